//! A request whose headers are there and whose body is not complete.

use super::clean::cleaned;
use super::effect::Effect;
use super::head::RequestHead;
use super::parsed::{ParsedRequest, ScannedBody};
use super::route::pass;
use super::serve::serve;
use super::step::Step;
use crate::choose::admission::Ask;
use crate::config::Limits;
use crate::request::reply::Rejection;
use crate::time::Monotonic;
use crate::workers::worker::{Ticket, Worker};

/// The headers are there, the body is not complete.
#[derive(Debug)]
pub(super) struct Reading {
    head: RequestHead,
}

impl Reading {
    pub(super) fn new(head: RequestHead) -> Self {
        Self { head }
    }

    /// `bytes` of the body are there, more may come.
    ///
    /// # Errors
    /// [`Rejection::TooLarge`]
    pub(super) fn check_size(&self, bytes: usize) -> Result<(), Rejection> {
        let limit = self.head.config.max_body_bytes;
        if bytes > limit { Err(Rejection::TooLarge(limit)) } else { Ok(()) }
    }

    /// The body is complete. `ticket` gets the request's place in a pool with limits.
    pub(super) fn body(
        self,
        worker: &mut Worker,
        ticket: &mut Option<Ticket>,
        body: &[u8],
        now: Monotonic,
    ) -> Result<Step, Rejection> {
        self.check_size(body.len())?;
        let Some(api) = self.head.api else {
            let edit = cleaned(&self.head, body)?;
            let step = Step::or_reject(pass(worker, &self.head.config, self.head.subset.as_ref(), now), worker);
            return Ok(step.after(Effect::edit_body(edit)));
        };
        let body = ScannedBody::read(body)?;
        let parsed = ParsedRequest::read(worker, self.head, api, &body, now)?;
        *ticket = admit(worker, &parsed)?;
        Ok(serve(worker, parsed, &body, now))
    }
}

/// Lets the request in, where its pool has limits.
fn admit(worker: &mut Worker, parsed: &ParsedRequest) -> Result<Option<Ticket>, Rejection> {
    let limits = parsed.pool().limits;
    if limits == Limits::default() {
        return Ok(None);
    }
    let claims = parsed.head.claims;
    let ask = Ask { tokens: parsed.kv_tokens(), priority: claims.priority, fairness: claims.fairness };
    worker.admit(&parsed.served.candidates.pool, limits, ask).map(Some).map_err(Rejection::Shed)
}
