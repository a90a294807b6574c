//! One request's life: events in, effects out.
//!
//! ```text
//! New ─headers─▶ Reading ─body─▶ [Waiting ─turn─▶] Prefilling ─answer─▶ Forwarded ─done─▶ Over
//!  │                │                │  └─ failed: the next prefill endpoint, else the pool's policy
//!  │                └─ served whole ─┴──────────────▶ Forwarded
//!  └─ nothing to read ──────────────────────────────▶ Watched or Over   anywhere: Reply ─▶ Over
//! ```
//! Where an engine wants both legs at once, the request is Forwarded while its prefill leg is in flight, and the
//! response's headers are held back until that leg has ended well: until then a failure can still become an error answer.
//!
//! The shell calls one method of [`Request`] per Envoy callback and carries out the [`Outcome`]. Events that do not fit
//! the state (late answers, callbacks after a reply) change nothing.
//!
//! | file | what it holds |
//! |---|---|
//! | `state`, `step` | the states and what a request has in each; what an event leads to |
//! | `new`, `reading`, `parked`, `waiting`, `prefilling`, `forwarded` | one state each: what its events do |
//! | `turn` | what becomes of a waiting request when it is its turn |
//! | `head`, `parsed`, `models`, `stored`, `clean` | what headers and body say |
//! | `serve`, `split`, `leg`, `route` | how a request is served: by two legs or by one, and where they go |
//! | `kv_lease` | whether an answer came while the KV cache was kept |
//! | `assignment` | the ledger's entry of a request that an endpoint has |
//! | `response_editor` | what changes in the response |
//! | `envoys_error` | errors that Envoy answers itself, in the form of the client's API |
//! | `effect`, `reply`, `ready` | what the shell does, and what the filter answers itself |

use crate::headers::Headers;
use crate::metrics::Metric;
use crate::paths::engines_path;
use crate::request::reply::{ErrorForm, Rejection};
use crate::time::Monotonic;
use crate::workers::bind::Turn;
use crate::workers::recent::DecisionRecord;
use crate::workers::worker::{Ticket, Worker};

use effect::decision_name;
use envoys_error::{EnvoysError, Respelt};
use forwarded::served_by;
use head::decoded_path;
use kv_lease::KvLease;
use leg::PREFILL_ANSWER;
use state::{Reading, State};
use step::Step;
use upstream::Answerer;

mod assignment;
mod clean;
mod effect;
mod envoys_error;
mod forwarded;
pub(crate) mod head;
mod kv_lease;
mod leg;
pub(crate) mod models;
mod new;
mod parked;
mod parsed;
mod prefilling;
mod reading;
mod ready;
pub mod reply;
mod response_editor;
mod route;
mod serve;
mod split;
mod state;
mod step;
mod stored;
mod turn;
pub mod upstream;
mod waiting;

pub use effect::{
    Call, DECISION, DECODE, DESTINATION, EXPLAIN, Effect, Flow, KV_HEADER, MATCHED_TOKENS, Outcome, PREFILL,
    PREFILL_MS, PREFILLER, RANK, REASON, SERVED_HEADER, STATES, WAIT_MS,
};
pub use leg::PrefillAnswer;
pub use ready::READY_PATH;

/// One request: its state, and its counts.
///
/// The shell must call [`done`](Self::done) at the end of the stream. `done` takes back all counts of the request.
#[derive(Debug, Default)]
pub struct Request {
    state: State,
    /// Form of the filter's own errors.
    error_form: ErrorForm,
    /// Whether the request's method is HEAD.
    is_head: bool,
    /// Whether the filter has given the answer that the request asks for, or an engine's. An error of the filter's own is
    /// none: Envoy may be first with another one.
    is_answered: bool,
    /// An error of Envoy's own whose body is on its way to the client.
    envoys_error: Option<EnvoysError>,
    /// The request's place in a pool with limits. It is given back at the end of the stream, however the stream ended.
    ticket: Option<Ticket>,
}

/// Events, in the order in which Envoy has them.
impl Request {
    /// The request's headers came. `end_of_stream`: no body follows.
    pub fn headers(&mut self, worker: &mut Worker, headers: Headers, end_of_stream: bool, now: Monotonic) -> Outcome {
        let path = decoded_path(headers.get(":path").unwrap_or_default());
        let prefixes = worker.config.as_ref().map_or(&[][..], |config| &config.path_prefixes);
        self.error_form = ErrorForm::of_path(engines_path(&path, prefixes));
        self.is_head = headers.get(":method") == Some(b"HEAD");
        self.enter(new::headers(worker, headers, end_of_stream, now))
    }

