//! Bodies of answers, field by field as vLLM writes them.

use std::fmt::Write as _;
use std::io;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};

use crate::api_error::ApiError;
use crate::dialects;
use crate::head::{Head, Usage, quote};
use crate::rules::Api;
use crate::shape::CALL_ID;
use crate::tokens::Output;

/// Body of every answer; an error closes the connection in mid-body.
pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// The last event of a stream.
pub(crate) const DONE_EVENT: &[u8] = b"data: [DONE]\n\n";

pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

pub(crate) fn json(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    typed(status, "application/json", body)
}

pub(crate) fn typed(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// An error as FastAPI writes it where no endpoint of vLLM is concerned.
pub(crate) fn detail(status: StatusCode) -> Response<Body> {
    json(status, format!(r#"{{"detail":{}}}"#, quote(status.canonical_reason().unwrap_or_default())))
}

pub(crate) fn error(error: &ApiError) -> Response<Body> {
    let status = StatusCode::from_u16(error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = json(status, error_body(error));
    if matches!(error.status, 429 | 503) {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

fn error_body(error: &ApiError) -> String {
    let param = error.param.map_or_else(|| "null".to_owned(), quote);
    format!(
        r#"{{"error":{{"message":{},"type":"{}","param":{param},"code":{}}}}}"#,
        quote(&error.message),
        error.kind,
        error.status
    )
}

/// An error in a stream that has begun.
pub(crate) fn error_event(error: &ApiError) -> Bytes {
    format!("data: {}\n\n", error_body(error)).into()
}

/// A choice of a whole answer.
pub(crate) struct Choice<'a> {
    pub(crate) output: &'a Output,
    /// The prompt, where it is to be repeated.
    pub(crate) echo: Option<&'a str>,
}

impl Head {
    /// A whole answer; `kv` is the value of `kv_transfer_params`, absent: no such key.
    pub(crate) fn whole(&self, choices: &[Choice<'_>], usage: Usage, kv: Option<&str>) -> String {
        if matches!(self.api, Api::Responses | Api::Messages | Api::Generate) {
            return dialects::whole(self, choices.iter().map(|choice| choice.output), usage, kv);
        }
        let mut out = String::with_capacity(512 + choices.iter().map(|choice| choice.output.text.len()).sum::<usize>());
        let object = if self.api == Api::Chat { "chat.completion" } else { "text_completion" };
        let _ = write!(out, r#"{}"{object}"{},"choices":["#, self.before, self.after);
        for (index, choice) in choices.iter().enumerate() {
            if index > 0 {
                out.push(',');
            }
            let finish = &choice.output.finish;
            let stop = stop_reason(choice.output);
            let _ = match self.api {
                Api::Chat => {
                    let said = quote(&self.shape.whole(&choice.output.text));
                    let (content, calls, finish) = match self.shape.tool() {
                        None => (said, String::new(), finish.reason()),
                        Some(name) => ("null".to_owned(), call(name, &said), TOOL_CALLS),
                    };
                    write!(
                        out,
                        r#"{{"index":{index},"message":{{"role":"assistant","content":{content},"refusal":null,"annotations":null,"audio":null,"function_call":null,"tool_calls":[{calls}],"reasoning":null}},"logprobs":null,"finish_reason":"{finish}","stop_reason":{stop},"token_ids":null}}"#,
                    )
                }
                _ => {
                    let text = match choice.echo {
                        Some(prompt) => quote(&format!("{prompt}{}", choice.output.text)),
                        None => quote(&choice.output.text),
                    };
                    write!(
                        out,
                        r#"{{"index":{index},"text":{text},"logprobs":null,"finish_reason":"{}","stop_reason":{stop},"token_ids":null,"prompt_logprobs":null,"prompt_token_ids":null}}"#,
                        finish.reason()
                    )
                }
            };
        }
        let _ = write!(
            out,
            r#"],"service_tier":null,"system_fingerprint":null,"usage":{},"prompt_logprobs":null,"prompt_token_ids":null"#,
            usage.to_json()
        );
        if let Some(kv) = kv {
            let _ = write!(out, r#","kv_transfer_params":{kv}"#);
        }
        out.push('}');
        out
    }

    /// The first event of a chat's choice.
    pub(crate) fn role_event(&self, index: usize) -> Bytes {
        format!(
            "data: {}\"chat.completion.chunk\"{},\"choices\":[{{\"index\":{index},\"delta\":{{\"role\":\"assistant\",\"content\":\"\"}},\"logprobs\":null,\"finish_reason\":null}}],\"prompt_token_ids\":null}}\n\n",
            self.before, self.after
        )
        .into()
    }

    /// One piece of a text; `last` also says why the text ended.
    pub(crate) fn token_event(
        &self,
        index: usize,
        (text, is_first): (&str, bool),
        last: Option<&Output>,
        usage: Option<Usage>,
    ) -> Bytes {
        let text = quote(&self.shape.piece(text, is_first, last.is_some()));
        let (finish, stop) = match last {
            None => ("null".to_owned(), String::new()),
            Some(output) => {
                let finish = if self.shape.tool().is_some() { TOOL_CALLS } else { output.finish.reason() };
                (format!("\"{finish}\""), format!(",\"stop_reason\":{}", stop_reason(output)))
            }
        };
        let delta = match self.shape.tool() {
            None => format!("\"content\":{text}"),
            Some(name) if is_first => format!("\"tool_calls\":[{}]", call(name, &text)),
            Some(_) => format!("\"tool_calls\":[{{\"index\":0,\"function\":{{\"arguments\":{text}}}}}]"),
        };
        let usage = usage.map(|usage| format!(",\"usage\":{}", usage.to_json())).unwrap_or_default();
        match self.api {
            Api::Chat => format!(
                "data: {}\"chat.completion.chunk\"{},\"choices\":[{{\"index\":{index},\"delta\":{{{delta}}},\"logprobs\":null,\"finish_reason\":{finish}{stop},\"token_ids\":null}}]{usage}}}\n\n",
                self.before, self.after
            ),
            _ => format!(
                "data: {}\"text_completion\"{},\"choices\":[{{\"index\":{index},\"text\":{text},\"logprobs\":null,\"finish_reason\":{finish}{stop},\"token_ids\":null}}]{usage}}}\n\n",
                self.before, self.after
            ),
        }
        .into()
    }

    /// The event that `stream_options.include_usage` asks for.
    pub(crate) fn usage_event(&self, usage: Usage) -> Bytes {
        let object = if self.api == Api::Chat { "chat.completion.chunk" } else { "text_completion" };
        format!("data: {}\"{object}\"{},\"choices\":[],\"usage\":{}}}\n\n", self.before, self.after, usage.to_json())
            .into()
    }
}

/// Why a chat ends that calls a tool.
const TOOL_CALLS: &str = "tool_calls";

/// A tool call of a chat; `arguments` are a JSON string.
fn call(name: &str, arguments: &str) -> String {
    let name = quote(name);
    format!(r#"{{"index":0,"id":"{CALL_ID}","type":"function","function":{{"name":{name},"arguments":{arguments}}}}}"#)
}

fn stop_reason(output: &Output) -> String {
    match &output.finish {
        crate::tokens::Finish::Stop(stop) => quote(stop),
        _ => "null".to_owned(),
    }
}
