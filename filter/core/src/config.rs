//! Plugin configuration: raw JSON → checked values. Unknown keys are refused, whatever is refused names its key.
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

use core::fmt;
use core::time::Duration;
use std::collections::BTreeMap;

use hashbrown::HashMap;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::paths::{is_inference, matches};
use crate::wire::{Endpoint, Engine, Snapshot, WIRE_VERSION, WireError, unknown_endpoint_key};

use keys::{Key, Values};

pub mod keys;

/// Epoch of the endpoints that stand in the configuration.
pub const STATIC_EPOCH: &str = "static";
/// Header that marks a request as prefill or decode work.
pub const PHASE_HEADER: &str = "x-pd-phase";
/// Header by which a caller asks why an endpoint was chosen. Untrusted by default: the answer names every candidate.
pub const EXPLAIN_HEADER: &str = "x-pd-explain";
/// Header by which llm-d names the prefill pod (`ip:port`).
pub const PREFILLER_HEADER: &str = "x-prefiller-host-port";

/// Header by which a peer restricts the endpoints of a request: `ip[:port],…` (Gateway API Inference Extension).
pub const SUBSET_HEADER: &str = "x-gateway-destination-endpoint-subset";
/// The same, as the extension's conformance tests send it.
pub const TEST_SELECTION_HEADER: &str = "test-epp-endpoint-selection";
/// Default of [`Config::session_headers`]: the header of llm-d and of most gateways, then those of coding agents (Claude
/// Code; OpenCode and Crush; Codex, its older releases with an underscore; OpenCode with its own provider; Qwen Code).
pub const SESSION_HEADERS: &[&str] = &[
    "x-session-id",
    "x-claude-code-session-id",
    "x-session-affinity",
    "session-id",
    "session_id",
    "x-opencode-session",
    "x-qwen-code-session-id",
];

/// Headers that [`Config::trusted_headers`] may name.
pub const TRUSTABLE_HEADERS: &[&str] =
    &[PHASE_HEADER, PREFILLER_HEADER, EXPLAIN_HEADER, SUBSET_HEADER, TEST_SELECTION_HEADER];

/// A checked configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Free text that an operator changes to tell roll-outs apart; shown in logs and the answer of `/v1/endpoints`.
    pub revision: String,
    /// Envoy cluster of the prefill leg. One cluster over all engine pods usually carries both legs.
    pub cluster: String,
    /// Envoy cluster of the prefill endpoints' bootstrap servers, which Mooncake's engine ids are asked from.
    pub bootstrap_cluster: String,
    /// Request header that the route fills from filter state and the cluster's `override_host` policy reads.
    pub destination_header: String,
    /// Where the endpoint list comes from; absent: from `endpoints` alone.
    pub control: Option<Control>,
    /// Endpoints that serve until `pd-control` has answered, or where there is none.
    pub endpoints: Vec<Endpoint>,
    /// Of [`TRUSTABLE_HEADERS`], those a client may set. The others are stripped.
    pub trusted_headers: Vec<String>,
    /// Paths that a client may reach beside those of inference APIs; see [`crate::paths::matches`].
    pub allowed_paths: Vec<String>,
    /// Prefixes that the gateway's routes take away from a path after the filter has seen it; see
    /// [`crate::paths::engines_path`].
    pub path_prefixes: Vec<String>,
    /// Whether requests that ask for another protocol, such as WebSocket, go to an endpoint. Otherwise they are refused.
    pub upgrades: bool,
    /// Request headers that name a client's session, the first one present counts: its requests stay together.
    pub session_headers: Vec<String>,
    /// Cookies that name it where no such header does; the first one present counts.
    pub session_cookies: Vec<String>,
    /// Largest request body, bytes, the spliced parameters included; above it clients get 413. Must not be above the
    /// limit of Envoy's buffer filter: an edit that takes a paused body past that limit ends the Envoy process.
    pub max_body_bytes: usize,
    /// Prefix hashing and index.
    pub prefix: Prefix,
    /// Names that clients may ask for and that stand for other models.
    pub models: BTreeMap<String, Alias>,
    /// Priority of each inference objective that a request may name.
    objectives: HashMap<String, i64>,
    /// Policy of each pool named in the configuration.
    pools: HashMap<String, Pool>,
    /// Policy of every other pool.
    default_pool: Pool,
}

