//! Hand-over protocols: in which order the legs go, what each leg's body is, and what the prefill answer must hold.
//!
//! Sources: vLLM's NIXL and Mooncake connectors and their example proxies, llm-d's routing sidecar, SGLang's router,
//! TensorRT-LLM's disaggregated server, AIBrix's gateway (Neuron).

use core::fmt::Write as _;
use core::net::SocketAddr;

use crate::body::json::{self, Object};
use crate::body::splice::{Edits, HeadPlan, rewrite};
use crate::body::{Api, FORBIDDEN, Key, KeySet, Scan, scan};
use crate::wire::Engine;

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
    Key::Background,
    Key::Store,
]);

/// Members that make an answer a stream.
const STREAM: KeySet = KeySet::of(&[Key::Stream, Key::StreamOptions]);

/// Sequences that one hand-over may concern: a bootstrap room of SGLang's each. vLLM's own bound of `n` is 16,384, and
/// a room takes 50 bytes of both legs' bodies.
pub const MAX_SEQUENCES: u32 = 1_024;

/// Path at which Mooncake's bootstrap server tells the ids of its engines.
pub const ENGINE_ID_PATH: &str = "/query";

/// What vLLM's prefill side is asked for.
const REMOTE_DECODE: &str = r#""kv_transfer_params":{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null},"#;

/// In which order the legs go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// The decode leg follows the prefill leg and says what that one answered.
    Sequential,
    /// Both at once: they find each other by what both were told.
    Concurrent,
    /// One leg: the decode endpoint runs the other one.
    OneLeg,
}

impl Engine {
    /// In which order the legs go.
    #[must_use]
    pub fn shape(self) -> Shape {
        match self {
            Self::VllmNixl | Self::VllmShared | Self::Trtllm | Self::Neuron => Shape::Sequential,
            Self::Sglang | Self::Mooncake => Shape::Concurrent,
            Self::Sidecar => Shape::OneLeg,
        }
    }

    /// Whether a decode endpoint serves a request whole when nobody has prefilled it. SGLang's answers 400.
    #[must_use]
    pub fn decodes_alone(self) -> bool {
        self != Self::Sglang
    }

    /// Whether one hand-over serves several sequences: more prompts or more answers than one. Where parameters name the
    /// blocks of one sequence, the second one that fetches them reads what is no longer there.
    #[must_use]
    pub fn hands_over_several(self) -> bool {
        matches!(self, Self::VllmShared | Self::Sglang)
    }

    /// Whether both legs name every sequence of a batch, so that there must not be too many.
    #[must_use]
    pub fn lists_sequences(self) -> bool {
        self == Self::Sglang
    }

    /// Whether a decode endpoint that computes a prompt itself says so, by the cached tokens of its answer: vLLM counts
    /// those it fetched. SGLang's decode endpoint tells what the prefill endpoint had cached, and cannot compute alone.
    #[must_use]
    pub fn counts_fetched_tokens(self) -> bool {
        !matches!(self, Self::Sglang | Self::Trtllm)
    }

    /// Whether the decode leg names an id that the prefill endpoint's bootstrap server tells.
    #[must_use]
    pub fn needs_engine_id(self) -> bool {
        self == Self::Mooncake
    }
}

/// What is told of a prefill endpoint to both legs.
#[derive(Clone, Debug)]
pub struct Pair<'a> {
    /// Its bootstrap server.
    pub bootstrap: SocketAddr,
    /// Its data-parallel rank.
    pub rank: Option<u32>,
    /// Its engine's id where [`needed`](Engine::needs_engine_id): a JSON string.
    pub engine_id: &'a [u8],
    /// Names this pair of legs; from [`pair_id`].
    pub id: u64,
    /// Sequences, where the body asks for a batch of them.
    pub batch: Option<u32>,
}

/// A name for a pair of legs out of evenly spread bits: at least 2^42 (TensorRT-LLM takes smaller ones for its own), and
/// with [`MAX_SEQUENCES`] to follow below 2^63 (SGLang's bound).
#[must_use]
pub fn pair_id(bits: u64) -> u64 {
    const BITS: u64 = (1 << 62) - 1;
    const LEAST: u64 = 1 << 42;
    bits & BITS | LEAST
}

