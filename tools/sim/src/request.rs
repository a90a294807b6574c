//! Reading a generation request as vLLM would: what it asks for, or why it is refused.

use serde::Deserialize;
use xxhash_rust::xxh3::xxh3_64;

use crate::config::{Config, Engine, Role};
use crate::fault::Leg;
use crate::fields::{Content, Fields, Text, missing, push_compact, wrong_type};
use crate::handoff::{KvParams, kv_params, trtllm_prompts};
use crate::tokens::{Limits, Output, Prompt, generate};

/// Which of the generation endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
    /// `/v1/responses`, OpenAI's later API.
    Responses,
    /// `/v1/messages`, Anthropic's API.
    Messages,
    /// `/inference/v1/generate`, vLLM's own: token ids in, token ids out.
    Generate,
}

impl Api {
    /// The API of a path.
    #[must_use]
    pub fn of_path(path: &str) -> Option<Self> {
        Some(match path {
            "/v1/chat/completions" => Self::Chat,
            "/v1/completions" => Self::Completions,
            "/v1/responses" => Self::Responses,
            "/v1/messages" => Self::Messages,
            "/inference/v1/generate" => Self::Generate,
            _ => return None,
        })
    }

    /// Whether its streams end with `[DONE]`.
    pub(crate) fn says_done(self) -> bool {
        !matches!(self, Self::Responses | Self::Messages)
    }
}

/// Tokens that `/v1/completions` generates when no limit is given (OpenAI's and vLLM's default).
const COMPLETIONS_DEFAULT_MAX_TOKENS: u64 = 16;
/// Choices of one request; vLLM's default limit is higher, but nobody needs more here.
const MAX_CHOICES: u64 = 128;

/// Placeholders of one image or sound: some 8 tokens each.
const MEDIA_PLACEHOLDERS: usize = 64;
/// vLLM's default of `--max-logprobs`.
const MAX_LOGPROBS: i64 = 20;
/// vLLM's default of `VLLM_MAX_STOP_STRINGS`.
const MAX_STOPS: usize = 4;

/// An answer in the shape of vLLM's errors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status, and `code` in the body.
    pub status: u16,
    /// `type` in the body.
    pub kind: &'static str,
    /// For people.
    pub message: String,
    /// Field that is wrong.
    pub param: Option<&'static str>,
}

impl ApiError {
    /// 400.
    #[must_use]
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self { status: 400, kind: "BadRequestError", message: message.into(), param: None }
    }

    /// 400 for one field.
    #[must_use]
    pub fn bad_field(param: &'static str, message: impl Into<String>) -> Self {
        Self { param: Some(param), ..Self::bad_request(message) }
    }

    /// 404 for a model that is not served.
    #[must_use]
    pub fn unknown_model(model: &str) -> Self {
        Self {
            status: 404,
            kind: "NotFoundError",
            message: format!("The model `{model}` does not exist."),
            param: Some("model"),
        }
    }

    /// 500.
    #[must_use]
    pub fn internal(message: impl Into<String>) -> Self {
        Self { status: 500, kind: "InternalServerError", message: message.into(), param: None }
    }
}

/// Rules of the server that a request must meet.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Longest prompt plus output, in tokens.
    pub max_model_len: u64,
    /// Whose hand-over protocol is spoken.
    pub engine: Engine,
    /// Work that the server is meant for: some engines refuse other.
    pub role: Role,
}