/// A name that stands for other models.
#[derive(Clone, Debug, PartialEq)]
pub struct Alias {
    /// At least one, and at least one with a weight.
    pub targets: Vec<Target>,
    /// Whether answers name the alias in place of the model that served.
    pub is_put_back: bool,
}

/// A model that an alias may stand for.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// Name as endpoints list it.
    pub model: String,
    /// Share of the requests, against the sum of the alias's weights.
    #[serde(default = "default_weight")]
    pub weight: u32,
}

fn default_weight() -> u32 {
    1
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
    /// Whether what is in flight and which blocks went where is [exchanged](crate::envoys) with other Envoys.
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
    /// Share of recent requests, 0 to 1, above which a block says nothing about who should hold it.
    pub hot_share: f64,
}

/// Policy of one pool.
#[derive(Clone, Debug, PartialEq)]
pub struct Pool {
    /// Hand-over protocol of endpoints that do not name their own.
    pub engine: Engine,
    /// When to run a prefill leg.
    pub split: Split,
    /// What to do when no prefill endpoint could be had.
    pub on_prefill_failure: OnPrefillFailure,
    /// Prefill endpoints to try, 1 to 8.
    pub prefill_attempts: u32,
    /// How long a prefill leg may take.
    pub prefill_timeout: LegLimit,
    /// Port of a prefill endpoint's bootstrap server (SGLang, Mooncake) where the endpoint does not say.
    pub bootstrap_port: u16,
    /// Alternates named beside the decode endpoint for Envoy's connect-failure retry, 0 to 4.
    pub alternates: usize,
    /// Prefill seconds of a prompt, to begin with.
    pub cost: Cost,
    /// Whether [`cost`](Self::cost) and [`bytes_per_token`](Self::bytes_per_token) follow what is seen.
    pub fit: bool,
    /// `w`: what a second of this prompt's own prefill weighs against a second of work ahead of it.
    pub affinity_weight: f64,
    /// β: share of a prompt that its rendezvous endpoint is costed as holding, 0 to 1, when this worker has not seen
    /// the prefix but others may have. Right where Envoys know of each other's decisions within 50 ms: 0, a prompt
    /// that is new to all of them would wait for nothing (+16 % p99 at 0.6). Without any exchange 0.3 to 0.6 keeps hits.
    /// `None`: 0.6 times the share of the other Envoys that [do not exchange](crate::endpoints::elsewhere::Fleet::not_exchanging).
    pub rendezvous_share: Option<f64>,
    /// A conversation keeps its decode endpoint while that has at most so many times the prompt's tokens more assigned than
    /// the least loaded one. 0: it never stays for its own sake.
    pub decode_stay: f64,
    /// Tokens of an endpoint's prefix cache where the endpoint does not say.
    pub cache_tokens: u64,
    /// Bytes of JSON per token, for estimates.
    pub bytes_per_token: f64,
    /// Tokens of media, for estimates.
    pub media: MediaCost,
    /// Whether `cached_tokens` in the answer of a split request are those of its prefill leg.
    pub tells_prefills_cached_tokens: bool,
    /// What may be in flight.
    pub limits: Limits,
    /// Whether and how requests wait for a prefill endpoint with room.
    pub queue: Queue,
}

/// How requests of a pool wait for a prefill endpoint with room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queue {
    /// Whether they wait at all. Otherwise each goes to an endpoint as soon as it comes.
    pub is_on: bool,
    /// Work that an endpoint may have left and still have room.
    pub lead: Duration,
    /// Longest wait. Who has waited so long gets 503.
    pub max_wait: Duration,
    /// How long a request can be overtaken by others of its priority.
    pub overtaken: Duration,
    /// Most requests that wait at this Envoy.
    pub max_requests: usize,
    /// Most bytes that they take.
    pub max_bytes: usize,
    /// How long a request waits for an endpoint where none is ready for its model. Zero: it gets 503 at once. The one of the
    /// pool `default` counts, since a model without endpoints belongs to no pool.
    pub no_endpoint: Duration,
}

