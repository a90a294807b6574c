//! Prompts as chained block hashes, and which endpoint holds which blocks.

pub mod block_log;
pub mod hash;
pub mod index;
