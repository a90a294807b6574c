//! Limits of a list, and why a list is refused.

use core::fmt;

use super::endpoint::EndpointId;

/// Version of this format, in every snapshot. A filter refuses a snapshot of another one and keeps its last good list.
pub const WIRE_VERSION: u32 = 1;
/// Endpoints that one snapshot may hold; more is refused. Ten times the largest fleet that the benches drive.
pub const MAX_ENDPOINTS: usize = 100_000;
/// Models that one snapshot may describe; more is refused. A filter remembers as many that no endpoint serves any more.
pub const MAX_CARDS: usize = 4_096;
/// Bytes that a model, pool or group name may have; more is refused.
pub const MAX_NAME_BYTES: usize = 256;
/// Models that one endpoint may serve (base model and adapters); more is refused.
pub const MAX_MODELS: usize = 1_024;
/// Bytes that `root` and `parent` of a model may have; more is refused.
pub const MAX_CARD_BYTES: usize = 1_024;

/// Why a snapshot or an endpoint is refused. The reader keeps its last good list and counts the refusal.
#[derive(Clone, Debug, PartialEq)]
pub enum WireError {
    /// Not JSON, or not of the right shape.
    Malformed(String),
    /// Another [`WIRE_VERSION`].
    Version(u32),
    /// More than [`MAX_ENDPOINTS`].
    TooMany,
    /// An endpoint has a value out of range.
    BadEndpoint {
        /// The endpoint.
        id: EndpointId,
        /// Key of [`Endpoint`].
        key: &'static str,
        /// What it must be.
        why: &'static str,
    },
    /// The same address and rank twice.
    Duplicate(EndpointId),
    /// `removed` holds something that is no endpoint name.
    BadId(String),
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(why) => write!(f, "malformed snapshot: {why}"),
            Self::Version(version) => write!(f, "wire version {version}, this filter speaks {WIRE_VERSION}"),
            Self::TooMany => write!(f, "more than {MAX_ENDPOINTS} endpoints"),
            Self::BadEndpoint { id, key, why } => write!(f, "endpoint {id}: {key}: {why}"),
            Self::Duplicate(id) => write!(f, "endpoint {id} is listed twice"),
            Self::BadId(id) => write!(f, "{id:?} names no endpoint (ip:port or ip:port#rank)"),
        }
    }
}

impl std::error::Error for WireError {}
