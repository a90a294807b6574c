//! The state Waiting: the request waits until a prefill endpoint has room for it.

use super::effect::{Effect, Flow, WAIT_MS};
use super::parsed::{ParsedRequest, ScannedBody};
use super::state::{Split, State, Waiting};
use super::step::Step;
use crate::choose::scheduler::Pick;
use crate::endpoints::candidates::Candidates;
use crate::endpoints::pairings::Partner;
use crate::engine::LegOrder;
use crate::metrics::Metric;
use crate::request::reply::{QueueRefusal, Rejection};
use crate::time::Monotonic;
use crate::workers::wait::{Ask, Full};
use crate::workers::worker::Worker;

/// Whether a request whose first choice is this endpoint waits for room.
///
/// - An engine that wants both legs at once needs a decode endpoint too when it begins.
/// - A trusted header that names an endpoint, or restricts the endpoints, has taken the choice already.
/// - Where an aggregated endpoint may serve the request as well, the choice is taken when it comes.
pub(super) fn may_wait(worker: &Worker, parsed: &ParsedRequest, pick: Pick) -> bool {
    let candidates = &parsed.served.candidates;
    let has_aggregated = candidates.compute.len() != candidates.prefill.len();
    let legs = worker.state.table.get(pick.endpoint).map(|state| state.engine.protocol().legs);
    parsed.pool().queue.is_on
        && legs != Some(LegOrder::Concurrent)
        && parsed.head.prefiller.is_none()
        && parsed.head.subset.is_none()
        && !has_aggregated
}

/// A request that is to be split goes to a prefill endpoint with room, or waits for one.
pub(super) fn split_or_wait(
    worker: &mut Worker,
    mut parsed: ParsedRequest,
    pick: Pick,
    body: &ScannedBody<'_>,
    arrival: Monotonic,
    now: Monotonic,
) -> Result<Step, Rejection> {
    // It waits for the endpoints of the pairing whose turn it was: one that has room may be of a pairing that got its share.
    let pairing = worker.state.table.get(pick.endpoint).map(|state| Partner::of(state).key());
    let pairing = pairing.filter(|_| !parsed.served.candidates.pairings.is_empty());
    if let Some(those) = pairing.and_then(|key| parsed.served.candidates.of_pairing(key)) {
        parsed.served.candidates = those;
    }
    let scheduler = parsed.scheduler(worker, now);
    let Candidates { decode, prefill, .. } = &*parsed.served.candidates;
    let has_room = || {
        scheduler.has_room(pick.endpoint, pick.seconds)
            && scheduler.decode_room(decode, prefill).fits(parsed.prompt.tokens)
    };
    if worker.state.waiting.is_empty() && has_room() {
        worker.counts.count(Metric::BoundAtOnce);
        return Split { parsed, tried: Vec::new(), refusal: None, started: now }.start(worker, pick, body, now);
    }
    let ask = Ask {
        candidates: &parsed.served.candidates,
        pairing,
        model: &parsed.served.model,
        prompt: &parsed.prompt,
        priority: parsed.head.claims.priority,
        fairness: parsed.head.claims.fairness,
        body_bytes: parsed.body_bytes,
        arrival,
        deadline: parsed.head.claims.deadline,
    };
    let (id, endpoint) = worker.wait(&ask, now).map_err(|full| {
        Rejection::Queue(match full {
            Full::Requests(seconds) => QueueRefusal::Requests(seconds),
            Full::Bytes(seconds) => QueueRefusal::Bytes(seconds),
            Full::Deadline => QueueRefusal::Deadline,
        })
    })?;
    let waiting = Waiting { parsed, id, arrival };
    match endpoint {
        Some(endpoint) => {
            let pick = waiting.parsed.scheduler(worker, now).pick(endpoint, &waiting.parsed.prompt);
            waiting.bind(worker, pick, body, now)
        }
        None => Ok(Step::new(State::Waiting(Box::new(waiting)), Flow::Pause, Vec::new())),
    }
}

impl Waiting {
    /// The stream ended.
    pub(super) fn end(&self, worker: &mut Worker) {
        worker.counts.count(Metric::WaitsLeft);
        worker.stop_waiting(self.id);
    }

    /// The request goes to an endpoint.
    pub(super) fn bind(
        self,
        worker: &mut Worker,
        pick: Pick,
        body: &ScannedBody<'_>,
        now: Monotonic,
    ) -> Result<Step, Rejection> {
        let waited = worker.bind(self.id, pick.seconds, now).unwrap_or_default();
        let ms = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
        let mut effects = Vec::new();
        if waited.is_zero() {
            worker.counts.count(Metric::BoundAtOnce);
        } else {
            worker.counts.count(Metric::BoundLater);
            worker.counts.record(
                match self.parsed.head.claims.priority {
                    1.. => Metric::WaitMsHigh,
                    0 => Metric::WaitMsNormal,
                    _ => Metric::WaitMsLow,
                },
                ms,
            );
            worker.record_wait(&self.parsed.served.candidates.pool, ms);
            effects.push(Effect::SetState(WAIT_MS, ms.to_string().into_bytes()));
        }
        let split = Split { parsed: self.parsed, tried: Vec::new(), refusal: None, started: now };
        let step = split.start(worker, pick, body, now);
        Ok(Step::or_reject(step, worker).after(effects))
    }
}
