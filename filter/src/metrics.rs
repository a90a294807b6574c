//! Metrics of the worker: Envoy's numbers of them. Also the host's shared data, because its counter and its gauges are metrics.

use core::cell::OnceCell;
use std::collections::BTreeMap;

use pd_core::metrics::{Level, Metric, MetricKind};
use pd_core::time::UnixTime;
use pd_core::wire::WIRE_VERSION;
use pd_core::workers::shared::Shared;
use pd_core::workers::slots::WORKER_SLOTS;
use pd_core::workers::worker::Worker;

use crate::host::{self, HostResult};
use crate::version::{BUILD, VERSION};

/// Envoy's numbers of the metrics.
#[derive(Default)]
pub struct MetricIds {
    metrics: Vec<u32>,
    levels: Vec<u32>,
    seen: Option<u32>,
    /// Gauges that are set when they change: number, and the value that Envoy has.
    gauges: BTreeMap<String, (u32, u64)>,
    /// Histograms of the pools' waits, by name and tags.
    waits: BTreeMap<String, u32>,
    announced: Option<u32>,
    /// Gauges of the worker slots, defined when one is first looked at.
    positions: Vec<OnceCell<Option<u32>>>,
}

impl MetricIds {
    /// Defines all metrics.
    pub fn define() -> HostResult<Self> {
        let metrics = Metric::ALL.iter().map(|metric| host::define_metric(metric.kind(), metric.name()));
        let levels = Level::ALL.iter().map(|level| host::define_metric(MetricKind::Gauge, level.name()));
        // Workers set the gauge of their own build at each tick, so that of a build that no worker runs stops moving.
        let seen = format!("pd_build_seen_seconds;version={VERSION};build={BUILD};wire={WIRE_VERSION}");
        Ok(Self {
            metrics: metrics.collect::<HostResult<_>>()?,
            levels: levels.collect::<HostResult<_>>()?,
            seen: Some(host::define_metric(MetricKind::Gauge, &seen)?),
            gauges: BTreeMap::new(),
            waits: BTreeMap::new(),
            announced: Some(host::define_metric(MetricKind::Counter, "pd_announced_total")?),
            positions: vec![OnceCell::new(); WORKER_SLOTS],
        })
    }

    /// Passes counts and changed gauges of the worker on to Envoy.
    pub fn flush(&mut self, worker: &mut Worker) {
        worker.counts.flush(|metric, value| {
            let Some(id) = self.metrics.get(metric as usize) else { return };
            let _ = match metric.kind() {
                MetricKind::Histogram => host::record_metric(*id, value.unsigned_abs()),
                MetricKind::Counter | MetricKind::Gauge => host::increment_metric(*id, value),
            };
        });
        for (name, ms) in worker.take_waits() {
            let define = || host::define_metric(MetricKind::Histogram, &name).ok();
            if let Some(id) = self.waits.get(&name).copied().or_else(define) {
                let _ = host::record_metric(id, ms);
                self.waits.insert(name, id);
            }
        }
        for (name, value) in worker.gauges() {
            let (id, set) = match self.gauges.get(&name) {
                Some(known) => *known,
                None => match host::define_metric(MetricKind::Gauge, &name) {
                    Ok(id) => (id, !value),
                    Err(_) => continue,
                },
            };
            if set != value {
                let _ = host::record_metric(id, value);
                self.gauges.insert(name, (id, value));
            }
        }
    }

    /// Sets levels, and the time at which this build was seen.
    pub fn set_levels(&self, levels: Vec<(Level, u64)>, now: UnixTime) {
        for (level, value) in levels {
            if let Some(id) = self.levels.get(level as usize) {
                let _ = host::record_metric(*id, value);
            }
        }
        if let Some(id) = self.seen {
            let _ = host::record_metric(id, now.as_secs());
        }
    }

    fn position(&self, slot: usize) -> Option<u32> {
        let define = || host::define_metric(MetricKind::Gauge, &format!("pd_log_position;seat={slot}")).ok();
        *self.positions.get(slot)?.get_or_init(define)
    }
}

impl Shared for MetricIds {
    fn get(&self, key: &str) -> Option<(Vec<u8>, u32)> {
        host::shared_data(key).ok()
    }

    fn set(&self, key: &str, value: &[u8], version: Option<u32>) -> bool {
        host::set_shared_data(key, value, version).is_ok()
    }

    fn announced(&self) -> u64 {
        self.announced.and_then(|id| host::metric(id).ok()).unwrap_or(0)
    }

    fn announce(&self) {
        if let Some(id) = self.announced {
            let _ = host::increment_metric(id, 1);
        }
    }

    fn position(&self, slot: usize) -> u64 {
        self.position(slot).and_then(|id| host::metric(id).ok()).unwrap_or(0)
    }

    fn set_position(&self, slot: usize, position: u64) {
        if let Some(id) = self.position(slot) {
            let _ = host::record_metric(id, position);
        }
    }
}
