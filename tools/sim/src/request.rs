//! Reading a generation request as vLLM would: what it asks for, or why it is refused.

use serde::Deserialize;

use crate::api_error::ApiError;
use crate::config::Config;
use crate::fault::Leg;
use crate::fields::{Fields, missing};
use crate::handoff::{KvParams, kv_params, trtllm_prompts};
use crate::rules::{Api, Rules};
use crate::shape::Shape;
use crate::tokens::{Limits, Output, Prompt, generate};

use limits::{asked_tokens, describes_tokens, limits, truncated};
use render::{render_chat, render_prompts};

mod limits;
mod render;

/// Choices of one request; vLLM's default limit is higher, but nobody needs more here.
const MAX_CHOICES: u64 = 128;

/// A valid generation request.
#[derive(Debug)]
pub struct Generation {
    /// Endpoint.
    pub api: Api,
    /// Name as the client wrote it.
    pub model: String,
    /// One, or the batch of a completions request.
    pub prompts: Vec<Prompt>,
    /// Choices per prompt.
    pub n: u32,
    /// Answer by server-sent events.
    pub stream: bool,
    /// `stream_options.include_usage`.
    pub include_usage: bool,
    /// `stream_options.continuous_usage_stats`.
    pub continuous_usage: bool,
    /// Completions repeat the prompt before the text.
    pub echo: bool,
    /// Changes the text.
    pub seed: Option<i64>,
    /// KV transfer.
    pub kv: KvParams,
    /// `previous_response_id` of a responses request.
    pub previous: Option<String>,
    /// Whether the response may be kept.
    pub store: bool,
    /// `x-request-id`, if the client sent one.
    pub request_id: Option<String>,
    /// Whether the KV cache does not come, so that the prompt is computed here.
    pub recomputes: bool,
    /// How long the server stands still before it fetches the KV cache.
    pub stall: Option<std::time::Duration>,
    /// Form of the answer.
    pub(crate) shape: Shape,
    limits: Vec<Limits>,
}

impl Generation {
    /// Reads and checks a body.
    ///
    /// # Errors
    /// The answer that vLLM would give.
    pub fn parse(api: Api, body: &[u8], rules: Rules) -> Result<Self, ApiError> {
        let fields = Fields::parse(body)?;
        let model: String = fields.required("model")?;
        Self::from_fields(api, &fields, model, rules)
    }

