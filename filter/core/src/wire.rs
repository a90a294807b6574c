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

use core::fmt;
use std::net::SocketAddr;

use hashbrown::HashSet;
use serde::{Deserialize, Serialize};

pub use crate::engine::Engine;

/// Version of this format, in every snapshot. A filter refuses a snapshot of another one and keeps its last good list.
pub const WIRE_VERSION: u32 = 1;
/// Path of the long poll on `pd-control`.
pub const WATCH_PATH: &str = "/v1/watch";
/// Endpoints that one snapshot may hold; more is refused. Ten times the largest fleet that the benches drive.
pub const MAX_ENDPOINTS: usize = 100_000;
/// Bytes that a model, pool or group name may have; more is refused.
pub const MAX_NAME_BYTES: usize = 256;
/// Models that one endpoint may serve (base model and adapters); more is refused.
pub const MAX_MODELS: usize = 1_024;
/// Models that one snapshot may describe; more is refused. A filter remembers as many that no endpoint serves any more.
pub const MAX_CARDS: usize = 4_096;
/// Bytes that `root` and `parent` of a model may have; more is refused.
pub const MAX_CARD_BYTES: usize = 1_024;

/// Work that an endpoint takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Computes KV caches of prompts for others.
    Prefill,
    /// Generates tokens from a KV cache that a prefill endpoint computed.
    Decode,
    /// Serves whole requests (an aggregated server).
    Both,
}

/// Whether an endpoint may get work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Takes work.
    #[default]
    Ready,
    /// Finishes what it has, gets nothing new.
    Draining,
    /// Gets nothing.
    Down,
}

/// One engine server that Envoy can reach, or one data-parallel rank of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Address as Envoy's cluster knows it.
    pub address: SocketAddr,
    /// Data-parallel rank behind that address, sent as `X-data-parallel-rank`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<u32>,
    /// Work it takes.
    pub role: Role,
    /// Pool whose policy applies.
    #[serde(default = "default_pool", skip_serializing_if = "is_default_pool")]
    pub pool: String,
    /// Models and adapters it serves; empty: it has not said.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<String>,
    /// Whether `models` is complete: `pd-control` adds none that the engine tells.
    #[serde(default, skip_serializing_if = "core::ops::Not::not")]
    pub models_closed: bool,
    /// Whether `pd-control` has yet to learn models from the engine. A filter then keeps those that it knows of the
    /// endpoint. Files do not have this key.
    #[serde(default, skip_serializing_if = "core::ops::Not::not")]
    pub models_pending: bool,
    /// Hand-over protocol, where it differs from its pool's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<Engine>,
    /// Pairing group: a prefill endpoint of a group serves decode endpoints of the same group only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Speed relative to the pool's other endpoints, 0.01 to 100.
    #[serde(default = "default_weight", skip_serializing_if = "is_default_weight")]
    pub weight: f64,
    /// Tokens that its prefix cache holds, CPU tier included; absent: the pool's figure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_tokens: Option<u64>,
    /// Port of a prefill endpoint's bootstrap server (SGLang, Mooncake); absent: the pool's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bootstrap_port: Option<u16>,
    /// Prompts of fewer tokens than these go elsewhere, while somebody else may take them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_prompt_tokens: Option<u64>,
    /// Prompts of more tokens than these go elsewhere, while somebody else may take them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_prompt_tokens: Option<u64>,
    /// Whether it may get work.
    #[serde(default, skip_serializing_if = "is_default_state")]
    pub state: State,
}

/// Keys of [`Endpoint`], for readers that refuse unknown ones.
pub const ENDPOINT_KEYS: &[&str] = &[
    "address",
    "rank",
    "role",
    "pool",
    "models",
    "models_closed",
    "engine",
    "group",
    "weight",
    "cache_tokens",
    "bootstrap_port",
    "min_prompt_tokens",
    "max_prompt_tokens",
    "state",
];

fn default_pool() -> String {
    "default".to_owned()
}
fn is_default_pool(pool: &str) -> bool {
    pool == "default"
}
fn default_weight() -> f64 {
    1.0
}
fn is_default_weight(weight: &f64) -> bool {
    *weight == 1.0
}
fn is_default_state(state: &State) -> bool {
    *state == State::Ready
}

/// The first key of a configured endpoint that [`Endpoint`] does not have.
#[must_use]
pub fn unknown_endpoint_key(endpoint: &serde_json::Map<String, serde_json::Value>) -> Option<&str> {
    endpoint.keys().map(String::as_str).find(|key| !ENDPOINT_KEYS.contains(key))
}

/// Names one endpoint for as long as it is in the list: address, and rank where there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointId {
    /// Address as Envoy's cluster knows it.
    pub address: SocketAddr,
    /// Data-parallel rank.
    pub rank: Option<u32>,
}

impl fmt::Display for EndpointId {
    /// `ip:port`, or `ip:port#rank`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rank {
            None => write!(f, "{}", self.address),
            Some(rank) => write!(f, "{}#{rank}", self.address),
        }
    }
}

impl core::str::FromStr for EndpointId {
    type Err = WireError;

    fn from_str(text: &str) -> Result<Self, WireError> {
        let bad = || WireError::BadId(text.to_owned());
        let (address, rank) = match text.split_once('#') {
            None => (text, None),
            Some((address, rank)) => (address, Some(rank.parse().map_err(|_| bad())?)),
        };
        Ok(Self { address: address.parse().map_err(|_| bad())?, rank })
    }
}

impl Endpoint {
    /// A ready endpoint of the default pool with everything else left at its default.
    #[must_use]
    pub fn new(address: SocketAddr, role: Role) -> Self {
        Self {
            address,
            rank: None,
            role,
            pool: default_pool(),
            models: Vec::new(),
            models_closed: false,
            models_pending: false,
            engine: None,
            group: None,
            weight: default_weight(),
            cache_tokens: None,
            bootstrap_port: None,
            min_prompt_tokens: None,
            max_prompt_tokens: None,
            state: State::Ready,
        }
    }

