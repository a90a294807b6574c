//! The workers of one Envoy: the state of each, and the log through which each learns what the others did.
//!
//! - [`worker`]: configuration, [`state`] and counts of one worker.
//! - [`event`]: what a worker does or sees, and how it changes the state; [`ledger`]: what one worker has in flight.
//! - [`log`]: a worker publishes its events and reads those of the others; [`slots`]: which workers there are.
//! - [`waiting`]: requests of all workers that wait for a prefill endpoint with room; `turns`: the requests of one worker;
//!   `wait`: how a request begins and ends to wait; [`bind`]: which request an endpoint with room gets.
//! - `judge`: what a worker concludes from answers: whether an endpoint is ejected or trusted again, whether its cache is
//!   lost.
//! - [`served`]: what each endpoint served, for the report.
//! - [`push`]: one worker polls `pd-control` for the endpoint list, and every worker gets it.

pub mod bind;
pub(crate) mod event;
mod inheritance;
pub(crate) mod judge;
mod keepers;
pub(crate) mod ledger;
pub mod log;
mod other_worker;
mod pending;
pub mod push;
pub mod recent;
pub mod served;
pub mod shared;
pub mod slots;
pub mod state;
mod turns;
pub(crate) mod wait;
pub mod waiting;
pub mod waits;
pub mod worker;
