//! What a request's body says, and which endpoints may serve it.

use std::borrow::Cow;
use std::sync::Arc;

use crate::body::json::Span;
use crate::body::markers::without_markers;
use crate::body::media::Media;
use crate::body::splice::{HeadEdit, HeadPlan};
use crate::body::{Api, Key, KeySet, Scan, json, scan};
use crate::choose::prompt::Prompt;
use crate::choose::scheduler::Scheduler;
use crate::config::{Config, Pool};
use crate::endpoints::candidates::Candidates;
use crate::endpoints::fitted_media::{self, CLASSES, MediaTokens};
use crate::engine::{acceptance, legs};
use crate::metrics::Metric;
use crate::prefix::hash::{BlockHash, Piece, pieces_hash, session_hash};
use crate::request::head::{RequestHead, within};
use crate::request::models::{Served, serving_model};
use crate::request::reply::Rejection;
use crate::request::stored::{is_kept, previous_id};
use crate::time::Monotonic;
use crate::workers::worker::Worker;

/// Output tokens that a request is expected to add to its KV cache, unless its limit is lower. The means of the traces are
/// 149 to 343. More makes long prompts count for less in the choice of a decode endpoint.
const EXPECTED_OUTPUT_TOKENS: u64 = 256;

/// A body that was scanned.
#[derive(Debug)]
pub(super) struct ScannedBody<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) scan: Scan,
}

impl<'a> ScannedBody<'a> {
    /// # Errors
    /// [`Rejection::InvalidJson`] of a body that is no JSON object.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, Rejection> {
        let scan = scan(bytes).map_err(|error| Rejection::InvalidJson(error.to_string()))?;
        Ok(Self { bytes, scan })
    }
}

/// What headers and body said, and which endpoints may serve the request.
#[derive(Debug)]
pub(super) struct ParsedRequest {
    pub(super) head: RequestHead,
    pub(super) api: Api,
    /// The model that serves it.
    pub(super) served: Served,
    /// The model that the client asked for, where the response is to name it.
    pub(super) put_back: Option<String>,
    /// Whether the response is a stream.
    pub(super) is_stream: bool,
    /// Whether the response will have a usage.
    pub(super) shows_usage: bool,
    pub(super) prompt: Prompt,
    pub(super) output_tokens: u64,
    /// Id of the response that the request continues.
    pub(super) previous_id: Option<String>,
    /// Whether the engine may keep the response.
    pub(super) is_kept: bool,
    /// Sequences, where the body asks for a batch of them.
    pub(super) batch: Option<u32>,
    pub(super) body_bytes: usize,
    /// The edit that makes the client's body the decode leg's, once the members to put in front are known.
    pub(super) plan: HeadPlan,
}

impl ParsedRequest {
    /// Reads a body whose headers name an API.
    ///
    /// # Errors
    /// [`Rejection`] of a body that names no model which is served, or is too large once the model is replaced.
    pub(super) fn read(
        worker: &mut Worker,
        head: RequestHead,
        api: Api,
        body: &ScannedBody<'_>,
        now: Monotonic,
    ) -> Result<Self, Rejection> {
        let (bytes, scan) = (body.bytes, &body.scan);
        let config = Arc::clone(&head.config);
        let model = if scan.has(Key::Model) { scan.str(bytes, Key::Model) } else { head.model(None) };
        let model = model.ok_or(Rejection::MissingModel)?;
        let mut served = serving_model(worker, &head, &model, now)?;
        let put_back = served.is_put_back.then(|| model.into_owned());
        let session = head.session().map(|id| session_hash(&served.model, id));
        let batch = batch(api, body);
        let mut prompt = prompt(worker, &config, &served, api, body, session);
        prompt.is_several |= batch.is_some_and(|batch| batch > 1);
        if batch.is_none_or(|batch| batch == 1) {
            check_length(worker.state.table.model_len(&served.model), api, body, &mut prompt);
        }
        served.candidates = worker.state.table.with_room(served.candidates, prompt.tokens);
        worker.counts.add(Metric::PromptTokens, prompt.tokens as i64);
        let plan = legs::decode_plan(bytes, scan, KeySet::EMPTY, served.rewrite.as_deref());
        // Envoy does not survive a body that an edit makes larger than the buffer filter's limit.
        if plan.edited_bytes(b"", bytes.len()) > config.max_body_bytes {
            return Err(Rejection::TooLarge(config.max_body_bytes));
        }
        let is_stream = scan.bool(bytes, Key::Stream) == Some(true);
        let mut options = json::members(scan.raw(bytes, Key::StreamOptions).unwrap_or_default());
        let shows_usage = !is_stream || options.any(|(key, value)| key == "include_usage" && value == b"true");
        Ok(Self {
            head,
            api,
            served,
            put_back,
            is_stream,
            shows_usage,
            prompt,
            output_tokens: output_tokens(body),
            previous_id: previous_id(api, &body.scan, body.bytes),
            is_kept: is_kept(api, &body.scan, body.bytes),
            batch,
            body_bytes: bytes.len(),
            plan,
        })
    }

