//! Prefill/decode routing: every decision that the filter takes, as pure functions of their arguments.
//!
//! ```text
//!  headers, body ──▶ request ──▶ choose ──▶ an effect for the shell: a prefill leg, an edit, a destination, a reply
//!                      │  │         │
//!              engine ─┘  │         ├── endpoints  the pushed list, load and health of each endpoint
//!              body ──────┘         └── prefix     which endpoint holds which blocks
//!                                          ▲
//!  every decision is an event ──▶ workers ─┘  the same state at every worker of one Envoy
//!                                    ▲
//!                                 envoys      what other Envoys have in flight and sent, through `pd-control`
//! ```
//! Start reading at [`request`]: it is the state machine that Envoy's callbacks drive.
//!
//! | folder | what it decides |
//! |---|---|
//! | [`request`] | what becomes of one request, from its headers to its end |
//! | [`choose`] | whether a pool lets a request in, whether to split it, which endpoints serve it |
//! | [`endpoints`] | which endpoints there are; load, health and prefill cost of each |
//! | [`prefix`] | how a prompt becomes blocks, and which endpoint holds them |
//! | [`engine`] | what is true of each engine: the order of the legs and their members |
//! | [`workers`] | what the workers of one Envoy share, through their log; the endpoint list of all of them |
//! | [`envoys`] | what several Envoys exchange, through `pd-control` |
//! | [`body`] | where the members of a JSON or form body are, and how bytes change |
//!
//! [`config`] is the plugin configuration, [`wire`] the endpoint list on its way from `pd-control`, [`metrics`] all that is
//! counted, [`headers`] a list of headers, [`paths`] what clients may reach, [`time`] the two clocks, `codec` the binary form
//! of messages.
//!
//! # What holds everywhere
//! - Core has no I/O, clock, random numbers, threads or global variables: times, bytes and random numbers are arguments,
//!   effects are values. So the same code runs in Envoy, in the unit tests, in the fuzz targets and in the trace simulator.
//! - No input makes core panic. Clippy forbids unwrapping, indexing and unchecked arithmetic outside of tests.
//! - Memory has bounds: the index by bytes, logs by their length, messages by their size.
//! - Bytes of a client's body stay as they are, except for the members that core edits.
//! - A folder imports no folder that imports it.
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
