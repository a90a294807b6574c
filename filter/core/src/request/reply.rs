//! Answers that the filter gives itself: JSON errors in the form of OpenAI's or Anthropic's API, with a reason header.

use crate::body::form::FormError;
use crate::choose::admission::Shed;
use crate::metrics::Metric;

/// llm-d's response header with the reason code of a request that admission refused.
pub const DROPPED_HEADER: &str = "x-llm-d-request-dropped-reason";
/// Response header with the reason code of an answer of the filter's own.
pub const REASON_HEADER: &str = "x-pd-reason";

/// Why the filter answers in place of an engine. The client gets an error with a message and the reason code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// The body is not a JSON object. 400; the text is the message.
    InvalidJson(String),
    /// The body is a form that two parsers could read differently. 400.
    InvalidForm(FormError),
    /// The path is neither one of an inference API nor allowed by the configuration. 404.
    UnknownPath,
    /// The body is compressed. 415.
    ContentEncoding,
    /// The request asks for another protocol, such as WebSocket, and the configuration does not allow that. 501.
    Upgrade,
    /// The request names no model, or names it by something else than a string. 400.
    MissingModel,
    /// No endpoint ever served the model, and the configuration does not name it. 404.
    UnknownModel {
        /// The model that the client named.
        model: String,
        /// Models that endpoints serve, and aliases of them.
        known: Vec<String>,
    },
    /// No endpoint is known to keep the response of that id. 404, as an engine answers.
    UnknownResponse(String),
    /// The phase header has another value than `prefill` or `decode`. 400.
    InvalidPhase,
    /// The body, or the body after the filter's edits, is larger than this many bytes. 413.
    TooLarge(usize),
    /// The request wants more sequences than this from an engine whose legs name each sequence. 400.
    TooManySequences(u32),
    /// Admission refused the request. 429.
    Shed(Shed),
    /// The request may not wait, or has waited too long: 429 for a limit or a deadline, 503 after the longest wait.
    Queue(QueueRefusal),
    /// No endpoint of the needed role is ready, or none that serves the model. 503.
    NoEndpoint,
    /// Envoy's cluster lacks the endpoints that were named, and one that may not generate answered, or none. 503.
    WrongEndpoint,
    /// The answer began later than the prefill server keeps the KV cache for, and may be wrong. 503.
    KvLeaseOver,
    /// Prefill failed at every endpoint that was tried, and the pool's policy is `fail`. 503.
    PrefillFailed,
    /// The plugin configuration was refused, and there is no earlier one. 503; the text is the refusal.
    NotConfigured(String),
}

/// Why the queue refuses a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueRefusal {
    /// The queue has its largest number of requests. The client may try again after this many seconds.
    Requests(u64),
    /// The queue has its largest number of bytes. The client may try again after this many seconds.
    Bytes(u64),
    /// No endpoint can compute the prompt by the client's deadline.
    Deadline,
    /// The request has waited as long as it may.
    Timeout,
}

impl QueueRefusal {
    /// Counter of requests that were refused for this reason.
    #[must_use]
    pub fn metric(self) -> Metric {
        match self {
            Self::Requests(_) => Metric::QueueRequests,
            Self::Bytes(_) => Metric::QueueBytes,
            Self::Deadline => Metric::QueueDeadline,
            Self::Timeout => Metric::QueueTimeout,
        }
    }

    /// Reason code.
    fn code(self) -> &'static str {
        self.metric().name().rsplit('=').next().unwrap_or_default()
    }
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

    /// An error's body, with the type that each API has for it.
    fn body(self, openai: &str, anthropic: &str, message: &str, param: Option<&str>, code: &str) -> Vec<u8> {
        let body = match self {
            Self::OpenAi => serde_json::json!({
                "error": {"message": message, "type": openai, "param": param, "code": code}
            }),
            Self::Anthropic => serde_json::json!({
                "type": "error", "error": {"type": anthropic, "message": message}
            }),
        };
        body.to_string().into_bytes()
    }
}

/// An error that another part of Envoy answers: its body in the form of an API.
#[must_use]
pub(super) fn error_body(form: ErrorForm, status: u16, message: &str, code: &str) -> Vec<u8> {
    form.body(openai_type(status), anthropic_type(status), message, None, code)
}

/// The error type that OpenAI's API has for a status.
fn openai_type(status: u16) -> &'static str {
    match status {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        429 => "rate_limit_error",
        503 => "service_unavailable_error",
        500.. => "server_error",
        _ => "invalid_request_error",
    }
}

/// The error type that Anthropic's API has for a status.
fn anthropic_type(status: u16) -> &'static str {
    match status {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        408 | 504 => "timeout_error",
        500.. => "api_error",
        _ => "invalid_request_error",
    }
}

