//! The metrics of `/metrics`. Their names and help texts are defined here only.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry as Families;

use crate::counters::{Counters, Labels};
use crate::engines::answers::{Scraped, Scrapes};
use crate::list::{role, state};
use crate::publish::registry::Registry;
use crate::scaling::history::DemandSource;
use crate::scaling::metrics::DemandCollector;
use crate::sources::kubernetes::pods::Pods;

/// Media type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All metrics of one pd-control.
#[derive(Debug)]
pub struct Metrics {
    families: Families,
}

/// Collects the metrics of the list in force.
#[derive(Debug)]
struct ListCollector(Arc<Registry>);

/// Collects the metrics of the followed pods; none without a Kubernetes source.
#[derive(Debug)]
struct PodsCollector(Arc<Pods>);

/// Collects the last answers of the engines.
#[derive(Debug)]
struct EnginesCollector(Arc<Scrapes>);

impl Metrics {
    /// Metrics of `counters`, of the list of `registry` and of `pods`.
    ///
    /// `scrapes` is `None` when pd-control asks no engines; then there are no metrics of engines.
    #[must_use]
    pub fn new(counters: &Counters, registry: Arc<Registry>, pods: Arc<Pods>, scrapes: Option<Arc<Scrapes>>) -> Self {
        let mut families = Families::with_prefix("pd_control");
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        families.register("build", "Version of the pd-control that runs; always 1", build);
        families.register_collector(Box::new(ListCollector(registry)));
        families.register_collector(Box::new(PodsCollector(pods)));
        register(counters, &mut families);
        if let Some(scrapes) = scrapes {
            families.register_collector(Box::new(EnginesCollector(scrapes)));
            families.register("scrapes", "Scrapes of engines, by result", counters.scrapes.clone());
        }
        Self { families }
    }

    /// The demand of each pool and role, too.
    #[must_use]
    pub fn with_demand(mut self, source: Arc<DemandSource>) -> Self {
        self.families.register_collector(Box::new(DemandCollector(source)));
        self
    }

    /// The OpenMetrics text.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = text::encode(&mut text, &self.families);
        text
    }
}

/// Registers the counters with their names and help texts.
fn register(counters: &Counters, families: &mut Families) {
    families.register(
        "refusals",
        "Endpoint lists refused; the last good one stayed in force",
        counters.refusals.clone(),
    );
    let help = "1 while the newest endpoint list is refused and an older one is in force";
    families.register("degraded", help, counters.degraded.clone());
    families.register("watch_requests", "Polls answered, by status", counters.watch_requests.clone());
    let help = "Exchange requests answered, by status";
    families.register("exchange_requests", help, counters.exchanges.clone());
    let help = "Exchange requests relayed to other replicas of pd-control, by result";
    families.register("relays", help, counters.relays.clone());
    families.register(
        "gateways",
        "Envoys that exchange what is in flight and which endpoint got which blocks",
        counters.gateways.clone(),
    );
    families.register("pollers", "Polls that wait for a change of the list", counters.pollers.clone());
    families.register("eds_writes", "Times the EDS file was written", counters.eds_writes.clone());
    families.register("eds_errors", "Times the EDS file could not be written", counters.eds_errors.clone());
    families.register("connections", "Connections open", counters.connections.clone());
    let help = "Connections closed at once because too many were open";
    families.register("connections_refused", help, counters.connections_refused.clone());
}

impl Collector for ListCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let published = self.0.current();
        let mut counts: BTreeMap<Labels<3>, i64> = BTreeMap::new();
        for endpoint in published.endpoints() {
            let labels = [
                ("pool", endpoint.pool.clone()),
                ("role", role(endpoint.role).to_owned()),
                ("state", state(endpoint.state).to_owned()),
            ];
            *counts.entry(labels).or_default() += 1;
        }
        let help = "Endpoints of the list in force";
        let mut family = encoder.encode_descriptor("endpoints", help, None, MetricType::Gauge)?;
        for (labels, count) in &counts {
            ConstGauge::new(*count).encode(family.encode_family(labels)?)?;
        }
        let help = "Version of the list in force; counts changes since the start";
        let version = i64::try_from(published.version()).unwrap_or(i64::MAX);
        let metric = encoder.encode_descriptor("snapshot_version", help, None, MetricType::Gauge)?;
        ConstGauge::new(version).encode(metric)?;
        let help = "When the list in force was published, in seconds of Unix time";
        let changed_at = published.changed_at().duration_since(UNIX_EPOCH).unwrap_or_default();
        let metric = encoder.encode_descriptor("last_change_timestamp_seconds", help, None, MetricType::Gauge)?;
        ConstGauge::new(changed_at.as_secs_f64()).encode(metric)
    }
}

