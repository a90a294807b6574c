//! What `pd-control` pushes to a filter: endpoints, as a whole list or as what changed since a version.
//!
//! ```text
//! GET /v1/watch?epoch=E&since=N&wait_ms=W     authorization: Bearer …
//!   200  Snapshot: whole (`base` null) when E is not the server's epoch or N is too old, else what changed since N
//!   304  nothing changed within W milliseconds
//! ```
//! Unknown fields are ignored here, so that a filter and a `pd-control` of neighbouring versions understand each other.
//! A field that is new since version 1 of the format is optional. Files and plugin configuration are stricter: see
//! [`unknown_endpoint_key`].

pub use crate::engine::Engine;
pub use card::ModelCard;
pub use endpoint::{ENDPOINT_KEYS, Endpoint, EndpointId, Role, State, unknown_endpoint_key};
pub use error::{MAX_CARD_BYTES, MAX_CARDS, MAX_ENDPOINTS, MAX_MODELS, MAX_NAME_BYTES, WIRE_VERSION, WireError};
pub use snapshot::Snapshot;
pub use stated::{MAX_STATED, MAX_TARGETS, Stated, Target};

mod card;
mod check;
mod endpoint;
mod error;
mod snapshot;
mod stated;

/// Path of the long poll on `pd-control`.
pub const WATCH_PATH: &str = "/v1/watch";

#[cfg(test)]
mod tests;
