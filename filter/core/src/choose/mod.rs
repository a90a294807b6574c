//! Choosing: which requests a pool lets in, and which endpoints serve them.
//!
//! - [`admission`]: limits of a pool, shedding and fair shares.
//! - [`prompt`]: what a choice needs to know of a prompt.
//! - [`scheduler`]: split or whole, and the endpoint of each leg. `shortlist` has the endpoints that it compares, `explain`
//!   describes its choice.

pub mod admission;
mod explain;
pub mod prompt;
pub mod scheduler;
mod shortlist;
