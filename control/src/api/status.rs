//! What `/v1/status` says, which the status page and the commands in a terminal show.

use std::net::SocketAddr;
use std::time::Duration;

use pd_core::envoys::report::Report;
use pd_core::wire::Endpoint;
use serde::{Deserialize, Serialize};

use crate::api::advice::advice;
use crate::api::app::App;
use crate::envoys::polls::FilterView;

/// All of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusView {
    /// Of pd-control.
    pub build: String,
    /// Names this run.
    pub epoch: String,
    /// Of the list in force; 0: there is none yet.
    pub version: u64,
    /// Since it came into force.
    pub age_ms: u64,
    /// Where lists come from.
    pub source: String,
    /// Why the newest one is not in force or may be old.
    pub degraded: Option<String>,
    /// Who polls.
    pub filters: Vec<FilterView>,
    /// What the Envoys report of themselves.
    pub gateways: Vec<GatewayView>,
    /// What is amiss among them, and what to do.
    #[serde(default)]
    pub advice: Vec<String>,
    /// What is followed in the cluster.
    pub watches: Vec<Watch>,
    /// Pods that were left out.
    pub refused: Vec<Refused>,
    /// Engines' pods without an address yet.
    pub pending: usize,
    /// The list in force.
    pub endpoints: Vec<EndpointView>,
}

/// What one Envoy reports of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GatewayView {
    /// Random number of its process, or of one worker's time as its leader.
    pub id: String,
    /// Since it was heard of.
    pub seen_ms: u64,
    /// The report.
    #[serde(flatten)]
    pub report: Report,
}

/// One kind of object in one namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Watch {
    /// `pods in NAMESPACE`.
    pub name: String,
    /// Whether what is known of them is up to date.
    pub up: bool,
    /// Why not.
    pub problem: Option<String>,
}

/// A pod that was left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Refused {
    /// `namespace/name`.
    pub pod: String,
    /// Why.
    pub reason: String,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndpointView {
    /// As the filters know it.
    #[serde(flatten)]
    pub endpoint: Endpoint,
    /// `namespace/name`.
    pub pod: Option<String>,
    /// Whether the engine answers; none: it is not asked.
    pub answers: Option<bool>,
    /// Why it does not, or that it did not answer Envoys.
    pub problem: Option<String>,
    /// Requests that wait in the engine.
    pub waiting: Option<f64>,
    /// Requests that it computes.
    pub running: Option<f64>,
    /// Share of its KV cache in use.
    pub kv_usage: Option<f64>,
    /// Share of prompt tokens that its prefix cache had.
    pub hit_ratio: Option<f64>,
}

/// Everything, as of now.
#[must_use]
pub fn view(app: &App) -> StatusView {
    let published = app.registry.current();
    let (pods, scrapes) = (app.pods.view(), app.scrapes.view());
    let gateways: Vec<_> = app.hub.reports().into_iter().map(gateway).collect();
    let to_envoys = |address: &SocketAddr| {
        let address = address.to_string();
        let failed = gateways.iter().filter(|of| of.report.failing.contains(&address)).count();
        (failed > 0).then(|| format!("no answer to {failed} of {} Envoys", gateways.len()))
    };
    let endpoint = |endpoint: &Endpoint| {
        let scraped = scrapes.get(&endpoint.address).filter(|it| it.asked > 0);
        let load = scraped.map(|it| it.load);
        EndpointView {
            endpoint: endpoint.clone(),
            pod: pods.names.get(&endpoint.id()).map(ToString::to_string),
            answers: scraped.map(|it| it.failures == 0),
            problem: scraped.and_then(|it| it.error.clone()).or_else(|| to_envoys(&endpoint.address)),
            waiting: load.and_then(|load| load.waiting),
            running: load.and_then(|load| load.running),
            kv_usage: load.and_then(|load| load.kv_usage),
            hit_ratio: load.and_then(|load| load.hit_ratio()),
        }
    };
    let reports: Vec<_> = gateways.iter().map(|it| (it.id.as_str(), &it.report)).collect();
    StatusView {
        advice: advice(&reports),
        build: env!("CARGO_PKG_VERSION").to_owned(),
        epoch: published.epoch().to_owned(),
        version: published.version(),
        age_ms: millis(published.changed_at().elapsed().unwrap_or_default()),
        source: app.status.source().to_owned(),
        degraded: app.status.degraded(),
        filters: app.filters.view(),
        watches: pods
            .watches
            .iter()
            .map(|watch| Watch {
                name: watch.name.clone(),
                up: watch.is_listed && watch.problem.is_none(),
                problem: watch.problem.clone(),
            })
            .collect(),
        refused: pods
            .refused
            .iter()
            .map(|(pod, reason)| Refused { pod: pod.to_string(), reason: reason.clone() })
            .collect(),
        pending: pods.pending,
        endpoints: published.endpoints().iter().map(endpoint).collect(),
        gateways,
    }
}

fn gateway((id, age, report): (u64, Duration, Report)) -> GatewayView {
    GatewayView { id: format!("{id:016x}"), seen_ms: millis(age), report }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
