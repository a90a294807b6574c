//! vLLM: its NIXL connector, and connectors over shared storage.

use super::protocol::{
    CachedTokensOf, Handover, LegAnswer, LegOrder, Pair, Protocol, no_cached_tokens_in_params, no_handover, no_members,
};
use crate::body::Api;
use crate::body::json::Object;

/// Pull or push. Push mode pairs the legs by `x-request-id`, which both carry.
pub(super) static NIXL: Protocol = Protocol {
    legs: LegOrder::Sequential,
    decodes_alone: true,
    hands_over_several: false,
    max_sequences: None,
    has_kv_lease: true,
    counts_fetched_tokens: true,
    limits_prefill: true,
    samples_first_token: true,
    // vLLM makes an exception of `do_remote_decode`.
    allows_budget: true,
    engine_id: None,
    prefill_members,
    decode_members: no_members,
    handover,
    cached_tokens_in_params,
};

/// LMCache or a shared directory: the decode endpoint looks the prompt's blocks up there.
pub(super) static SHARED_STORAGE: Protocol = Protocol {
    legs: LegOrder::Sequential,
    decodes_alone: true,
    hands_over_several: true,
    max_sequences: None,
    has_kv_lease: false,
    counts_fetched_tokens: true,
    limits_prefill: true,
    samples_first_token: true,
    allows_budget: false,
    engine_id: None,
    prefill_members: no_members,
    decode_members: no_members,
    handover: no_handover,
    cached_tokens_in_params: no_cached_tokens_in_params,
};

/// Parameters that make a prefill endpoint keep the blocks and name them in its answer.
const REMOTE_DECODE: &str = r#""kv_transfer_params":{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}"#;

fn prefill_members(_: &Pair<'_>) -> Vec<u8> {
    REMOTE_DECODE.into()
}

/// Parameter with the prompt tokens that the prefill server had cached. vLLM 0.32 and later report them as the decode
/// server's `cached_tokens`, whether the KV cache came or not. Any value that is no integer makes the decode server report
/// its own.
const CACHED_TOKENS_PARAM: &str = "remote_prefill_cached_tokens";

fn handover(_: Api, answer: &LegAnswer<'_>, cached_tokens: CachedTokensOf) -> Handover {
    let Some(params) = answer.kv_transfer_params().filter(|params| is_usable(params)) else {
        return Handover::Missing;
    };
    let is_taken_back = cached_tokens == CachedTokensOf::Decode && cached_tokens_in_params(answer).is_some();
    let mut members = br#""kv_transfer_params":"#.to_vec();
    if is_taken_back {
        params.write_with(CACHED_TOKENS_PARAM, b"null", &mut members);
    } else {
        members.extend_from_slice(params.text());
    }
    Handover::insert(members)
}

fn cached_tokens_in_params(answer: &LegAnswer<'_>) -> Option<u64> {
    core::str::from_utf8(answer.kv_transfer_params()?.get(CACHED_TOKENS_PARAM)?).ok()?.parse().ok()
}

/// Whether a decode server can use the parameters. One that lacks `remote_request_id` hangs, null block ids end it.
fn is_usable(params: &Object<'_>) -> bool {
    let starts = |key: &str, with: &[u8]| params.get(key).is_some_and(|value| value.starts_with(with));
    starts("do_remote_prefill", b"true") && starts("remote_block_ids", b"[") && starts("remote_request_id", b"\"")
}

#[cfg(test)]
mod tests {
    use super::super::testing::{handover, insert, prefill};
    use super::*;
    use crate::engine::Engine;

    #[test]
    fn the_nixl_prefill_leg_ends_by_length_and_asks_for_parameters() {
        let body = r#"{"model":"m", "messages":[{"role":"user","content":"hi","x":1}],"stream":true,"stream_options":{"include_usage":true},"max_completion_tokens":9,"stop":["a"],"min_tokens":3,"n":2,"seed":9007199254740993,"z":{"y":[1.0e5]}}"#;
        assert_eq!(
            prefill(Engine::VllmNixl, Api::Chat, body),
            format!(
                r#"{{{REMOTE_DECODE},"max_completion_tokens":1,"max_tokens":1,"stream":false,"model":"m", "messages":[{{"role":"user","content":"hi","x":1}}],"seed":9007199254740993,"z":{{"y":[1.0e5]}}}}"#
            )
        );
    }

    #[test]
    fn a_decode_server_that_is_to_count_itself_does_not_get_the_prefill_servers_count() {
        let with = |params: &str| {
            format!(
                r#"{{"do_remote_prefill":true,"remote_block_ids":[[1]],"remote_request_id":"r", {params}"n":18446744073709551617}}"#
            )
        };
        for (params, of_prefill, read) in [
            (r#""remote_prefill_cached_tokens" : 16, "#, r#""remote_prefill_cached_tokens" : null, "#, Some(16)),
            (r#""remote_prefill_cached_tokens":null,"#, r#""remote_prefill_cached_tokens":null,"#, None),
            ("", "", None),
        ] {
            let answer = format!(r#"{{"kv_transfer_params":{}}}"#, with(params));
            let answer = LegAnswer::read(answer.as_bytes());
            let members = |params: &str| insert(&format!(r#""kv_transfer_params":{}"#, with(params)));
            assert_eq!((NIXL.handover)(Api::Chat, &answer, CachedTokensOf::Prefill), members(params));
            assert_eq!((NIXL.handover)(Api::Chat, &answer, CachedTokensOf::Decode), members(of_prefill));
            assert_eq!((NIXL.cached_tokens_in_params)(&answer), read);
        }
    }

    #[test]
    fn parameters_are_handed_over_byte_for_byte_or_not_at_all() {
        let params = r#"{ "do_remote_prefill" : true, "remote_block_ids":[[1,2]],"remote_request_id":"r","x":18446744073709551617, "y":1.0e-7}"#;
        let answer = format!(r#"{{"id":"x","kv_transfer_params": {params} }}"#);
        let nixl = |answer: &str| handover(Engine::VllmNixl, Api::Chat, answer);
        assert_eq!(nixl(&answer), insert(&format!(r#""kv_transfer_params":{params}"#)));
        assert_eq!(handover(Engine::VllmShared, Api::Chat, &answer), Handover::Nothing);
        for params in [
            "null",
            "1",
            "[]",
            "{}",
            r#"{"do_remote_prefill":false,"remote_block_ids":[1],"remote_request_id":"r"}"#,
            r#"{"do_remote_prefill":true,"remote_block_ids":null,"remote_request_id":"r"}"#,
            r#"{"do_remote_prefill":true,"remote_block_ids":[1],"remote_request_id":null}"#,
            r#"{"do_remote_prefill":true,"remote_block_ids":[1]}"#,
        ] {
            assert_eq!(nixl(&format!(r#"{{"kv_transfer_params":{params}}}"#)), Handover::Missing, "{params}");
        }
        for answer in ["", "{", "[]", r#"{"kv_transfer_params":{"do_remote_prefill":tr"#] {
            assert_eq!(nixl(answer), Handover::Missing, "{answer}");
        }
    }
}