/// An answer of the filter's own to the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// Headers, `content-type` included.
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
            Self::Upgrade => (501, "invalid_request_error", None, "upgrade"),
            Self::ContentEncoding => (415, "invalid_request_error", None, "content_encoding"),
            Self::MissingModel => (400, "invalid_request_error", Some("model"), "missing_model"),
            Self::UnknownModel { .. } => (404, "not_found_error", Some("model"), "unknown_model"),
            Self::UnknownResponse(_) => (404, "invalid_request_error", Some("response_id"), "unknown_response"),
            Self::InvalidPhase => (400, "invalid_request_error", None, "invalid_phase"),
            Self::TooLarge(_) => (413, "invalid_request_error", None, "too_large"),
            Self::TooManySequences(_) => (400, "invalid_request_error", None, "too_many_sequences"),
            Self::Shed(shed) => (429, "rate_limit_error", None, shed.code()),
            Self::Queue(QueueRefusal::Timeout) => {
                (503, "service_unavailable_error", None, QueueRefusal::Timeout.code())
            }
            Self::Queue(refusal) => (429, "rate_limit_error", None, refusal.code()),
            Self::NoEndpoint => (503, "service_unavailable_error", None, "no_endpoint"),
            Self::WrongEndpoint => (503, "service_unavailable_error", None, "wrong_endpoint"),
            Self::KvLeaseOver => (503, "service_unavailable_error", None, "kv_lease_over"),
            Self::PrefillFailed => (503, "service_unavailable_error", None, "prefill_failed"),
            Self::NotConfigured(_) => (503, "service_unavailable_error", None, "not_configured"),
        }
    }

    /// The error's text for people.
    #[must_use]
    pub fn message(&self) -> String {
        match self {
            Self::InvalidJson(why) => why.clone(),
            Self::InvalidForm(error) => error.to_string(),
            Self::UnknownPath => "this path is not one of an inference API".to_owned(),
            Self::Upgrade => "this gateway does not forward upgrades to other protocols".to_owned(),
            Self::ContentEncoding => "the request body must not be compressed".to_owned(),
            Self::MissingModel => "the request body must have a string `model`".to_owned(),
            Self::UnknownModel { model, known } => {
                format!("the model `{model}` does not exist; known models: {}", known.join(", "))
            }
            Self::UnknownResponse(id) => format!(
                "Response with id '{id}' not found: it is not known which server keeps it, or that server is gone"
            ),
            Self::InvalidPhase => "x-pd-phase must be `prefill` or `decode`".to_owned(),
            Self::TooLarge(limit) => format!("the request body is larger than {limit} bytes"),
            Self::TooManySequences(limit) => format!("a request may have {limit} prompts or answers at most"),
            Self::Queue(QueueRefusal::Timeout) => "no prefill endpoint had room in time".to_owned(),
            Self::Shed(Shed::Deadline) | Self::Queue(QueueRefusal::Deadline) => {
                "the prompt cannot be computed by the deadline".to_owned()
            }
            Self::Shed(_) | Self::Queue(_) => "the model is overloaded; try again later".to_owned(),
            Self::NoEndpoint => "no endpoint is ready for this model".to_owned(),
            Self::WrongEndpoint => {
                "the gateway does not have the endpoints of this model; the Service behind its route may lead to another port"
                    .to_owned()
            }
            Self::KvLeaseOver => {
                "the answer began later than the KV cache of its prompt was kept for, and may be wrong; try again"
                    .to_owned()
            }
            Self::PrefillFailed => "no prefill endpoint could compute the prompt".to_owned(),
            Self::NotConfigured(why) => format!("the prefill/decode filter has no valid configuration: {why}"),
        }
    }

    /// Seconds after which another try may be worth it.
    fn retry_after(&self) -> u64 {
        match self {
            Self::Queue(QueueRefusal::Requests(seconds) | QueueRefusal::Bytes(seconds)) => *seconds,
            _ => 1,
        }
    }

    /// The reason code.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        self.parts().3
    }

    /// Status of the answer.
    pub(super) fn status(&self) -> u16 {
        self.parts().0
    }

    /// The answer, as clients of that API read errors.
    #[must_use]
    pub fn reply(&self, form: ErrorForm) -> Reply {
        let (status, kind, param, reason) = self.parts();
        let body = form.body(kind, anthropic_type(status), &self.message(), param, reason);
        let mut headers = vec![("content-type", "application/json".to_owned()), (REASON_HEADER, reason.to_owned())];
        if matches!(status, 429 | 503) {
            headers.push(("retry-after", self.retry_after().to_string()));
        }
        if matches!(self, Self::ContentEncoding) {
            headers.push(("accept-encoding", "identity".to_owned()));
        }
        if matches!(self, Self::Shed(_) | Self::Queue(_)) {
            headers.push((DROPPED_HEADER, reason.to_owned()));
        }
        Reply { status, headers, body, reason }
    }
}
