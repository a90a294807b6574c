//! Which requests are let in, and which endpoints serve them.

pub mod admission;
pub mod decode_cost;
pub mod queue;
pub mod schedule;
pub mod weight;
