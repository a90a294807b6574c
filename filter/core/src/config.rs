//! Plugin configuration: raw JSON becomes checked values. Unknown keys are refused. Each refusal names its key.
//!
//! ```json
//! {
//!   "revision": "2026-11-20",
//!   "cluster": "engines",
//!   "control": {"cluster": "pd-control"},
//!   "pools": {"default": {"engine": "vllm-nixl", "split": {"mode": "threshold", "uncached_tokens": 512}}}
//! }
//! ```
//! Every key has a default; `{}` is a valid configuration (it has no endpoints, so requests get 503 until it has).

use core::time::Duration;
use std::collections::BTreeMap;

use hashbrown::HashMap;

use crate::config::legs::Legs;
use crate::paths::{is_inference, matches};
use crate::wire::{Endpoint, Snapshot, Stated, Target};

pub use error::ConfigError;
pub use pool::{Cost, LegLimit, Limits, MediaCost, OnPrefillFailure, Pool, Queue, Split};

mod check;
mod error;
pub mod keys;
pub mod legs;
mod names;
mod pool;
mod raw;

/// Epoch of the endpoints in the configuration.
pub const STATIC_EPOCH: &str = "static";
/// Header that marks a request as prefill or decode work.
pub const PHASE_HEADER: &str = "x-pd-phase";
/// Header by which a caller asks why an endpoint was chosen. Untrusted by default: the answer names every candidate.
pub const EXPLAIN_HEADER: &str = "x-pd-explain";
/// Header by which llm-d names the prefill pod (`ip:port`).
pub const PREFILLER_HEADER: &str = "x-prefiller-host-port";

/// Header that restricts the endpoints of a request: `ip[:port],…` (Gateway API Inference Extension).
pub const SUBSET_HEADER: &str = "x-gateway-destination-endpoint-subset";
/// The same, as the extension's conformance tests send it.
pub const TEST_SELECTION_HEADER: &str = "test-epp-endpoint-selection";
/// Default of [`Config::session_headers`]: the header of llm-d and of most gateways, then those of clients.
/// docs/headers-and-access-log.md lists the clients of each header. The last three may be narrower than a conversation, so
/// they count only if the request has no other.
pub const SESSION_HEADERS: &[&str] = &[
    "x-session-id",
    "x-claude-code-session-id",
    "x-session-affinity",
    "session-id",
    "session_id",
    "x-opencode-session",
    "agent-session-id",
    "x-kilocode-taskid",
    "x-client-session-id",
    "x-amp-thread-id",
    "x-coder-chat-id",
    "x-task-id",
    "x-roo-task-id",
    "x-openwebui-chat-id",
    "x-litellm-session-id",
    "x-litellm-trace-id",
    "x-interaction-id",
];

/// Headers that [`Config::trusted_headers`] may name.
pub const TRUSTABLE_HEADERS: &[&str] =
    &[PHASE_HEADER, PREFILLER_HEADER, EXPLAIN_HEADER, SUBSET_HEADER, TEST_SELECTION_HEADER];

/// A checked configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Configuration revision: text that an operator changes with each roll-out. Logs and the answer of `/v1/endpoints` show
    /// it.
    pub revision: String,
    /// Envoy cluster of the prefill leg. One cluster over all engine pods usually carries both legs.
    pub cluster: String,
    /// Envoy cluster of the prefill endpoints' bootstrap servers, which the filter asks for Mooncake's engine ids.
    pub bootstrap_cluster: String,
    /// Request header that the route fills from filter state and the cluster's `override_host` policy reads.
    pub destination_header: String,
    /// Where the endpoint list comes from; absent: from `endpoints` alone.
    pub control: Option<Control>,
    /// Endpoints that serve until `pd-control` has answered, or where there is none.
    pub endpoints: Vec<Endpoint>,
    /// Those of [`TRUSTABLE_HEADERS`] that a client may set. The filter strips the others.
    pub trusted_headers: Vec<String>,
    /// Paths that a client may reach beside those of inference APIs; see [`crate::paths::matches`].
    pub allowed_paths: Vec<String>,
    /// Prefixes that the gateway's routes take away from a path after the filter has seen it; see
    /// [`crate::paths::engines_path`].
    pub path_prefixes: Vec<String>,
    /// How prefill legs differ from the client's request.
    pub legs: Legs,
    /// Whether requests that ask for another protocol, such as WebSocket, go to an endpoint. Otherwise they are refused.
    pub upgrades: bool,
    /// Request headers that name a client's session, whose requests stay together. The first one present counts.
    pub session_headers: Vec<String>,
    /// Cookies that name the session where no such header does. The first one present counts.
    pub session_cookies: Vec<String>,
    /// Largest request body, bytes, the spliced parameters included; above it clients get 413. Must not be above the
    /// limit of Envoy's buffer filter: an edit that takes a paused body past that limit ends the Envoy process.
    pub max_body_bytes: usize,
    /// Prefix hashing and index.
    pub prefix: Prefix,
    /// Aliases by name.
    pub models: BTreeMap<String, Alias>,
    /// Priority of each inference objective that a request may name.
    objectives: HashMap<String, i64>,
    /// Policy of each pool named in the configuration.
    pools: HashMap<String, Pool>,
    /// Policy of every other pool.
    default_pool: Pool,
}

