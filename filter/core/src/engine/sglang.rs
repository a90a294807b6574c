//! SGLang: both legs meet in a bootstrap room at the prefill endpoint.

use super::protocol::{LegOrder, Pair, Protocol, no_cached_tokens_in_params, no_handover};

/// Sequences that one request may ask for; each has a bootstrap room of its own, which takes 50 bytes of both legs'
/// bodies. vLLM's own bound of `n` is 16,384.
pub(super) const MAX_SEQUENCES: u32 = 1_024;

pub(super) static PROTOCOL: Protocol = Protocol {
    legs: LegOrder::Concurrent,
    // A decode endpoint answers 400 to a request without a bootstrap room.
    decodes_alone: false,
    hands_over_several: true,
    max_sequences: Some(MAX_SEQUENCES),
    // A decode endpoint's answer repeats the tokens that the prefill endpoint had cached.
    has_kv_lease: false,
    counts_fetched_tokens: false,
    limits_prefill: false,
    samples_first_token: false,
    allows_budget: true,
    engine_id: None,
    prefill_members: rooms,
    decode_members,
    handover: no_handover,
    cached_tokens_in_params: no_cached_tokens_in_params,
};

/// Where the legs meet: one value each, or a list with one for every sequence of a batch.
fn rooms(pair: &Pair<'_>) -> Vec<u8> {
    let (host, port) = (pair.bootstrap.ip(), pair.bootstrap.port());
    let Some(batch) = pair.batch else {
        return format!(r#""bootstrap_host":"{host}","bootstrap_port":{port},"bootstrap_room":{}"#, pair.id).into();
    };
    let list = |value: &dyn Fn(u64) -> String| (0..u64::from(batch)).map(value).collect::<Vec<_>>().join(",");
    format!(
        r#""bootstrap_host":[{}],"bootstrap_port":[{}],"bootstrap_room":[{}]"#,
        list(&|_| format!(r#""{host}""#)),
        list(&|_| port.to_string()),
        list(&|i| pair.id.saturating_add(i).to_string()),
    )
    .into()
}

fn decode_members(pair: &Pair<'_>) -> Vec<u8> {
    let mut members = rooms(pair);
    if let Some(rank) = pair.rank {
        members.extend_from_slice(format!(r#","disagg_prefill_dp_rank":{rank}"#).as_bytes());
    }
    members
}

#[cfg(test)]
mod tests {
    use super::super::testing::{decode_members, pair, prefill};
    use super::*;
    use crate::body::Api;
    use crate::engine::Engine;

    #[test]
    fn the_legs_meet_in_a_room_for_every_sequence() {
        let id = pair().id;
        let one = format!(r#""bootstrap_host":"10.0.0.1","bootstrap_port":8998,"bootstrap_room":{id}"#);
        assert_eq!(decode_members(Engine::Sglang, &pair()), one);
        assert_eq!(
            prefill(Engine::Sglang, Api::Chat, r#"{"stream":true,"n":1,"max_tokens":7}"#),
            format!(r#"{{{one},"stream":false,"n":1,"max_tokens":7}}"#)
        );
        let batch = Pair { batch: Some(2), rank: Some(3), bootstrap: "[fd00::1]:9".parse().unwrap(), ..pair() };
        assert_eq!(
            decode_members(Engine::Sglang, &batch),
            format!(
                r#""bootstrap_host":["fd00::1","fd00::1"],"bootstrap_port":[9,9],"bootstrap_room":[{id},{}],"disagg_prefill_dp_rank":3"#,
                id + 1
            )
        );
    }
}