    /// A part of the body came: `bytes` of the body are buffered, and more will come.
    pub fn body_part(&mut self, worker: &mut Worker, bytes: usize) -> Outcome {
        match &self.state {
            State::Reading(reading) => match reading.check_size(bytes) {
                Ok(()) => Outcome::WAIT,
                Err(rejection) => self.enter(Step::reject(worker, rejection)),
            },
            State::Parked(_) | State::Waiting(_) | State::Prefilling(_) => Outcome::WAIT,
            State::New | State::Forwarded(_) | State::Watched | State::Over => Outcome::GO_ON,
        }
    }

    /// The body is complete. An empty `body` is a body of no bytes.
    pub fn body(&mut self, worker: &mut Worker, body: &[u8], now: Monotonic) -> Outcome {
        match core::mem::take(&mut self.state) {
            State::Reading(reading) => {
                let spare = reading.spare();
                let step = reading.body(worker, &mut self.ticket, body, now, now);
                let step = Reading::or_park(spare, step, worker, &mut self.ticket, (body.len(), now), now);
                self.enter_or_reject(worker, step, now)
            }
            other => self.stay(other, Outcome::GO_ON),
        }
    }

    /// A call ended. `body` reads the client's body again; it is called where another leg needs the body.
    pub fn prefill_answer<B: AsRef<[u8]>>(
        &mut self,
        worker: &mut Worker,
        answer: PrefillAnswer<'_>,
        body: impl FnOnce() -> Option<B>,
        now: Monotonic,
    ) -> Outcome {
        match core::mem::take(&mut self.state) {
            State::Prefilling(prefilling) => {
                let step = prefilling.answered(worker, answer, body, now);
                self.enter_or_reject(worker, step, now)
            }
            State::Forwarded(forwarded) => self.enter(forwarded.prefill_answered(worker, answer, now)),
            other => self.stay(other, Outcome::WAIT),
        }
    }

    /// It is this waiting request's turn; see [`Worker::next_turn`]. `body` reads the client's body again.
    pub fn turn<B: AsRef<[u8]>>(
        &mut self,
        worker: &mut Worker,
        turn: Turn,
        body: impl FnOnce() -> Option<B>,
        now: Monotonic,
    ) -> Outcome {
        match core::mem::take(&mut self.state) {
            State::Waiting(waiting) if waiting.id == turn.id => {
                let step = waiting.turn(worker, &mut self.ticket, turn.act, body, now);
                self.enter_or_reject(worker, step, now)
            }
            State::Parked(parked) if parked.id == turn.id => {
                let step = parked.turn(worker, &mut self.ticket, turn.act, body, now);
                self.enter_or_reject(worker, step, now)
            }
            other => self.stay(other, Outcome::WAIT),
        }
    }

    /// The response's headers came; `status` is `None` where the response has no valid one.
    pub fn response_headers(
        &mut self,
        worker: &mut Worker,
        answerer: Answerer<'_>,
        status: Option<u16>,
        now: Monotonic,
    ) -> Outcome {
        match core::mem::take(&mut self.state) {
            State::Forwarded(forwarded) => self.enter(forwarded.response_headers(worker, answerer, status, now)),
            State::Watched => {
                self.enter(Step::new(State::Over, Flow::Continue, served_by(answerer).into_iter().collect()))
            }
            other => self.stay(other, Outcome::GO_ON),
        }
    }

    /// The headers of an error came that Envoy answers itself ([`AnswerSource::is_envoys_error`]). `ends`: no body follows.
    ///
    /// [`AnswerSource::is_envoys_error`]: upstream::AnswerSource::is_envoys_error
    pub fn envoys_error(&mut self, status: u16, content_type: Option<&[u8]>, ends: bool) -> Outcome {
        if self.is_answered {
            return Outcome::GO_ON;
        }
        match EnvoysError::headers(self.error_form, status, content_type, self.is_head, ends) {
            None => Outcome::GO_ON,
            Some(Respelt::NoBody(outcome)) => {
                self.is_answered = true;
                outcome
            }
            Some(Respelt::Body(error, outcome)) => {
                self.envoys_error = Some(error);
                outcome
            }
        }
    }

    /// The first byte of the response's body came: the prompt has been computed.
    pub fn first_byte(&mut self, worker: &mut Worker, now: Monotonic) {
        if let State::Forwarded(forwarded) = &mut self.state {
            forwarded.first_byte(worker, now);
        }
    }

