//! What the filter does for a request: effects, which the shell carries out in their order.

use core::time::Duration;

use crate::body::splice::HeadEdit;
use crate::headers::Headers;
use crate::metrics::Metric;
use crate::request::reply::Reply;

/// Filter state that the route copies into the destination header: `ip:port[,ip:port…]`.
pub const DESTINATION: &str = "pd.destination";
/// Filter state that the route copies into `x-data-parallel-rank`: the rank behind the destination, if it has one.
pub const RANK: &str = "pd.rank";
/// Filter state that the route copies into `x-prefiller-host-port`, for a routing sidecar that runs the prefill leg.
pub const PREFILLER: &str = "pd.prefiller";
/// Filter state for the access log: `split`, `decode_only`, `prefill_only`, `passed` or `rejected`.
pub const DECISION: &str = "pd.decision";
/// Filter state for the access log: why, as a reason code.
pub const REASON: &str = "pd.reason";
/// Filter state for the access log: prefill endpoint.
pub const PREFILL: &str = "pd.prefill";
/// Filter state for the access log: decode endpoint that was chosen first.
pub const DECODE: &str = "pd.decode";
/// Filter state for the access log: prompt tokens thought to be cached where the prompt was computed.
pub const MATCHED_TOKENS: &str = "pd.matched_tokens";
/// Filter state for the access log: milliseconds from the first prefill leg to the decode leg.
pub const PREFILL_MS: &str = "pd.prefill_ms";
/// Filter state for an answer header: the candidates and why one of them was chosen, where a caller who is trusted to
/// asked by [`EXPLAIN_HEADER`](crate::config::EXPLAIN_HEADER).
pub const EXPLAIN: &str = "pd.explain";
/// Every filter state that a request may get.
pub const STATES: &[&str] =
    &[DESTINATION, RANK, PREFILLER, DECISION, REASON, PREFILL, DECODE, MATCHED_TOKENS, PREFILL_MS, EXPLAIN];

/// Answer header of a request whose prompt was computed twice, because the prefill leg's KV cache could not be handed
/// over: `missing`.
pub const KV_HEADER: &str = "x-pd-kv";
/// Answer header of a request whose endpoints a peer restricted: who served it.
pub const SERVED_HEADER: &str = "x-gateway-destination-endpoint-served";

/// What becomes of the callback that an event came with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// The stream goes on.
    Continue,
    /// The stream waits: for more of the body, for an answer, or for its end after a reply.
    Pause,
}

/// Something for the shell to do, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Remove a request header. Headers phase only.
    RemoveHeader(Vec<u8>),
    /// Set a filter state.
    SetState(&'static str, Vec<u8>),
    /// Edit the front of the buffered request body.
    EditBody(HeadEdit),
    /// Run a prefill leg, or ask a bootstrap server what the leg needs to know; the end of the call comes back as
    /// [`Request::prefill_answer`](super::Request::prefill_answer).
    Call(Call),
    /// Remove a header of the response whose headers are there.
    RemoveResponseHeader(&'static str),
    /// Edit the part of the response's body that is there.
    EditResponse(HeadEdit),
    /// Add a header to the response whose headers are there.
    AddResponseHeader(&'static str, String),
    /// Warn the operator that something is degraded: once per change.
    Warn(String),
    /// Let the response go on that [`Request::response_headers`](super::Request::response_headers) held back.
    ResumeResponse,
    /// Answer the client.
    Reply(Reply),
}

impl Effect {
    /// The edit of the request body; `None` if it changes nothing.
    pub(super) fn edit_body(edit: HeadEdit) -> Option<Self> {
        (!edit.is_none()).then_some(Self::EditBody(edit))
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

/// A prefill leg, or the question before it.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// Envoy cluster.
    pub cluster: String,
    /// Headers, pseudo-headers included.
    pub headers: Headers,
    /// Body; empty: none.
    pub body: Vec<u8>,
    /// Time limit.
    pub timeout: Duration,
}

/// What an event leads to.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// What becomes of the callback. In an answer's callback `Continue` means: resume the request.
    pub flow: Flow,
    /// What to do first.
    pub effects: Vec<Effect>,
}

impl Outcome {
    /// The stream goes on; nothing is to do.
    pub(super) const GO_ON: Self = Self { flow: Flow::Continue, effects: Vec::new() };
    /// The stream waits; nothing is to do.
    pub(super) const WAIT: Self = Self { flow: Flow::Pause, effects: Vec::new() };
}