/// An alias: its targets, and the model name in answers.
#[derive(Clone, Debug, PartialEq)]
pub struct Alias {
    /// At least one, and at least one with a weight.
    pub targets: Vec<Target>,
    /// Whether answers name the alias in place of the model that served.
    pub is_put_back: bool,
}

/// How the filter reaches `pd-control`.
#[derive(Clone, Debug, PartialEq)]
pub struct Control {
    /// Envoy cluster of `pd-control`.
    pub cluster: String,
    /// `:authority` of the poll.
    pub authority: String,
    /// How long `pd-control` may hold a poll.
    pub wait: Duration,
    /// Environment variable of the Envoy process that holds the bearer token, if there is one.
    pub token_env: String,
    /// Whether this Envoy [exchanges](crate::envoys) with others.
    pub exchange: bool,
}

/// Prefix hashing and index.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prefix {
    /// Bytes of a prompt's first hashed blocks, 64 to 65,536; blocks further back are multiples of it. Smaller blocks
    /// match more finely and cost more per kB.
    pub block_bytes: usize,
    /// Bound of the index in bytes, per worker.
    pub index_bytes: usize,
    /// Share of recent requests, 0 to 1, above which a block is hot: it does not decide which endpoint gets a prompt.
    pub hot_share: f64,
}

impl Config {
    /// Policy of a pool; a pool that the configuration does not name has the one of `default`.
    #[must_use]
    pub fn pool(&self, name: &str) -> &Pool {
        self.pools.get(name).unwrap_or(&self.default_pool)
    }

    /// Priority of an inference objective: as configured, else as the cluster states it, else the number that the name is,
    /// else 0.
    #[must_use]
    pub fn priority(&self, objective: &str, stated: &Stated) -> i64 {
        let known = self.objectives.get(objective).or_else(|| stated.objectives.get(objective));
        known.copied().or_else(|| objective.parse().ok()).unwrap_or(0)
    }

    /// The policies: each pool that the configuration names, and `default` if it does not name that.
    pub fn policies(&self) -> impl Iterator<Item = (&str, &Pool)> {
        let named = self.pools.iter().map(|(name, pool)| (name.as_str(), pool));
        named.chain([("default", &self.default_pool)])
    }

    /// Whether requests of any pool may wait.
    #[must_use]
    pub fn has_queue(&self) -> bool {
        self.policies().any(|(_, Pool { queue, .. })| queue.is_on || !queue.no_endpoint.is_zero())
    }

    /// Whether the configuration names a model: as an alias, as an alias's target, or as one of an endpoint.
    #[must_use]
    pub fn names_model(&self, name: &str) -> bool {
        let is_target = |alias: &Alias| alias.targets.iter().any(|target| target.model == name);
        self.models.contains_key(name)
            || self.models.values().any(is_target)
            || self.endpoints.iter().any(|endpoint| endpoint.models.iter().any(|model| model == name))
    }

    /// Whether a client may set this header of ours.
    #[must_use]
    pub fn trusts(&self, header: &str) -> bool {
        self.trusted_headers.iter().any(|trusted| trusted == header)
    }

    /// Whether a client may reach this path, percent-encoding undone and without a query.
    #[must_use]
    pub fn allows(&self, path: &[u8]) -> bool {
        is_inference(path) || self.allowed_paths.iter().any(|pattern| matches(pattern, path))
    }

    /// The configured endpoints as a snapshot that any list of `pd-control` replaces.
    #[must_use]
    pub fn static_snapshot(&self) -> Snapshot {
        Snapshot::whole(STATIC_EPOCH, 1, self.endpoints.clone())
    }
}

#[cfg(test)]
mod tests;