    /// A part of the response's body came, as the client would get it; `is_last`: the response ends with it.
    pub fn response_part(&mut self, worker: &mut Worker, part: &[u8], is_last: bool, now: Monotonic) -> Outcome {
        if let Some(error) = &mut self.envoys_error {
            return error.part(part, is_last);
        }
        match &mut self.state {
            State::Forwarded(forwarded) => forwarded.response_part(worker, part, is_last, now),
            _ => Outcome::GO_ON,
        }
    }

    /// The stream ended, for whatever reason. A second call changes nothing.
    pub fn done(&mut self, worker: &mut Worker, now: Monotonic) {
        if let Some(ticket) = self.ticket.take() {
            worker.release(ticket);
        }
        match core::mem::replace(&mut self.state, State::Over) {
            State::Forwarded(mut forwarded) => forwarded.end(worker, now),
            State::Prefilling(prefilling) => prefilling.end(worker, now),
            State::Waiting(waiting) => waiting.end(worker),
            State::Parked(parked) => parked.end(worker),
            State::New | State::Reading(_) | State::Watched | State::Over => {}
        }
        worker.pending.request_ended();
    }

    fn enter(&mut self, step: Step) -> Outcome {
        let Step { next, mut outcome, rejection } = step;
        self.state = next;
        let is_answer = |effect: &Effect| matches!(effect, Effect::Reply(reply) if reply.status < 400 || reply.reason == PREFILL_ANSWER);
        self.is_answered |= outcome.effects.last().is_some_and(is_answer);
        outcome.effects.extend(rejection.map(|rejection| Effect::Reply(rejection.reply(self.error_form))));
        outcome
    }

    fn enter_or_reject(&mut self, worker: &mut Worker, step: Result<Step, Rejection>, now: Monotonic) -> Outcome {
        if let Err(rejection) = &step {
            worker.record_decision(now, |_| record_of(rejection));
        }
        self.enter(Step::or_reject(step, worker))
    }

    fn stay(&mut self, state: State, outcome: Outcome) -> Outcome {
        self.state = state;
        outcome
    }
}

/// Questions of the shell before it reads what an event needs.
impl Request {
    /// Whether [`body`](Self::body) needs the complete body.
    #[must_use]
    pub fn wants_body(&self) -> bool {
        matches!(self.state, State::Reading(_))
    }

    /// The request's number in [turns](Turn), while it waits until a prefill endpoint has room, or any endpoint is ready.
    #[must_use]
    pub fn waiting_id(&self) -> Option<u64> {
        match &self.state {
            State::Waiting(waiting) => Some(waiting.id),
            State::Parked(parked) => Some(parked.id),
            _ => None,
        }
    }

    /// Whether the request waits for its prefill leg.
    #[must_use]
    pub fn is_prefilling(&self) -> bool {
        matches!(self.state, State::Prefilling(_))
    }

    /// Whether a call is in flight, while the request is held or an endpoint has it.
    #[must_use]
    pub fn awaits_call(&self) -> bool {
        match &self.state {
            State::Prefilling(_) => true,
            State::Forwarded(forwarded) => {
                forwarded.concurrent_prefill.is_some() || forwarded.kv_lease.as_ref().is_some_and(KvLease::is_asking)
            }
            State::New | State::Reading(_) | State::Parked(_) | State::Waiting(_) | State::Watched | State::Over => {
                false
            }
        }
    }

    /// Whether an engine endpoint has the request. Otherwise [`response_headers`](Self::response_headers) does nothing.
    #[must_use]
    pub fn is_forwarded(&self) -> bool {
        matches!(self.state, State::Forwarded(_) | State::Watched)
    }

    /// Whether the filter itself has given the answer that the request asks for.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        self.is_answered
    }

    /// Whether [`first_byte`](Self::first_byte) was not called yet for a request that an engine endpoint has.
    #[must_use]
    pub fn awaits_first_byte(&self) -> bool {
        matches!(&self.state, State::Forwarded(forwarded) if !forwarded.has_first_byte)
    }

    /// Whether [`response_part`](Self::response_part) needs the response's body.
    #[must_use]
    pub fn wants_response_body(&self) -> bool {
        self.envoys_error.is_some()
            || matches!(&self.state, State::Forwarded(forwarded)
            if forwarded.editor.is_some() || forwarded.kv_lease.as_ref().is_some_and(KvLease::reads_body))
    }
}

/// A refused request for the report to pd-control.
fn record_of(rejection: &Rejection) -> DecisionRecord {
    DecisionRecord {
        decision: decision_name(Metric::RequestsRejected).to_owned(),
        reason: rejection.reason().to_owned(),
        status: u64::from(rejection.status()),
        ..DecisionRecord::default()
    }
}

#[cfg(test)]
mod tests;