    /// The list may have changed since the request came: its places may be other endpoints' now. Where no endpoint is ready
    /// any more, those stay that drain and may have to take over.
    pub(super) fn refresh_candidates(&mut self, worker: &Worker) {
        let table = &worker.state.table;
        let mut current = table.listed_candidates(&self.served.model).unwrap_or_else(|| {
            Arc::new(Candidates { pool: Arc::clone(&self.served.candidates.pool), ..Candidates::default() })
        });
        if let Some(subset) = &self.head.subset {
            current = within(table, &current, subset);
        }
        self.served.candidates = table.with_room(current, self.prompt.tokens);
    }

    pub(super) fn pool(&self) -> &Pool {
        self.head.config.pool(&self.served.candidates.pool)
    }

    pub(super) fn scheduler<'a>(&'a self, worker: &'a Worker, now: Monotonic) -> Scheduler<'a> {
        Scheduler { table: &worker.state.table, index: &worker.state.index, pool: self.pool(), now }
    }

    /// KV tokens that the request is expected to take at its decode endpoint.
    pub(super) fn kv_tokens(&self) -> u64 {
        (self.prompt.tokens as u64).saturating_add(self.output_tokens)
    }

    /// Whether the response will show cached tokens where the filter reads them. `/v1/messages` subtracts them from its
    /// `input_tokens`.
    pub(super) fn shows_cached_tokens(&self) -> bool {
        self.shows_usage && self.api != Api::Messages
    }

    /// The edit of the body where nothing is put in front.
    pub(super) fn plain_edit(&self) -> HeadEdit {
        self.plan.with_insert(b"")
    }
}

/// Output tokens that the request is expected to add to its KV cache.
fn output_tokens(body: &ScannedBody<'_>) -> u64 {
    let limits = [Key::MaxCompletionTokens, Key::MaxTokens, Key::MaxOutputTokens];
    let limit = limits.into_iter().find_map(|key| body.scan.u64(body.bytes, key));
    limit.unwrap_or(EXPECTED_OUTPUT_TOKENS).min(EXPECTED_OUTPUT_TOKENS)
}

/// By what factor the estimate of a prompt's tokens may be too low.
const ESTIMATE_ERROR: f64 = 2.0;

/// Compares the prompt's estimate and the limit of tokens with the model's length, if the filter knows the length. A prompt
/// without a limit is never too long: the prefill endpoint refuses it before it computes anything.
fn check_length(longest: Option<u64>, api: Api, body: &ScannedBody<'_>, prompt: &mut Prompt) {
    let asked = acceptance::asked_tokens(api, body.bytes, &body.scan);
    let exceeds = |tokens: f64, longest: u64| tokens + asked.unwrap_or(0) as f64 > longest as f64;
    prompt.is_too_long = asked.is_some() && longest.is_some_and(|longest| exceeds(prompt.tokens, longest));
    if acceptance::cuts_prompt(api, body.bytes, &body.scan) {
        prompt.is_refusable |= longest.is_none_or(|longest| exceeds(prompt.tokens * ESTIMATE_ERROR, longest));
    }
}

/// The prompt as the scheduler sees it.
fn prompt(
    worker: &mut Worker,
    config: &Config,
    served: &Served,
    api: Api,
    body: &ScannedBody<'_>,
    session: Option<BlockHash>,
) -> Prompt {
    let pool = config.pool(&served.candidates.pool);
    let parts = prompt_parts(api, body, pool.engine.drops_billing_line());
    let pieces = prompt_pieces(&parts, body, config.prefix.block_bytes, pool);
    let of_text = |piece: &Piece<'_>| if let Piece::Text(text) = piece { text.len() } else { 0 };
    let bytes = pieces.iter().map(of_text).fold(0_usize, usize::saturating_add);
    let media = MediaTokens::of(&pool.media, body.scan.media());
    let salt = body.scan.raw(body.bytes, Key::CacheSalt).unwrap_or_default();
    // SGLang's name of an adapter, beside the model's.
    let adapter = body.scan.raw(body.bytes, Key::LoraPath).map(|path| [salt, path].concat());
    let salt = adapter.as_deref().unwrap_or(salt);
    let hash = pieces_hash(served.model.as_bytes(), salt, &pieces, config.prefix.block_bytes);
    let distinctive = worker.state.index.distinctive(&hash.blocks, config.prefix.hot_share);
    let learnt = worker.state.table.bytes_per_token(&served.candidates.pool).filter(|_| pool.fit);
    let bytes_per_token = learnt.unwrap_or(pool.bytes_per_token);
    let factors = worker.state.table.media_factors(&served.candidates.pool).filter(|_| pool.fit);
    let media_tokens = media.total(&factors.unwrap_or([1.0; CLASSES]));
    Prompt {
        bytes,
        media,
        session,
        tokens: bytes as f64 / bytes_per_token + media_tokens,
        block_tokens: config.prefix.block_bytes as f64 / bytes_per_token,
        key: distinctive.map_or(hash.head, |block| block.0),
        is_unseen: distinctive.is_some_and(|block| !worker.state.index.knows(block)),
        is_several: asks_for_several(body),
        is_refusable: acceptance::is_refusable(api, body.bytes, &body.scan),
        has_budget: acceptance::has_thinking_budget(api, body.bytes, &body.scan),
        describes_prompt: acceptance::describes_prompt(api, body.bytes, &body.scan),
        is_too_long: false,
        hash,
    }
}

