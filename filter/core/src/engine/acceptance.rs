//! Whether a decode endpoint may refuse members that the prefill leg does not carry.
//!
//! The prefill leg drops the members that say how an answer ends ([`legs`](super::legs)), so the prefill endpoint never
//! checks them. The decode endpoint answers 400 to a value of a wrong type or out of range, and the prefill endpoint keeps
//! the KV blocks of that prompt until its own time limit. Such a request goes to a decode endpoint alone, which answers in
//! its own words.
//!
//! Only spellings that every engine takes count as accepted. An engine may take more, such as `"5"` and `5.0` for an integer.
//! Such a request is served whole. Sources: the request models of vLLM 0.33, SGLang 0.5.23 and TensorRT-LLM.

use crate::body::json::{self, members};
use crate::body::{Api, Key, Scan};

/// Most stop strings by vLLM's default (`VLLM_MAX_STOP_STRINGS`) and OpenAI's API.
const MAX_STOPS: usize = 4;
/// Most alternatives of one token by vLLM's default (`--max-logprobs`).
const MAX_LOGPROBS: i64 = 20;
/// Most answers of one request by vLLM's default (`VLLM_MAX_N_SEQUENCES`).
const MAX_ANSWERS: i64 = 16_384;
/// Temperature below which vLLM takes the most likely token, and more than one answer is an error.
const GREEDY: f64 = 1e-5;
/// Limit of `/v1/completions` where the request names none.
const COMPLETION_TOKENS: i64 = 16;

/// Whether the decode endpoint may refuse a request whose prefill leg is accepted.
#[must_use]
pub fn is_refusable(api: Api, body: &[u8], scan: &Scan) -> bool {
    let top = Members { api, body, scan, nested: None };
    let members = match scan.raw(body, Key::SamplingParams).filter(|_| api == Api::Generate) {
        Some(sampling @ [b'{', ..]) => Members { nested: Some(sampling), ..top },
        // Its parameters are required.
        _ if api == Api::Generate => return true,
        _ => top,
    };
    // What the engine cuts off a prompt depends on the limit of tokens, which is another one in the prefill leg.
    let keeps_prompt = top.is(Key::TruncatePromptTokens, Null::Allowed, |_| false);
    !(has_valid_stream(&top) && members.are_accepted() && keeps_prompt)
}

/// Whether the request asks the engine to cut a prompt that is too long for the model. The two legs would cut the
/// prompt at different places.
#[must_use]
pub fn cuts_prompt(api: Api, body: &[u8], scan: &Scan) -> bool {
    api == Api::Responses && scan.raw(body, Key::Truncation) == Some(b"\"auto\"")
}

/// Tokens that the answer may have, by the request's own limit or by the API's. An engine refuses a prompt that leaves less
/// room than that in the model's length. `None` where nothing limits the answer: it then ends where the model's length ends.
#[must_use]
pub fn asked_tokens(api: Api, body: &[u8], scan: &Scan) -> Option<u64> {
    let nested = scan.raw(body, Key::SamplingParams).filter(|_| api == Api::Generate);
    let members = Members { api, body, scan, nested };
    let limit = |key| members.integer(key);
    let asked = match api {
        Api::Chat => limit(Key::MaxCompletionTokens).or(limit(Key::MaxTokens)),
        Api::Completions => limit(Key::MaxTokens).or(Some(COMPLETION_TOKENS)),
        Api::Responses => limit(Key::MaxOutputTokens),
        Api::Messages | Api::Generate => limit(Key::MaxTokens),
    };
    asked.and_then(|asked| u64::try_from(asked).ok())
}

/// Whether the answer describes the prompt: by probabilities of its tokens (`prompt_logprobs`, `echo` with `logprobs`), by its
/// hidden states or its experts. Only the endpoint that computes the prompt has these. A decode endpoint that fetched the KV
/// cache computes the whole prompt again for them, or fails (vllm#27449, vllm-ascend#13363).
#[must_use]
pub fn describes_prompt(api: Api, body: &[u8], scan: &Scan) -> bool {
    let top = Members { api, body, scan, nested: None };
    let is_asked = |key| top.get(key).is_some_and(|value| !matches!(value, b"null" | b"false"));
    let of_sampling = || {
        let nested = members(scan.raw(body, Key::SamplingParams).unwrap_or_default());
        let mut found = nested.filter(|(key, _)| key.starts_with("prompt_logprob"));
        found.any(|(_, value)| !is_null(value))
    };
    let is_echoed = match api {
        // vLLM takes `top_logprobs` for the prompt's, and its default is 0, not none.
        Api::Chat => is_asked(Key::Echo),
        Api::Completions => is_asked(Key::Echo) && is_asked(Key::Logprobs),
        Api::Responses | Api::Messages | Api::Generate => false,
    };
    let keys = [Key::PromptLogprobs, Key::ReturnHiddenStates, Key::ReturnRoutedExperts];
    is_echoed || keys.into_iter().any(is_asked) || api == Api::Generate && of_sampling()
}

