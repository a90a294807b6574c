//! Prefixes: a prompt as a chain of block hashes, and which endpoint holds which blocks.
//!
//! - [`hash`]: block hashes of a prompt, and rendezvous hashing.
//! - [`index`]: which endpoint holds which blocks.
//! - [`block_log`]: which blocks an Envoy sent to which endpoint, for the other Envoys.

pub mod block_log;
pub mod hash;
pub mod index;
mod lru;
