//! Which requests are let in, and which endpoints serve them.

pub mod admission;
mod explain;
pub mod scheduler;
mod shortlist;
