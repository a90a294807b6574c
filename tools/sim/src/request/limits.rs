//! How long an answer may get, what ends it, and which token probabilities it carries.

use serde::Deserialize;

use crate::api_error::ApiError;
use crate::fields::{Fields, missing};
use crate::rules::{Api, Rules};
use crate::tokens::{BYTES_PER_TOKEN, Limits, Prompt};

/// Tokens that `/v1/completions` generates when no limit is given (OpenAI's and vLLM's default).
const COMPLETIONS_DEFAULT_MAX_TOKENS: u64 = 16;

/// vLLM's default of `--max-logprobs`.
const MAX_LOGPROBS: i64 = 20;

/// vLLM's default of `VLLM_MAX_STOP_STRINGS`.
const MAX_STOPS: usize = 4;

/// Checks which token probabilities the request asks for. Returns whether it asks for some of the prompt's tokens.
pub(crate) fn describes_tokens(api: Api, sampling: &Fields<'_>, n: u64, echo: bool) -> Result<bool, ApiError> {
    let count = |name: &'static str| -> Result<Option<i64>, ApiError> {
        let count: Option<i64> = sampling.get(name)?;
        match count {
            Some(count) if !(-1..=MAX_LOGPROBS).contains(&count) => {
                Err(ApiError::bad_field(name, format!("`{name}` must be between -1 and {MAX_LOGPROBS}, got {count}.")))
            }
            count => Ok(count),
        }
    };
    let (of_tokens, is_on) = match api {
        Api::Chat => (count("top_logprobs")?, sampling.get("logprobs")?.unwrap_or(false)),
        Api::Responses => (count("top_logprobs")?, true),
        Api::Completions | Api::Generate => (count("logprobs")?, true),
        Api::Messages => (None, true),
    };
    if of_tokens.is_some_and(|count| count != 0) && !is_on {
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

/// The limit of tokens that a request names.
pub(crate) fn asked_tokens(api: Api, fields: &Fields<'_>) -> Result<Option<i64>, ApiError> {
    Ok(match api {
        Api::Chat => fields.get::<i64>("max_completion_tokens")?.or(fields.get("max_tokens")?),
        Api::Responses => fields.get("max_output_tokens")?,
        Api::Completions | Api::Messages | Api::Generate => fields.get("max_tokens")?,
    })
}

/// The last tokens of each prompt, where the request wants only so many: -1 for as many as the limit of tokens leaves room for.
pub(crate) fn truncated(
    api: Api,
    fields: &Fields<'_>,
    asked: Option<i64>,
    rules: Rules,
    mut prompts: Vec<Vec<u8>>,
) -> Result<Vec<Vec<u8>>, ApiError> {
    let is_auto = api == Api::Responses && fields.get::<String>("truncation")?.as_deref() == Some("auto");
    let wanted = fields.get::<i64>("truncate_prompt_tokens")?.or(is_auto.then_some(-1));
    let Some(wanted) = wanted else { return Ok(prompts) };
    let room = rules.max_model_len.saturating_sub(u64::try_from(asked.unwrap_or(0)).unwrap_or(0));
    let kept = u64::try_from(wanted).unwrap_or(room);
    if kept > room {
        let why = format!("truncate_prompt_tokens={kept} cannot be greater than max_model_len - max_tokens = {room}.");
        return Err(ApiError::bad_field("truncate_prompt_tokens", why));
    }
    for prompt in &mut prompts {
        let cut = prompt.len().saturating_sub(kept as usize * BYTES_PER_TOKEN);
        prompt.drain(..cut);
    }
    Ok(prompts)
}

/// How long an answer may get, and what ends it.
pub(crate) fn limits(api: Api, fields: &Fields<'_>, prompt: &Prompt, rules: Rules) -> Result<Limits, ApiError> {
    let max_tokens = max_tokens(api, fields, prompt, rules)?;
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

/// Most tokens of the answer.
fn max_tokens(api: Api, fields: &Fields<'_>, prompt: &Prompt, rules: Rules) -> Result<u64, ApiError> {
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
    Ok(match asked_tokens(api, fields)? {
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
    })
}
