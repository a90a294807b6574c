//! The turn of a waiting request: it goes to an endpoint, is scheduled anew, or gives up.

use super::parsed::ScannedBody;
use super::serve::serve;
use super::state::{Reading, Waiting};
use super::step::Step;
use crate::request::reply::{QueueRefusal, Rejection};
use crate::time::Monotonic;
use crate::workers::bind::Act;
use crate::workers::worker::{Ticket, Worker};

impl Waiting {
    /// It is the request's turn. `body` reads the client's body again.
    pub(super) fn turn<B: AsRef<[u8]>>(
        mut self,
        worker: &mut Worker,
        ticket: &mut Option<Ticket>,
        act: Act,
        body: impl FnOnce() -> Option<B>,
        now: Monotonic,
    ) -> Result<Step, Rejection> {
        let refusal = match act {
            Act::GiveUp => Some(QueueRefusal::Timeout),
            Act::MissDeadline => Some(QueueRefusal::Deadline),
            Act::Bind(_) | Act::Reschedule => None,
        };
        if let Some(refusal) = refusal {
            worker.stop_waiting(self.id);
            return Err(Rejection::Queue(refusal));
        }
        let body = body();
        let scanned = body.as_ref().and_then(|body| ScannedBody::read(body.as_ref()).ok());
        let Some(body) = scanned else {
            worker.stop_waiting(self.id);
            return Err(Rejection::PrefillFailed);
        };
        self.parsed.refresh_candidates(worker);
        match act {
            Act::Bind(endpoint) => {
                let pick = self.parsed.scheduler(worker, now).pick(endpoint, &self.parsed.prompt);
                self.bind(worker, pick, &body, now)
            }
            _ => {
                worker.stop_waiting(self.id);
                let spare = Reading { head: self.parsed.head.clone() }.spare();
                let (bytes, arrival) = (self.parsed.body_bytes, self.arrival);
                let step = serve(worker, self.parsed, &body, arrival, now);
                Reading::or_park(spare, Ok(step), worker, ticket, (bytes, arrival), now)
            }
        }
    }
}
