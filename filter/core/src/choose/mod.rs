//! Which requests are let in, and which endpoints serve them.

pub mod admission;
pub mod schedule;
