//! Bodies of the two legs, made from the client's body.

use super::acceptance::is_valid_stream;
use super::protocol::{Pair, Protocol};
use crate::body::splice::{Edits, HeadPlan, rewrite};
use crate::body::{Api, FORBIDDEN, Key, KeySet, Scan, scan};

/// Members that could end the prefill leg otherwise than by length, and so without KV parameters, or that could make its
/// answer longer than one token.
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
    Key::Background,
    Key::Store,
]);

/// Members that ask for more about the tokens of an answer.
const TOKEN_DETAILS: KeySet = KeySet::of(&[Key::Logprobs, Key::TopLogprobs, Key::LogprobTokenIds, Key::Echo]);

/// Members that make an answer a stream.
const STREAM: KeySet = KeySet::of(&[Key::Stream, Key::StreamOptions]);

/// Body of the prefill leg: the client's body, with the engine's members in front, without [`FORBIDDEN`] members,
/// answered in one piece. It ends by length at one token where [`Protocol::limits_prefill`] says so.
///
/// `model` (a JSON string) replaces the client's model; `None` leaves it.
#[must_use]
pub fn prefill_body(
    protocol: &Protocol,
    api: Api,
    body: &[u8],
    scan: &Scan,
    pair: &Pair<'_>,
    model: Option<&[u8]>,
) -> Vec<u8> {
    let limited = protocol.limits_prefill;
    // What the decode endpoint refuses, the prefill endpoint of such an engine must refuse as well.
    let is_valid_stream = limited || is_valid_stream(api, body, scan);
    let ending: &[u8] = match (limited, is_valid_stream) {
        (true, _) => ends_at_one_token(api, scan),
        (false, true) => br#""stream":false"#,
        (false, false) => b"",
    };
    let front = [(protocol.prefill_members)(pair), model_member(scan, model).unwrap_or_default(), ending.to_vec()];
    let insert = front.into_iter().filter(|members| !members.is_empty()).collect::<Vec<_>>().join(&b',');
    let sampling = scan.raw(body, Key::SamplingParams).filter(|_| limited && api == Api::Generate);
    let sampling = sampling.map(|params| one_token(params, dropped(protocol)));
    let replace: Vec<_> = model
        .map(|model| (Key::Model, model))
        .into_iter()
        .chain(sampling.as_ref().map(|sampling| (Key::SamplingParams, sampling.as_slice())))
        .collect();
    let drop = match (limited, is_valid_stream) {
        (true, _) => dropped(protocol),
        (false, true) => STREAM,
        (false, false) => KeySet::EMPTY,
    };
    let drop = FORBIDDEN.union(drop);
    rewrite(body, scan, &Edits { drop, replace: &replace, insert: &insert })
}

/// Members that a leg of one token leaves out.
fn dropped(protocol: &Protocol) -> KeySet {
    if protocol.samples_first_token { GENERATION.union(TOKEN_DETAILS) } else { GENERATION }
}

/// Members that end an answer at one token, in one piece.
fn ends_at_one_token(api: Api, scan: &Scan) -> &'static [u8] {
    match api {
        Api::Responses => br#""max_output_tokens":1,"store":false,"stream":false"#,
        Api::Chat if scan.has(Key::MaxCompletionTokens) => {
            br#""max_completion_tokens":1,"max_tokens":1,"stream":false"#
        }
        Api::Chat | Api::Completions | Api::Messages => br#""max_tokens":1,"stream":false"#,
        Api::Generate if scan.has(Key::SamplingParams) => br#""stream":false"#,
        Api::Generate => br#""sampling_params":{"max_tokens":1},"stream":false"#,
    }
}

/// Sampling parameters that end by length at one token.
fn one_token(params: &[u8], drop: KeySet) -> Vec<u8> {
    const LIMIT: &[u8] = br#""max_tokens":1"#;
    match scan(params) {
        Ok(scan) => rewrite(params, &scan, &Edits { drop: FORBIDDEN.union(drop), replace: &[], insert: LIMIT }),
        Err(_) => [b"{", LIMIT, b"}"].concat(),
    }
}

/// Plans how the client's body becomes the body of the decode leg. The members to put in front are known later.
///
/// `drop` names members that the engine gets another value for; `model` is as for [`prefill_body`].
#[must_use]
pub fn decode_plan(body: &[u8], scan: &Scan, drop: KeySet, model: Option<&[u8]>) -> HeadPlan {
    let replace = model.map(|model| (Key::Model, model));
    let insert = model_member(scan, model).unwrap_or_default();
    HeadPlan::new(body, scan, &Edits { drop: FORBIDDEN.union(drop), replace: replace.as_slice(), insert: &insert })
}

/// The model as a member, where the body has none to replace.
fn model_member(scan: &Scan, model: Option<&[u8]>) -> Option<Vec<u8>> {
    let model = model.filter(|_| !scan.has(Key::Model))?;
    Some([br#""model":"#, model].concat())
}

#[cfg(test)]
mod tests {
    use super::super::testing::prefill;
    use super::*;
    use crate::engine::Engine;

    #[test]
    fn a_prefill_leg_of_the_responses_api_is_neither_kept_nor_run_in_the_background() {
        assert_eq!(
            prefill(
                Engine::VllmShared,
                Api::Responses,
                r#"{"input":"a","store":true,"background":true,"max_output_tokens":5}"#
            ),
            r#"{"max_output_tokens":1,"store":false,"stream":false,"input":"a"}"#
        );
    }

    #[test]
    fn a_prefill_leg_of_token_ids_ends_by_its_sampling_parameters() {
        for (body, expected) in [
            (
                r#"{"token_ids":[1],"sampling_params":{"max_tokens":9, "stop":["a"],"seed":18446744073709551617,"n":2}}"#,
                r#"{"stream":false,"token_ids":[1],"sampling_params":{"max_tokens":1,"seed":18446744073709551617}}"#,
            ),
            (r#"{"token_ids":[1]}"#, r#"{"sampling_params":{"max_tokens":1},"stream":false,"token_ids":[1]}"#),
            (r#"{"sampling_params":null}"#, r#"{"stream":false,"sampling_params":{"max_tokens":1}}"#),
            (r#"{"sampling_params":{}}"#, r#"{"stream":false,"sampling_params":{"max_tokens":1}}"#),
        ] {
            assert_eq!(prefill(Engine::VllmShared, Api::Generate, body), expected);
        }
    }

    #[test]
    fn a_clients_own_parameters_reach_neither_leg() {
        let forbidden = |key: &Key| FORBIDDEN.contains(*key);
        let members: Vec<_> =
            Key::ALL.iter().filter(|key| forbidden(key)).map(|key| format!(r#""{}":"evil","#, key.name())).collect();
        let body = format!(r#"{{{}"prompt":"a"}}"#, members.concat());
        for engine in Engine::ALL {
            assert!(!prefill(*engine, Api::Completions, &body).contains("evil"), "{engine:?}");
        }
        let plan = decode_plan(body.as_bytes(), &scan(body.as_bytes()).unwrap(), KeySet::EMPTY, None);
        let edit = plan.with_insert(br#""kv_transfer_params":{}"#);
        let decode = [&edit.head, &body.as_bytes()[edit.drain as usize..]].concat();
        assert_eq!(String::from_utf8(decode).unwrap(), r#"{"kv_transfer_params":{},"prompt":"a"}"#);
    }
}