/// Whether the request asks for a thinking budget, which vLLM compares with the limit of tokens: one in a prefill leg.
#[must_use]
pub fn has_thinking_budget(api: Api, body: &[u8], scan: &Scan) -> bool {
    api == Api::Messages && budget(scan.raw(body, Key::Thinking).unwrap_or_default()).is_some()
}

/// Whether the members that make an answer a stream have values that every engine takes.
#[must_use]
pub fn is_valid_stream(api: Api, body: &[u8], scan: &Scan) -> bool {
    has_valid_stream(&Members { api, body, scan, nested: None })
}

fn has_valid_stream(top: &Members<'_>) -> bool {
    let is_stream = top.get(Key::Stream) == Some(b"true");
    let options = match top.get(Key::StreamOptions) {
        None | Some(b"null") => true,
        Some(options @ [b'{', ..]) => {
            let mut all = members(options);
            (is_stream || members(options).next().is_none())
                && all.all(|(key, value)| {
                    !matches!(&*key, "include_usage" | "continuous_usage_stats") || is_boolean(value) || is_null(value)
                })
        }
        Some(_) => false,
    };
    options && top.is(Key::Stream, Null::Allowed, is_boolean)
}

/// Whether `null` stands for an absent member.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Null {
    Allowed,
    Refused,
}

/// The members that an engine reads its limits from: those of the body, or of its `sampling_params`.
#[derive(Clone, Copy)]
struct Members<'a> {
    api: Api,
    body: &'a [u8],
    scan: &'a Scan,
    nested: Option<&'a [u8]>,
}

