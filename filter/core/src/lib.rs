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

pub mod body;
pub mod choose;
mod codec;
pub mod config;
pub mod endpoints;
pub mod engine;
pub mod envoys;
pub mod headers;
pub mod metrics;
pub mod paths;
pub mod prefix;
pub mod request;
pub mod time;
pub mod wire;
pub mod workers;

pub use body::{json, splice};
pub use choose::{admission, scheduler};
pub use endpoints::{load, table};
pub use envoys as exchange;
pub use prefix::{hash, index};
pub use request::reply;
pub use workers::{push, share, worker};
