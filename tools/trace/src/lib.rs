//! A simulation of prefill and decode servers in which pd-core itself decides, beside the field's rules and bounds.
//!
//! Discrete events, no clock and no network: the same trace, seed and code give the same figures. It leaves out
//! everything that does not depend on the chosen endpoints: failures and networks. Every request is split, but in [`split`].

pub mod agree;
pub mod autoscale;
pub mod cache;
pub mod decode;
pub mod filter;
pub mod generate;
pub mod late;
pub mod load;
pub mod outcome;
pub mod plan;
mod pooled;
pub mod prefill;
pub mod rules;
pub mod sim;
pub mod split;
pub mod split_loads;
pub mod timed;
