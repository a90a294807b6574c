//! Request headers that no client may send on to an engine.

/// Headers of this filter. `x-pd-phase` is trusted by default and not among them.
pub const OURS: [&str; 2] = ["x-pd-destination", "x-pd-anything"];

/// Headers by which other routers of the field name an endpoint.
pub const OTHERS: [&str; 9] = [
    "x-prefiller-host-port",
    "x-gateway-destination-endpoint",
    "x-gateway-destination-endpoint-served",
    "x-gateway-destination-endpoint-subset",
    "test-epp-endpoint-selection",
    "x-data-parallel-rank",
    "x-data-parallel-host-port",
    "target-pod",
    "prefill-target-pod",
];

/// [`OURS`] and [`OTHERS`].
pub fn all() -> impl Iterator<Item = &'static str> {
    OURS.into_iter().chain(OTHERS)
}
