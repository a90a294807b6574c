//! The state Parked: no endpoint is ready for the request, which waits until one is.

use super::effect::Flow;
use super::state::{Parked, Reading, State};
use super::step::Step;
use crate::config::Queue;
use crate::metrics::Metric;
use crate::request::models::alias;
use crate::request::reply::Rejection;
use crate::time::Monotonic;
use crate::wire::Stated;
use crate::workers::bind::Act;
use crate::workers::served::REFUSED_KEY;
use crate::workers::worker::{Ticket, Worker};

impl Reading {
    /// A copy for the case that no endpoint is ready; `None` where the request then does not wait.
    pub(super) fn spare(&self) -> Option<Self> {
        let waits = self.head.api.is_some() && self.head.subset.is_none() && !queue(self).no_endpoint.is_zero();
        waits.then(|| Self { head: self.head.clone() })
    }

    /// Parks a request for which no endpoint is ready. Returns `step` unchanged if it is another step, or if the
    /// request may not wait.
    pub(super) fn or_park(
        spare: Option<Self>,
        step: Result<Step, Rejection>,
        worker: &mut Worker,
        ticket: &mut Option<Ticket>,
        (body_bytes, arrival): (usize, Monotonic),
        now: Monotonic,
    ) -> Result<Step, Rejection> {
        let Some(reading) = spare.filter(|reading| reading.may_be_served_later(&step, worker.state.table.stated()))
        else {
            return step;
        };
        let Some(id) = worker.park(queue(&reading), body_bytes, arrival, now) else { return step };
        if let Ok(Step { rejection: Some(_), .. }) = step {
            // It is not answered yet.
            worker.counts.add(Metric::RequestsRejected, -1);
            worker.served.note(REFUSED_KEY, |sums| sums.errors = sums.errors.saturating_sub(1));
        }
        if let Some(ticket) = ticket.take() {
            worker.release(ticket);
        }
        Ok(Step::new(State::Parked(Box::new(Parked { reading, id, arrival })), Flow::Pause, Vec::new()))
    }

    fn may_be_served_later(&self, step: &Result<Step, Rejection>, stated: &Stated) -> bool {
        match step {
            Err(rejection) | Ok(Step { rejection: Some(rejection), .. }) => match rejection {
                Rejection::NoEndpoint => true,
                Rejection::UnknownModel { model, .. } => alias(&self.head.config, stated, model).is_some(),
                _ => false,
            },
            Ok(_) => false,
        }
    }
}

impl Parked {
    /// It is the request's turn. `body` reads the client's body again.
    pub(super) fn turn<B: AsRef<[u8]>>(
        self,
        worker: &mut Worker,
        ticket: &mut Option<Ticket>,
        act: Act,
        body: impl FnOnce() -> Option<B>,
        now: Monotonic,
    ) -> Result<Step, Rejection> {
        worker.unpark(self.id);
        let body = if act == Act::Reschedule { body() } else { None };
        let Some(body) = body else { return Err(Rejection::NoEndpoint) };
        let (body, arrival) = (body.as_ref(), self.arrival);
        let spare = self.reading.spare();
        let step = self.reading.body(worker, ticket, body, arrival, now);
        Reading::or_park(spare, step, worker, ticket, (body.len(), arrival), now)
    }

    /// The stream ended.
    pub(super) fn end(&self, worker: &mut Worker) {
        worker.counts.count(Metric::WaitsLeft);
        worker.unpark(self.id);
    }
}

fn queue(reading: &Reading) -> &Queue {
    &reading.head.config.pool("default").queue
}
