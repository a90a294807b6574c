//! The states of a request, and the data of each. The file of a state has the transitions of that state.

use core::time::Duration;

use super::assignment::Assignment;
use super::head::RequestHead;
use super::kv_lease::KvLease;
use super::parsed::ParsedRequest;
use super::response_editor::ResponseEditor;
use crate::choose::scheduler::Pick;
use crate::endpoints::beliefs::Belief;
use crate::endpoints::pairings::Partner;
use crate::endpoints::table::EndpointRef;
use crate::prefix::hash::BlockHash;
use crate::request::reply::Reply;
use crate::time::Monotonic;

/// State of a request. Each state has a file with its transitions.
#[derive(Debug, Default)]
pub(super) enum State {
    /// No event has come yet.
    #[default]
    New,
    /// The headers are there, the body is not complete.
    Reading(Box<Reading>),
    /// The request waits until an endpoint is ready that could serve it.
    Parked(Box<Parked>),
    /// The request waits until a prefill endpoint has room.
    Waiting(Box<Waiting>),
    /// The request waits for its prefill leg.
    Prefilling(Box<Prefilling>),
    /// An engine endpoint has the request.
    Forwarded(Box<Forwarded>),
    /// An engine endpoint has the request. Nothing is counted for it, but the response is to say which endpoint served.
    Watched,
    /// No event changes anything any more.
    Over,
}

/// The headers are there, the body is not complete.
#[derive(Debug)]
pub(super) struct Reading {
    pub(super) head: RequestHead,
}

/// A request for which no endpoint was ready. Its body is complete and stays with Envoy.
#[derive(Debug)]
pub(super) struct Parked {
    pub(super) reading: Reading,
    /// Its number among the waiting requests.
    pub(super) id: u64,
    pub(super) arrival: Monotonic,
}

/// A request that waits until a prefill endpoint has room. Its body stays with Envoy.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) parsed: ParsedRequest,
    /// Its number among the waiting requests.
    pub(super) id: u64,
    pub(super) arrival: Monotonic,
}

/// A request that waits for its prefill leg.
#[derive(Debug)]
pub(super) struct Prefilling {
    pub(super) split: Split,
    pub(super) prefiller: Prefiller,
    /// The leg; none yet while the endpoint's bootstrap server is asked for the engine's id.
    pub(super) leg: Option<u64>,
    /// When the call was sent.
    pub(super) sent: Monotonic,
}

/// A request that two legs serve.
#[derive(Debug)]
pub(super) struct Split {
    pub(super) parsed: ParsedRequest,
    /// Prefill endpoints that failed.
    pub(super) tried: Vec<EndpointRef>,
    /// An endpoint's refusal, while another one is asked.
    pub(super) refusal: Option<(EndpointRef, Reply)>,
    /// When the first endpoint was chosen.
    pub(super) started: Monotonic,
}

/// The prefill endpoint that was chosen.
#[derive(Clone, Debug)]
pub(super) struct Prefiller {
    pub(super) pick: Pick,
    pub(super) endpoint: EndpointRef,
    /// Which decode endpoints can take over from it.
    pub(super) partner: Partner,
    /// Blocks of the prompt that it did not hold before the leg, in case that it refuses the prompt.
    pub(super) new_blocks: Vec<BlockHash>,
    /// What it was believed to hold of the prompt before the leg.
    pub(super) belief: Belief,
}

/// A request that an engine endpoint has.
#[derive(Debug)]
pub(super) struct Forwarded {
    pub(super) assignment: Assignment,
    /// Endpoints that Envoy may go on to.
    pub(super) alternates: Vec<EndpointRef>,
    /// The prefill leg, where the engine wants both legs at once and the leg is in flight.
    pub(super) concurrent_prefill: Option<ConcurrentPrefill>,
    /// Whether a prefill endpoint keeps KV blocks for the decode endpoint, until their time limit if it refuses the request.
    pub(super) strands_if_refused: bool,
    /// The prefill endpoint whose KV cache the decode endpoint fetches.
    pub(super) handed_over_by: Option<EndpointRef>,
    /// The KV lease of that KV cache, until the answer is known to be in time.
    pub(super) kv_lease: Option<KvLease>,
    /// Whether the decode endpoint computes the prompt a second time.
    pub(super) is_kv_missing: bool,
    /// Editor of the response's body; `None` where the body is not read.
    pub(super) editor: Option<Box<ResponseEditor>>,
    /// Whether the usage in the response shows that the KV cache came.
    pub(super) is_judged: bool,
    /// What the endpoint was believed to hold of the prompt, where it serves the request whole and its usage will tell.
    pub(super) belief: Option<Belief>,
    /// The endpoint of which the response is one of the few streams that are read for what was cached.
    pub(super) reads_stream_of: Option<EndpointRef>,
    /// Whether a trusted header restricted the endpoints, so that the answer names the endpoint that served.
    pub(super) is_restricted: bool,
    pub(super) decode_leg: DecodeLeg,
    pub(super) response: Response,
    /// Whether an endpoint answered 200.
    pub(super) is_accepted: bool,
    /// Whether the response's body has begun.
    pub(super) has_first_byte: bool,
}

/// When the decode leg began, and how long its endpoint may be silent.
#[derive(Clone, Copy, Debug)]
pub(super) struct DecodeLeg {
    pub(super) started: Monotonic,
    /// When the request's first endpoint was chosen.
    pub(super) chosen: Monotonic,
    /// Number of the decision that the next report names; `None` where it names none.
    pub(super) recorded: Option<u64>,
    /// As long as a prefill leg of the same prompt may take there.
    pub(super) silent_after: Duration,
    /// Whether the client wants a stream, which begins with the first token.
    pub(super) is_stream: bool,
}

/// A prefill leg in flight beside its decode leg.
#[derive(Clone, Debug)]
pub(super) struct ConcurrentPrefill {
    pub(super) endpoint: EndpointRef,
    pub(super) leg: u64,
    pub(super) started: Monotonic,
    /// As [`Prefiller::new_blocks`].
    pub(super) new_blocks: Vec<BlockHash>,
    /// As [`Prefiller::belief`].
    pub(super) belief: Belief,
}

/// How far the response's headers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Response {
    Awaited,
    /// The filter holds them until the prefill leg ends.
    Held,
    /// The client has them.
    Passed,
}
