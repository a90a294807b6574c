//! One endpoint of a list.

use core::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::engine::Engine;

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

/// Whether an endpoint may get requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Gets new requests and prefill legs.
    #[default]
    Ready,
    /// Finishes its running requests and gets no new ones.
    Draining,
    /// Gets no requests.
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
    /// Requests that the endpoint serves.
    pub role: Role,
    /// Pool whose policy applies.
    #[serde(default = "default_pool", skip_serializing_if = "is_default_pool")]
    pub pool: String,
    /// Models and adapters that the endpoint serves; empty: any, or not known yet (see `models_closed`, `models_pending`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<String>,
    /// Whether `models` is complete, so that `pd-control` adds no model that the engine reports.
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
    /// Revision of model and engine: a prefill endpoint serves decode endpoints of the same revision only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Speed relative to the pool's other endpoints, 0.01 to 100.
    #[serde(default = "default_weight", skip_serializing_if = "is_default_weight")]
    pub weight: f64,
    /// Tokens that its prefix cache holds, CPU tier included; absent: the pool's figure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_tokens: Option<u64>,
    /// Port of a prefill endpoint's bootstrap server (SGLang, Mooncake); absent: the pool's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bootstrap_port: Option<u16>,
    /// Shortest prompt, in tokens. Shorter prompts go to other endpoints, as long as another endpoint may take them. Absent:
    /// no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_prompt_tokens: Option<u64>,
    /// Longest prompt, in tokens. Longer prompts go to other endpoints, as long as another endpoint may take them. Absent:
    /// no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_prompt_tokens: Option<u64>,
    /// Whether the endpoint may get requests.
    #[serde(default, skip_serializing_if = "is_default_state")]
    pub state: State,
    /// Id of the containers behind the address; absent if the source does not know it. Another id is another process. Files do
    /// not have this key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// Number of the prefix cache behind the address, which `pd-control` derives from the engine's metrics. Another number is
    /// another cache, which is empty. Files do not have this key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_epoch: Option<u64>,
    /// KV leases that the engine let expire since it started, by its metrics. Files do not have this key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expired_kv_leases: Option<u64>,
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
    "revision",
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

impl EndpointId {
    /// The number by which workers, and Envoys among each other, name the endpoint. It is the same in every release.
    #[must_use]
    pub fn key(&self) -> u64 {
        xxhash_rust::xxh3::xxh3_64(self.to_string().as_bytes())
    }
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
            revision: None,
            weight: default_weight(),
            cache_tokens: None,
            bootstrap_port: None,
            min_prompt_tokens: None,
            max_prompt_tokens: None,
            state: State::Ready,
            container: None,
            cache_epoch: None,
            expired_kv_leases: None,
        }
    }

    /// The name that [`Snapshot::removed`](super::Snapshot::removed) uses.
    #[must_use]
    pub fn id(&self) -> EndpointId {
        EndpointId { address: self.address, rank: self.rank }
    }

    /// Whether the endpoint has a bound for the length of prompts.
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
}
