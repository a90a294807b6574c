//! Effects: acts that core asks the shell to do for a request, in their order.

use core::time::Duration;

use crate::body::splice::HeadEdit;
use crate::config::Config;
use crate::headers::Headers;
use crate::metrics::Metric;
use crate::request::reply::Reply;

/// Filter state that the route copies into the destination header: `ip:port[,ip:port…]`.
pub const DESTINATION: &str = "pd.destination";
/// Filter state that the route copies into `x-data-parallel-rank`: the rank of the chosen endpoint. Unset where the
/// endpoint has no rank.
pub const RANK: &str = "pd.rank";
/// Filter state that the route copies into `x-prefiller-host-port`: `ip:port` of the prefill endpoint, for a routing sidecar
/// that runs the prefill leg. Unset for other engines.
pub const PREFILLER: &str = "pd.prefiller";
/// Filter state that the route copies into `x-envoy-retry-on`: the failure at which Envoy may send the request once more,
/// beside those at which nothing was sent. Unset where the request must not be sent twice.
pub const RETRY_ON: &str = "pd.retry_on";
/// Filter state that the route copies into `x-envoy-max-retries`, in place of the route's own number. Set with [`RETRY_ON`].
pub const MAX_RETRIES: &str = "pd.max_retries";
/// Filter state for the access log: `split`, `decode_only`, `prefill_only`, `passed` or `rejected`.
pub const DECISION: &str = "pd.decision";
/// Filter state for the access log: the reason code of the decision or of the error. Unset for `passed`, except for the
/// filter's own list of models.
pub const REASON: &str = "pd.reason";
/// Filter state for the access log: `ip:port` of the prefill endpoint. Unset where no prefill leg was sent.
pub const PREFILL: &str = "pd.prefill";
/// Filter state for the access log: `ip:port` of the endpoint that was chosen to generate. Envoy may have gone on to an
/// alternate.
pub const DECODE: &str = "pd.decode";
/// Filter state for the access log: matched tokens of the endpoint that computed the prompt, by the index.
pub const MATCHED_TOKENS: &str = "pd.matched_tokens";
/// Filter state for the access log: milliseconds from the choice of the first prefill endpoint to the end of the prefill leg
/// that ended well. Unset without one.
pub const PREFILL_MS: &str = "pd.prefill_ms";
/// Filter state for the access log: milliseconds that the request waited in the gateway for a prefill endpoint with room.
/// Unset where the request did not wait.
pub const WAIT_MS: &str = "pd.wait_ms";
/// Filter state for a response header: a line of text with the candidates and the reason of the choice. Set where the
/// request has [`EXPLAIN_HEADER`](crate::config::EXPLAIN_HEADER) and the configuration trusts that header.
pub const EXPLAIN: &str = "pd.explain";
/// All filter states that a request may get.
pub const STATES: &[&str] = &[
    DESTINATION,
    RANK,
    PREFILLER,
    RETRY_ON,
    MAX_RETRIES,
    DECISION,
    REASON,
    PREFILL,
    DECODE,
    MATCHED_TOKENS,
    PREFILL_MS,
    WAIT_MS,
    EXPLAIN,
];

/// Response header with the value `missing`: the prefill answer had no usable KV parameters, so that the decode endpoint
/// computed the prompt a second time.
pub const KV_HEADER: &str = "x-pd-kv";
/// Response header with `ip:port` of the endpoint that answered, for a request that a trusted header restricted to a subset.
pub const SERVED_HEADER: &str = "x-gateway-destination-endpoint-served";

/// What the shell returns from the callback that brought an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Envoy continues the stream.
    Continue,
    /// The stream waits: for more of the body, for the end of a call, or for its own end after a reply.
    Pause,
}

/// An act of the shell.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Remove a request header. Only [`Request::headers`](super::Request::headers) asks for it.
    RemoveHeader(Vec<u8>),
    /// Set the request's `:path`. Only [`Request::headers`](super::Request::headers) asks for it.
    SetPath(Vec<u8>),
    /// Set a request header, in place of all of that name. Only [`Request::headers`](super::Request::headers) asks for it.
    SetHeader(String, Vec<u8>),
    /// Set the filter state of this name, one of [`STATES`].
    SetState(&'static str, Vec<u8>),
    /// Edit the front of the buffered request body, which is complete.
    EditBody(HeadEdit),
    /// Start a call. When the call ends, the shell calls [`Request::prefill_answer`](super::Request::prefill_answer); it
    /// also does so at once, with `NotStarted`, where the host refuses to start the call.
    Call(Call),
    /// Remove a response header. Only [`Request::response_headers`](super::Request::response_headers) asks for it.
    RemoveResponseHeader(&'static str),
    /// Edit the part of the response's body that the callback has.
    EditResponse(HeadEdit),
    /// Add a response header. Only [`Request::response_headers`](super::Request::response_headers) asks for it.
    AddResponseHeader(&'static str, String),
    /// Log a warning. Core asks for it once per change.
    Warn(String),
    /// Let the response go on whose headers [`Request::response_headers`](super::Request::response_headers) held back.
    ResumeResponse,
    /// Answer the client. It is the last effect.
    Reply(Reply),
}

impl Effect {
    /// The edit of the request body; `None` if it changes nothing.
    pub(super) fn edit_body(edit: HeadEdit) -> Option<Self> {
        (!edit.is_none()).then_some(Self::EditBody(edit))
    }

    /// Lets Envoy send a request once more whose connection ended before the answer began. Once only, so that a request that ends
    /// engines ends no third one.
    pub(super) fn may_repeat() -> [Self; 2] {
        [Self::SetState(RETRY_ON, b"reset".into()), Self::SetState(MAX_RETRIES, b"1".into())]
    }

    /// The decision for the access log, named as the metric that counts it.
    pub(super) fn decision(decision: Metric) -> Self {
        Self::SetState(DECISION, decision_name(decision).into())
    }
}

/// The name of a decision in the access log and in reports: the value of the metric's tag.
pub(super) fn decision_name(decision: Metric) -> &'static str {
    decision.name().rsplit('=').next().unwrap_or_default()
}

/// An HTTP call of the filter: a prefill leg, or the question for an engine's id before it.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// Envoy cluster that the call goes to.
    pub cluster: String,
    /// Headers, pseudo-headers included.
    pub headers: Headers,
    /// Body; empty where the call has none.
    pub body: Vec<u8>,
    /// Time limit.
    pub timeout: Duration,
}

impl Call {
    /// The question for a path of one server, `ip:port`, in that cluster.
    pub(super) fn question(config: &Config, cluster: &str, path: &str, server: &str, timeout: Duration) -> Self {
        let own = [(":method", "GET"), (":path", path), (":authority", server), (":scheme", "http")];
        let headers = Headers::from_pairs(own.into_iter().chain([(config.destination_header.as_str(), server)]));
        Self { cluster: cluster.to_owned(), headers, body: Vec::new(), timeout }
    }
}

/// What an event leads to.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// What the shell returns from the callback. After the end of a call, `Continue` means: resume the request.
    pub flow: Flow,
    /// What the shell does before it returns.
    pub effects: Vec<Effect>,
}

impl Outcome {
    /// Envoy continues the stream. The shell has nothing else to do.
    pub(super) const GO_ON: Self = Self { flow: Flow::Continue, effects: Vec::new() };
    /// The stream waits. The shell has nothing else to do.
    pub(super) const WAIT: Self = Self { flow: Flow::Pause, effects: Vec::new() };
}
