//! What a request's body says, and which endpoints may serve it.

use core::time::Duration;
use std::borrow::Cow;
use std::sync::Arc;

use crate::body::splice::HeadPlan;
use crate::body::{Api, Key, KeySet, Scan, json};
use crate::choose::schedule::Prompt;
use crate::config::{Config, Pool};
use crate::engine::legs;
use crate::headers::Headers;
use crate::metrics::Metric;
use crate::prefix::hash::{prompt_hash, session_hash};
use crate::request::head::Subset;
use crate::request::models::{Served, serve};
use crate::request::reply::Rejection;
use crate::workers::worker::Worker;

/// Output tokens that a request is expected to add to its KV cache, unless it allows fewer. The traces' mean is 149 to 343.
const EXPECTED_OUTPUT_TOKENS: u64 = 256;

/// What the body said, and who may serve it.
#[derive(Debug)]
pub(crate) struct ParsedRequest {
    pub(crate) config: Arc<Config>,
    pub(crate) headers: Headers,
    pub(crate) api: Api,
    /// The model that serves it.
    pub(crate) served: Served,
    /// What the client asked for, where the answer is to say so.
    pub(crate) put_back: Option<String>,
    /// Whether the answer is a stream.
    pub(crate) is_stream: bool,
    /// Whether the answer will tell what it used.
    pub(crate) shows_usage: bool,
    pub(crate) prompt: Prompt,
    pub(crate) output_tokens: u64,
    /// Sequences, where the body asks for a batch of them.
    pub(crate) batch: Option<u32>,
    pub(crate) body_bytes: usize,
    pub(crate) subset: Option<Subset>,
    /// How the body becomes an engine's, when it is known what to put in front.
    pub(crate) plan: HeadPlan,
}

impl ParsedRequest {
    pub(crate) fn pool(&self) -> &Pool {
        self.config.pool(&self.served.candidates.pool)
    }
}

#[expect(clippy::too_many_arguments, reason = "what headers and body said")]
pub(crate) fn read_body(
    worker: &mut Worker,
    config: Arc<Config>,
    headers: Headers,
    api: Api,
    subset: Option<Subset>,
    body: &[u8],
    scan: &Scan,
    now: Duration,
) -> Result<ParsedRequest, Rejection> {
    let named = || {
        let header = headers.get("x-ai-eg-model").or_else(|| headers.get("x-gateway-model-name"));
        let header = header.filter(|_| !scan.has(Key::Model))?;
        Some(Cow::Owned(core::str::from_utf8(header).ok()?.to_owned()))
    };
    let model = scan.str(body, Key::Model).or_else(named).ok_or(Rejection::MissingModel)?;
    let session = config.session_headers.iter().find_map(|name| headers.get(name));
    let bits = match session {
        _ if !config.models.contains_key(&*model) => 0,
        // A conversation stays with its model.
        Some(id) => xxhash_rust::xxh3::xxh3_64(id),
        None => worker.pair_id(headers.get("x-request-id").unwrap_or_default(), now),
    };
    let mut served = serve(&config, &worker.table, subset.as_ref(), &model, bits)?;
    let put_back = served.is_put_back.then(|| model.into_owned());
    let (model, candidates) = (&served.model, &served.candidates);
    let pool = config.pool(&candidates.pool);
    let parts = prompt_parts(api, body, scan);
    let bytes = parts.iter().fold(0_usize, |sum, part| sum.saturating_add(part.len()));
    let salt = scan.raw(body, Key::CacheSalt).unwrap_or_default();
    // SGLang's name of an adapter, beside the model's.
    let adapter = scan.raw(body, Key::LoraPath).map(|path| [salt, path].concat());
    let salt = adapter.as_deref().unwrap_or(salt);
    let hash = prompt_hash(model.as_bytes(), salt, &parts, config.prefix.block_bytes);
    let distinctive = worker.index.distinctive(&hash.blocks, config.prefix.hot_share);
    let learnt = worker.table.bytes_per_token(&candidates.pool).filter(|_| pool.fit);
    let bytes_per_token = learnt.unwrap_or(pool.bytes_per_token);
    let session = session.map(|id| session_hash(model, id));
    let tokens = bytes as f64 / bytes_per_token;
    let prompt = Prompt {
        bytes,
        session,
        tokens,
        block_tokens: config.prefix.block_bytes as f64 / bytes_per_token,
        key: distinctive.map_or(hash.head, |block| block.0),
        is_unseen: distinctive.is_some_and(|block| !worker.index.knows(block)),
        is_several: asks_for_several(body, scan),
        hash,
    };
    served.candidates = served.candidates.for_prompt(tokens, &worker.table);
    let batch = batch(api, body, scan);
    let prompt = Prompt { is_several: prompt.is_several || batch.is_some_and(|batch| batch > 1), ..prompt };
    worker.counts.add(Metric::PromptTokens, prompt.tokens as i64);
    let limits = [Key::MaxCompletionTokens, Key::MaxTokens, Key::MaxOutputTokens];
    let limit = limits.into_iter().find_map(|key| scan.u64(body, key));
    let output_tokens = limit.unwrap_or(EXPECTED_OUTPUT_TOKENS).min(EXPECTED_OUTPUT_TOKENS);
    let plan = legs::decode_plan(body, scan, KeySet::EMPTY, served.rewrite.as_deref());
    // Envoy does not survive a body that an edit makes larger than the buffer filter's limit.
    if plan.with_insert(b"").edited_bytes(body.len()) > config.max_body_bytes {
        return Err(Rejection::TooLarge(config.max_body_bytes));
    }
    let is_stream = scan.bool(body, Key::Stream) == Some(true);
    let mut options = json::members(scan.raw(body, Key::StreamOptions).unwrap_or_default());
    let shows_usage = !is_stream || options.any(|(key, value)| key == "include_usage" && value == b"true");
    Ok(ParsedRequest {
        config,
        headers,
        api,
        served,
        put_back,
        is_stream,
        shows_usage,
        prompt,
        output_tokens,
        batch,
        body_bytes: body.len(),
        subset,
        plan,
    })
}

