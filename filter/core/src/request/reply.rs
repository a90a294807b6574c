//! Answers that the filter gives itself: OpenAI-style JSON errors with a reason header.

use crate::body::form::FormError;
use crate::choose::admission::Shed;

/// llm-d's answer header that says why a request was not let in.
pub const DROPPED_HEADER: &str = "x-llm-d-request-dropped-reason";
/// Answer header that says why the filter answered.
pub const REASON_HEADER: &str = "x-pd-reason";

/// Why the filter answers in place of an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// The body is no JSON object.
    InvalidJson(String),
    /// The body is a form that parsers could read differently.
    InvalidForm(FormError),
    /// A path that no client may reach.
    UnknownPath,
    /// The body is compressed.
    ContentEncoding,
    /// No `model`, or not a string.
    MissingModel,
    /// A model that no endpoint serves.
    UnknownModel {
        /// As asked.
        model: String,
        /// What is served.
        known: Vec<String>,
    },
    /// A phase header with another value than `prefill` or `decode`.
    InvalidPhase,
    /// The body is larger than this many bytes.
    TooLarge(usize),
    /// One request asks for more than this many sequences of an engine that is told of each.
    TooManySequences(u32),
    /// The request is not let in now.
    Shed(Shed),
    /// No endpoint of the needed role is ready.
    NoEndpoint,
    /// Prefill failed on every endpoint tried, and the pool's policy is `fail`.
    PrefillFailed,
    /// The plugin configuration was refused and there is no earlier one.
    NotConfigured(String),
}

/// How an API spells errors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ErrorForm {
    /// `{"error": {"message", "type", "param", "code"}}`
    #[default]
    OpenAi,
    /// `{"type": "error", "error": {"type", "message"}}`, on `/v1/messages` and below.
    Anthropic,
}

impl ErrorForm {
    /// The form on a path, percent-encoding undone and without a query.
    #[must_use]
    pub fn of_path(path: &[u8]) -> Self {
        match path.strip_prefix(b"/v1/messages") {
            Some([] | [b'/', ..]) => Self::Anthropic,
            _ => Self::OpenAi,
        }
    }
}

/// The error type that Anthropic's API has for a status.
fn anthropic_type(status: u16) -> &'static str {
    match status {
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        500.. => "api_error",
        _ => "invalid_request_error",
    }
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// Headers besides `content-type`, which is JSON.
    pub headers: Vec<(&'static str, String)>,
    /// Body.
    pub body: Vec<u8>,
    /// Reason code, as in the reason header and the access log.
    pub reason: &'static str,
}

impl Rejection {
    /// Status, OpenAI error type, `param` and reason code.
    fn parts(&self) -> (u16, &'static str, Option<&'static str>, &'static str) {
        match self {
            Self::InvalidJson(_) => (400, "invalid_request_error", None, "invalid_json"),
            Self::InvalidForm(_) => (400, "invalid_request_error", None, "invalid_form"),
            Self::UnknownPath => (404, "not_found_error", None, "unknown_path"),
            Self::ContentEncoding => (415, "invalid_request_error", None, "content_encoding"),
            Self::MissingModel => (400, "invalid_request_error", Some("model"), "missing_model"),
            Self::UnknownModel { .. } => (404, "not_found_error", Some("model"), "unknown_model"),
            Self::InvalidPhase => (400, "invalid_request_error", None, "invalid_phase"),
            Self::TooLarge(_) => (413, "invalid_request_error", None, "too_large"),
            Self::TooManySequences(_) => (400, "invalid_request_error", None, "too_many_sequences"),
            Self::Shed(shed) => (429, "rate_limit_error", None, shed.code()),
            Self::NoEndpoint => (503, "service_unavailable_error", None, "no_endpoint"),
            Self::PrefillFailed => (503, "service_unavailable_error", None, "prefill_failed"),
            Self::NotConfigured(_) => (503, "service_unavailable_error", None, "not_configured"),
        }
    }

    fn message(&self) -> String {
        match self {
            Self::InvalidJson(why) => why.clone(),
            Self::InvalidForm(error) => error.to_string(),
            Self::UnknownPath => "this path is not one of an inference API".to_owned(),
            Self::ContentEncoding => "the request body must not be compressed".to_owned(),
            Self::MissingModel => "the request body must have a string `model`".to_owned(),
            Self::UnknownModel { model, known } => {
                format!("the model `{model}` does not exist; known models: {}", known.join(", "))
            }
            Self::InvalidPhase => "x-pd-phase must be `prefill` or `decode`".to_owned(),
            Self::TooLarge(limit) => format!("the request body is larger than {limit} bytes"),
            Self::TooManySequences(limit) => format!("a request may have {limit} prompts or answers at most"),
            Self::Shed(Shed::Deadline) => "the prompt cannot be computed by the deadline".to_owned(),
            Self::Shed(_) => "the model is overloaded; try again later".to_owned(),
            Self::NoEndpoint => "no endpoint is ready for this model".to_owned(),
            Self::PrefillFailed => "no prefill endpoint could compute the prompt".to_owned(),
            Self::NotConfigured(why) => format!("the prefill/decode filter has no valid configuration: {why}"),
        }
    }

    /// The reason code.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        self.parts().3
    }

    /// The answer, as clients of that API read errors.
    #[must_use]
    pub fn reply(&self, form: ErrorForm) -> Reply {
        let (status, kind, param, reason) = self.parts();
        let body = match form {
            ErrorForm::OpenAi => serde_json::json!({
                "error": {"message": self.message(), "type": kind, "param": param, "code": reason}
            }),
            ErrorForm::Anthropic => serde_json::json!({
                "type": "error", "error": {"type": anthropic_type(status), "message": self.message()}
            }),
        };
        let mut headers = vec![("content-type", "application/json".to_owned()), (REASON_HEADER, reason.to_owned())];
        if matches!(status, 429 | 503) {
            headers.push(("retry-after", "1".to_owned()));
        }
        if matches!(self, Self::Shed(_)) {
            headers.push((DROPPED_HEADER, reason.to_owned()));
        }
        Reply { status, headers, body: body.to_string().into_bytes(), reason }
    }
}
