//! Texts of the manifests that tests on the cluster change.

pub const ENGINES: &str = "base/engines.yaml";
pub const FILTER: &str = "base/filter.yaml";
pub const GATEWAY: &str = "base/gateway.yaml";
pub const PD_CONTROL: &str = "base/pd-control.yaml";
pub const POLICIES: &str = "base/policies.yaml";
pub const PREFLIGHT: &str = "base/preflight.yaml";
pub const ROUTES: &str = "base/routes.yaml";

/// In [`ENGINES`].
pub const HEADLESS: &str = "  clusterIP: None\n";
/// In [`FILTER`] and [`PREFLIGHT`].
pub const IMAGE: &str = "image: {url: set-by-kustomize}";
/// In [`FILTER`].
pub const SPLIT: &str = "split: {mode: threshold, uncached_tokens: 256}";
pub const HEADER: &str = "      destination_header: x-pd-destination\n";
/// In [`GATEWAY`].
pub const COMPRESSOR: &str = "  - {name: envoy.filters.http.compressor, before: envoy.filters.http.wasm}\n";
/// In [`PD_CONTROL`].
pub const REPLICAS: &str = "replicas: 1";
/// In [`POLICIES`]. `LAST` is the end of the file.
pub const LIMIT: &str = "  # The filter's max_body_bytes. A longer body gets 413.\n";
pub const BUFFER: &str = "  requestBuffer: {limit: 16Mi}\n";
pub const TRIGGERS: &str = "    retryOn: {triggers: [connect-failure, refused-stream]}\n";
pub const LAST: &str = "      remove: [x-pd-destination, x-data-parallel-rank, x-prefiller-host-port, x-envoy-retry-on, x-envoy-max-retries]\n";
/// In [`ROUTES`].
pub const ENDLESS: &str =
    "    # No limit: a generation may take any time. Envoy's default is 15 s.\n    timeouts: {request: 0s}\n";
pub const FILTERS: &str = "    filters:\n    - type: RequestHeaderModifier\n";
pub const SET: &str = "        set:\n        - {name: x-pd-destination";
pub const EXPLAIN: &str = "        - {name: x-pd-explain";
pub const BACKENDS: &str = "    - {name: engines, port: 8000}\n";

/// All of them. Each stands once in its file.
#[allow(dead_code, reason = "for the test that reads the files")]
pub const ALL: [(&str, &str); 17] = [
    (ENGINES, HEADLESS),
    (FILTER, IMAGE),
    (FILTER, SPLIT),
    (FILTER, HEADER),
    (GATEWAY, COMPRESSOR),
    (PD_CONTROL, REPLICAS),
    (POLICIES, LIMIT),
    (POLICIES, BUFFER),
    (POLICIES, TRIGGERS),
    (POLICIES, LAST),
    (PREFLIGHT, IMAGE),
    (ROUTES, ENDLESS),
    (ROUTES, FILTERS),
    (ROUTES, SET),
    (ROUTES, EXPLAIN),
    (ROUTES, BACKENDS),
    ("overlays/sim/kustomization.yaml", "/spec/provider/kubernetes/envoyDeployment/replicas, value: 1"),
];
