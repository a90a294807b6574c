//! A request that two legs serve: the prefill leg starts, in the order of legs that its engine has.

use core::time::Duration;

use super::effect::{Call, Effect, Flow};
use super::leg::{start_leg, with_pair};
use super::parsed::ScannedBody;
use super::route::{Prefill, Route, forward, remember_prompt};
use super::state::{ConcurrentPrefill, Prefiller, Prefilling, Split, State};
use super::step::Step;
use crate::choose::scheduler::Pick;
use crate::endpoints::pairings::Partner;
use crate::engine::{EngineIdQuery, LegOrder};
use crate::metrics::Metric;
use crate::prefix::index::EndpointIndex;
use crate::request::reply::Rejection;
use crate::time::Monotonic;
use crate::workers::worker::Worker;

/// Time limit of the question for an engine's id, which a bootstrap server has in memory.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(2);

impl Split {
    /// Starts the prefill leg at a chosen endpoint.
    pub(super) fn start(
        self,
        worker: &mut Worker,
        pick: Pick,
        body: &ScannedBody<'_>,
        now: Monotonic,
    ) -> Result<Step, Rejection> {
        let (Some(endpoint), Some(state)) =
            (worker.state.table.refer(pick.endpoint), worker.state.table.get(pick.endpoint))
        else {
            return Err(Rejection::NoEndpoint);
        };
        let belief = worker.belief(pick.endpoint, &self.parsed.prompt.hash.blocks, pick.matched_tokens);
        let mut prefiller = Prefiller { pick, endpoint, partner: Partner::of(state), new_blocks: Vec::new(), belief };
        let protocol = state.engine.protocol();
        if let (Some(batch), Some(most)) = (self.parsed.batch, protocol.max_sequences)
            && batch > most
        {
            return Err(Rejection::TooManySequences(most));
        }
        if let Some(query) = protocol.engine_id.as_ref().filter(|_| state.engine_id.is_none()) {
            let server = state.bootstrap.to_string();
            return Ok(self.ask_engine_id(prefiller, query, &server, now));
        }
        if self.tried.is_empty() {
            worker.retries.earn();
        }
        match protocol.legs {
            LegOrder::Sequential => {
                let (call, leg) = start_leg(worker, &self, pick, None, body, now);
                prefiller.new_blocks = remember_prompt(worker, pick.endpoint, &self.parsed.prompt);
                Ok(self.await_call(prefiller, Some(leg), call, now))
            }
            LegOrder::Concurrent => self.start_both(worker, &prefiller, body, now),
            LegOrder::DecodeOnly => self.leave_to_sidecar(worker, &prefiller, now),
        }
    }

    /// The decode leg will name the engine, so its id is asked for first.
    fn ask_engine_id(self, prefiller: Prefiller, query: &EngineIdQuery, server: &str, now: Monotonic) -> Step {
        let config = &self.parsed.head.config;
        let call = Call::question(config, &config.bootstrap_cluster, query.path, server, QUESTION_TIMEOUT);
        self.await_call(prefiller, None, call, now)
    }

    fn await_call(self, prefiller: Prefiller, leg: Option<u64>, call: Call, sent: Monotonic) -> Step {
        let state = Prefilling { split: self, prefiller, leg, sent };
        Step::new(State::Prefilling(Box::new(state)), Flow::Pause, vec![Effect::Call(call)])
    }

    /// Both legs go at once.
    fn start_both(
        self,
        worker: &mut Worker,
        prefiller: &Prefiller,
        body: &ScannedBody<'_>,
        now: Monotonic,
    ) -> Result<Step, Rejection> {
        let parsed = &self.parsed;
        let (pick, alternates) = self.pick_decode(worker, &prefiller.partner, now)?;
        let id = worker.pair_id(parsed.head.request_id(), now);
        let decode_members = prefiller.partner.engine.protocol().decode_members;
        let members = with_pair(worker, parsed, prefiller.pick, id, decode_members);
        let limit = parsed.head.config.max_body_bytes;
        if parsed.plan.edited_bytes(&members, parsed.body_bytes) > limit {
            return Err(Rejection::TooLarge(limit));
        }
        let (call, leg) = start_leg(worker, &self, prefiller.pick, Some(id), body, now);
        let new_blocks = remember_prompt(worker, prefiller.pick.endpoint, &parsed.prompt);
        let Prefiller { endpoint, belief, .. } = *prefiller;
        let concurrent = ConcurrentPrefill { endpoint, leg, started: self.started, new_blocks, belief };
        let prefill = Prefill::Concurrent(prefiller.pick, concurrent);
        let edit = parsed.plan.with_insert(&members);
        let route = Route { decision: Metric::RequestsSplit, reason: "concurrent", pick, alternates, prefill, edit };
        let step = Step::or_reject(forward(worker, parsed, route, now), worker);
        Ok(step.after([Effect::Call(call)]))
    }

    /// The decode endpoint's sidecar runs the prefill leg.
    fn leave_to_sidecar(self, worker: &mut Worker, prefiller: &Prefiller, now: Monotonic) -> Result<Step, Rejection> {
        let (pick, alternates) = self.pick_decode(worker, &prefiller.partner, now)?;
        let prefill = Prefill::Sidecar(prefiller.pick, prefiller.endpoint);
        let (decision, edit) = (Metric::RequestsSplit, self.parsed.plain_edit());
        let route = Route { decision, reason: "sidecar", pick, alternates, prefill, edit };
        remember_prompt(worker, prefiller.pick.endpoint, &self.parsed.prompt);
        forward(worker, &self.parsed, route, now)
    }

    /// A decode endpoint that can take over from the prefill endpoint, and its alternates. A draining endpoint is
    /// picked only if no other can take over, because the prompt was sent before that endpoint began to drain.
    pub(super) fn pick_decode(
        &self,
        worker: &Worker,
        partner: &Partner,
        now: Monotonic,
    ) -> Result<(Pick, Vec<EndpointIndex>), Rejection> {
        let candidates = &self.parsed.served.candidates;
        let scheduler = self.parsed.scheduler(worker, now);
        let pick = |among: &[EndpointIndex]| scheduler.pick_decode(among, &self.parsed.prompt, &[]);
        let picked = pick(candidates.partners(partner)).or_else(|| pick(candidates.leaving_partners(partner)));
        picked.ok_or(Rejection::NoEndpoint)
    }
}
