//! One prefill leg: its call, its place in the ledger, and how it ended.

use super::effect::{Call, Effect};
use super::head::is_ours;
use super::parsed::{ParsedRequest, ScannedBody};
use super::route::{destination, millis};
use super::state::Split;
use crate::choose::scheduler::Pick;
use crate::config::Config;
use crate::endpoints::outliers::{ErrorClass, Leg};
use crate::endpoints::table::EndpointRef;
use crate::engine::{Pair, legs};
use crate::headers::Headers;
use crate::metrics::Metric;
use crate::request::reply::Reply;
use crate::time::Monotonic;
use crate::workers::worker::Worker;

/// How a call ended: a prefill leg, or the question for an engine's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefillAnswer<'a> {
    /// The host refused to start the call. That says nothing about the endpoint.
    NotStarted,
    /// The call ended without an answer.
    None,
    /// An answer came, from the engine or from Envoy.
    Answered {
        /// HTTP status.
        status: u16,
        /// `content-type`; `None` if the answer has none, or if the shell leaves it out because core does not read it
        /// (status 200).
        content_type: Option<&'a [u8]>,
        /// Body.
        body: &'a [u8],
    },
}

/// A prefill leg as a call, and its number in the ledger.
///
/// A `pair_id` is given where the decode leg names the endpoint already. Without one, the leg gets an id of its own and
/// alternates.
pub(super) fn start_leg(
    worker: &mut Worker,
    split: &Split,
    pick: Pick,
    pair_id: Option<u64>,
    body: &ScannedBody<'_>,
    now: Monotonic,
) -> (Call, u64) {
    let leg = worker.next_leg();
    let parsed = &split.parsed;
    let (pool, config) = (parsed.pool(), &parsed.head.config);
    let mut alternates = Vec::new();
    if pair_id.is_none() {
        // Envoy skips a host that it does not know yet, so the next name must be a prefill endpoint too. Where the decode
        // leg names the endpoint, no other endpoint will do.
        let scheduler = parsed.scheduler(worker, now);
        alternates = scheduler.alternates(&parsed.served.candidates.prefill, &parsed.prompt, pick.endpoint);
        alternates.retain(|index| worker.state.table.refer(*index).is_some_and(|it| !split.tried.contains(&it)));
    }
    let destination = destination(worker, pick.endpoint, alternates.into_iter());
    let id = pair_id.unwrap_or_else(|| worker.pair_id(parsed.head.request_id(), now));
    let protocol = worker.state.table.get(pick.endpoint).map_or(pool.engine, |state| state.engine).protocol();
    let model = parsed.served.rewrite.as_deref();
    let body = with_pair(worker, parsed, pick, id, |pair| {
        legs::prefill_body(protocol, parsed.api, body.bytes, &body.scan, pair, model)
    });
    let mut rank = None;
    let mut timeout = pool.prefill_timeout.of(pick.seconds);
    if let Some(state) = worker.state.table.get_mut(pick.endpoint) {
        state.health.sent(now);
        rank = state.endpoint.rank;
        timeout = pool.prefill_timeout.of(state.work(now) + pick.seconds);
    }
    if let Some(endpoint) = worker.state.table.refer(pick.endpoint) {
        worker.prefill_started(endpoint, leg, pick.seconds, now, now.saturating_add(timeout));
        worker.served.note(endpoint.key, |sums| sums.legs = sums.legs.saturating_add(1));
    }
    worker.counts.add(Metric::PrefillInFlight, 1);
    let path = leg_path(parsed);
    let headers = leg_headers(&parsed.head.headers, config, &path, destination.as_bytes(), rank);
    (Call { cluster: config.cluster.clone(), headers, body, timeout }, leg)
}

