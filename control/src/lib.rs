//! Tells every Envoy's prefill/decode filter which endpoints there are, within milliseconds of a change.
//!
//! ```text
//! sources (pods, a file) ──Update──▶ publisher ──▶ EDS file (hosts of a plain Envoy)
//!                                            └───▶ registry ──▶ HTTP long polls of the filters
//! ```
//! A source reads a list whole or refuses it whole; a refused list leaves the last good one in force.
#![forbid(unsafe_code)]

pub mod advice;
pub mod allow;
pub mod check;
pub mod cli;
pub mod eds;
pub mod engine_metrics;
pub mod exchange;
pub mod file;
pub mod http;
pub mod kubernetes;
pub mod merge;
pub mod metrics;
pub mod names;
pub mod pods;
pub mod publisher;
pub mod registry;
pub mod scrape;
pub mod server;
pub mod source;
pub mod status;
pub mod terminal;
pub mod tls;
pub mod watch;

pub use server::{Config, Control};
