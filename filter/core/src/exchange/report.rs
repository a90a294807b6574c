//! What an Envoy reports of itself once a second, for people.

use serde::{Deserialize, Serialize};

/// Decisions that a report may hold.
pub const MAX_DECISIONS: usize = 8;
/// Bytes of a report at most; a longer one is not kept.
pub const MAX_REPORT_BYTES: usize = 64 << 10;

/// One Envoy's report. Newer filters may tell more; what is missing stands at its default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// What its workers run, a line per build and configuration: two or more while one is rolled out.
    pub generations: Vec<Generation>,
    /// Epoch of the endpoint list in force.
    pub epoch: String,
    /// Its version.
    pub version: u64,
    /// Endpoints in it.
    pub endpoints: u64,
    /// `ip:port` of those that did not answer last time.
    pub failing: Vec<String>,
    /// Some of the latest decisions, newest first.
    pub decisions: Vec<Decision>,
}

impl Report {
    /// The bytes of [`Record::report`](super::message::Record::report).
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        // Strings and integers only: serde_json has nothing to refuse here.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads what [`to_json`](Self::to_json) wrote, or a newer one.
    #[must_use]
    pub fn from_json(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }
}

/// Workers that run one build with one configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct Generation {
    /// Release.
    pub version: String,
    /// Source revision.
    pub build: String,
    /// `revision` of the plugin configuration in force.
    pub revision: String,
    /// Workers alive.
    pub workers: u64,
}

/// Where a request went. The words are those of the access log.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Decision {
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// `split`, `decode_only` …
    pub decision: String,
    /// Why.
    pub reason: String,
    /// Model that served.
    pub model: String,
    /// `ip:port` of the prefill endpoint, where there was one.
    pub prefill: String,
    /// `ip:port` of the decode endpoint.
    pub decode: String,
    /// Estimated tokens of the prompt.
    pub prompt_tokens: u64,
    /// Those that the endpoint which computed it held.
    pub matched_tokens: u64,
}