/// Makes bytes that depend on the prefill endpoint and the pairing of the legs; the default where the endpoint is gone.
pub(super) fn with_pair<T: Default>(
    worker: &Worker,
    parsed: &ParsedRequest,
    pick: Pick,
    id: u64,
    make: impl FnOnce(&Pair<'_>) -> T,
) -> T {
    let Some(state) = worker.state.table.get(pick.endpoint) else { return T::default() };
    let engine_id = state.engine_id.as_deref().unwrap_or_default();
    make(&Pair { bootstrap: state.bootstrap, rank: state.endpoint.rank, engine_id, id, batch: parsed.batch })
}

/// Facts of a prefill leg that ended.
#[derive(Debug)]
pub(super) struct LegEnd {
    /// Seconds that the endpoint spent on it, where known.
    pub(super) seconds: Option<f64>,
    /// A warning, where its answer ejects the endpoint.
    pub(super) warning: Option<Effect>,
    /// Whether the leg took longer than its limit at an endpoint that answers others. Another endpoint would need as long.
    pub(super) is_too_slow: bool,
}

/// Takes a prefill leg out of the ledger and notes how it went. A refusal says nothing of the endpoint yet: the caller
/// notes whether it is the endpoint's or the client's. A leg over its limit is no mark against an endpoint that answered
/// another leg since this one was `sent`.
pub(super) fn leg_ended(
    worker: &mut Worker,
    endpoint: EndpointRef,
    (leg, sent): (u64, Monotonic),
    answer: &PrefillAnswer<'_>,
    now: Monotonic,
) -> LegEnd {
    worker.counts.add(Metric::PrefillInFlight, -1);
    let fault = answer.fault();
    let state = worker.state.table.resolve(endpoint);
    let is_too_slow = fault == Some(Fault::TimedOut) && state.is_some_and(|state| state.answered_at > sent);
    worker.counts.count(match (fault, answer) {
        (Some(Fault::NotStarted), _) => Metric::PrefillNotSent,
        (Some(Fault::TimedOut), _) => Metric::PrefillTimedOut,
        (Some(Fault::Unreachable), _) => Metric::PrefillRefused,
        (Some(Fault::ServerError), _) => Metric::PrefillServerError,
        (None, PrefillAnswer::Answered { status: 200, .. }) => Metric::PrefillOk,
        (None, _) => Metric::PrefillClientError,
    });
    if matches!((fault, answer), (None, PrefillAnswer::Answered { status: 200, .. })) {
        worker.served.note(endpoint.key, |sums| sums.answered(millis(now.saturating_sub(sent))));
    }
    let seconds = worker.state.table.resolve(endpoint).and_then(|state| state.prefill.service_seconds(leg, now));
    match fault {
        None | Some(Fault::ServerError) => worker.prefill_answered(endpoint, leg, now),
        Some(_) => worker.prefill_ended(endpoint, leg, now),
    }
    let mut warning = None;
    match fault {
        Some(Fault::TimedOut) if is_too_slow => {}
        Some(Fault::Unreachable | Fault::TimedOut) => {
            if answer.is_refused_connection() {
                worker.failed_to_connect(endpoint, now);
            } else {
                worker.failed(endpoint, now);
            }
            if let Some(state) = worker.state.table.resolve(endpoint) {
                state.engine_id = None;
            }
        }
        Some(Fault::NotStarted) => {}
        Some(Fault::ServerError) | None if answer.is_refusal() => {}
        Some(Fault::ServerError) | None => {
            let error = answer.status().and_then(ErrorClass::of_status);
            warning = worker.judge_answer(endpoint, Leg::Prefill, error, now).map(Effect::Warn);
        }
    }
    LegEnd { seconds, warning, is_too_slow }
}

/// Notes that a prefill endpoint refused a request that another endpoint accepted. Returns a warning if that ejects the
/// endpoint.
pub(super) fn refused_alone(worker: &mut Worker, endpoint: EndpointRef, now: Monotonic) -> Option<Effect> {
    worker.judge_answer(endpoint, Leg::Prefill, Some(ErrorClass::Refusal), now).map(Effect::Warn)
}

/// The request ended before its prefill leg did.
pub(super) fn abandon(worker: &mut Worker, endpoint: EndpointRef, leg: u64, now: Monotonic) {
    worker.counts.add(Metric::PrefillInFlight, -1);
    worker.counts.count(Metric::KvStranded);
    worker.prefill_abandoned(endpoint, leg, now);
}

/// Reason of a reply that is an engine's own answer to the prefill leg.
pub(super) const PREFILL_ANSWER: &str = "prefill_answer";

/// An engine's own answer to the prefill leg, for the client.
pub(super) fn engines_reply(status: u16, content_type: Option<&[u8]>, body: &[u8]) -> Reply {
    let content_type = content_type.and_then(|value| core::str::from_utf8(value).ok());
    let headers = vec![("content-type", content_type.unwrap_or("application/json").to_owned())];
    Reply { status, headers, body: body.to_vec(), reason: PREFILL_ANSWER }
}

/// Why a prefill leg is worth another try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Envoy would not send it: too many headers, a full circuit breaker, no healthy host, no cluster.
    NotStarted,
    /// The endpoint did not answer. It is ejected.
    Unreachable,
    /// The endpoint did not answer within the leg's limit.
    TimedOut,
    /// The endpoint answered that it cannot compute the prompt now. It is not ejected for that.
    ServerError,
}

