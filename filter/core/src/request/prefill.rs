//! A request that waits for its prefill leg: the order of the legs, another try, and the way on.

use core::time::Duration;
use std::sync::Arc;

use super::leg::{Fault, leg_ended, start_leg, with_pair};
use super::route::{Prefill, Route, enter};
use super::sent::Companion;
use super::{Call, Effect, Flow, KV_MISSING, Outcome, PrefillAnswer, QUESTION_TIMEOUT, Request, State};
use crate::body::json::Object;
use crate::body::{Scan, scan};
use crate::choose::scheduler::{Pick, Prompt, Scheduler};
use crate::config::OnPrefillFailure;
use crate::endpoints::candidates::{Candidates, Partner};
use crate::endpoints::table::EndpointRef;
use crate::endpoints::usage::Usage;
use crate::engine::{self, Handover, Shape};
use crate::metrics::Metric;
use crate::prefix::index::EndpointIndex;
use crate::request::intake::{Work, candidates, question_headers};
use crate::request::models::Served;
use crate::request::reply::Rejection;
use crate::wire::EndpointId;
use crate::workers::worker::Worker;

/// A request that waits for its prefill leg.
#[derive(Debug)]
pub(super) struct Prefilling {
    pub(super) work: Work,
    pub(super) tried: Vec<EndpointRef>,
    pub(super) pick: Pick,
    pub(super) endpoint: EndpointRef,
    pub(super) partner: Partner,
    /// The leg; none yet while the endpoint's bootstrap server is asked for the engine's id.
    pub(super) leg: Option<u64>,
    pub(super) started: Duration,
}

impl Request {
    pub(super) fn prefill_ended<B: AsRef<[u8]>>(
        &mut self,
        worker: &mut Worker,
        mut state: Prefilling,
        answer: PrefillAnswer<'_>,
        body: impl FnOnce() -> Option<B>,
        now: Duration,
    ) -> Outcome {
        let mut seconds = None;
        if let Some(leg) = state.leg {
            seconds = leg_ended(worker, state.endpoint, leg, &answer, now);
        }
        // The list may have changed since the leg began: its places may be other endpoints' now.
        let current = candidates(&worker.state.table, &state.work.served.model, state.work.subset.as_ref());
        let current = current.unwrap_or_else(|_| {
            Arc::new(Candidates { pool: Arc::clone(&state.work.served.candidates.pool), ..Candidates::default() })
        });
        state.work.served.candidates = current.for_prompt(state.work.prompt.tokens, &worker.state.table);
        let mut body = Some(body);
        let mut read_again = || body.take().and_then(|body| body());
        match (&answer, answer.fault()) {
            (PrefillAnswer::Answered { status: 200, body: answer, .. }, None) if state.leg.is_some() => {
                let Prompt { bytes, tokens, .. } = state.work.prompt;
                let thought = (bytes as f64, tokens, state.pick.matched_tokens);
                let answer = Object::read(answer).unwrap_or_default();
                let usage = Usage::of_answer(&answer);
                worker.state.table.saw_prefill(state.endpoint, thought, seconds, usage);
                let handover = engine::handover(state.partner.engine, state.work.api, &answer);
                return self.prefilled(worker, &state, &handover, usage, read_again, now);
            }
            (PrefillAnswer::Answered { status: 200, body: answer, .. }, None) => {
                let slot = worker.state.table.resolve(state.endpoint);
                if let Some(slot) = slot
                    && let Some(id) = engine::engine_id(answer, slot.endpoint.rank)
                {
                    slot.engine_id = Some(id.into());
                    if let Some(body) = read_again()
                        && let Ok(scan) = scan(body.as_ref())
                    {
                        let Prefilling { work, tried, pick, started, .. } = state;
                        return self.split(worker, work, tried, pick, (body.as_ref(), &scan), started, now);
                    }
                }
            }
            (PrefillAnswer::Answered { status, content_type, body }, None) if state.leg.is_some() => {
                return self.pass_on(worker, *status, *content_type, body);
            }
            _ => {
                if state.leg.is_none() && answer.fault() == Some(Fault::Unreachable) {
                    worker.failed(state.endpoint, now);
                }
            }
        }
        state.tried.push(state.endpoint);
        let pool = state.work.pool();
        let next = (state.tried.len() < pool.prefill_attempts as usize)
            .then(|| {
                let scheduler = Scheduler { table: &worker.state.table, index: &worker.state.index, pool, now };
                let is_there = |tried: &&EndpointRef| worker.state.table.refer(tried.index) == Some(**tried);
                let tried: Vec<_> = state.tried.iter().filter(is_there).map(|tried| tried.index).collect();
                scheduler.pick_by_cost(&state.work.served.candidates.prefill, &state.work.prompt, &tried)
            })
            .flatten();
        if let Some(pick) = next
            && let Some(body) = read_again()
            && let Ok(scan) = scan(body.as_ref())
        {
            if !worker.retries.spend() {
                worker.counts.count(Metric::RetriesDenied);
                return self.give_up(worker, &state.work, now);
            }
            worker.counts.count(Metric::PrefillRetries);
            let Prefilling { work, tried, started, .. } = state;
            return self.split(worker, work, tried, pick, (body.as_ref(), &scan), started, now);
        }
        self.give_up(worker, &state.work, now)
    }

