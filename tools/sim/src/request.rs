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
mod tests {
    use super::*;

    const RULES: Rules = Rules { max_model_len: 1_000, engine: Engine::VllmNixl, role: Role::Both };

    fn chat(fields: &str) -> Result<Generation, ApiError> {
        let body = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"hi"}}]{fields}}}"#);
        Generation::parse(Api::Chat, body.as_bytes(), RULES)
    }

    fn rendered(body: &str) -> String {
        String::from_utf8(Generation::parse(Api::Chat, body.as_bytes(), RULES).unwrap().prompts[0].rendered.clone())
            .unwrap()
    }

    #[test]
    fn renders_as_a_template_would() {
        assert_eq!(
            rendered(
                r#"{"tools": [ {"a": "b c"} ], "messages":[{"content":[{"type":"text","text":"x\ny"}],"role":"system"},
                {"role":"assistant","content":null,"tool_calls":[ 1 ]},{"role":"user","content":"é\u00e9"}],"model":"m"}"#
            ),
            "<|tools|>[{\"a\":\"b c\"}]\n<|system|>x\ny\n<|assistant|>[1]\n<|user|>éé\n<|assistant|>"
        );
        let image = |data: &str| {
            rendered(&format!(
                r#"{{"model":"m","messages":[{{"role":"user","content":[{{"type":"image_url","image_url":{{"url":"{data}"}}}}]}}]}}"#
            ))
        };
        assert!(image("data:1").starts_with("<|user|><|image_url:"));
        assert_ne!(image("data:1"), image("data:2"));
    }

    #[test]
    fn the_last_of_repeated_keys_counts() {
        assert!(chat(r#","stream":true,"stream":false"#).is_ok_and(|generation| !generation.stream));
    }

    #[test]
    fn refuses_what_vllm_refuses() {
        for (fields, why) in [
            (r#","stream_options":{"include_usage":true}"#, "Stream options"),
            (r#","max_tokens":0"#, "at least 1"),
            (r#","max_tokens":-1"#, "at least 1"),
            (r#","max_tokens":"5""#, "max_tokens"),
            (r#","max_tokens":999"#, "too large"),
            (r#","max_tokens":1,"min_tokens":2"#, "min_tokens"),
            (r#","n":0"#, "n must"),
            (r#","n":2,"temperature":0"#, "greedy"),
            (r#","top_logprobs":2"#, "`logprobs` must be set"),
            (r#","logprobs":true,"top_logprobs":21"#, "top_logprobs"),
            (r#","stop":["a","b","c","d","e"]"#, "at most 4"),
            (r#","stop_token_ids":["a"]"#, "stop_token_ids"),
            (r#","stop":5"#, "stop"),
            (r#","kv_transfer_params":"x""#, "kv_transfer_params"),
            (r#","seed":9223372036854775808"#, "seed"),
            (r#","cache_salt":"""#, "cache_salt"),
            (r#","tools":{}"#, "tools"),
            (r#"},"#, "json_invalid"),
        ] {
            let error = chat(fields).unwrap_err();
            assert_eq!(error.status, 400, "{fields}");
            assert!(error.message.contains(why), "{fields}: {}", error.message);
        }
        for body in [
            r#"{"messages":[{"role":"user","content":"hi"}]}"#,
            r#"{"model":"m"}"#,
            r#"{"model":"m","messages":[]}"#,
            r#"{"model":"m","messages":[{"content":"hi"}]}"#,
            r#"{"model":"m","messages":"hi"}"#,
            r#"{"model":"m","messages":[{"role":"user","content":5}]}"#,
            "[]",
            "",
            "\u{0}",
        ] {
            assert_eq!(Generation::parse(Api::Chat, body.as_bytes(), RULES).unwrap_err().status, 400, "{body}");
        }
        assert!(chat(r#","seed":9223372036854775807,"max_tokens":900,"unknown":{"a":1e400}"#).is_ok());
    }

    #[test]
    fn other_apis_have_their_own_names_for_the_same() {
        let parse = |path: &str, fields: &str| {
            let body = format!(r#"{{"model":"m",{fields}}}"#);
            Generation::parse(Api::of_path(path).unwrap(), body.as_bytes(), RULES).map_err(|error| error.status)
        };
        let rendered = |path: &str, fields: &str| {
            String::from_utf8(parse(path, fields).unwrap().prompts[0].rendered.clone()).unwrap()
        };
        assert_eq!(
            rendered("/v1/responses", r#""instructions":"Be brief.","input":"hi""#),
            "<|system|>Be brief.\n<|user|>hi\n<|assistant|>"
        );
        assert_eq!(
            rendered("/v1/responses", r#""input":[{"role":"user","content":[{"type":"input_text","text":"hi"}]}]"#),
            "<|user|>hi\n<|assistant|>"
        );
        let messages = r#""messages":[{"role":"user","content":"hi"}]"#;
        assert_eq!(
            rendered("/v1/messages", &format!(r#""max_tokens":3,"system":"s",{messages}"#)),
            "<|system|>s\n<|user|>hi\n<|assistant|>"
        );
        let ids = parse("/inference/v1/generate", r#""token_ids":[1,2,3],"sampling_params":{"max_tokens":2}"#).unwrap();
        assert_eq!((ids.prompts[0].tokens(), ids.output(0, 0, false).tokens), (3, 2));
        for (path, fields) in [
            ("/v1/responses", r#""messages":[]"#),
            ("/v1/responses", r#""input":5"#),
            ("/v1/messages", messages),
            ("/inference/v1/generate", r#""token_ids":[1]"#),
            ("/inference/v1/generate", r#""token_ids":"a","sampling_params":{}"#),
            ("/inference/v1/generate", r#""token_ids":[[1]],"sampling_params":{}"#),
        ] {
            assert_eq!(parse(path, fields).map(drop), Err(400), "{path} {fields}");
        }
    }

    #[test]
    fn prompts_may_be_text_ids_or_lists() {
        let tokens = |prompt: &str| {
            let body = format!(r#"{{"model":"m","prompt":{prompt}}}"#);
            Generation::parse(Api::Completions, body.as_bytes(), RULES)
                .map(|generation| generation.prompts.iter().map(Prompt::tokens).collect::<Vec<_>>())
                .map_err(|error| error.status)
        };
        assert_eq!(tokens(r#""12345""#), Ok(vec![2]));
        assert_eq!(tokens("[1,2,3]"), Ok(vec![3]));
        assert_eq!(tokens(r#"["1234","12345"]"#), Ok(vec![1, 2]));
        assert_eq!(tokens("[[1],[2,3]]"), Ok(vec![1, 2]));
        for bad in ["[]", "[[]]", "5", r#"[1,"a"]"#, "{}"] {
            assert_eq!(tokens(bad), Err(400), "{bad}");
        }
    }

    #[test]
    fn kv_params_are_read_as_vllm_reads_them() {
        let kv = |params: &str| chat(&format!(r#","kv_transfer_params":{params}"#)).unwrap().kv;
        assert!(matches!(kv("null"), KvParams::None));
        assert!(matches!(kv("{}"), KvParams::None));
        assert!(matches!(kv(r#"{"do_remote_decode":true,"remote_block_ids":null}"#), KvParams::Keep));
        let KvParams::Pull(remote) = kv(r#"{"do_remote_prefill":true, "x":1.0e-7}"#) else { panic!() };
        assert_eq!(&*remote.raw, r#"{"do_remote_prefill":true, "x":1.0e-7}"#);
        assert!(!remote.has_block_ids && remote.source.is_none());
        let full = r#"{"do_remote_prefill":true,"remote_block_ids":[[1]],"remote_engine_id":"e",
            "remote_host":"h","remote_port":1,"remote_request_id":"r"}"#;
        let KvParams::Pull(remote) = kv(full) else { panic!() };
        assert!(remote.has_block_ids && remote.source.is_some());
        let KvParams::Pull(remote) = kv(&full.replace("remote_request_id", "x")) else { panic!() };
        assert!(remote.source.is_none());
    }

    #[test]
    fn expected_text_ignores_what_does_not_change_the_answer() {
        let body = |fields: &str| {
            format!(r#"{{"model":"x","messages":[{{"role":"user","content":"hi"}}],"max_tokens":8{fields}}}"#)
        };
        let text = expected_text("m", body(""));
        assert_eq!(text.len(), 32);
        assert_eq!(text, expected_text("m", body(r#","stream":true,"kv_transfer_params":{"do_remote_prefill":true}"#)));
        assert_ne!(text, expected_text("x", body("")));
        assert_ne!(text, expected_text("m", body(r#","seed":1"#)));
        let choices = expected_texts("m", body(r#","n":2"#));
        assert_eq!((choices.len(), &choices[0]), (2, &text));
        assert_ne!(choices[0], choices[1]);
        assert_eq!(expected_text("m", "{"), "");
    }
}