impl PrefillAnswer<'_> {
    /// HTTP status, if an answer came.
    fn status(&self) -> Option<u16> {
        if let Self::Answered { status, .. } = self { Some(*status) } else { None }
    }

    /// Whether Envoy could not connect to the endpoint.
    fn is_refused_connection(&self) -> bool {
        const REASON: &[u8] = b"connection failure";
        matches!(self, Self::Answered { status: 503, body, .. }
            if is_envoys(body) && body.windows(REASON.len()).any(|part| part == REASON))
    }

    /// Whether the endpoint closed the connection before it answered: as likely an idle connection's end that the leg met as
    /// the end of a process.
    pub(super) fn is_cut_off(&self) -> bool {
        const REASON: &[u8] = b"connection termination";
        matches!(self, Self::Answered { status: 502..=503, body, .. }
            if is_envoys(body) && body.windows(REASON.len()).any(|part| part == REASON))
    }

    /// Whether the engine refuses the request: with 4xx, other than those that mean "not now".
    pub(super) fn is_refusal(&self) -> bool {
        matches!(self.status(), Some(400..=499)) && self.fault().is_none()
    }

    /// Whether the call failed in a way that another endpoint may not; `None` for an engine's own answer.
    pub(super) fn fault(&self) -> Option<Fault> {
        match self {
            PrefillAnswer::NotStarted => Some(Fault::NotStarted),
            PrefillAnswer::None => Some(Fault::Unreachable),
            PrefillAnswer::Answered { status: 504, body: b"upstream request timeout", .. } => Some(Fault::TimedOut),
            PrefillAnswer::Answered { status: 502..=504, body, .. } if is_envoys(body) => {
                Some(if was_sent(body) { Fault::Unreachable } else { Fault::NotStarted })
            }
            PrefillAnswer::Answered { status: 500.. | 408 | 429, .. } => Some(Fault::ServerError),
            PrefillAnswer::Answered { .. } => None,
        }
    }
}

/// Whether an answer's body is Envoy's own: a connect failure, a reset or a time-out reaches a call-out as an answer.
pub(super) fn is_envoys(body: &[u8]) -> bool {
    const OWN: [&[u8]; 3] = [b"upstream connect error", b"upstream request timeout", b"no healthy upstream"];
    body.is_empty() || OWN.iter().any(|text| body.starts_with(text))
}

/// Whether Envoy sent the call to a host before it answered itself: not where a circuit breaker was full, or where no host
/// was healthy.
fn was_sent(envoys_body: &[u8]) -> bool {
    !(envoys_body.starts_with(b"no healthy upstream") || envoys_body.ends_with(b"reset reason: overflow"))
}

/// Headers of the client's request that do not belong on another one, beside pseudo-headers.
const NOT_FORWARDED: &[&[u8]] = &[
    b"accept-encoding", // the answer must be readable
    b"connection",
    b"content-length",
    b"expect",
    b"keep-alive",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
];

/// Header with the rank, where several ranks share an address.
const RANK_HEADER: &[u8] = b"x-data-parallel-rank";

