//! vLLM with the Mooncake connector: both legs name a transfer, the decode leg also the prefill engine's id.

use super::protocol::{EngineIdQuery, LegOrder, Pair, Protocol, no_cached_tokens_in_params, no_handover};
use crate::body::json;

pub(super) static PROTOCOL: Protocol = Protocol {
    legs: LegOrder::Concurrent,
    decodes_alone: true,
    hands_over_several: false,
    max_sequences: None,
    has_kv_lease: false,
    counts_fetched_tokens: true,
    limits_prefill: true,
    samples_first_token: true,
    allows_budget: true,
    engine_id: Some(EngineIdQuery { path: "/query", read: engine_id }),
    prefill_members,
    decode_members,
    handover: no_handover,
    cached_tokens_in_params: no_cached_tokens_in_params,
};

fn prefill_members(pair: &Pair<'_>) -> Vec<u8> {
    let id = transfer_id(pair);
    format!(r#""kv_transfer_params":{{"do_remote_decode":true,"do_remote_prefill":false,"transfer_id":"{id}"}}"#).into()
}

fn decode_members(pair: &Pair<'_>) -> Vec<u8> {
    let params = format!(
        r#""kv_transfer_params":{{"do_remote_prefill":true,"do_remote_decode":false,"transfer_id":"{}","remote_bootstrap_addr":"http://{}","remote_engine_id":"#,
        transfer_id(pair),
        pair.bootstrap
    );
    [params.as_bytes(), pair.engine_id, b"}"].concat()
}

/// The name that both legs share, spelt as vLLM's proxy spells it: a UUID.
fn transfer_id(pair: &Pair<'_>) -> String {
    let other = xxhash_rust::xxh3::xxh3_64(&pair.id.to_le_bytes());
    let (a, b, c) = (pair.id.wrapping_shr(32) & 0xffff_ffff, pair.id.wrapping_shr(16) & 0xffff, pair.id & 0xfff);
    let (d, e) = (other.wrapping_shr(52), other & 0xffff_ffff_ffff);
    format!("xfer-{a:08x}-{b:04x}-4{c:03x}-a{d:03x}-{e:012x}")
}

/// The id of a rank's engine in the answer of its bootstrap server, which lists ids by rank; no rank is rank 0.
fn engine_id(answer: &[u8], rank: Option<u32>) -> Option<&[u8]> {
    let id = json::raw_member(answer, &[&rank.unwrap_or(0).to_string(), "engine_id"]).ok()??;
    (id.first() == Some(&b'"')).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{decode_members, pair, prefill};
    use super::*;
    use crate::body::Api;
    use crate::engine::{Engine, pair_id};

    #[test]
    fn the_legs_share_a_transfer_id() {
        let id = transfer_id(&pair());
        assert_eq!(id.len(), "xfer-".len() + 36);
        assert!(prefill(Engine::Mooncake, Api::Chat, "{}").contains(&format!(r#""transfer_id":"{id}""#)));
        assert_eq!(
            decode_members(Engine::Mooncake, &pair()),
            format!(
                r#""kv_transfer_params":{{"do_remote_prefill":true,"do_remote_decode":false,"transfer_id":"{id}","remote_bootstrap_addr":"http://10.0.0.1:8998","remote_engine_id":"e\u002f1"}}"#
            )
        );
        let other = Pair { id: pair_id(1), ..pair() };
        assert_ne!(transfer_id(&other), id);
    }

    #[test]
    fn an_engine_id_is_found_by_rank() {
        let answer = br#"{"0":{"engine_id":"a","worker_addr":{}},"1":{"engine_id":"b"},"2":{"engine_id":3}}"#;
        assert_eq!(engine_id(answer, None), Some(&br#""a""#[..]));
        assert_eq!(engine_id(answer, Some(1)), Some(&br#""b""#[..]));
        assert_eq!([engine_id(answer, Some(2)), engine_id(answer, Some(3)), engine_id(b"", None)], [None; 3]);
    }
}