impl<'a> Members<'a> {
    fn get(&self, key: Key) -> Option<&'a [u8]> {
        match self.nested {
            None => self.scan.raw(self.body, key),
            Some(object) => members(object).filter(|(name, _)| name == key.name()).last().map(|(_, value)| value),
        }
    }

    /// Whether the member is absent, or has a value that passes.
    fn is(&self, key: Key, null: Null, passes: impl Fn(&[u8]) -> bool) -> bool {
        self.get(key).is_none_or(|value| if is_null(value) { null == Null::Allowed } else { passes(value) })
    }

    fn integer(&self, key: Key) -> Option<i64> {
        integer(self.get(key)?)
    }

    fn are_accepted(&self) -> bool {
        let is_limit = |value: &[u8]| integer(value).is_some_and(|limit| limit >= 1);
        let has_stops = |key| self.is(key, Null::Allowed, is_stop) && !self.stops_without_text(key);
        match self.api {
            Api::Chat => {
                self.is(Key::MaxTokens, Null::Allowed, is_limit)
                    && self.is(Key::MaxCompletionTokens, Null::Allowed, is_limit)
                    && self.has_minimum(self.integer(Key::MaxCompletionTokens).or(self.integer(Key::MaxTokens)))
                    && has_stops(Key::Stop)
                    && self.is(Key::StopTokenIds, Null::Allowed, are_token_ids)
                    && self.has_answers(Null::Allowed)
                    && self.is(Key::Echo, Null::Refused, is_boolean)
                    && self.is(Key::Logprobs, Null::Allowed, is_boolean)
                    && self.has_alternatives(Key::TopLogprobs, self.get(Key::Logprobs) == Some(b"true"))
            }
            Api::Completions => {
                let limit = self.integer(Key::MaxTokens).unwrap_or(COMPLETION_TOKENS);
                self.is(Key::MaxTokens, Null::Allowed, is_limit)
                    && self.has_minimum(Some(limit))
                    && has_stops(Key::Stop)
                    && self.is(Key::StopTokenIds, Null::Allowed, are_token_ids)
                    && self.has_answers(Null::Refused)
                    && self.is(Key::Echo, Null::Allowed, is_boolean)
                    && self.has_alternatives(Key::Logprobs, self.integer(Key::Logprobs).is_some())
            }
            Api::Responses => {
                // An answer in the background needs a store, which is off by default in engines.
                let is_kept = self.get(Key::Background).is_none_or(|value| matches!(value, b"false" | b"null"));
                is_kept
                    && self.is(Key::PreviousResponseId, Null::Allowed, |value| value.starts_with(b"\""))
                    && self.is(Key::Store, Null::Allowed, is_boolean)
                    && self.is(Key::MaxOutputTokens, Null::Allowed, is_limit)
                    && has_stops(Key::Stop)
                    && self.is(Key::StopTokenIds, Null::Allowed, are_token_ids)
                    && self.has_alternatives(Key::TopLogprobs, true)
                    && self.is(Key::Truncation, Null::Allowed, |value| matches!(value, b"\"auto\"" | b"\"disabled\""))
            }
            Api::Messages => {
                let limit = self.integer(Key::MaxTokens).filter(|limit| *limit >= 1);
                let thinking = self.get(Key::Thinking).and_then(budget);
                limit.is_some_and(|limit| thinking.is_none_or(|budget| budget.is_some_and(|budget| budget < limit)))
                    && self.is(Key::StopSequences, Null::Allowed, |value| value.starts_with(b"[") && is_stop(value))
            }
            Api::Generate => {
                self.is(Key::MaxTokens, Null::Allowed, is_limit)
                    && self.has_minimum(self.integer(Key::MaxTokens))
                    && has_stops(Key::Stop)
                    && self.is(Key::StopTokenIds, Null::Allowed, are_token_ids)
                    && self.has_answers(Null::Refused)
                    && self.has_alternatives(Key::Logprobs, true)
            }
        }
    }

    /// `min_tokens`, against the limit of tokens if there is one.
    fn has_minimum(&self, limit: Option<i64>) -> bool {
        let is_in_range = |minimum: i64| minimum >= 0 && limit.is_none_or(|limit| minimum <= limit);
        self.is(Key::MinTokens, Null::Refused, |value| integer(value).is_some_and(is_in_range))
    }

    /// `n` and what goes with it.
    fn has_answers(&self, null: Null) -> bool {
        let count = |value: &[u8]| integer(value).filter(|count| (1..=MAX_ANSWERS).contains(count));
        let answers = self.get(Key::N).and_then(count).unwrap_or(1);
        let is_greedy = || self.get(Key::Temperature).is_some_and(|value| number(value) < GREEDY);
        self.is(Key::N, null, |value| count(value).is_some())
            && self.is(Key::BestOf, Null::Allowed, |value| count(value).is_some_and(|best_of| best_of >= answers))
            && self.is(Key::UseBeamSearch, Null::Refused, is_boolean)
            && (answers == 1 || self.get(Key::UseBeamSearch) == Some(b"true") || !is_greedy())
    }

    /// How many alternatives of each token the answer names, and those of `logprob_token_ids`.
    fn has_alternatives(&self, count: Key, is_asked: bool) -> bool {
        let is_in_range = |value: &[u8]| integer(value).is_some_and(|count| (0..=MAX_LOGPROBS).contains(&count));
        let names_some = self.integer(count).is_some_and(|count| count > 0);
        let is_beam = self.get(Key::UseBeamSearch) == Some(b"true");
        self.is(count, Null::Allowed, is_in_range)
            && (is_asked || !names_some)
            && self.is(Key::LogprobTokenIds, Null::Allowed, |ids| {
                let is_short = json::elements(ids).count() <= MAX_LOGPROBS as usize;
                are_token_ids(ids) && is_short && is_asked && !is_beam
            })
    }

    /// Whether stop strings are looked for in an answer that is to stay without text.
    fn stops_without_text(&self, stop: Key) -> bool {
        let Some(object) = self.nested else { return false };
        let is_text = members(object).all(|(key, value)| key != "detokenize" || value == b"true");
        !is_text && self.get(stop).is_some_and(|value| !is_null(value))
    }
}

/// The budget of `thinking`; `None` where none is asked for, `Some(None)` where it is no integer.
fn budget(thinking: &[u8]) -> Option<Option<i64>> {
    let member = |name: &str| members(thinking).filter(|(key, _)| key == name).last().map(|(_, value)| value);
    let is_enabled = json::string(member("type")?)? == "enabled";
    is_enabled.then(|| member("budget_tokens").and_then(integer))
}

fn is_null(value: &[u8]) -> bool {
    value == b"null"
}

fn is_boolean(value: &[u8]) -> bool {
    matches!(value, b"true" | b"false")
}

/// An integer in digits; `None` for `1.0`, `"1"`, `true` and what 64 bits do not hold.
fn integer(value: &[u8]) -> Option<i64> {
    core::str::from_utf8(value).ok()?.parse().ok()
}

/// A number; 0 if `value` is none.
fn number(value: &[u8]) -> f64 {
    core::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).unwrap_or(0.0)
}

/// A stop string, or a few of them.
fn is_stop(value: &[u8]) -> bool {
    let is_text = |value: &[u8]| value.len() > 2 && value.starts_with(b"\"");
    match value.first() {
        Some(b'[') => json::elements(value).all(is_text) && json::elements(value).count() <= MAX_STOPS,
        _ => is_text(value),
    }
}

fn are_token_ids(value: &[u8]) -> bool {
    value.starts_with(b"[") && json::elements(value).all(|id| integer(id).is_some_and(|id| id >= 0))
}

#[cfg(test)]
mod tests;