/// Body of the prefill leg: the client's, ended by length at one token and answered in one piece, for another `model`
/// (a JSON string) if there is one.
#[must_use]
pub fn prefill_body(
    engine: Engine,
    api: Api,
    body: &[u8],
    scan: &Scan,
    pair: &Pair<'_>,
    model: Option<&[u8]>,
) -> Vec<u8> {
    let mut replace = Vec::new();
    replace.extend(model.map(|model| (Key::Model, model)));
    let mut insert = match engine {
        Engine::VllmNixl => REMOTE_DECODE.to_owned(),
        Engine::VllmShared | Engine::Neuron | Engine::Sidecar => String::new(),
        Engine::Sglang => bootstrap(pair),
        Engine::Trtllm => {
            format!(r#""disaggregated_params":{{"request_type":"context_only","disagg_request_id":{}}},"#, pair.id)
        }
        Engine::Mooncake => format!(
            r#""kv_transfer_params":{{"do_remote_decode":true,"do_remote_prefill":false,"transfer_id":"{}"}},"#,
            transfer_id(pair)
        ),
    };
    if let Some(member) = model_member(scan, model) {
        insert.push_str(&String::from_utf8_lossy(&member));
        insert.push(',');
    }
    if engine == Engine::Sglang {
        // Its prefill server ends by itself, and both legs must ask for the same sequences.
        insert.push_str(r#""stream":false"#);
        return rewrite(
            body,
            scan,
            &Edits { drop: FORBIDDEN.union(STREAM), replace: &replace, insert: insert.as_bytes() },
        );
    }
    insert.push_str(match api {
        Api::Responses => r#""max_output_tokens":1,"store":false,"stream":false"#,
        Api::Chat if scan.has(Key::MaxCompletionTokens) => r#""max_completion_tokens":1,"max_tokens":1,"stream":false"#,
        Api::Chat | Api::Completions | Api::Messages => r#""max_tokens":1,"stream":false"#,
        Api::Generate if scan.has(Key::SamplingParams) => r#""stream":false"#,
        Api::Generate => r#""sampling_params":{"max_tokens":1},"stream":false"#,
    });
    let sampling = scan.raw(body, Key::SamplingParams).filter(|_| api == Api::Generate).map(one_token);
    replace.extend(sampling.as_ref().map(|sampling| (Key::SamplingParams, sampling.as_slice())));
    let edits = Edits { drop: FORBIDDEN.union(GENERATION), replace: &replace, insert: insert.as_bytes() };
    rewrite(body, scan, &edits)
}

/// Sampling parameters that end by length at one token.
fn one_token(params: &[u8]) -> Vec<u8> {
    const LIMIT: &[u8] = br#""max_tokens":1"#;
    match scan(params) {
        Ok(scan) => rewrite(params, &scan, &Edits { drop: FORBIDDEN.union(GENERATION), replace: &[], insert: LIMIT }),
        Err(_) => [b"{", LIMIT, b"}"].concat(),
    }
}

/// How the client's body becomes the decode leg's, once it is known what to put in front. `drop` is what the engine
/// gets another value for, `model` as for [`prefill_body`].
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

/// Members to put in front of a decode leg that goes out with its prefill leg.
#[must_use]
pub fn decode_members(engine: Engine, pair: &Pair<'_>) -> Vec<u8> {
    match engine {
        Engine::Sglang => {
            let mut members = bootstrap(pair);
            if let Some(rank) = pair.rank {
                let _ = write!(members, r#""disagg_prefill_dp_rank":{rank},"#);
            }
            members.pop();
            members.into_bytes()
        }
        Engine::Mooncake => [
            format!(
                r#""kv_transfer_params":{{"do_remote_prefill":true,"do_remote_decode":false,"transfer_id":"{}","remote_bootstrap_addr":"http://{}","remote_engine_id":"#,
                transfer_id(pair),
                pair.bootstrap
            )
            .as_bytes(),
            pair.engine_id,
            b"}",
        ]
        .concat(),
        Engine::VllmNixl | Engine::VllmShared | Engine::Trtllm | Engine::Neuron | Engine::Sidecar => Vec::new(),
    }
}

/// Where SGLang's legs meet: one value each, or one for every sequence of a batch. A comma ends it.
fn bootstrap(pair: &Pair<'_>) -> String {
    let (host, port) = (pair.bootstrap.ip(), pair.bootstrap.port());
    let Some(batch) = pair.batch else {
        return format!(r#""bootstrap_host":"{host}","bootstrap_port":{port},"bootstrap_room":{},"#, pair.id);
    };
    let list = |value: &dyn Fn(u64) -> String| (0..u64::from(batch)).map(value).collect::<Vec<_>>().join(",");
    format!(
        r#""bootstrap_host":[{}],"bootstrap_port":[{}],"bootstrap_room":[{}],"#,
        list(&|_| format!(r#""{host}""#)),
        list(&|_| port.to_string()),
        list(&|i| pair.id.saturating_add(i).to_string()),
    )
}

/// The name that Mooncake's legs share, spelt as vLLM's proxy does: a UUID.
fn transfer_id(pair: &Pair<'_>) -> String {
    let other = xxhash_rust::xxh3::xxh3_64(&pair.id.to_le_bytes());
    let (a, b, c) = (pair.id.wrapping_shr(32) & 0xffff_ffff, pair.id.wrapping_shr(16) & 0xffff, pair.id & 0xfff);
    let (d, e) = (other.wrapping_shr(52), other & 0xffff_ffff_ffff);
    format!("xfer-{a:08x}-{b:04x}-4{c:03x}-a{d:03x}-{e:012x}")
}

/// The id of an engine in the answer of its bootstrap server, which lists them by rank: a JSON string.
#[must_use]
pub fn engine_id(answer: &[u8], rank: Option<u32>) -> Option<&[u8]> {
    let id = json::raw_member(answer, &[&rank.unwrap_or(0).to_string(), "engine_id"]).ok()??;
    (id.first() == Some(&b'"')).then_some(id)
}

/// What a prefill answer says about the KV cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Handover {
    /// The decode leg says this.
    Insert {
        /// Members to put in front of the body.
        members: Vec<u8>,
        /// The client's members that they stand in for.
        drop: KeySet,
    },
    /// The engine needs none: decode finds the KV cache by itself.
    Nothing,
    /// The engine should have given parameters and did not, or unusable ones: decode computes the prompt itself.
    Missing,
}

/// Reads the answer of a prefill leg that the decode leg waited for.
#[must_use]
pub fn handover(engine: Engine, api: Api, answer: &Object<'_>) -> Handover {
    let members = match engine {
        Engine::VllmShared | Engine::Sglang | Engine::Mooncake | Engine::Sidecar => return Handover::Nothing,
        Engine::Trtllm => return trtllm_handover(api, answer).unwrap_or(Handover::Missing),
        Engine::VllmNixl => match answer.get("kv_transfer_params") {
            Some(params) if usable(params) => [br#""kv_transfer_params":"#, params].concat(),
            _ => return Handover::Missing,
        },
        Engine::Neuron => match answer.text() {
            text @ [b'{', ..] => [br#""disagg_prefill_resp":"#, text].concat(),
            _ => return Handover::Missing,
        },
    };
    Handover::Insert { members, drop: KeySet::EMPTY }
}

/// TensorRT-LLM's parameters, now for generation, and the prompt as the prefill endpoint tokenised it.
fn trtllm_handover(api: Api, answer: &Object<'_>) -> Option<Handover> {
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

/// Whether a decode server can use the parameters. One that lacks `remote_request_id` hangs, null block ids end it.
fn usable(params: &[u8]) -> bool {
    let Ok(params) = Object::read(params) else { return false };
    let starts = |key: &str, with: &[u8]| params.get(key).is_some_and(|value| value.starts_with(with));
    starts("do_remote_prefill", b"true") && starts("remote_block_ids", b"[") && starts("remote_request_id", b"\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handover(engine: Engine, api: Api, answer: &[u8]) -> Handover {
        super::handover(engine, api, &Object::read(answer).unwrap_or_default())
    }

    fn pair() -> Pair<'static> {
        Pair {
            bootstrap: ([10, 0, 0, 1], 8_998).into(),
            rank: None,
            engine_id: br#""e\u002f1""#,
            id: pair_id(0x0123_4567_89ab_cdef),
            batch: None,
        }
    }

    fn prefill(engine: Engine, api: Api, body: &str) -> String {
        let scan = scan(body.as_bytes()).unwrap();
        String::from_utf8(prefill_body(engine, api, body.as_bytes(), &scan, &pair(), None)).unwrap()
    }

    fn insert(members: &str) -> Handover {
        Handover::Insert { members: members.into(), drop: KeySet::EMPTY }
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

    #[test]
    fn sglangs_legs_meet_in_a_room_for_every_sequence() {
        let id = pair().id;
        let one = format!(r#""bootstrap_host":"10.0.0.1","bootstrap_port":8998,"bootstrap_room":{id}"#);
        assert_eq!(decode_members(Engine::Sglang, &pair()), one.as_bytes());
        assert_eq!(
            prefill(Engine::Sglang, Api::Chat, r#"{"stream":true,"n":1,"max_tokens":7}"#),
            format!(r#"{{{one},"stream":false,"n":1,"max_tokens":7}}"#)
        );
        let batch = Pair { batch: Some(2), rank: Some(3), bootstrap: "[fd00::1]:9".parse().unwrap(), ..pair() };
        assert_eq!(
            String::from_utf8(decode_members(Engine::Sglang, &batch)).unwrap(),
            format!(
                r#""bootstrap_host":["fd00::1","fd00::1"],"bootstrap_port":[9,9],"bootstrap_room":[{id},{}],"disagg_prefill_dp_rank":3"#,
                id + 1
            )
        );
    }

    #[test]
    fn mooncakes_legs_share_a_transfer_id() {
        let id = transfer_id(&pair());
        assert_eq!(id.len(), "xfer-".len() + 36);
        assert!(prefill(Engine::Mooncake, Api::Chat, "{}").contains(&format!(r#""transfer_id":"{id}""#)));
        assert_eq!(
            String::from_utf8(decode_members(Engine::Mooncake, &pair())).unwrap(),
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

    #[test]
    fn pair_ids_are_in_the_range_of_every_engine() {
        for bits in [0, 1, u64::MAX] {
            assert!(((1 << 42)..(1 << 63) - u64::from(MAX_SEQUENCES)).contains(&pair_id(bits)));
        }
    }

    #[test]
    fn parameters_are_handed_over_byte_for_byte_or_not_at_all() {
        let params = r#"{ "do_remote_prefill" : true, "remote_block_ids":[[1,2]],"remote_request_id":"r","x":18446744073709551617, "y":1.0e-7}"#;
        let answer = format!(r#"{{"id":"x","kv_transfer_params": {params} }}"#);
        let nixl = |answer: &str| handover(Engine::VllmNixl, Api::Chat, answer.as_bytes());
        assert_eq!(nixl(&answer), insert(&format!(r#""kv_transfer_params":{params}"#)));
        assert_eq!(handover(Engine::VllmShared, Api::Chat, answer.as_bytes()), Handover::Nothing);
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

    #[test]
    fn trtllms_parameters_change_in_one_place_and_bring_the_prompts_ids() {
        let params =
            r#"{"first_gen_tokens":[7], "request_type" : "context_only","ctx_request_id":18446744073709551617}"#;
        let turned = params.replace("context_only", "generation_only");
        let trtllm = |api, answer: &str| handover(Engine::Trtllm, api, answer.as_bytes());
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

    #[test]
    fn neurons_decode_leg_quotes_the_whole_prefill_answer() {
        assert_eq!(
            handover(Engine::Neuron, Api::Chat, b" {\"id\":\"x\", \"n\":1e5}\n"),
            insert(r#""disagg_prefill_resp":{"id":"x", "n":1e5}"#)
        );
        for answer in ["", "null", "[1]", "{"] {
            assert_eq!(handover(Engine::Neuron, Api::Chat, answer.as_bytes()), Handover::Missing);
        }
    }
}
