//! Hand-over protocols: what each leg's body is, and what the prefill answer must hold.
//!
//! Sources: vLLM's NIXL connector and llm-d's routing sidecar (`kv_transfer_params`), vLLM's shared-storage connectors.

use crate::body::{Api, Key, KeySet, Scan};
use crate::json;
use crate::splice::{Edits, HeadPlan, rewrite};
use crate::wire::Engine;

/// Members that no client may send to an engine: they name another server's memory, and one of them can end a decode
/// server's process.
pub const FORBIDDEN: KeySet = KeySet::of(&[
    Key::KvTransferParams,
    Key::BootstrapHost,
    Key::BootstrapPort,
    Key::BootstrapRoom,
    Key::DataParallelRank,
    Key::RoutedDpRank,
    Key::DisaggPrefillDpRank,
    Key::DisaggregatedParams,
    Key::DisaggPrefillResp,
]);

/// Members that could end the prefill leg otherwise than by length, and thus without KV parameters, or make it answer
/// more than one token once.
const GENERATION: KeySet = KeySet::of(&[
    Key::Stream,
    Key::StreamOptions,
    Key::MaxTokens,
    Key::MaxCompletionTokens,
    Key::MaxOutputTokens,
    Key::MinTokens,
    Key::Stop,
    Key::StopTokenIds,
    Key::StopSequences,
    Key::N,
    Key::BestOf,
    Key::UseBeamSearch,
]);

/// What vLLM's prefill side is asked for.
const REMOTE_DECODE: &str = r#""kv_transfer_params":{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null},"#;

/// Body of the prefill leg: the client's, ended by length at one token and answered in one piece.
#[must_use]
pub fn prefill_body(engine: Engine, api: Api, body: &[u8], scan: &Scan) -> Vec<u8> {
    let params = if engine == Engine::VllmShared { "" } else { REMOTE_DECODE };
    let limit = match api {
        Api::Responses => r#""max_output_tokens":1,"stream":false"#,
        Api::Chat if scan.has(Key::MaxCompletionTokens) => r#""max_completion_tokens":1,"max_tokens":1,"stream":false"#,
        Api::Chat | Api::Completions | Api::Messages | Api::Generate => r#""max_tokens":1,"stream":false"#,
    };
    let insert = [params, limit].concat();
    let edits = Edits { drop: FORBIDDEN.union(GENERATION), replace: &[], insert: insert.as_bytes() };
    rewrite(body, scan, &edits)
}

/// How the client's body becomes the decode leg's, once the prefill answer is there.
#[must_use]
pub fn decode_plan(body: &[u8], scan: &Scan) -> HeadPlan {
    HeadPlan::new(body, scan, &Edits { drop: FORBIDDEN, replace: &[], insert: b"" })
}

/// What a prefill answer says about the KV cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Handover {
    /// Members to put in front of the decode leg's body.
    Insert(Vec<u8>),
    /// The engine needs none: decode finds the KV cache by itself.
    Nothing,
    /// The engine should have given parameters and did not, or unusable ones: decode computes the prompt itself.
    Missing,
}

/// Reads a prefill answer.
#[must_use]
pub fn handover(engine: Engine, answer: &[u8]) -> Handover {
    if engine == Engine::VllmShared {
        return Handover::Nothing;
    }
    match json::raw_member(answer, &["kv_transfer_params"]) {
        Ok(Some(params)) if usable(params) => Handover::Insert([br#""kv_transfer_params":"#, params].concat()),
        _ => Handover::Missing,
    }
}

/// Whether a decode server can use the parameters. One that lacks `remote_request_id` hangs, null block ids end it.
fn usable(params: &[u8]) -> bool {
    let (mut prefilled, mut blocks, mut request) = (false, false, false);
    for (key, value) in json::members(params) {
        match key.as_ref() {
            "do_remote_prefill" => prefilled = value == b"true",
            "remote_block_ids" => blocks = value.starts_with(b"["),
            "remote_request_id" => request = value.starts_with(b"\""),
            _ => {}
        }
    }
    prefilled && blocks && request
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::scan;

    fn prefill(engine: Engine, api: Api, body: &str) -> String {
        String::from_utf8(prefill_body(engine, api, body.as_bytes(), &scan(body.as_bytes()).unwrap())).unwrap()
    }

    #[test]
    fn the_nixl_prefill_leg_ends_by_length_and_asks_for_parameters() {
        let body = r#"{"model":"m", "messages":[{"role":"user","content":"hi","x":1}],"stream":true,"stream_options":{"include_usage":true},"max_completion_tokens":9,"stop":["a"],"min_tokens":3,"n":2,"seed":9007199254740993,"z":{"y":[1.0e5]}}"#;
        assert_eq!(
            prefill(Engine::VllmNixl, Api::Chat, body),
            format!(
                r#"{{{REMOTE_DECODE}"max_completion_tokens":1,"max_tokens":1,"stream":false,"model":"m", "messages":[{{"role":"user","content":"hi","x":1}}],"seed":9007199254740993,"z":{{"y":[1.0e5]}}}}"#
            )
        );
    }

    #[test]
    fn the_shared_storage_prefill_leg_asks_for_nothing() {
        assert_eq!(
            prefill(Engine::VllmShared, Api::Responses, r#"{"input":"a","max_output_tokens":5}"#),
            r#"{"max_output_tokens":1,"stream":false,"input":"a"}"#
        );
    }

    #[test]
    fn a_clients_own_parameters_reach_neither_leg() {
        let body = r#"{"kv_transfer_params":{"do_remote_prefill":true},"prompt":"a","bootstrap_room":1}"#;
        assert!(!prefill(Engine::VllmShared, Api::Completions, body).contains("do_remote_prefill"));
        let plan = decode_plan(body.as_bytes(), &scan(body.as_bytes()).unwrap());
        let edit = plan.with_insert(br#""kv_transfer_params":{}"#);
        let decode = [&edit.head, &body.as_bytes()[edit.drain as usize..]].concat();
        assert_eq!(String::from_utf8(decode).unwrap(), r#"{"kv_transfer_params":{},"prompt":"a"}"#);
    }

    #[test]
    fn parameters_are_handed_over_byte_for_byte_or_not_at_all() {
        let params = r#"{ "do_remote_prefill" : true, "remote_block_ids":[[1,2]],"remote_request_id":"r","x":18446744073709551617, "y":1.0e-7}"#;
        let answer = format!(r#"{{"id":"x","kv_transfer_params": {params} }}"#);
        let insert = Handover::Insert(format!(r#""kv_transfer_params":{params}"#).into_bytes());
        assert_eq!(handover(Engine::VllmNixl, answer.as_bytes()), insert);
        assert_eq!(handover(Engine::VllmShared, answer.as_bytes()), Handover::Nothing);
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
            let answer = format!(r#"{{"kv_transfer_params":{params}}}"#);
            assert_eq!(handover(Engine::VllmNixl, answer.as_bytes()), Handover::Missing, "{params}");
        }
        for answer in ["", "{", "[]", r#"{"kv_transfer_params":{"do_remote_prefill":tr"#] {
            assert_eq!(handover(Engine::VllmNixl, answer.as_bytes()), Handover::Missing, "{answer}");
        }
    }
}