/// Tokens of media in a prompt, to begin with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MediaCost {
    /// Pixels of an image per token, where its data says how many it has.
    pub pixels_per_token: f64,
    /// Tokens of any other image.
    pub image_tokens: f64,
    /// Tokens of a sound.
    pub audio_tokens: f64,
    /// Tokens of a film.
    pub video_tokens: f64,
    /// Tokens of a document.
    pub file_tokens: f64,
}

/// Limits of one pool, all workers of an Envoy together. 0: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests in flight.
    pub requests: u64,
    /// KV tokens in flight: prompts and expected output.
    pub tokens: u64,
}

/// Prefill seconds `a + b·(n − p) + c·(n² − p²)` of `n` prompt tokens of which `p` are cached.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Seconds per request.
    pub a: f64,
    /// Seconds per uncached token.
    pub b: f64,
    /// Seconds per squared token (attention).
    pub c: f64,
}

impl Cost {
    /// Seconds of prefill for `n` tokens of which `p` are cached.
    #[must_use]
    pub fn seconds(&self, n: f64, p: f64) -> f64 {
        let p = p.min(n).max(0.0);
        self.a + self.b * (n - p) + self.c * (n * n - p * p)
    }
}

/// Time limit of a prefill leg. It follows what the ledger expects, so that a long prompt behind a long queue is not taken
/// for an endpoint that does not answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LegLimit {
    /// Shortest limit.
    pub floor: Duration,
    /// Times of the expected seconds, 1 or more.
    pub factor: f64,
}

impl LegLimit {
    /// Longest limit.
    const MAX: Duration = Duration::from_secs(3_600);

    /// Limit of a leg that is expected to end after so many seconds, with the work ahead of it.
    #[must_use]
    pub fn of(&self, seconds: f64) -> Duration {
        let expected = Duration::try_from_secs_f64(seconds * self.factor).unwrap_or_default();
        expected.max(self.floor).min(Self::MAX)
    }
}

/// When to run a prefill leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// When this many prompt tokens or more are not cached on the best decode endpoint.
    Threshold {
        /// Tokens.
        uncached_tokens: u64,
    },
    /// Always.
    Always,
    /// Never.
    Never,
}

/// What to do when no prefill endpoint could be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnPrefillFailure {
    /// The decode endpoint computes the prompt itself.
    DecodeOnly,
    /// The client gets 503.
    Fail,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Raw {
    revision: String,
    cluster: String,
    bootstrap_cluster: Option<String>,
    destination_header: String,
    control: Option<RawControl>,
    endpoints: Vec<Map<String, Value>>,
    trusted_headers: Vec<String>,
    allowed_paths: Vec<String>,
    path_prefixes: Vec<String>,
    upgrades: bool,
    session_headers: Vec<String>,
    session_cookies: Vec<String>,
    max_body_bytes: usize,
    prefix: RawPrefix,
    objectives: Vec<RawObjective>,
    models: BTreeMap<String, RawAlias>,
    pools: BTreeMap<String, RawPool>,
}

