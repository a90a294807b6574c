//! Prefill/decode routing, decided purely: bytes, times and answers come in as arguments, effects go out as values.
//!
//! The filter (`filter/`) translates Envoy's callbacks into these calls, the tests and the fuzzers call them directly.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unreachable,
        clippy::unwrap_used
    )
)]

pub mod admission;
mod answer;
pub mod body;
pub mod config;
pub mod engine;
pub mod exchange;
pub mod fit;
pub mod hash;
pub mod headers;
pub mod index;
mod intake;
pub mod json;
mod ledger;
pub mod load;
pub mod metrics;
mod models;
pub mod paths;
pub mod push;
pub mod reply;
pub mod request;
pub mod schedule;
pub mod share;
pub mod splice;
pub mod table;
pub mod wire;
pub mod worker;
