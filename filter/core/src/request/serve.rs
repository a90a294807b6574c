//! How a request is served after its body was read: by two legs or by one, and which endpoint gets the first leg.

use super::effect::{EXPLAIN, Effect};
use super::head::Phase;
use super::parsed::{ParsedRequest, ScannedBody};
use super::route::{Prefill, Route, forward};
use super::state::Split;
use super::step::Step;
use super::stored::keeper;
use super::waiting::{may_wait, split_or_wait};
use crate::choose::admission::Shed;
use crate::choose::decider::{Schedule, WholeReason};
use crate::choose::scheduler::{Pick, Scheduler};
use crate::choose::split_cost::Ahead;
use crate::config::{self, EXPLAIN_HEADER, OnPrefillFailure};
use crate::endpoints::candidates::Candidates;
use crate::metrics::Metric;
use crate::prefix::index::EndpointIndex;
use crate::request::reply::Rejection;
use crate::time::Monotonic;
use crate::wire::EndpointId;
use crate::workers::worker::Worker;

/// The legs of a request.
enum Legs {
    /// One leg, by this route.
    One(Route),
    /// Two legs, the prefill leg at this endpoint.
    Two(Pick),
}

/// Serves a request whose body was complete at `arrival`. Where a trusted header asks for it, explains the choice.
pub(super) fn serve(
    worker: &mut Worker,
    parsed: ParsedRequest,
    body: &ScannedBody<'_>,
    arrival: Monotonic,
    now: Monotonic,
) -> Step {
    let is_asked = parsed.head.config.trusts(EXPLAIN_HEADER) && parsed.head.headers.get(EXPLAIN_HEADER).is_some();
    let explained = is_asked.then(|| parsed.scheduler(worker, now).explain(&parsed.served.candidates, &parsed.prompt));
    let legs = choose_legs(worker, &parsed, now);
    if let Ok(Legs::Two(pick)) = &legs {
        worker.state.table.gave(&parsed.served.candidates, pick.endpoint, parsed.kv_tokens() as f64);
    }
    let started = match legs {
        Ok(Legs::One(route)) => forward(worker, &parsed, route, now),
        Ok(Legs::Two(pick)) if may_wait(worker, &parsed, pick) => {
            split_or_wait(worker, parsed, pick, body, arrival, now)
        }
        Ok(Legs::Two(pick)) => {
            Split { parsed, tried: Vec::new(), refusal: None, started: now }.start(worker, pick, body, now)
        }
        Err(rejection) => Err(rejection),
    };
    let step = Step::or_reject(started, worker);
    step.after(explained.map(|text| Effect::SetState(EXPLAIN, text.into_bytes())))
}

fn choose_legs(worker: &mut Worker, parsed: &ParsedRequest, now: Monotonic) -> Result<Legs, Rejection> {
    let candidates = &parsed.served.candidates;
    let hint = parsed.head.prefiller.as_ref().map(|ids| hinted(worker, ids, candidates));
    if hint == Some(None) && parsed.head.phase.is_none() {
        worker.counts.count(Metric::HintsIgnored);
    }
    let scheduler = parsed.scheduler(worker, now);
    let chosen = match parsed.head.phase {
        Some(Phase::Prefill) => prefill_only(&scheduler, parsed).map(Legs::One),
        Some(Phase::Decode) => decode_only(&scheduler, parsed).map(Legs::One),
        None => match &parsed.previous_id {
            Some(id) => Some(Legs::One(at_keeper(worker, &scheduler, parsed, id)?)),
            None => by_content(worker, &scheduler, parsed, hint.flatten())?,
        },
    };
    chosen.ok_or(Rejection::NoEndpoint)
}

/// A trusted header marks the request as a prefill leg.
fn prefill_only(scheduler: &Scheduler<'_>, parsed: &ParsedRequest) -> Option<Route> {
    let among = &parsed.served.candidates.prefill;
    let pick = scheduler.pick_by_cost(among, &parsed.prompt, &[])?;
    let alternates = scheduler.alternates(among, &parsed.prompt, pick.endpoint);
    Some(one_leg(parsed, (Metric::RequestsPrefillOnly, "phase_header"), pick, alternates))
}

