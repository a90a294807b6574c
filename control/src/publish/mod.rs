//! From what the sources send to the one list in force: merged, versioned, written for Envoy, published.

pub mod eds;
pub mod merge;
pub mod publisher;
pub mod registry;
pub mod updates;
