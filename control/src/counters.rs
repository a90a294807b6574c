//! What the parts of pd-control count. Names and help texts stand where they are shown, in [`crate::api::metrics`].

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

/// Values of labels.
pub type Labels<const N: usize> = [(&'static str, String); N];

/// Counters and gauges; all begin at zero.
#[derive(Debug, Default)]
pub struct Counters {
    /// Lists refused, by source.
    pub refusals: Counter,
    /// 1 while the newest list was refused and an older one is in force.
    pub degraded: Gauge,
    /// Long polls that wait now.
    pub pollers: Gauge,
    /// Times the EDS file was written.
    pub eds_writes: Counter,
    /// Times it could not be written.
    pub eds_errors: Counter,
    /// Connections open now.
    pub connections: Gauge,
    /// Connections closed because too many were open.
    pub connections_refused: Counter,
    /// Envoys that exchange.
    pub gateways: Gauge,
    /// Long polls answered, by `code`.
    pub watch_requests: Family<Labels<1>, Counter>,
    /// Messages of the exchange answered, by `code`.
    pub exchanges: Family<Labels<1>, Counter>,
    /// Messages to other replicas, by `result`.
    pub relays: Family<Labels<1>, Counter>,
    /// Engines asked, by `result`.
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

    /// Counts an engine that was asked.
    pub fn scraped(&self, is_ok: bool) {
        let result = if is_ok { "ok" } else { "failed" };
        self.scrapes.get_or_create(&[("result", result.to_owned())]).inc();
    }
}