/// A trusted header marks the request as a decode leg.
fn decode_only(scheduler: &Scheduler<'_>, parsed: &ParsedRequest) -> Option<Route> {
    let candidates = &parsed.served.candidates;
    let among = if candidates.decode.is_empty() { &candidates.whole } else { &candidates.decode };
    let (pick, alternates) = scheduler.pick_decode(among, &parsed.prompt, &[])?;
    Some(one_leg(parsed, (Metric::RequestsDecodeOnly, "phase_header"), pick, alternates))
}

/// Routes a request that continues a stored response to the only endpoint that keeps the response.
fn at_keeper(worker: &Worker, scheduler: &Scheduler<'_>, parsed: &ParsedRequest, id: &str) -> Result<Route, Rejection> {
    let keeper = keeper(worker, id, parsed.served.candidates.without_prompt())?;
    let pick = scheduler.pick(keeper, &parsed.prompt);
    Ok(one_leg(parsed, (Metric::RequestsDecodeOnly, WholeReason::Stored.code()), pick, Vec::new()))
}

/// No header says how to serve the request. A `hint` is the prefill endpoint that a trusted header names.
fn by_content(
    worker: &Worker,
    scheduler: &Scheduler<'_>,
    parsed: &ParsedRequest,
    hint: Option<EndpointIndex>,
) -> Result<Option<Legs>, Rejection> {
    let (candidates, prompt) = (&parsed.served.candidates, &parsed.prompt);
    let hinted = hint.and_then(|endpoint| scheduler.pick_by_cost(&[endpoint], prompt, &[]));
    let unhinted = || {
        let is_compared = parsed.pool().split == config::Split::Cost && parsed.pool().queue.is_on;
        let priority = parsed.head.claims.priority;
        let ahead = if is_compared { worker.ahead(candidates, priority) } else { Ahead::default() };
        scheduler.schedule_behind(candidates, prompt, ahead)
    };
    let schedule = hinted.map_or_else(unhinted, Schedule::Split);
    if let (Some(deadline), Schedule::Split(pick) | Schedule::Whole(pick, _)) = (parsed.head.claims.deadline, schedule)
        && let Some(state) = scheduler.table.get(pick.endpoint)
        && state.work(scheduler.now) + pick.seconds > deadline.as_secs_f64()
    {
        return Err(Rejection::Shed(Shed::Deadline));
    }
    Ok(match schedule {
        Schedule::Nobody => None,
        Schedule::Split(pick) => Some(Legs::Two(pick)),
        // What follows where every prefill leg fails follows where there is nobody to send one to.
        Schedule::Whole(_, WholeReason::NoPrefill) if parsed.pool().on_prefill_failure == OnPrefillFailure::Fail => {
            return Err(Rejection::PrefillFailed);
        }
        Schedule::Whole(pick, reason) => {
            let alternates = scheduler.alternates(&candidates.whole, prompt, pick.endpoint);
            Some(Legs::One(one_leg(parsed, (Metric::RequestsDecodeOnly, reason.code()), pick, alternates)))
        }
    })
}

/// A request that one endpoint serves alone.
fn one_leg(
    parsed: &ParsedRequest,
    (decision, reason): (Metric, &'static str),
    pick: Pick,
    alternates: Vec<EndpointIndex>,
) -> Route {
    Route { decision, reason, pick, alternates, prefill: Prefill::Own, edit: parsed.plain_edit() }
}

/// The prefill endpoint that a trusted header names, if it is one of the candidates. A name without a rank stands for any
/// rank.
fn hinted(worker: &Worker, ids: &[EndpointId], candidates: &Candidates) -> Option<EndpointIndex> {
    let is_meant = |id: &EndpointId, index: EndpointIndex| {
        let found = worker.state.table.get(index).map(|state| state.endpoint.id());
        found.is_some_and(|found| found.address == id.address && (id.rank.is_none() || id.rank == found.rank))
    };
    ids.iter().find_map(|id| candidates.prefill.iter().copied().find(|index| is_meant(id, *index)))
}