    /// No prefill endpoint could be had: what the pool's policy says.
    pub(super) fn give_up(&mut self, worker: &mut Worker, work: &Work, now: Duration) -> Outcome {
        worker.counts.count(Metric::PrefillGivenUp);
        let Work { served: Served { candidates, .. }, prompt, plan, .. } = work;
        let pool = work.pool();
        let scheduler = Scheduler { table: &worker.state.table, index: &worker.state.index, pool, now };
        let picked = match pool.on_prefill_failure {
            OnPrefillFailure::Fail => None,
            OnPrefillFailure::DecodeOnly => scheduler.pick_decode(&candidates.whole, prompt, &[]),
        };
        let Some((pick, alternates)) = picked else {
            return self.reject(worker, Vec::new(), &Rejection::PrefillFailed);
        };
        let (decision, reason) = (Metric::RequestsDecodeOnly, "prefill_failed");
        let route = Route { decision, reason, pick, alternates, prefill: Prefill::Own, plan, insert: b"" };
        self.send(worker, work, route, now)
    }

    /// Starts the prefill leg at a chosen endpoint, in the order of legs that its engine has.
    #[expect(clippy::too_many_arguments, reason = "the parts of one leg; a struct for them would be used once")]
    pub(super) fn split(
        &mut self,
        worker: &mut Worker,
        work: Work,
        tried: Vec<EndpointRef>,
        pick: Pick,
        (body, scan): (&[u8], &Scan),
        started: Duration,
        now: Duration,
    ) -> Outcome {
        let (Some(endpoint), Some(slot)) =
            (worker.state.table.refer(pick.endpoint), worker.state.table.get(pick.endpoint))
        else {
            return self.reject(worker, Vec::new(), &Rejection::NoEndpoint);
        };
        let partner = Partner::of(slot);
        let (engine, shape) = (slot.engine, slot.engine.shape());
        if engine.lists_sequences() && work.batch.is_some_and(|batch| batch > engine::MAX_SEQUENCES) {
            return self.reject(worker, Vec::new(), &Rejection::TooManySequences(engine::MAX_SEQUENCES));
        }
        if engine.needs_engine_id() && slot.engine_id.is_none() {
            let server = slot.bootstrap.to_string();
            let call = Call {
                cluster: work.config.bootstrap_cluster.clone(),
                headers: question_headers(&work.config, engine::ENGINE_ID_PATH, &server),
                body: Vec::new(),
                timeout: QUESTION_TIMEOUT,
            };
            let state = Prefilling { work, tried, pick, endpoint, partner, leg: None, started };
            self.state = State::Prefilling(Box::new(state));
            return Outcome { flow: Flow::Pause, effects: vec![Effect::Call(call)] };
        }
        if tried.is_empty() {
            worker.retries.earn();
        }
        if shape == Shape::Sequential {
            let (call, leg) = start_leg(worker, &work, &tried, pick, None, (body, scan), now);
            let state = Prefilling { work, tried, pick, endpoint, partner, leg: Some(leg), started };
            self.state = State::Prefilling(Box::new(state));
            return Outcome { flow: Flow::Pause, effects: vec![Effect::Call(call)] };
        }
        let scheduler = Scheduler { table: &worker.state.table, index: &worker.state.index, pool: work.pool(), now };
        let Work { served: Served { candidates, .. }, prompt, plan, .. } = &work;
        let Some((decode, alternates)) = scheduler.pick_decode(candidates.partners(&partner), prompt, &[]) else {
            return self.reject(worker, Vec::new(), &Rejection::NoEndpoint);
        };
        let (decision, reason) = (Metric::RequestsSplit, if shape == Shape::OneLeg { "sidecar" } else { "concurrent" });
        let mut route = Route { decision, reason, pick: decode, alternates, prefill: Prefill::Own, plan, insert: b"" };
        if shape == Shape::OneLeg {
            route.prefill = Prefill::Sidecar(pick, endpoint);
            enter(worker, pick.endpoint, prompt);
            return self.send(worker, &work, route, now);
        }
        let id = worker.pair_id(work.headers.get("x-request-id").unwrap_or_default(), now);
        let members = with_pair(worker, &work, pick, id, |pair| engine::decode_members(engine, pair));
        if plan.edited_bytes(&members, work.body_bytes) > work.config.max_body_bytes {
            return self.reject(worker, Vec::new(), &Rejection::TooLarge(work.config.max_body_bytes));
        }
        let (call, leg) = start_leg(worker, &work, &tried, pick, Some(id), (body, scan), now);
        route.prefill = Prefill::Beside(pick, Companion { endpoint, leg, started });
        route.insert = &members;
        let mut outcome = self.send(worker, &work, route, now);
        outcome.effects.insert(0, Effect::Call(call));
        outcome
    }