/// Parts of the prompt that the engine shows the model, in the order of chat templates, without the parts that the engine
/// leaves out. For each part: its range in the body, and its text.
fn prompt_parts<'a>(api: Api, body: &ScannedBody<'a>, drops_billing: bool) -> Vec<(Span, Cow<'a, [u8]>)> {
    let keys: &[Key] = match api {
        Api::Chat => &[Key::Tools, Key::Messages],
        Api::Completions => &[Key::Prompt],
        Api::Responses => &[Key::Tools, Key::Instructions, Key::Input],
        Api::Messages => &[Key::Tools, Key::System, Key::Messages],
        Api::Generate => &[Key::TokenIds, Key::PromptTokenIds],
    };
    let part = |key: &Key| {
        let span = body.scan.get(*key)?.value;
        Some((span, without_markers(api, *key, span.get(body.bytes), body.scan.has_cache_marker, drops_billing)))
    };
    keys.iter().filter_map(part).collect()
}

/// The parts as text, and media by themselves.
fn prompt_pieces<'a>(
    parts: &'a [(Span, Cow<'a, [u8]>)],
    body: &ScannedBody<'a>,
    block_bytes: usize,
    pool: &Pool,
) -> Vec<Piece<'a>> {
    let mut pieces = Vec::with_capacity(4);
    for (span, text) in parts {
        let inside = |media: &&Media| media.payload.start >= span.start && media.payload.end <= span.end;
        let mut rest: &[u8] = text;
        let mut offset = span.start;
        for media in body.scan.media().iter().filter(inside) {
            let payload = media.payload.get(body.bytes);
            // What is left out stands before and behind payloads, never in them.
            let before = match text {
                Cow::Borrowed(_) => Some(media.payload.start.saturating_sub(offset) as usize),
                Cow::Owned(_) => memchr::memmem::find(rest, payload),
            };
            let Some((before, behind)) = before.and_then(|before| rest.split_at_checked(before)) else { continue };
            pieces.push(Piece::Text(before));
            // By the configuration alone: every worker of every Envoy must count the same blocks.
            let bytes = fitted_media::tokens(&pool.media, media).1 * pool.bytes_per_token;
            let units = (bytes / block_bytes.max(1) as f64).ceil() as usize;
            pieces.push(Piece::Media { payload, units });
            rest = behind.get(payload.len()..).unwrap_or_default();
            offset = media.payload.end;
        }
        pieces.push(Piece::Text(rest));
    }
    pieces
}

/// Whether more answers than one are asked for, or several are computed to give one.
fn asks_for_several(ScannedBody { bytes, scan }: &ScannedBody<'_>) -> bool {
    let one: [&[u8]; 4] = [b"1", b"1.0", b"null", b"false"];
    let keys = [Key::N, Key::BestOf, Key::UseBeamSearch];
    let is_several = |key: &str, value: &[u8]| keys.iter().any(|asks| asks.name() == key) && !one.contains(&value);
    let nested = scan.raw(bytes, Key::SamplingParams).unwrap_or_default();
    keys.iter().any(|key| scan.raw(bytes, *key).is_some_and(|value| is_several(key.name(), value)))
        || json::members(nested).any(|(key, value)| is_several(&key, value))
}

/// Sequences that SGLang keeps apart, as its own router counts them: prompts of a batch, answers of a chat. `None`
/// where there is one and no list of them.
fn batch(api: Api, ScannedBody { bytes, scan }: &ScannedBody<'_>) -> Option<u32> {
    match api {
        Api::Completions => {
            let prompts = scan.raw(bytes, Key::Prompt)?;
            let first = prompts.strip_prefix(b"[")?.trim_ascii_start().first()?;
            let count = matches!(first, b'"' | b'[').then(|| json::elements(prompts).count())?;
            Some(u32::try_from(count).unwrap_or(u32::MAX))
        }
        Api::Chat => {
            let answers = scan.u64(bytes, Key::N).filter(|n| *n > 1)?;
            Some(u32::try_from(answers).unwrap_or(u32::MAX))
        }
        Api::Responses | Api::Messages | Api::Generate => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            let scanned = ScannedBody::read(body.as_bytes()).unwrap();
            let counted = (batch(api, &scanned), asks_for_several(&scanned));
            assert_eq!(counted, expected, "{body}");
        }
    }
}