impl Collector for PodsCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let view = self.0.view();
        if view.watches.is_empty() {
            return Ok(());
        }
        let help = "1 while the view of these objects is up to date";
        let mut family = encoder.encode_descriptor("watch_up", help, None, MetricType::Gauge)?;
        for watch in &view.watches {
            let is_up = watch.is_listed && watch.problem.is_none();
            ConstGauge::new(i64::from(is_up)).encode(family.encode_family(&[("watch", watch.name.as_str())])?)?;
        }
        let help = "1 for each pod that pd-control refused; the log has the reason";
        let mut family = encoder.encode_descriptor("pod_refused", help, None, MetricType::Gauge)?;
        for pod in view.refused.keys() {
            let labels = [("namespace", pod.namespace.as_str()), ("pod", pod.name.as_str())];
            ConstGauge::new(1_i64).encode(family.encode_family(&labels)?)?;
        }
        let help = "Pods of engines that have no address yet";
        let metric = encoder.encode_descriptor("pods_pending", help, None, MetricType::Gauge)?;
        ConstGauge::new(i64::try_from(view.pending).unwrap_or(i64::MAX)).encode(metric)
    }
}

impl Collector for EnginesCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        type Read = fn(&Scraped) -> Option<f64>;
        let families: [(&str, &str, Read); 10] = [
            ("engine_up", "1 while the engine answers", |it| {
                Some(if it.has_answered && it.failures == 0 { 1.0 } else { 0.0 })
            }),
            (
                "engine_refusing",
                "1 while the engine answers 401 or 403 to pd-control: it wants another API key",
                |it| Some(f64::from(u8::from(it.refusal.is_some()))),
            ),
            ("engine_waiting", "Requests that wait in the engine", |it| it.load.waiting),
            ("engine_running", "Requests that run in the engine", |it| it.load.running),
            ("engine_kv_usage_ratio", "Share of the engine's KV cache in use", |it| it.load.kv_usage),
            ("engine_cache_tokens", "Tokens that the engine's KV cache holds", |it| {
                it.load.cache_tokens.map(|tokens| tokens as f64)
            }),
            (
                "engine_prefix_hit_ratio",
                "Share of prompt tokens that the engine found in its prefix cache since its start",
                |it| it.load.hit_ratio(),
            ),
            (
                "engine_expired_kv_leases",
                "KV leases that expired before a decode server fetched the KV cache, since the engine's start",
                |it| it.load.expired_kv_leases,
            ),
            (
                "engine_late_kv_fetches",
                "KV caches that a decode server fetched from the engine after their KV lease, since the engine's start: each is an answer that was refused or had wrong text",
                |it| it.load.late_fetches,
            ),
            ("engine_start_time_seconds", "When the engine's process started, in seconds of Unix time", |it| {
                it.load.process_start
            }),
        ];
        let view = self.0.view();
        for (name, help, read) in families {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (address, scraped) in view.iter() {
                if let Some(value) = read(scraped) {
                    ConstGauge::new(value).encode(family.encode_family(&[("address", address.to_string())])?)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use pd_core::wire::{Endpoint, Role, State};

    use super::*;
    use crate::list::EndpointList;

    fn line<'a>(text: &'a str, start: &str) -> Option<&'a str> {
        text.lines().find(|line| line.starts_with(start))
    }

    #[test]
    fn the_list_in_force_is_counted_by_pool_role_and_state() {
        let registry = Arc::new(Registry::new("e", SystemTime::UNIX_EPOCH));
        let metrics = Metrics::new(&Counters::default(), Arc::clone(&registry), Arc::default(), None);
        let endpoint =
            |n: u8, role, pool: &str| Endpoint { pool: pool.into(), ..Endpoint::new(([10, 0, 0, n], 80).into(), role) };
        let down = Endpoint { state: State::Down, ..endpoint(4, Role::Decode, "default") };
        let odd = endpoint(3, Role::Both, "a\"b\\c\nd");
        let list = [endpoint(1, Role::Prefill, "default"), endpoint(2, Role::Prefill, "default"), odd, down];
        registry
            .publish(EndpointList::new(list.into()).unwrap(), SystemTime::UNIX_EPOCH + Duration::from_millis(1_500));
        let text = metrics.encode();
        for expected in [
            r#"pd_control_endpoints{pool="default",role="prefill",state="ready"} 2"#,
            r#"pd_control_endpoints{pool="default",role="decode",state="down"} 1"#,
            r#"pd_control_endpoints{pool="a\"b\\c\nd",role="both",state="ready"} 1"#,
            "pd_control_snapshot_version 1",
            "pd_control_last_change_timestamp_seconds 1.5",
        ] {
            assert_eq!(line(&text, expected), Some(expected), "{text}");
        }
        assert!(line(&text, "pd_control_build_info{version=\"").is_some(), "{text}");
    }

    #[test]
    fn answers_are_counted_by_status() {
        let counters = Counters::default();
        let registry = Arc::new(Registry::new("e", SystemTime::UNIX_EPOCH));
        let metrics = Metrics::new(&counters, registry, Arc::default(), None);
        counters.watch_answered(200);
        counters.watch_answered(200);
        let text = metrics.encode();
        assert_eq!(
            line(&text, "pd_control_watch_requests_total"),
            Some("pd_control_watch_requests_total{code=\"200\"} 2")
        );
    }
}
