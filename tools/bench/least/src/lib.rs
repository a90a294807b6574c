//! The least that a filter can do which runs a prefill leg: it sends a request to the next prefill endpoint, then to the
//! next decode endpoint with a word of what came back. It weighs nothing, checks nothing and tells nobody. What it costs
//! beside plain Envoy is the floor of every such filter: `make bench` measures it in the same run.
#![cfg_attr(
    target_family = "wasm",
    allow(missing_docs, reason = "the entry point that the SDK's macro makes has none")
)]

pub mod endpoints;
#[cfg(target_family = "wasm")]
mod filter;