    fn from_fields(api: Api, fields: &Fields<'_>, model: String, rules: Rules) -> Result<Self, ApiError> {
        let stream = fields.get("stream")?.unwrap_or(false);
        let options = StreamOptions::of(fields, stream)?;
        let nested: Option<Fields<'_>> = match api {
            Api::Generate => Some(fields.borrowed("sampling_params")?.ok_or_else(|| missing("sampling_params"))?),
            _ => None,
        };
        let sampling = nested.as_ref().unwrap_or(fields);
        let n: u64 = sampling.get("n")?.unwrap_or(1);
        if !(1..=MAX_CHOICES).contains(&n) {
            return Err(ApiError::bad_field("n", format!("n must be between 1 and {MAX_CHOICES}, got {n}.")));
        }
        let salt: Option<String> = fields.get("cache_salt")?;
        if salt.as_deref() == Some("") {
            return Err(ApiError::bad_field(
                "cache_salt",
                "Parameter 'cache_salt' must be a non-empty string if provided.",
            ));
        }
        let echo = fields.get("echo")?.unwrap_or(false);
        let describes_prompt = describes_tokens(api, sampling, n, echo)?;
        let rendered = match (trtllm_prompts(api, fields, rules)?, api) {
            (Some(prompts), _) => prompts,
            (None, Api::Chat) => vec![render_chat(fields, None, "messages")?],
            (None, Api::Messages) => vec![render_chat(fields, Some("system"), "messages")?],
            (None, Api::Responses) => vec![render_chat(fields, Some("instructions"), "input")?],
            (None, Api::Completions) => render_prompts(fields, "prompt")?,
            (None, Api::Generate) => render_prompts(fields, "token_ids")?,
        };
        let rendered = truncated(api, fields, asked_tokens(api, sampling)?, rules, rendered)?;
        let kv = kv_params(fields, rules, rendered.len(), n as usize, stream)?;
        if describes_prompt && matches!(kv, KvParams::Pull(_) | KvParams::Meet(_)) {
            // It has the KV of the prompt and no logits of it (vllm#27449).
            return Err(ApiError::internal("out of range integral type conversion attempted"));
        }
        let prompts: Vec<Prompt> =
            rendered.into_iter().map(|bytes| Prompt::new(&model, salt.as_deref(), bytes)).collect();
        let limits = prompts.iter().map(|prompt| limits(api, sampling, prompt, rules)).collect::<Result<_, _>>()?;
        Ok(Self {
            api,
            model,
            prompts,
            n: n as u32,
            stream,
            include_usage: options.include_usage,
            continuous_usage: options.continuous_usage_stats,
            echo: echo && api == Api::Completions,
            seed: sampling.get("seed")?,
            kv,
            previous: fields.get("previous_response_id")?.filter(|_| api == Api::Responses),
            store: fields.get("store")?.unwrap_or(true) && api == Api::Responses,
            request_id: None,
            recomputes: false,
            stall: None,
            shape: Shape::of(api, fields),
            limits,
        })
    }

    /// Which half of a split request this is.
    #[must_use]
    pub fn leg(&self) -> Leg {
        match self.kv {
            KvParams::None => Leg::Plain,
            KvParams::Keep | KvParams::Offer(_) => Leg::Prefill,
            KvParams::Pull(_) | KvParams::Meet(_) => Leg::Decode,
        }
    }

    /// Choices in the answer.
    #[must_use]
    pub fn choices(&self) -> usize {
        self.prompts.len() * self.n as usize
    }

    /// The text of one choice of one prompt.
    #[must_use]
    pub fn output(&self, prompt: usize, choice: u32, wrong: bool) -> Output {
        generate(self.prompts[prompt].digest, self.seed, choice, &self.limits[prompt], wrong)
    }
}

/// The text that a right answer to `body` has (its first choice), whichever servers compute it. `model` counts instead
/// of the body's, for gateways that rewrite it. Empty for a body that a server refuses.
#[must_use]
pub fn expected_text(model: &str, body: impl AsRef<[u8]>) -> String {
    expected_texts(model, body).into_iter().next().unwrap_or_default()
}

/// As [`expected_text`], for every choice of every prompt in the order of their `index`.
#[must_use]
pub fn expected_texts(model: &str, body: impl AsRef<[u8]>) -> Vec<String> {
    let is_chat = Fields::parse(body.as_ref()).is_ok_and(|fields| fields.raw("messages").is_some());
    expected_texts_of(if is_chat { Api::Chat } else { Api::Completions }, model, body)
}

/// As [`expected_texts`], of any API.
#[must_use]
pub fn expected_texts_of(api: Api, model: &str, body: impl AsRef<[u8]>) -> Vec<String> {
    let rules = Rules::of(&Config::default());
    let Ok(fields) = Fields::parse(body.as_ref()) else { return Vec::new() };
    let Ok(generation) = Generation::from_fields(api, &fields, model.to_owned(), rules) else { return Vec::new() };
    let mut texts = Vec::with_capacity(generation.choices());
    for (index, prompt) in generation.prompts.iter().enumerate() {
        for choice in 0..generation.n {
            let mut text = generation.output(index, choice, false).text;
            if generation.echo {
                text.insert_str(0, &String::from_utf8_lossy(&prompt.rendered));
            }
            texts.push(text);
        }
    }
    texts
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct StreamOptions {
    include_usage: bool,
    continuous_usage_stats: bool,
}

impl StreamOptions {
    fn of(fields: &Fields<'_>, stream: bool) -> Result<Self, ApiError> {
        match fields.raw("stream_options") {
            None => Ok(Self::default()),
            Some(_) if !stream && fields.truthy("stream_options") => {
                Err(ApiError::bad_field("stream_options", "Stream options can only be defined when `stream=True`."))
            }
            Some(_) => Ok(fields.get("stream_options")?.unwrap_or_default()),
        }
    }
}

#[cfg(test)]
mod tests;
