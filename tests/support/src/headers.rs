//! Request headers that no client may send on to an engine.

/// Headers of this filter. `envoy/local.yaml` trusts `x-pd-phase`, which is not among them.
pub const OURS: [&str; 2] = ["x-pd-destination", "x-pd-anything"];

/// Headers by which other routers of the field name an endpoint.
pub const OTHERS: [&str; 17] = [
    "x-prefiller-host-port",
    "x-gateway-destination-endpoint",
    "x-gateway-destination-endpoint-served",
    "x-gateway-destination-endpoint-subset",
    "test-epp-endpoint-selection",
    "x-data-parallel-rank",
    "x-data-parallel-host-port",
    "x-encoder-hosts-ports",
    "x-kv-cache-source-host-port",
    "target-pod",
    "prefill-target-pod",
    "x-gateway-destination-endpoint-scores",
    "x-override-bootstrap-host",
    "x-override-bootstrap-room",
    "x-override-routed-dp-rank",
    "x-trtllm-subagent-affinity-id",
    "x-trtllm-disagg-auth",
];

/// [`OURS`] and [`OTHERS`].
pub fn all() -> impl Iterator<Item = &'static str> {
    OURS.into_iter().chain(OTHERS)
}
