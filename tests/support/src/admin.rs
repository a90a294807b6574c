//! Envoy's admin interface: readiness, hosts, metrics.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use crate::client;

/// Metrics by name and labels as Prometheus writes them: `pd_requests_total{decision="split"}`, `pd_endpoints`.
pub type Metrics = BTreeMap<String, f64>;

/// An admin interface.
#[derive(Clone, Copy, Debug)]
pub struct Admin {
    /// Where it is.
    pub address: SocketAddr,
}

impl Admin {
    /// Body of a 200, `None` where there is no such answer.
    pub async fn get(&self, path: &str) -> Option<String> {
        Some(client::get(self.address, path).await.ok()?.ok().ok()?.text())
    }

    /// All metrics; none while Envoy is not there.
    pub async fn metrics(&self) -> Metrics {
        metrics(&self.get("/stats/prometheus").await.unwrap_or_default())
    }

    /// Addresses of a cluster's hosts.
    pub async fn hosts(&self, cluster: &str) -> Vec<String> {
        let text = self.get("/clusters").await.unwrap_or_default();
        let prefix = format!("{cluster}::");
        let hosts = text.lines().filter_map(|line| line.strip_prefix(&prefix)?.strip_suffix("::health_flags::healthy"));
        hosts.map(str::to_owned).collect()
    }

    /// Connections that each worker has taken at a listener, ever.
    pub async fn connections_by_worker(&self, listener: SocketAddr) -> Vec<u64> {
        let text = self.get("/stats?filter=worker_.*downstream_cx_total").await.unwrap_or_default();
        let name = format!("listener.{}_{}.worker_", listener.ip(), listener.port());
        let mut by_worker: Vec<(usize, u64)> = text
            .lines()
            .filter_map(|line| {
                let (worker, rest) = line.strip_prefix(&name)?.split_once('.')?;
                Some((worker.parse().ok()?, rest.rsplit(' ').next()?.parse().ok()?))
            })
            .collect();
        by_worker.sort_unstable();
        by_worker.into_iter().map(|(_, connections)| connections).collect()
    }
}

/// Reads metrics as Prometheus does.
#[must_use]
pub fn metrics(text: &str) -> Metrics {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| Some((line.rsplit_once(' ')?.0.replace("{}", ""), value(line)?))).collect()
}

fn value(line: &str) -> Option<f64> {
    line.rsplit_once(' ')?.1.parse().ok()
}
