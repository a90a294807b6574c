//! One step of the state machine: the state that follows an event, and what the shell does.

use super::effect::{Effect, Flow, Outcome, REASON};
use super::forwarded::Forwarded;
use super::prefilling::Prefilling;
use super::reading::Reading;
use crate::metrics::Metric;
use crate::request::reply::{Rejection, Reply};
use crate::workers::worker::Worker;

/// Where a request is. Each state has a file, which says what may happen to a request in it.
#[derive(Debug, Default)]
pub(super) enum State {
    /// Nothing is known yet.
    #[default]
    New,
    /// The headers are there, the body is not complete.
    Reading(Box<Reading>),
    /// The request waits for its prefill leg.
    Prefilling(Box<Prefilling>),
    /// An engine endpoint has the request.
    Forwarded(Box<Forwarded>),
    /// An engine endpoint has the request. Nothing is counted for it, but the response is to say which endpoint served.
    Watched,
    /// No event changes anything any more.
    Over,
}

/// The state that follows an event, and what the shell does.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) next: State,
    pub(super) outcome: Outcome,
}

impl Step {
    pub(super) fn new(next: State, flow: Flow, effects: Vec<Effect>) -> Self {
        Self { next, outcome: Outcome { flow, effects } }
    }

    /// The step, or the answer of the filter in its place.
    pub(super) fn or_reject(result: Result<Self, Rejection>, worker: &mut Worker) -> Self {
        result.unwrap_or_else(|rejection| Self::reject(worker, &rejection))
    }

    /// The filter refuses the request.
    pub(super) fn reject(worker: &mut Worker, rejection: &Rejection) -> Self {
        worker.counts.count(Metric::RequestsRejected);
        if let Rejection::Shed(shed) = rejection {
            worker.counts.count(shed.metric());
        }
        Self::answer(rejection.reply())
    }

    /// The client gets an error answer, which the caller has counted.
    pub(super) fn answer(reply: Reply) -> Self {
        let reason = Effect::SetState(REASON, reply.reason.into());
        Self::reply(vec![Effect::decision(Metric::RequestsRejected), reason], reply)
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
