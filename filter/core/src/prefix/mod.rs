//! Prompts as chained block hashes, and which endpoint holds which blocks.

pub mod hash;
pub mod index;
