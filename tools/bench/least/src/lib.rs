//! The smallest filter that runs a prefill leg. It sends a request to the next prefill endpoint, then to the next decode
//! endpoint with a short text from the first answer. It compares no loads, checks no bodies and counts nothing. Its cost
//! beside plain Envoy is the floor of every filter with a prefill leg: `make bench` measures it in the same run.
#![cfg_attr(
    target_family = "wasm",
    allow(missing_docs, reason = "the entry point that the SDK's macro makes has none")
)]

pub mod endpoints;
#[cfg(target_family = "wasm")]
mod filter;
