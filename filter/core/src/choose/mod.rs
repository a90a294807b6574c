//! Choosing: which requests a pool lets in, and which endpoints serve them.
//!
//! - [`admission`]: limits of a pool, shedding and fair shares.
//! - [`prompt`]: what a choice needs to know of a prompt.
//! - [`queue`]: which waiting request a prefill endpoint with room gets next; `room` says which endpoints have room.
//! - [`decode_cost`]: decode by assigned tokens and by tokens to move.
//! - [`weight`]: affinity that follows the load.
//! - [`decider`]: split or whole; [`split_cost`]: the costs of both.
//! - [`scheduler`]: the endpoint of a prefill leg; `decode_profile`: the endpoint of a decode leg. `shortlist` has the
//!   endpoints that they compare, `explain` describes the choice.

pub mod admission;
pub mod decider;
pub mod decode_cost;
mod decode_profile;
mod explain;
pub mod prompt;
pub mod queue;
pub(crate) mod room;
pub mod scheduler;
mod shortlist;
pub mod split_cost;
pub mod weight;
