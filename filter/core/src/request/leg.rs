//! One prefill leg: its call, its place in the ledger, and how it ended.

use core::time::Duration;

use super::route::{destination, enter};
use super::{Call, Effect, PREFILL_MS, PrefillAnswer};
use crate::body::Scan;
use crate::choose::scheduler::{Pick, Scheduler};
use crate::endpoints::table::EndpointRef;
use crate::engine::{self, Pair};
use crate::metrics::Metric;
use crate::request::intake::{Work, leg_headers};
use crate::request::reply::Reply;
use crate::workers::worker::Worker;

/// A prefill leg as a call, and its number in the ledger.
pub(super) fn start_leg(
    worker: &mut Worker,
    work: &Work,
    tried: &[EndpointRef],
    pick: Pick,
    pair_id: Option<u64>,
    (body, scan): (&[u8], &Scan),
    now: Duration,
) -> (Call, u64) {
    let leg = worker.next_leg();
    let pool = work.pool();
    let mut alternates = Vec::new();
    if pair_id.is_none() {
        // A host that Envoy does not know yet is skipped: the next one must be a prefill endpoint too. Where the decode
        // leg has been told which one it is, no other will do.
        let scheduler = Scheduler { table: &worker.state.table, index: &worker.state.index, pool, now };
        alternates = scheduler.alternates(&work.served.candidates.prefill, &work.prompt, pick.endpoint);
        alternates.retain(|at| worker.state.table.refer(*at).is_some_and(|at| !tried.contains(&at)));
    }
    let destination = destination(worker, pick.endpoint, alternates.into_iter());
    let id = pair_id.unwrap_or_else(|| worker.pair_id(work.headers.get("x-request-id").unwrap_or_default(), now));
    let engine = worker.state.table.get(pick.endpoint).map_or(pool.engine, |slot| slot.engine);
    let model = work.served.rewrite.as_deref();
    let body =
        with_pair(worker, work, pick, id, |pair| engine::prefill_body(engine, work.api, body, scan, pair, model));
    let mut rank = None;
    if let Some(slot) = worker.state.table.get_mut(pick.endpoint) {
        slot.health.sent(now);
        rank = slot.endpoint.rank;
    }
    if let Some(endpoint) = worker.state.table.refer(pick.endpoint) {
        worker.prefill_started(endpoint, leg, pick.seconds, now, now.saturating_add(pool.prefill_timeout));
    }
    enter(worker, pick.endpoint, &work.prompt);
    worker.counts.add(Metric::PrefillInFlight, 1);
    let headers = leg_headers(&work.headers, &work.config, destination.as_bytes(), rank);
    let timeout = pool.prefill_timeout;
    (Call { cluster: work.config.cluster.clone(), headers, body, timeout }, leg)
}

/// What is made of that which both legs are told of the prefill endpoint.
pub(super) fn with_pair<T: Default>(
    worker: &Worker,
    work: &Work,
    pick: Pick,
    id: u64,
    make: impl FnOnce(&Pair<'_>) -> T,
) -> T {
    let Some(slot) = worker.state.table.get(pick.endpoint) else { return T::default() };
    let engine_id = slot.engine_id.as_deref().unwrap_or_default();
    make(&Pair { bootstrap: slot.bootstrap, rank: slot.endpoint.rank, engine_id, id, batch: work.batch })
}

/// Takes a prefill leg out of the ledger and notes how it went; the seconds that the endpoint spent on it, where known.
pub(super) fn leg_ended(
    worker: &mut Worker,
    endpoint: EndpointRef,
    leg: u64,
    answer: &PrefillAnswer<'_>,
    now: Duration,
) -> Option<f64> {
    worker.counts.add(Metric::PrefillInFlight, -1);
    let fault = answer.fault();
    worker.counts.count(match (fault, answer) {
        (Some(Fault::NotStarted | Fault::Unreachable), _) => Metric::PrefillRefused,
        (Some(Fault::ServerError), _) => Metric::PrefillServerError,
        (None, PrefillAnswer::Answered { status: 200, .. }) => Metric::PrefillOk,
        (None, _) => Metric::PrefillClientError,
    });
    let seconds = worker.state.table.resolve(endpoint).and_then(|slot| slot.prefill.service_seconds(leg, now));
    worker.prefill_ended(endpoint, leg, now);
    match fault {
        Some(Fault::Unreachable) => {
            worker.failed(endpoint, now);
            if let Some(slot) = worker.state.table.resolve(endpoint) {
                slot.engine_id = None;
            }
        }
        Some(Fault::NotStarted) => {}
        Some(Fault::ServerError) | None => worker.answered(endpoint),
    }
    seconds
}

/// Nobody waits for a prefill leg any more.
pub(super) fn abandon(worker: &mut Worker, endpoint: EndpointRef, leg: u64, now: Duration) {
    worker.counts.add(Metric::PrefillInFlight, -1);
    worker.counts.count(Metric::KvStranded);
    worker.prefill_abandoned(endpoint, leg, now);
}

/// The time that a prefill leg took, as filter state.
pub(super) fn prefill_ms(worker: &mut Worker, started: Duration, now: Duration) -> Effect {
    let ms = u64::try_from(now.saturating_sub(started).as_millis()).unwrap_or(u64::MAX);
    worker.counts.record(Metric::PrefillMs, ms);
    Effect::SetState(PREFILL_MS, ms.to_string().into_bytes())
}

/// An engine's own answer to the prefill leg, for the client.
pub(super) fn engines_reply(status: u16, content_type: Option<&[u8]>, body: &[u8]) -> Reply {
    let content_type = content_type.and_then(|value| core::str::from_utf8(value).ok());
    let headers = vec![("content-type", content_type.unwrap_or("application/json").to_owned())];
    Reply { status, headers, body: body.to_vec(), reason: "prefill_answer" }
}

/// Why a prefill leg is worth another try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The host would not send it: too many headers, an open circuit breaker, no cluster.
    NotStarted,
    /// The endpoint did not answer: it is out for its next requests.
    Unreachable,
    /// It answered that it cannot now. Overload is no reason to stay away from it.
    ServerError,
}

impl PrefillAnswer<'_> {
    pub(super) fn fault(&self) -> Option<Fault> {
        match self {
            PrefillAnswer::NotStarted => Some(Fault::NotStarted),
            PrefillAnswer::None => Some(Fault::Unreachable),
            PrefillAnswer::Answered { status: 502..=504, body, .. } if is_envoys(body) => Some(Fault::Unreachable),
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
