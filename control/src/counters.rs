//! Counters and gauges of all parts. Their names and help texts are in [`crate::api::metrics`].

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

/// Names and values of a metric's labels.
pub type Labels<const N: usize> = [(&'static str, String); N];

/// Counters and gauges. All begin at zero.
#[derive(Debug, Default)]
pub struct Counters {
    /// Lists that pd-control refused.
    pub refusals: Counter,
    /// 1 while an older list is in force because the newest one was refused, else 0.
    pub degraded: Gauge,
    /// Long polls that wait for a change now.
    pub pollers: Gauge,
    /// Times the EDS file was written.
    pub eds_writes: Counter,
    /// Times the EDS file could not be written.
    pub eds_errors: Counter,
    /// Connections open now.
    pub connections: Gauge,
    /// Connections that pd-control closed at once because too many were open.
    pub connections_refused: Counter,
    /// Envoys that exchange loads and prefix blocks.
    pub gateways: Gauge,
    /// Long polls answered, by `code`.
    pub watch_requests: Family<Labels<1>, Counter>,
    /// Messages of Envoys and replicas answered, by `code`.
    pub exchanges: Family<Labels<1>, Counter>,
    /// Messages sent to other replicas, by `result`.
    pub relays: Family<Labels<1>, Counter>,
    /// Requests to engines for their metrics, by `result`.
    pub scrapes: Family<Labels<1>, Counter>,
}

impl Counters {
    /// Counts an answered message of the exchange.
    pub fn exchanged(&self, status: u16) {
        self.exchanges.get_or_create(&[("code", status.to_string())]).inc();
    }

    /// Counts a message to another replica.
    pub fn relayed(&self, result: &str) {
        self.relays.get_or_create(&[("result", result.to_owned())]).inc();
    }

    /// Counts an answered long poll.
    pub fn watch_answered(&self, status: u16) {
        self.watch_requests.get_or_create(&[("code", status.to_string())]).inc();
    }

    /// Counts a request to an engine for its metrics.
    pub fn scraped(&self, is_ok: bool) {
        let result = if is_ok { "ok" } else { "failed" };
        self.scrapes.get_or_create(&[("result", result.to_owned())]).inc();
    }
}
