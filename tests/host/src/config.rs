//! What a worker is configured with: the plugin's configuration and the parts of Envoy around it.

use std::collections::BTreeMap;

use crate::{Clock, LogLevel};

/// Configuration of one worker's VM and of the Envoy around it.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// Shared data and queues are kept per `vm_id`.
    pub vm_id: String,
    /// `root_id` of the plugin.
    pub root_id: String,
    /// Name of the plugin.
    pub plugin_name: String,
    /// Given to `proxy_on_vm_start`.
    pub vm_configuration: Vec<u8>,
    /// Given to `proxy_on_configure`.
    pub plugin_configuration: Vec<u8>,
    /// Clusters the worker knows and that have a healthy host.
    pub clusters: Vec<String>,
    /// Properties of every stream, by path with dots (`source.address`); see [`crate::Stream::set_property`].
    pub properties: BTreeMap<String, Property>,
    /// Environment variables of the VM.
    pub environment: Vec<(String, String)>,
    /// Level that `proxy_get_log_level` reports. Lines below it are captured all the same.
    pub log_level: LogLevel,
    /// Whether Envoy's buffer filter stands between this filter and the router.
    pub buffer_filter: bool,
    /// A buffered request body over this many bytes is answered with 413. `None`: no limit.
    pub request_limit_bytes: Option<usize>,
    /// Request headers the route sets from filter state: header name, filter state name (`wasm.pd.destination`). A
    /// missing state leaves the header as it is, like `%FILTER_STATE(…)%` does.
    pub route_headers: Vec<(String, String)>,
    /// The clock all workers of one Envoy share.
    pub clock: Clock,
    /// What the modules' random numbers follow from, with the number of the worker: another one for another Envoy.
    pub seed: u64,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        Self {
            vm_id: "vm".into(),
            root_id: "root".into(),
            plugin_name: "plugin".into(),
            vm_configuration: Vec::new(),
            plugin_configuration: Vec::new(),
            clusters: Vec::new(),
            properties: BTreeMap::new(),
            environment: Vec::new(),
            log_level: LogLevel::Info,
            buffer_filter: true,
            request_limit_bytes: None,
            route_headers: Vec::new(),
            clock: Clock::new(),
            seed: 0x5eed,
        }
    }
}

/// What stands behind a cluster name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterState {
    /// Call-outs start and wait for the test's answer.
    Ready,
    /// Envoy fails the call at once (no healthy host, circuit breaker): `proxy_http_call` returns `InternalFailure` and
    /// no callback follows.
    FailsAtOnce,
}

/// A property's value, in the form Envoy gives its type to the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Property {
    /// Strings and bytes.
    Bytes(Vec<u8>),
    /// Integers, timestamps and durations (ns): 8 bytes, little endian.
    Int(i64),
    /// Unsigned integers: 8 bytes, little endian.
    Uint(u64),
    /// Booleans: one byte.
    Bool(bool),
}

impl Property {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Bytes(bytes) => bytes.clone(),
            Self::Int(n) => n.to_le_bytes().to_vec(),
            Self::Uint(n) => n.to_le_bytes().to_vec(),
            Self::Bool(b) => vec![u8::from(*b)],
        }
    }
}

impl From<&str> for Property {
    fn from(text: &str) -> Self {
        Self::Bytes(text.as_bytes().to_vec())
    }
}
