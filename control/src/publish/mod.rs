//! Makes one list of what the sources send, writes its hosts for Envoy, and publishes it to the filters.

pub mod eds;
pub mod merge;
pub mod publisher;
pub mod registry;
pub mod updates;
