//! Prefill/decode routing, decided purely: bytes, times and answers come in as arguments, effects go out as values.
//!
//! The filter (`filter/`) translates Envoy's callbacks into these calls, the tests and the fuzzers call them directly.
#![forbid(unsafe_code)]

pub mod wire;