/// What the engine puts in front of the model, in the order in which chat templates do.
fn prompt_parts<'a>(api: Api, body: &'a [u8], scan: &Scan) -> Vec<&'a [u8]> {
    let keys: &[Key] = match api {
        Api::Chat => &[Key::Tools, Key::Messages],
        Api::Completions => &[Key::Prompt],
        Api::Responses => &[Key::Tools, Key::Instructions, Key::Input],
        Api::Messages => &[Key::Tools, Key::System, Key::Messages],
        Api::Generate => &[Key::TokenIds, Key::PromptTokenIds],
    };
    keys.iter().filter_map(|key| scan.raw(body, *key)).collect()
}

/// Whether more answers than one are asked for, or several are computed to give one.
fn asks_for_several(body: &[u8], scan: &Scan) -> bool {
    let one: [&[u8]; 4] = [b"1", b"1.0", b"null", b"false"];
    let keys = [Key::N, Key::BestOf, Key::UseBeamSearch];
    let is_several = |key: &str, value: &[u8]| keys.iter().any(|asks| asks.name() == key) && !one.contains(&value);
    let nested = scan.raw(body, Key::SamplingParams).unwrap_or_default();
    keys.iter().any(|key| scan.raw(body, *key).is_some_and(|value| is_several(key.name(), value)))
        || json::members(nested).any(|(key, value)| is_several(&key, value))
}

/// Sequences that SGLang keeps apart, as its own router counts them: prompts of a batch, answers of a chat. `None`
/// where there is one and no list of them.
fn batch(api: Api, body: &[u8], scan: &Scan) -> Option<u32> {
    match api {
        Api::Completions => {
            let prompts = scan.raw(body, Key::Prompt)?;
            let first = prompts.strip_prefix(b"[")?.trim_ascii_start().first()?;
            let count = matches!(first, b'"' | b'[').then(|| json::elements(prompts).count())?;
            Some(u32::try_from(count).unwrap_or(u32::MAX))
        }
        Api::Chat => {
            let answers = scan.u64(body, Key::N).filter(|n| *n > 1)?;
            Some(u32::try_from(answers).unwrap_or(u32::MAX))
        }
        Api::Responses | Api::Messages | Api::Generate => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::scan;

    #[test]
    fn sequences_are_counted_as_the_engines_do() {
        for (api, body, expected) in [
            (Api::Completions, r#"{"prompt":"a"}"#, (None, false)),
            (Api::Completions, r#"{"prompt":[1,2,3]}"#, (None, false)),
            (Api::Completions, r#"{"prompt":["a"]}"#, (Some(1), false)),
            (Api::Completions, r#"{"prompt": [ "a" , "b"]}"#, (Some(2), false)),
            (Api::Completions, r#"{"prompt":[[1],[2,3],[4]]}"#, (Some(3), false)),
            (Api::Completions, r#"{"prompt":[],"best_of":2}"#, (None, true)),
            (Api::Completions, r#"{"prompt":"a","use_beam_search":true}"#, (None, true)),
            (Api::Chat, r#"{"n":1}"#, (None, false)),
            (Api::Chat, r#"{"n":3}"#, (Some(3), true)),
            (Api::Chat, r#"{"n":2.0}"#, (None, true)),
            (Api::Chat, r#"{"n":null,"use_beam_search":false}"#, (None, false)),
            (Api::Chat, r#"{"n":18446744073709551615}"#, (Some(u32::MAX), true)),
            (Api::Generate, r#"{"sampling_params":{"n":2}}"#, (None, true)),
            (Api::Generate, r#"{"sampling_params":{"n":1,"seed":2}}"#, (None, false)),
            (Api::Messages, r#"{"n":3}"#, (None, true)),
        ] {
            let scan = scan(body.as_bytes()).unwrap();
            let counted = (batch(api, body.as_bytes(), &scan), asks_for_several(body.as_bytes(), &scan));
            assert_eq!(counted, expected, "{body}");
        }
    }
}
