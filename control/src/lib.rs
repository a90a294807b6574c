//! Tells every Envoy's prefill/decode filter which endpoints there are, within milliseconds of a change.
//!
//! ```text
//! sources (pods, a file) ──Update──▶ publisher ──▶ EDS file (hosts of a plain Envoy)
//!                                            └───▶ registry ──▶ HTTP long polls of the filters
//! ```
//! A source reads a list whole or refuses it whole; a refused list leaves the last good one in force.
#![forbid(unsafe_code)]

pub mod access;
pub mod api;
pub mod cli;
pub mod control;
pub mod counters;
pub mod engines;
pub mod envoys;
pub mod list;
pub mod publish;
pub mod scaling;
pub mod sources;

pub use control::{Config, Control};
