//! The state Reading: the headers have come, the body is not complete.

use super::clean::ReadBody;
use super::effect::Effect;
use super::head::RequestHead;
use super::models::serving_model;
use super::parsed::{ParsedRequest, ScannedBody};
use super::route::{Restriction, pass};
use super::serve::serve;
use super::state::Reading;
use super::step::Step;
use super::stored::id_of_path;
use crate::choose::admission::Ask;
use crate::config::Limits;
use crate::request::reply::Rejection;
use crate::time::Monotonic;
use crate::workers::worker::{Ticket, Worker};

impl Reading {
    /// `bytes` of the body are there, more may come.
    ///
    /// # Errors
    /// [`Rejection::TooLarge`]
    pub(super) fn check_size(&self, bytes: usize) -> Result<(), Rejection> {
        let limit = self.head.config.max_body_bytes;
        if bytes > limit { Err(Rejection::TooLarge(limit)) } else { Ok(()) }
    }

    /// The body is complete, since `arrival`. `ticket` gets the request's place in a pool with limits.
    pub(super) fn body(
        self,
        worker: &mut Worker,
        ticket: &mut Option<Ticket>,
        body: &[u8],
        arrival: Monotonic,
        now: Monotonic,
    ) -> Result<Step, Rejection> {
        self.check_size(body.len())?;
        let Some(api) = self.head.api else { return self.body_without_prompt(worker, ticket, body, now) };
        let body = ScannedBody::read(body)?;
        let parsed = ParsedRequest::read(worker, self.head, api, &body, now)?;
        *ticket = admit(worker, &parsed.head, &parsed.served.candidates.pool, || parsed.kv_tokens())?;
        Ok(serve(worker, parsed, &body, arrival, now))
    }

    /// The body is complete and has no prompt. The request goes to an endpoint of the model that its body names, or to
    /// any endpoint if the body names none.
    fn body_without_prompt(
        self,
        worker: &mut Worker,
        ticket: &mut Option<Ticket>,
        body: &[u8],
        now: Monotonic,
    ) -> Result<Step, Rejection> {
        let Self { head } = self;
        let read = ReadBody::read(&head, body)?;
        let served = match head.model(read.model(body)) {
            Some(model) => Some(serving_model(worker, &head, &model, now)?),
            None => None,
        };
        let edit = read.edit(body, served.as_ref())?;
        if edit.edited_bytes(body.len()) > head.config.max_body_bytes {
            return Err(Rejection::TooLarge(head.config.max_body_bytes));
        }
        if let Some(served) = &served {
            let pool = head.config.pool(&served.candidates.pool);
            let tokens = || read.tokens(body, pool) as u64;
            *ticket = admit(worker, &head, &served.candidates.pool, tokens)?;
        }
        let response = id_of_path(&head.headers, &head.config);
        let restriction = Restriction { subset: head.subset.as_ref(), response: response.as_deref() };
        let may_repeat = served.is_some() && response.is_none() && head.computes();
        let step = pass(worker, &head.config, served.as_ref(), restriction, now)?;
        let repeat = if may_repeat { Some(Effect::may_repeat()) } else { None };
        Ok(step.after(Effect::edit_body(edit)).after(repeat.into_iter().flatten()))
    }
}

/// Lets the request in, where its pool has limits.
fn admit(
    worker: &mut Worker,
    head: &RequestHead,
    pool: &str,
    tokens: impl FnOnce() -> u64,
) -> Result<Option<Ticket>, Rejection> {
    let limits = head.config.pool(pool).limits;
    if limits == Limits::default() {
        return Ok(None);
    }
    let ask = Ask { tokens: tokens(), priority: head.claims.priority, fairness: head.claims.fairness };
    worker.admit(pool, limits, ask).map(Some).map_err(Rejection::Shed)
}