/// The path at which engines have the request's API, with the configured prefix and the client's query: no route rewrites a
/// call's path.
fn leg_path(parsed: &ParsedRequest) -> Vec<u8> {
    let path = parsed.head.headers.get(":path").unwrap_or_default();
    let query = path.iter().position(|byte| *byte == b'?').and_then(|start| path.get(start..)).unwrap_or_default();
    [parsed.head.config.legs.path_prefix.as_bytes(), parsed.api.path().as_bytes(), query].concat()
}

/// Headers of the prefill leg: the client's, changed as configured, the leg's path, the destination, and the destination's
/// rank if it has one.
fn leg_headers(headers: &Headers, config: &Config, path: &[u8], destination: &[u8], rank: Option<u32>) -> Headers {
    const PSEUDO: &[&[u8]] = &[b":method", b":path", b":authority", b":scheme"];
    let forwarded = |name: &[u8]| {
        PSEUDO.contains(&name)
            || !(name.starts_with(b":")
                || name.starts_with(b"x-envoy-")
                || NOT_FORWARDED.contains(&name)
                || is_ours(name, config))
    };
    let own = (config.destination_header.as_bytes(), destination);
    let rank = rank.map(|rank| rank.to_string());
    let rank = rank.as_ref().map(|rank| (RANK_HEADER, rank.as_bytes()));
    // What the configuration copies may be a header that is not forwarded itself.
    let headers = config.legs.apply(headers.clone());
    let authority = config.legs.authority.as_deref().map(str::as_bytes);
    let kept = headers.iter().filter(|(name, _)| forwarded(name));
    let kept = kept.map(|(name, value)| match name {
        b":path" => (name, path),
        b":authority" => (name, authority.unwrap_or(value)),
        _ => (name, value),
    });
    Headers::from_pairs(kept.chain([own]).chain(rank))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leg_carries_the_clients_headers_and_none_of_ours() {
        let config = Config::parse(br#"{"destination_header":"x-custom"}"#).unwrap();
        let headers = [
            (":method", "POST"),
            (":path", "/p"),
            (":authority", "a"),
            (":scheme", "http"),
            (":protocol", "x"),
            ("authorization", "Bearer t"),
            ("x-request-id", "1"),
            ("x-request-id", "2"),
            ("content-length", "5"),
            ("accept-encoding", "gzip"),
            ("x-envoy-retry-on", "5xx"),
            ("x-pd-phase", "decode"),
            ("x-custom", "evil"),
            ("x-prefiller-host-port", "evil"),
        ];
        let leg = leg_headers(&Headers::from_pairs(headers), &config, b"/v1/x", b"10.0.0.1:1", Some(3));
        let names: Vec<_> = leg.iter().map(|(name, _)| core::str::from_utf8(name).unwrap()).collect();
        assert_eq!(
            names,
            [
                ":method",
                ":path",
                ":authority",
                ":scheme",
                "authorization",
                "x-request-id",
                "x-request-id",
                "x-custom",
                "x-data-parallel-rank"
            ]
        );
        assert_eq!(leg.get("x-data-parallel-rank"), Some(&b"3"[..]));
        assert_eq!(leg.get("x-custom"), Some(&b"10.0.0.1:1"[..]));
    }

    #[test]
    fn a_leg_carries_what_is_configured() {
        let text = br#"{"legs":{"authority":"engines.internal","headers":[
            {"name":"x-user","from":"x-envoy-user"},{"name":"x-pd-phase","value":"decode"},{"name":"x-a","value":"1"}]}}"#;
        let config = Config::parse(text).unwrap();
        let headers = [(":method", "POST"), (":path", "/p"), (":authority", "a"), ("x-envoy-user", "u"), ("x-a", "2")];
        let leg = leg_headers(&Headers::from_pairs(headers), &config, b"/llm/v1/x", b"10.0.0.1:1", None);
        let value = |name: &str| leg.get(name).map(|value| core::str::from_utf8(value).unwrap());
        assert_eq!((value(":authority"), value(":path")), (Some("engines.internal"), Some("/llm/v1/x")));
        assert_eq!((value("x-user"), value("x-a"), value("x-envoy-user")), (Some("u"), Some("1"), None));
        assert_eq!(value("x-pd-phase"), None, "what steers the filter never goes on");
    }
}
