//! vLLM: its NIXL connector, and connectors over shared storage.

use super::protocol::{Handover, LegOrder, Pair, Protocol, no_handover, no_members};
use crate::body::Api;
use crate::body::json::Object;

/// Pull or push. Push mode pairs the legs by `x-request-id`, which both carry.
pub(super) static NIXL: Protocol = Protocol {
    legs: LegOrder::Sequential,
    decodes_alone: true,
    hands_over_several: false,
    max_sequences: None,
    counts_fetched_tokens: true,
    limits_prefill: true,
    samples_first_token: true,
    // vLLM makes an exception of `do_remote_decode`.
    allows_budget: true,
    engine_id: None,
    prefill_members,
    decode_members: no_members,
    handover,
};

/// LMCache or a shared directory: the decode endpoint looks the prompt's blocks up there.
pub(super) static SHARED_STORAGE: Protocol = Protocol {
    legs: LegOrder::Sequential,
    decodes_alone: true,
    hands_over_several: true,
    max_sequences: None,
    counts_fetched_tokens: true,
    limits_prefill: true,
    samples_first_token: true,
    allows_budget: false,
    engine_id: None,
    prefill_members: no_members,
    decode_members: no_members,
    handover: no_handover,
};

/// Parameters that make a prefill endpoint keep the blocks and name them in its answer.
const REMOTE_DECODE: &str = r#""kv_transfer_params":{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}"#;

fn prefill_members(_: &Pair<'_>) -> Vec<u8> {
    REMOTE_DECODE.into()
}

fn handover(_: Api, answer: &Object<'_>) -> Handover {
    match answer.get("kv_transfer_params") {
        Some(params) if is_usable(params) => Handover::insert([br#""kv_transfer_params":"#, params].concat()),
        _ => Handover::Missing,
    }
}

/// Whether a decode server can use the parameters. One that lacks `remote_request_id` hangs, null block ids end it.
fn is_usable(params: &[u8]) -> bool {
    let Ok(params) = Object::read(params) else { return false };
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