    /// The prompt is computed: on to a decode endpoint.
    pub(super) fn prefilled<B: AsRef<[u8]>>(
        &mut self,
        worker: &mut Worker,
        state: &Prefilling,
        handover: &Handover,
        usage: Option<Usage>,
        read_again: impl FnOnce() -> Option<B>,
        now: Duration,
    ) -> Outcome {
        let Work { plan, body_bytes, config, served, prompt, .. } = &state.work;
        let replaced = match handover {
            Handover::Insert { drop, .. } if !drop.is_empty() => read_again().and_then(|body| {
                let scan = scan(body.as_ref()).ok()?;
                Some(engine::decode_plan(body.as_ref(), &scan, *drop, served.rewrite.as_deref()))
            }),
            _ => None,
        };
        let spliced = replaced.as_ref().unwrap_or(plan);
        let fits = |members: &[u8]| spliced.edited_bytes(members, *body_bytes) <= config.max_body_bytes;
        let mut warning = None;
        if let Some(slot) = worker.state.table.resolve(state.endpoint) {
            let is_missing = *handover == Handover::Missing;
            if is_missing && !slot.is_kv_missing {
                warning =
                    Some(format!("{} gives no usable KV parameters: its prompts are computed twice", slot.address));
            }
            slot.is_kv_missing = is_missing;
        }
        let (reason, plan, insert): (_, _, &[u8]) = match handover {
            // Envoy does not survive a paused body that an edit makes larger than the buffer filter's limit.
            Handover::Insert { members, .. } if fits(members) => ("prefilled", spliced, members),
            Handover::Nothing => ("prefilled", plan, b""),
            Handover::Insert { .. } | Handover::Missing => {
                worker.counts.count(Metric::KvMissing);
                (KV_MISSING, plan, b"")
            }
        };
        let scheduler =
            Scheduler { table: &worker.state.table, index: &worker.state.index, pool: state.work.pool(), now };
        let Some((pick, alternates)) = scheduler.pick_decode(served.candidates.partners(&state.partner), prompt, &[])
        else {
            return self.reject(worker, Vec::new(), &Rejection::NoEndpoint);
        };
        let prefill = Prefill::Done(state.pick, state.endpoint, state.started, usage);
        let route = Route { decision: Metric::RequestsSplit, reason, pick, alternates, prefill, plan, insert };
        let mut outcome = self.send(worker, &state.work, route, now);
        outcome.effects.extend(warning.map(Effect::Warn));
        outcome
    }
}

/// The prefill endpoint that a trusted peer names, if it is one of the candidates. A name without a rank is any rank's.
pub(super) fn hinted(worker: &Worker, ids: &[EndpointId], candidates: &Candidates) -> Option<EndpointIndex> {
    let is_meant = |id: &EndpointId, at: EndpointIndex| {
        let found = worker.state.table.get(at).map(|slot| slot.endpoint.id());
        found.is_some_and(|found| found.address == id.address && (id.rank.is_none() || id.rank == found.rank))
    };
    ids.iter().find_map(|id| candidates.prefill.iter().copied().find(|at| is_meant(id, *at)))
}