impl Rules {
    /// The rules of a server.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        Self { max_model_len: config.max_model_len, engine: config.engine, role: config.role }
    }
}

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
        let options: StreamOptions = match fields.raw("stream_options") {
            None => StreamOptions::default(),
            Some(_) if !stream && fields.truthy("stream_options") => {
                return Err(ApiError::bad_field(
                    "stream_options",
                    "Stream options can only be defined when `stream=True`.",
                ));
            }
            Some(_) => fields.get("stream_options")?.unwrap_or_default(),
        };
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
        let tells_prompt = told_tokens(api, sampling, n, echo)?;
        let rendered = match (trtllm_prompts(api, fields, rules)?, api) {
            (Some(prompts), _) => prompts,
            (None, Api::Chat) => vec![render_chat(fields, None, "messages")?],
            (None, Api::Messages) => vec![render_chat(fields, Some("system"), "messages")?],
            (None, Api::Responses) => vec![render_chat(fields, Some("instructions"), "input")?],
            (None, Api::Completions) => render_prompts(fields, "prompt")?,
            (None, Api::Generate) => render_prompts(fields, "token_ids")?,
        };
        let kv = kv_params(fields, rules, rendered.len(), n as usize, stream)?;
        if tells_prompt && matches!(kv, KvParams::Pull(_) | KvParams::Meet(_)) {
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

/// Checks what the answer is to tell of tokens, and whether that is something of the prompt's.
fn told_tokens(api: Api, sampling: &Fields<'_>, n: u64, echo: bool) -> Result<bool, ApiError> {
    let count = |name: &'static str| -> Result<Option<i64>, ApiError> {
        let count: Option<i64> = sampling.get(name)?;
        match count {
            Some(count) if !(-1..=MAX_LOGPROBS).contains(&count) => {
                Err(ApiError::bad_field(name, format!("`{name}` must be between -1 and {MAX_LOGPROBS}, got {count}.")))
            }
            count => Ok(count),
        }
    };
    let (of_tokens, told) = match api {
        Api::Chat => (count("top_logprobs")?, sampling.get("logprobs")?.unwrap_or(false)),
        Api::Responses => (count("top_logprobs")?, true),
        Api::Completions | Api::Generate => (count("logprobs")?, true),
        Api::Messages => (None, true),
    };
    if of_tokens.is_some_and(|count| count != 0) && !told {
        let why = "when using `top_logprobs`, `logprobs` must be set to true.";
        return Err(ApiError::bad_field("top_logprobs", why));
    }
    if n > 1 && sampling.get("temperature")?.is_some_and(|temperature: f64| temperature < 1e-5) {
        return Err(ApiError::bad_request(format!("n must be 1 when using greedy sampling, got {n}.")));
    }
    let echoes = match api {
        Api::Chat => echo,
        Api::Completions => echo && of_tokens.is_some(),
        Api::Responses | Api::Messages | Api::Generate => false,
    };
    Ok(count("prompt_logprobs")?.is_some() || echoes)
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct StreamOptions {
    include_usage: bool,
    continuous_usage_stats: bool,
}

fn limits(api: Api, fields: &Fields<'_>, prompt: &Prompt, rules: Rules) -> Result<Limits, ApiError> {
    let (tokens, most) = (prompt.tokens(), rules.max_model_len);
    if tokens >= most {
        return Err(ApiError {
            param: Some("input_tokens"),
            ..ApiError::bad_request(format!(
                "This model's maximum context length is {most} tokens. However, your request has {tokens} input \
                 tokens. Please reduce the length of the input messages."
            ))
        });
    }
    let left = most - tokens;
    let asked = match api {
        Api::Chat => fields.get::<i64>("max_completion_tokens")?.or(fields.get("max_tokens")?),
        Api::Responses => fields.get("max_output_tokens")?,
        Api::Completions | Api::Messages | Api::Generate => fields.get("max_tokens")?,
    };
    let max_tokens = match asked {
        None if matches!(api, Api::Chat | Api::Responses) => left,
        None if api == Api::Messages => return Err(missing("max_tokens")),
        None => left.min(COMPLETIONS_DEFAULT_MAX_TOKENS),
        Some(limit) => match u64::try_from(limit) {
            Ok(limit) if (1..=left).contains(&limit) => limit,
            Ok(limit) if limit > left => {
                return Err(ApiError::bad_field(
                    "max_tokens",
                    format!(
                        "'max_tokens' or 'max_completion_tokens' is too large: {limit}. This model's maximum context \
                         length is {most} tokens and your request has {tokens} input tokens ({limit} > {most} - {tokens})."
                    ),
                ));
            }
            _ => {
                return Err(ApiError::bad_field("max_tokens", format!("max_tokens must be at least 1, got {limit}.")));
            }
        },
    };
    let min_tokens: u64 = fields.get("min_tokens")?.unwrap_or(0);
    if min_tokens > max_tokens {
        return Err(ApiError::bad_request(format!(
            "min_tokens must be less than or equal to max_tokens={max_tokens}, got {min_tokens}."
        )));
    }
    let stop = match fields.get(if api == Api::Messages { "stop_sequences" } else { "stop" })? {
        None => Vec::new(),
        Some(OneOrMany::One(stop)) => vec![stop],
        Some(OneOrMany::Many(stops)) => stops,
    };
    if stop.len() > MAX_STOPS {
        return Err(ApiError::bad_field(
            "stop",
            format!("List should have at most {MAX_STOPS} items after validation"),
        ));
    }
    let _: Option<Vec<i64>> = fields.get("stop_token_ids")?;
    if api == Api::Messages
        && let Some(Thinking { kind, budget_tokens: Some(budget) }) = fields.get("thinking")?
        && kind == "enabled"
        && budget >= max_tokens
        && !fields.truthy("kv_transfer_params")
    {
        return Err(ApiError::bad_request("thinking.budget_tokens must be less than max_tokens"));
    }
    if stop.iter().any(String::is_empty) {
        return Err(ApiError::bad_request("stop cannot contain an empty string."));
    }
    Ok(Limits { max_tokens, min_tokens, ignore_eos: fields.get("ignore_eos")?.unwrap_or(false), stop })
}

#[derive(Deserialize)]
struct Thinking {
    #[serde(rename = "type")]
    kind: String,
    budget_tokens: Option<u64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

/// What a chat template would make of tools, system text and messages; `/v1/responses` takes a plain text as well.
fn render_chat(fields: &Fields<'_>, system: Option<&'static str>, messages: &'static str) -> Result<Vec<u8>, ApiError> {
    let raw = fields.raw(messages).ok_or_else(|| missing(messages))?;
    let text: Option<Text<'_>> = (messages == "input").then(|| serde_json::from_str(raw.get()).ok()).flatten();
    let list: Vec<Fields<'_>> = match text {
        Some(_) => Vec::new(),
        None => serde_json::from_str(raw.get()).map_err(|_| wrong_type(messages))?,
    };
    if list.is_empty() && text.is_none() {
        return Err(ApiError::bad_field(messages, format!("{messages}: List should have at least 1 item")));
    }
    let mut out = Vec::with_capacity(raw.get().len());
    if let Some(tools) = fields.raw("tools") {
        if !tools.get().starts_with('[') {
            return Err(wrong_type("tools"));
        }
        out.extend_from_slice(b"<|tools|>");
        push_compact(&mut out, tools.get());
        out.push(b'\n');
    }
    if let Some(content) = system.map(|name| fields.borrowed::<Content<'_>>(name)).transpose()?.flatten() {
        out.extend_from_slice(b"<|system|>");
        push_content(&mut out, Some(content))?;
        out.push(b'\n');
    }
    if let Some(text) = text {
        out.extend_from_slice(b"<|user|>");
        out.extend_from_slice(text.0.as_bytes());
        out.push(b'\n');
    }
    for message in &list {
        let role: Text<'_> = message.borrowed("role")?.ok_or_else(|| missing("messages.role"))?;
        out.extend_from_slice(b"<|");
        out.extend_from_slice(role.0.as_bytes());
        out.extend_from_slice(b"|>");
        push_content(&mut out, message.borrowed("content")?)?;
        if let Some(calls) = message.raw("tool_calls") {
            push_compact(&mut out, calls.get());
        }
        out.push(b'\n');
    }
    out.extend_from_slice(b"<|assistant|>");
    Ok(out)
}

fn push_content(out: &mut Vec<u8>, content: Option<Content<'_>>) -> Result<(), ApiError> {
    match content {
        None => Ok(()),
        Some(Content::Text(text)) => {
            out.extend_from_slice(text.as_bytes());
            Ok(())
        }
        Some(Content::Parts(parts)) => parts.iter().try_for_each(|part| push_part(out, part)),
    }
}

fn push_part(out: &mut Vec<u8>, part: &Fields<'_>) -> Result<(), ApiError> {
    let kind: Text<'_> = part.borrowed("type")?.ok_or_else(|| missing("messages.content.type"))?;
    if matches!(&*kind.0, "text" | "input_text" | "output_text") {
        let text: Text<'_> = part.borrowed("text")?.ok_or_else(|| missing("messages.content.text"))?;
        out.extend_from_slice(text.0.as_bytes());
        return Ok(());
    }
    // An image becomes a placeholder that depends on its content.
    let mut compact = Vec::new();
    for (name, value) in &part.0 {
        compact.extend_from_slice(name.0.as_bytes());
        push_compact(&mut compact, value.get());
    }
    let placeholder = format!("<|{}:{:016x}|>", kind.0, xxh3_64(&compact));
    out.extend_from_slice(placeholder.repeat(MEDIA_PLACEHOLDERS).as_bytes());
    Ok(())
}

/// Prompts of a completions request: text, token ids, or a list of either. vLLM's own API takes ids alone.
fn render_prompts(fields: &Fields<'_>, name: &'static str) -> Result<Vec<Vec<u8>>, ApiError> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Many {
        Ids(Vec<u32>),
        Texts(Vec<String>),
        IdLists(Vec<Vec<u32>>),
    }
    let raw = fields.raw(name).ok_or_else(|| missing(name))?.get();
    let ids = |ids: &[u32]| ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>();
    if raw.starts_with('"') && name == "prompt" {
        let text: Text<'_> = serde_json::from_str(raw).map_err(|_| wrong_type(name))?;
        return Ok(vec![text.0.into_owned().into_bytes()]);
    }
    let prompts = match serde_json::from_str(raw).map_err(|_| wrong_type(name))? {
        Many::Texts(_) | Many::IdLists(_) if name != "prompt" => return Err(wrong_type(name)),
        Many::Ids(list) if list.is_empty() => Vec::new(),
        Many::Ids(list) => vec![ids(&list)],
        Many::Texts(texts) => texts.into_iter().map(String::into_bytes).collect(),
        Many::IdLists(lists) => lists.iter().map(|list| ids(list)).collect(),
    };
    if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
        return Err(ApiError::bad_field(name, "The prompt must not be empty."));
    }
    Ok(prompts)
}

#[cfg(test)]
mod tests;