    /// The name that [`Snapshot::removed`] uses.
    #[must_use]
    pub fn id(&self) -> EndpointId {
        EndpointId { address: self.address, rank: self.rank }
    }

    /// Whether it says of which length prompts should be.
    #[must_use]
    pub fn has_prompt_bounds(&self) -> bool {
        self.min_prompt_tokens.is_some() || self.max_prompt_tokens.is_some()
    }

    /// Whether a prompt of this length is within its bounds, both of which are included.
    #[must_use]
    pub fn takes_prompt(&self, tokens: f64) -> bool {
        self.min_prompt_tokens.is_none_or(|min| tokens >= min as f64)
            && self.max_prompt_tokens.is_none_or(|max| tokens <= max as f64)
    }

    /// Checks what the types alone do not say.
    ///
    /// # Errors
    /// [`WireError::BadEndpoint`] names the endpoint and the key.
    pub fn validate(&self) -> Result<(), WireError> {
        let bad = |key: &'static str, why: &'static str| WireError::BadEndpoint { id: self.id(), key, why };
        if self.address.port() == 0 {
            return Err(bad("address", "port must not be 0"));
        }
        if self.bootstrap_port == Some(0) {
            return Err(bad("bootstrap_port", "must not be 0"));
        }
        if self.min_prompt_tokens.zip(self.max_prompt_tokens).is_some_and(|(min, max)| min > max) {
            return Err(bad("max_prompt_tokens", "must not be below min_prompt_tokens"));
        }
        if self.address.ip().is_unspecified() {
            return Err(bad("address", "must not be the unspecified address"));
        }
        if !(0.01..=100.0).contains(&self.weight) {
            return Err(bad("weight", "must be between 0.01 and 100"));
        }
        if self.models.len() > MAX_MODELS {
            return Err(bad("models", "too many"));
        }
        let names = [("pool", Some(&self.pool)), ("group", self.group.as_ref())];
        for (key, name) in names.into_iter().chain(self.models.iter().map(|model| ("models", Some(model)))) {
            if let Some(name) = name
                && (name.is_empty() || name.len() > MAX_NAME_BYTES)
            {
                return Err(bad(key, "names must have 1 to 256 bytes"));
            }
        }
        Ok(())
    }
}

/// What engines tell of a model, beside its name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelCard {
    /// Its name.
    pub id: String,
    /// Longest prompt and answer together, tokens. Where servers differ, the smallest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<u64>,
    /// Where the engine loaded it from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// The base model of an adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Whose it is, by the engine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owned_by: Option<String>,
}

impl ModelCard {
    /// A card with a name only.
    #[must_use]
    pub fn new(id: &str) -> Self {
        Self { id: id.to_owned(), ..Self::default() }
    }

    /// Whether a snapshot may have the card.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        let texts = [&self.root, &self.parent, &self.owned_by];
        !self.id.is_empty()
            && self.id.len() <= MAX_NAME_BYTES
            && texts.into_iter().flatten().all(|text| text.len() <= MAX_CARD_BYTES)
    }

    /// What two servers tell of one model: the smaller length, and each text from the first that has it.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        let max_model_len = match (self.max_model_len, other.max_model_len) {
            (Some(one), Some(two)) => Some(one.min(two)),
            (one, two) => one.or(two),
        };
        Self {
            id: self.id,
            max_model_len,
            root: self.root.or(other.root),
            parent: self.parent.or(other.parent),
            owned_by: self.owned_by.or(other.owned_by),
        }
    }
}

/// A list of endpoints, or what changed since an earlier one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// [`WIRE_VERSION`].
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
}

impl Snapshot {
    /// Reads and checks a snapshot; it is taken whole or not at all.
    ///
    /// # Errors
    /// [`WireError`] for anything but a well-formed snapshot of [`WIRE_VERSION`].
    pub fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        let snapshot: Self = serde_json::from_slice(bytes).map_err(|error| WireError::Malformed(error.to_string()))?;
        snapshot.validate()?;
        Ok(snapshot)
    }

    /// Checks versions, the number of endpoints, each endpoint, and that no endpoint is listed twice.
    ///
    /// # Errors
    /// As [`Snapshot::parse`].
    pub fn validate(&self) -> Result<(), WireError> {
        if self.wire != WIRE_VERSION {
            return Err(WireError::Version(self.wire));
        }
        if self.base.is_some_and(|base| base >= self.version) {
            return Err(WireError::Malformed("base must be below version".to_owned()));
        }
        if self.endpoints.len() > MAX_ENDPOINTS || self.removed.len() > MAX_ENDPOINTS {
            return Err(WireError::TooMany);
        }
        let mut seen = HashSet::with_capacity(self.endpoints.len());
        for endpoint in &self.endpoints {
            endpoint.validate()?;
            if !seen.insert(endpoint.id()) {
                return Err(WireError::Duplicate(endpoint.id()));
            }
        }
        for id in &self.removed {
            id.parse::<EndpointId>()?;
        }
        if self.models.len() > MAX_CARDS {
            return Err(WireError::Malformed(format!("more than {MAX_CARDS} models")));
        }
        if let Some(card) = self.models.iter().find(|card| !card.is_valid()) {
            let why = format!("models: {:.64}: a name or a text is empty or too long", card.id);
            return Err(WireError::Malformed(why));
        }
        Ok(())
    }

    /// The bytes that go over the wire.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        // Strings, integers and finite floats only: serde_json has nothing to refuse here.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

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

#[cfg(test)]
mod tests;
