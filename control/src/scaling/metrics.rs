//! Demand at `/metrics`. Names and help texts stand here and nowhere else.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::scaling::demand::Demand;
use crate::scaling::history::DemandSource;

type Read = fn(&Demand) -> Option<f64>;

/// Gauges of each pool and role without pd-control's prefix: name, help, value. A value that is not known has no series.
pub const GAUGES: &[(&str, &str, Read)] = &[
    ("role_endpoints_ready", "Ready endpoints", |it| Some(it.ready as f64)),
    (
        "role_prefill_work_seconds",
        "Seconds of prefill work that wait at Envoys or at ready endpoints, or are computed",
        |it| it.prefill_work_seconds,
    ),
    ("role_prefill_work_seconds_per_endpoint", "Seconds of prefill work per ready endpoint", |it| {
        it.prefill_work_seconds_per_endpoint()
    }),
    ("role_prefill_busy_ratio", "Share of the ready endpoints that have prefill work", |it| it.prefill_busy_ratio()),
    ("role_kv_tokens_assigned", "KV tokens that Envoys assigned to ready endpoints for decoding", |it| {
        it.kv_tokens_assigned
    }),
    ("role_kv_tokens_used", "KV tokens in use at ready endpoints, as their engines report", |it| it.kv_tokens_used),
    ("role_kv_tokens_capacity", "KV tokens that the ready endpoints together can hold", |it| it.kv_tokens_capacity),
    (
        "role_kv_load_ratio",
        "Share of the KV capacity that is assigned or in use, whichever is more; above 1 when more is assigned than fits",
        |it| it.kv_load_ratio(),
    ),
    ("role_requests_in_flight", "Requests that Envoys sent to ready endpoints for decoding", |it| {
        it.requests_in_flight
    }),
    ("role_requests_waiting", "Requests that wait in the engines of ready endpoints", |it| it.requests_waiting),
    ("role_requests_unbound", "Requests that Envoys keep because no endpoint has room or is ready for them", |it| {
        it.requests_unbound
    }),
    (
        "role_oldest_unbound_seconds",
        "Age of the oldest request that Envoys keep because no endpoint has room or is ready for it; 0 where there is none",
        |it| it.oldest_unbound_seconds,
    ),
];

/// The metrics of every pool and role, as of now.
#[derive(Debug)]
pub struct DemandCollector(pub Arc<DemandSource>);

impl Collector for DemandCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let demand = self.0.now();
        for (name, help, read) in GAUGES {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (of, demand) in &demand {
                if let Some(value) = read(demand) {
                    let labels = [("pool", of.pool.as_str()), ("role", of.role)];
                    ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
                }
            }
        }
        Ok(())
    }
}