impl Default for Raw {
    fn default() -> Self {
        Self {
            revision: String::new(),
            cluster: "engines".to_owned(),
            bootstrap_cluster: None,
            destination_header: "x-pd-destination".to_owned(),
            control: None,
            endpoints: Vec::new(),
            trusted_headers: Vec::new(),
            allowed_paths: Vec::new(),
            path_prefixes: Vec::new(),
            upgrades: false,
            session_headers: SESSION_HEADERS.iter().map(|&name| name.to_owned()).collect(),
            session_cookies: Vec::new(),
            max_body_bytes: 16 << 20,
            prefix: RawPrefix::default(),
            objectives: Vec::new(),
            models: BTreeMap::new(),
            pools: BTreeMap::new(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawObjective {
    name: String,
    priority: i64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAlias {
    targets: Vec<Target>,
    #[serde(default)]
    answer: AnswerModel,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum AnswerModel {
    #[default]
    Served,
    Asked,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum CachedTokens {
    Prefill,
    Decode,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawControl {
    cluster: String,
    #[serde(default = "default_authority")]
    authority: String,
    #[serde(default = "default_wait_ms")]
    wait_ms: u64,
    #[serde(default = "default_token_env")]
    token_env: String,
    #[serde(default = "default_exchange")]
    exchange: bool,
}

fn default_authority() -> String {
    "pd-control".to_owned()
}
fn default_wait_ms() -> u64 {
    30_000
}
fn default_exchange() -> bool {
    true
}
fn default_token_env() -> String {
    "PD_CONTROL_TOKEN".to_owned()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawPrefix {
    block_bytes: usize,
    index_bytes: usize,
    hot_share: f64,
}

impl Default for RawPrefix {
    fn default() -> Self {
        Self { block_bytes: 512, index_bytes: 256 << 20, hot_share: 0.02 }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawPool {
    engine: Engine,
    split: RawSplit,
    on_prefill_failure: OnPrefillFailure,
    prefill_attempts: u32,
    prefill_timeout_ms: u64,
    prefill_timeout_factor: f64,
    bootstrap_port: u16,
    alternates: usize,
    cost: RawCost,
    fit: bool,
    affinity_weight: f64,
    rendezvous_share: Option<f64>,
    decode_stay: f64,
    cache_tokens: u64,
    bytes_per_token: f64,
    media: RawMedia,
    cached_tokens: CachedTokens,
    max_requests: u64,
    max_tokens: u64,
    queue: RawQueue,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawQueue {
    enabled: bool,
    lead_ms: u64,
    max_wait_ms: u64,
    overtaken_ms: u64,
    max_requests: usize,
    max_bytes: usize,
    no_endpoint_ms: u64,
}

impl Default for RawQueue {
    fn default() -> Self {
        Self {
            enabled: false,
            lead_ms: 20,
            max_wait_ms: 600_000,
            overtaken_ms: 300_000,
            max_requests: 8_192,
            max_bytes: 512 << 20,
            no_endpoint_ms: 0,
        }
    }
}

impl Default for RawPool {
    fn default() -> Self {
        Self {
            engine: Engine::VllmNixl,
            split: RawSplit::default(),
            on_prefill_failure: OnPrefillFailure::DecodeOnly,
            prefill_attempts: 2,
            prefill_timeout_ms: 60_000,
            prefill_timeout_factor: 4.0,
            bootstrap_port: 8_998,
            alternates: 2,
            cost: RawCost::default(),
            fit: true,
            affinity_weight: 3.0,
            rendezvous_share: None,
            decode_stay: 2.0,
            cache_tokens: 500_000,
            bytes_per_token: 4.0,
            media: RawMedia::default(),
            cached_tokens: CachedTokens::Prefill,
            max_requests: 0,
            max_tokens: 0,
            queue: RawQueue::default(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawSplit {
    mode: SplitMode,
    uncached_tokens: u64,
}

impl Default for RawSplit {
    fn default() -> Self {
        Self { mode: SplitMode::Threshold, uncached_tokens: 256 }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum SplitMode {
    Threshold,
    Always,
    Never,
}

/// An 8-billion-parameter model on one H100, the design's figures.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawCost {
    a_ms: f64,
    b_us: f64,
    c_ns: f64,
}

impl Default for RawCost {
    fn default() -> Self {
        Self { a_ms: 15.0, b_us: 25.0, c_ns: 0.524 }
    }
}

/// A patch of 28 by 28 pixels a token (Qwen2-VL); others are guesses, which answers correct.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawMedia {
    pixels_per_token: f64,
    image_tokens: f64,
    audio_tokens: f64,
    video_tokens: f64,
    file_tokens: f64,
}

impl Default for RawMedia {
    fn default() -> Self {
        Self {
            pixels_per_token: 784.0,
            image_tokens: 1_024.0,
            audio_tokens: 768.0,
            video_tokens: 4_096.0,
            file_tokens: 2_048.0,
        }
    }
}

/// Why a configuration is refused. The last good one stays in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// Key path and reason.
    message: String,
}

impl ConfigError {
    fn new(key: &str, why: impl fmt::Display) -> Self {
        Self { message: format!("{key}: {why}") }
    }

    /// No configuration has come yet.
    pub(crate) fn none_yet() -> Self {
        Self { message: "none has been read yet".to_owned() }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ConfigError {}

impl Raw {
    /// Checks names of clusters, headers and paths.
    fn check_names(&self) -> Result<(), ConfigError> {
        check_name("cluster", &self.cluster)?;
        if let Some(cluster) = &self.bootstrap_cluster {
            check_name("bootstrap_cluster", cluster)?;
        }
        check_header_name("destination_header", &self.destination_header)?;
        for header in &self.trusted_headers {
            if !TRUSTABLE_HEADERS.contains(&header.as_str()) {
                let why = format!("{header:?} is none of {}", TRUSTABLE_HEADERS.join(", "));
                return Err(ConfigError::new("trusted_headers", why));
            }
        }
        for (i, path) in self.allowed_paths.iter().enumerate() {
            if !path.starts_with('/') || path.trim_end_matches("/*").contains(['*', '?', '#', '%']) {
                let why = "must be a path without a query, or one that ends in `/*`";
                return Err(ConfigError::new(&format!("allowed_paths[{i}]"), why));
            }
        }
        for (i, prefix) in self.path_prefixes.iter().enumerate() {
            if !prefix.starts_with('/') || prefix.ends_with('/') || prefix.contains(['*', '?', '#', '%']) {
                let why = "must be a path such as `/team`, without a slash at its end";
                return Err(ConfigError::new(&format!("path_prefixes[{i}]"), why));
            }
        }
        for (i, header) in self.session_headers.iter().enumerate() {
            // Clients' own names may have underscores.
            check_header_name(&format!("session_headers[{i}]"), &header.replace('_', "-"))?;
        }
        for (i, cookie) in self.session_cookies.iter().enumerate() {
            let is_token = |byte: u8| byte.is_ascii_graphic() && !b"()<>@,;:\\\"/[]?={}".contains(&byte);
            if cookie.is_empty() || cookie.len() > 128 || !cookie.bytes().all(is_token) {
                return Err(ConfigError::new(&format!("session_cookies[{i}]"), "must be the name of a cookie"));
            }
        }
        Ok(())
    }
}

impl Config {
    /// Reads and checks a plugin configuration. No bytes at all stand for `{}`.
    ///
    /// # Errors
    /// [`ConfigError`] names the first key that is unknown, of the wrong type or out of range.
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        let raw: Raw = match bytes.trim_ascii() {
            b"" => Raw::default(),
            // serde would also take an array of all values in order.
            text if text.starts_with(b"{") => {
                serde_json::from_slice(bytes).map_err(|error| ConfigError::new("plugin configuration", error))?
            }
            _ => return Err(ConfigError::new("plugin configuration", "must be a JSON object")),
        };
        raw.check_names()?;
        check_number(Key::MaxBodyBytes, raw.max_body_bytes as f64)?;
        check_number(Key::PrefixBlockBytes, raw.prefix.block_bytes as f64)?;
        check_number(Key::PrefixIndexBytes, raw.prefix.index_bytes as f64)?;
        check_number(Key::PrefixHotShare, raw.prefix.hot_share)?;
        let control = raw.control.map(Control::check).transpose()?;
        let endpoints = check_endpoints(raw.endpoints)?;
        let mut pools = HashMap::with_capacity(raw.pools.len());
        for (name, pool) in &raw.pools {
            pools.insert(name.clone(), Pool::check(name, pool)?);
        }
        let mut models = BTreeMap::new();
        for (name, alias) in raw.models {
            let alias = Alias::check(&format!("models.{name}"), alias)?;
            models.insert(name, alias);
        }
        let default_pool = match pools.get("default") {
            Some(pool) => pool.clone(),
            None => Pool::check("default", &RawPool::default())?,
        };
        Ok(Self {
            revision: raw.revision,
            bootstrap_cluster: raw.bootstrap_cluster.unwrap_or_else(|| raw.cluster.clone()),
            cluster: raw.cluster,
            destination_header: raw.destination_header,
            control,
            endpoints,
            trusted_headers: raw.trusted_headers,
            allowed_paths: raw.allowed_paths,
            path_prefixes: raw.path_prefixes,
            upgrades: raw.upgrades,
            session_headers: raw.session_headers,
            session_cookies: raw.session_cookies,
            max_body_bytes: raw.max_body_bytes,
            prefix: Prefix {
                block_bytes: raw.prefix.block_bytes,
                index_bytes: raw.prefix.index_bytes,
                hot_share: raw.prefix.hot_share,
            },
            models,
            objectives: raw.objectives.into_iter().map(|objective| (objective.name, objective.priority)).collect(),
            pools,
            default_pool,
        })
    }

    /// Policy of a pool; a pool that the configuration does not name has the one of `default`.
    #[must_use]
    pub fn pool(&self, name: &str) -> &Pool {
        self.pools.get(name).unwrap_or(&self.default_pool)
    }

    /// Priority of an inference objective: as configured, else the number that the name is, else 0.
    #[must_use]
    pub fn priority(&self, objective: &str) -> i64 {
        self.objectives.get(objective).copied().or_else(|| objective.parse().ok()).unwrap_or(0)
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
        Snapshot {
            wire: WIRE_VERSION,
            epoch: STATIC_EPOCH.to_owned(),
            version: 1,
            base: None,
            endpoints: self.endpoints.clone(),
            removed: Vec::new(),
            models: Vec::new(),
        }
    }
}

impl Alias {
    fn check(key: &str, raw: RawAlias) -> Result<Self, ConfigError> {
        if raw.targets.iter().any(|target| target.model.is_empty()) {
            return Err(ConfigError::new(key, "targets: a model must have a name"));
        }
        if raw.targets.iter().all(|target| target.weight == 0) {
            return Err(ConfigError::new(key, "targets: there must be one with a weight"));
        }
        Ok(Self { targets: raw.targets, is_put_back: matches!(raw.answer, AnswerModel::Asked) })
    }
}

impl Control {
    fn check(raw: RawControl) -> Result<Self, ConfigError> {
        check_name("control.cluster", &raw.cluster)?;
        check_name("control.authority", &raw.authority)?;
        check_number(Key::ControlWaitMs, raw.wait_ms as f64)?;
        Ok(Self {
            cluster: raw.cluster,
            authority: raw.authority,
            wait: Duration::from_millis(raw.wait_ms),
            token_env: raw.token_env,
            exchange: raw.exchange,
        })
    }
}

impl Pool {
    fn check(name: &str, raw: &RawPool) -> Result<Self, ConfigError> {
        let numbers = [
            (Key::PoolsPrefillAttempts, f64::from(raw.prefill_attempts)),
            (Key::PoolsPrefillTimeoutMs, raw.prefill_timeout_ms as f64),
            (Key::PoolsPrefillTimeoutFactor, raw.prefill_timeout_factor),
            (Key::PoolsBootstrapPort, f64::from(raw.bootstrap_port)),
            (Key::PoolsAlternates, raw.alternates as f64),
            (Key::PoolsCostA, raw.cost.a_ms),
            (Key::PoolsCostB, raw.cost.b_us),
            (Key::PoolsCostC, raw.cost.c_ns),
            (Key::PoolsAffinityWeight, raw.affinity_weight),
            (Key::PoolsRendezvousShare, raw.rendezvous_share.unwrap_or(0.0)),
            (Key::PoolsDecodeStay, raw.decode_stay),
            (Key::PoolsCacheTokens, raw.cache_tokens as f64),
            (Key::PoolsBytesPerToken, raw.bytes_per_token),
            (Key::PoolsQueueLeadMs, raw.queue.lead_ms as f64),
            (Key::PoolsQueueMaxWaitMs, raw.queue.max_wait_ms as f64),
            (Key::PoolsQueueOvertakenMs, raw.queue.overtaken_ms as f64),
            (Key::PoolsQueueMaxRequests, raw.queue.max_requests as f64),
            (Key::PoolsQueueMaxBytes, raw.queue.max_bytes as f64),
            (Key::PoolsMediaPixelsPerToken, raw.media.pixels_per_token),
            (Key::PoolsMediaImageTokens, raw.media.image_tokens),
            (Key::PoolsMediaAudioTokens, raw.media.audio_tokens),
            (Key::PoolsMediaVideoTokens, raw.media.video_tokens),
            (Key::PoolsMediaFileTokens, raw.media.file_tokens),
            (Key::PoolsQueueNoEndpointMs, raw.queue.no_endpoint_ms as f64),
        ];
        for (key, value) in numbers {
            check_range(&key.path().replacen("NAME", name, 1), key, value)?;
        }
        Ok(Self::unchecked(raw))
    }

    fn unchecked(raw: &RawPool) -> Self {
        let uncached_tokens = raw.split.uncached_tokens;
        Self {
            engine: raw.engine,
            split: match raw.split.mode {
                SplitMode::Threshold => Split::Threshold { uncached_tokens },
                SplitMode::Always => Split::Always,
                SplitMode::Never => Split::Never,
            },
            on_prefill_failure: raw.on_prefill_failure,
            prefill_attempts: raw.prefill_attempts,
            prefill_timeout: LegLimit {
                floor: Duration::from_millis(raw.prefill_timeout_ms),
                factor: raw.prefill_timeout_factor,
            },
            bootstrap_port: raw.bootstrap_port,
            alternates: raw.alternates,
            cost: Cost { a: raw.cost.a_ms * 1e-3, b: raw.cost.b_us * 1e-6, c: raw.cost.c_ns * 1e-9 },
            fit: raw.fit,
            affinity_weight: raw.affinity_weight,
            rendezvous_share: raw.rendezvous_share,
            decode_stay: raw.decode_stay,
            cache_tokens: raw.cache_tokens,
            bytes_per_token: raw.bytes_per_token,
            media: MediaCost {
                pixels_per_token: raw.media.pixels_per_token,
                image_tokens: raw.media.image_tokens,
                audio_tokens: raw.media.audio_tokens,
                video_tokens: raw.media.video_tokens,
                file_tokens: raw.media.file_tokens,
            },
            tells_prefills_cached_tokens: matches!(raw.cached_tokens, CachedTokens::Prefill),
            limits: Limits { requests: raw.max_requests, tokens: raw.max_tokens },
            queue: Queue {
                is_on: raw.queue.enabled,
                lead: Duration::from_millis(raw.queue.lead_ms),
                max_wait: Duration::from_millis(raw.queue.max_wait_ms),
                overtaken: Duration::from_millis(raw.queue.overtaken_ms),
                max_requests: raw.queue.max_requests,
                max_bytes: raw.queue.max_bytes,
                no_endpoint: Duration::from_millis(raw.queue.no_endpoint_ms),
            },
        }
    }
}

fn check_endpoints(raw: Vec<Map<String, Value>>) -> Result<Vec<Endpoint>, ConfigError> {
    let mut endpoints = Vec::with_capacity(raw.len());
    for (i, object) in raw.into_iter().enumerate() {
        if let Some(key) = unknown_endpoint_key(&object) {
            return Err(ConfigError::new(&format!("endpoints[{i}].{key}"), "unknown key"));
        }
        let endpoint: Endpoint = serde_json::from_value(Value::Object(object))
            .map_err(|error| ConfigError::new(&format!("endpoints[{i}]"), error))?;
        endpoints.push(endpoint);
    }
    let snapshot = Snapshot {
        wire: WIRE_VERSION,
        epoch: String::new(),
        version: 1,
        base: None,
        endpoints,
        removed: Vec::new(),
        models: Vec::new(),
    };
    snapshot.validate().map_err(|error: WireError| ConfigError::new("endpoints", error))?;
    Ok(snapshot.endpoints)
}

fn check_name(key: &str, value: &str) -> Result<(), ConfigError> {
    if value.is_empty() || value.len() > 512 || !value.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(ConfigError::new(key, "must be 1 to 512 visible ASCII characters"));
    }
    Ok(())
}

fn check_header_name(key: &str, value: &str) -> Result<(), ConfigError> {
    let token = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if value.is_empty() || value.len() > 128 || !value.bytes().all(token) {
        return Err(ConfigError::new(key, "must be a header name in lower case"));
    }
    Ok(())
}

fn check_number(key: Key, value: f64) -> Result<(), ConfigError> {
    check_range(key.path(), key, value)
}

fn check_range(path: &str, key: Key, value: f64) -> Result<(), ConfigError> {
    match key.values() {
        Values::Between { low, high, .. } if !key.values().allows(value) => {
            Err(ConfigError::new(path, format_args!("must be between {low} and {high}, is {value}")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
