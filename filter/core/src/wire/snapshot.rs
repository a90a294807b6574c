//! A list of endpoints.

use serde::{Deserialize, Serialize};

use super::card::ModelCard;
use super::endpoint::Endpoint;
use super::error::WIRE_VERSION;
use super::stated::Stated;

/// A list of endpoints, or what changed since an earlier one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// [`WIRE_VERSION`](super::WIRE_VERSION).
    pub wire: u32,
    /// Names one run of one `pd-control`; versions of different epochs do not compare.
    pub epoch: String,
    /// Counts changes within the epoch, from 1.
    pub version: u64,
    /// Version this one builds on; absent or null: `endpoints` is the whole list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<u64>,
    /// Endpoints that are new or changed (all of them in a whole list).
    #[serde(default)]
    pub endpoints: Vec<Endpoint>,
    /// Endpoints that left since `base`, as `ip:port` or `ip:port#rank`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<String>,
    /// Models whose cards are new or changed (all of them in a whole list), those included that no endpoint serves any
    /// more. A model that has no card here keeps the one that the filter has.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<ModelCard>,
    /// What objects of the cluster state. Absent: nothing in a whole list, no change in a change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stated: Option<Stated>,
}

impl Snapshot {
    /// A whole list of these endpoints, without models and without stated objectives and aliases. The list may be empty.
    #[must_use]
    pub fn whole(epoch: &str, version: u64, endpoints: Vec<Endpoint>) -> Self {
        Self {
            wire: WIRE_VERSION,
            epoch: epoch.to_owned(),
            version,
            base: None,
            endpoints,
            removed: Vec::new(),
            models: Vec::new(),
            stated: None,
        }
    }

    /// The bytes that go over the wire.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        // Strings, integers and finite floats only: serde_json has nothing to refuse here.
        serde_json::to_vec(self).unwrap_or_default()
    }
}
