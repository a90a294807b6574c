//! One step of the state machine: the state that follows an event, and what the shell does.

use super::effect::{Effect, Flow, Outcome, REASON};
use super::state::State;
use crate::metrics::Metric;
use crate::request::reply::{Rejection, Reply};
use crate::workers::served::REFUSED_KEY;
use crate::workers::worker::Worker;

/// The state that follows an event, and what the shell does.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) next: State,
    pub(super) outcome: Outcome,
    /// Why the filter refuses the request; `None` where it does not. The error answer follows the effects, in the form
    /// of the client's API.
    pub(super) rejection: Option<Rejection>,
}

impl Step {
    pub(super) fn new(next: State, flow: Flow, effects: Vec<Effect>) -> Self {
        Self { next, outcome: Outcome { flow, effects }, rejection: None }
    }

    /// The step, or the answer of the filter in its place.
    pub(super) fn or_reject(result: Result<Self, Rejection>, worker: &mut Worker) -> Self {
        result.unwrap_or_else(|rejection| Self::reject(worker, rejection))
    }

    /// The filter refuses the request.
    pub(super) fn reject(worker: &mut Worker, rejection: Rejection) -> Self {
        worker.counts.count(Metric::RequestsRejected);
        worker.served.note(REFUSED_KEY, |sums| sums.errors = sums.errors.saturating_add(1));
        if let Rejection::Shed(shed) = &rejection {
            worker.counts.count(shed.metric());
        }
        if let Rejection::Queue(refusal) = &rejection {
            worker.counts.count(refusal.metric());
        }
        Self::refuse(rejection)
    }

    /// As [`reject`](Self::reject), of a request that was counted already.
    pub(super) fn refuse(rejection: Rejection) -> Self {
        let effects = Self::of_refusal(rejection.reason());
        Self { rejection: Some(rejection), ..Self::new(State::Over, Flow::Pause, effects) }
    }

    /// The client gets an engine's error answer, which the caller has counted.
    pub(super) fn answer(reply: Reply) -> Self {
        Self::reply(Self::of_refusal(reply.reason), reply)
    }

    fn of_refusal(reason: &str) -> Vec<Effect> {
        vec![Effect::decision(Metric::RequestsRejected), Effect::SetState(REASON, reason.into())]
    }

    /// The client gets an answer, and the request is over.
    pub(super) fn reply(mut effects: Vec<Effect>, reply: Reply) -> Self {
        effects.push(Effect::Reply(reply));
        Self::new(State::Over, Flow::Pause, effects)
    }

    /// The step with effects before its own.
    pub(super) fn after(mut self, effects: impl IntoIterator<Item = Effect>) -> Self {
        self.outcome.effects.splice(..0, effects);
        self
    }
}
