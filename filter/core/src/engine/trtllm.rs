//! TensorRT-LLM: parameters travel from the context answer to the generation request.

use super::protocol::{Handover, LegAnswer, LegOrder, Pair, Protocol, no_cached_tokens_in_params, no_members};
use crate::body::json;
use crate::body::{Api, Key, KeySet};

pub(super) static PROTOCOL: Protocol = Protocol {
    legs: LegOrder::Sequential,
    decodes_alone: true,
    hands_over_several: false,
    max_sequences: None,
    has_kv_lease: false,
    counts_fetched_tokens: false,
    limits_prefill: true,
    samples_first_token: false,
    allows_budget: true,
    engine_id: None,
    prefill_members,
    decode_members: no_members,
    handover: |api, answer, _| handover(api, answer).unwrap_or(Handover::Missing),
    cached_tokens_in_params: no_cached_tokens_in_params,
};

fn prefill_members(pair: &Pair<'_>) -> Vec<u8> {
    format!(r#""disaggregated_params":{{"request_type":"context_only","disagg_request_id":{}}}"#, pair.id).into()
}

/// The answer's parameters, now for generation, and the prompt as the prefill endpoint tokenised it.
fn handover(api: Api, leg: &LegAnswer<'_>) -> Option<Handover> {
    let answer = &leg.answer;
    let choice = answer.get("choices").and_then(|choices| json::elements(choices).next());
    let of_choice = |key: &str| Some(json::members(choice?).filter(|(name, _)| name == key).last()?.1);
    // An answer that ended otherwise is complete, and its KV cache is gone.
    if of_choice("finish_reason").is_some_and(|reason| !matches!(reason, br#""length""# | br#""not_finished""#)) {
        return None;
    }
    let params = answer.get("disaggregated_params").or_else(|| of_choice("disaggregated_params"))?;
    let params = json::with_member(params, "request_type", br#""generation_only""#)?;
    let mut members = [br#""disaggregated_params":"#, params.as_slice()].concat();
    let mut drop = KeySet::EMPTY;
    let key = match api {
        Api::Completions => Some(Key::Prompt),
        Api::Chat => Some(Key::PromptTokenIds),
        Api::Responses | Api::Messages | Api::Generate => None,
    };
    if let (Some(key), Some(ids @ [b'[', ..])) = (key, answer.get("prompt_token_ids")) {
        members.extend([format!(r#","{}":"#, key.name()).as_bytes(), ids].concat());
        drop = drop.with(key);
    }
    Some(Handover::Insert { members, drop })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{handover, pair, prefill};
    use super::*;
    use crate::engine::Engine;

    #[test]
    fn parameters_change_in_one_place_and_bring_the_prompts_ids() {
        let params =
            r#"{"first_gen_tokens":[7], "request_type" : "context_only","ctx_request_id":18446744073709551617}"#;
        let turned = params.replace("context_only", "generation_only");
        let trtllm = |api, answer: &str| handover(Engine::Trtllm, api, answer);
        let nested = format!(
            r#"{{"choices":[{{"finish_reason":"length","disaggregated_params":{params}}}],"prompt_token_ids":[1, 2]}}"#
        );
        let top = format!(r#"{{"disaggregated_params":{params}}}"#);
        for (api, answer, members, drop) in [
            (
                Api::Completions,
                &nested,
                format!(r#""disaggregated_params":{turned},"prompt":[1, 2]"#),
                KeySet::of(&[Key::Prompt]),
            ),
            (
                Api::Chat,
                &nested,
                format!(r#""disaggregated_params":{turned},"prompt_token_ids":[1, 2]"#),
                KeySet::of(&[Key::PromptTokenIds]),
            ),
            (Api::Chat, &top, format!(r#""disaggregated_params":{turned}"#), KeySet::EMPTY),
        ] {
            assert_eq!(trtllm(api, answer), Handover::Insert { members: members.into(), drop });
        }
        for answer in [nested.replace("length", "stop"), top.replace(params, "null"), "{}".to_owned(), "{".to_owned()] {
            assert_eq!(trtllm(Api::Chat, &answer), Handover::Missing, "{answer}");
        }
        assert!(prefill(Engine::Trtllm, Api::Chat, "{}").contains(&format!(r#""disagg_request_id":{}"#, pair().id)));
    }
}
