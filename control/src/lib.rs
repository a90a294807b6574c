//! pd-control pushes the endpoint list to the prefill/decode filter of every Envoy, within milliseconds of a change.
//!
//! ```text
//!  sources ──Update──▶ publish: merge ─▶ publisher ─▶ registry ──▶ api ──long poll──▶ filters of the Envoys
//!  file, command line,                      │            │          ▲
//!  Kubernetes                               ▼            │          │ exchange
//!                                   EDS file of a        │       envoys ◀──relay──▶ other replicas
//!                                   plain Envoy          ▼
//!  engines ◀──metrics, models── engines: scrape ◀── list in force
//!                                   └──Facts──▶ publish
//! ```
//! - A source reads a list whole or refuses it whole. When it refuses one, the last good list stays in force.
//! - There is no list before every source has sent one.
//! - A new host is in the EDS file before a filter has the endpoint, and stays there until every filter has dropped it.
//! - Nothing that runs imports [`cli`], and so not `check`. No folder imports one that leads back to it:
//!   `cli` > `control` > `api` > `envoys`, `engines`, `sources` > `publish` > `list`, `counters`. `access` imports none.
//!
//! Start reading at [`control`], which starts the parts and connects them.
//!
//! | folder or file | what it does |
//! |---|---|
//! | [`sources`] | sends lists of endpoints: from a file, from the command line (addresses and DNS names), from Kubernetes |
//! | [`publish`] | merges the lists, versions them, writes the EDS file, publishes the list in force |
//! | [`engines`] | asks engines for metrics and models, and sends what the list takes from them |
//! | [`envoys`] | hub of the exchange between Envoys, relay between replicas, polls of each Envoy |
//! | [`api`] | HTTP server: long polls, exchange, status and its page, probes, metrics |
//! | [`cli`] | the command line: arguments, `check`, and `endpoints`, `explain`, `top` in a terminal |
//! | [`access`] | bearer token and TLS, of the server and of its clients |
//! | [`control`] | configuration of one run; starts and stops the parts |
//! | [`list`] | the endpoint list: valid, sorted, each endpoint once |
//! | [`counters`] | what the parts count; [`api::metrics`] has names and help texts |
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
