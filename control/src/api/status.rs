//! The answer of `/v1/status`, which the status page and the commands in a terminal show.

use std::net::SocketAddr;
use std::time::Duration;

use pd_core::envoys::report::Report;
use pd_core::time::UnixTime;
use pd_core::wire::Endpoint;
use serde::{Deserialize, Serialize};

use crate::api::advice::advice;
use crate::api::app::App;
use crate::engines::answers::Scraped;
use crate::envoys::polls::PollView;

/// The answer of `/v1/status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusView {
    /// Version of pd-control.
    pub build: String,
    /// Name of this run of pd-control.
    pub epoch: String,
    /// Version of the list in force; 0: there is no list yet.
    pub version: u64,
    /// Milliseconds since the list came into force.
    pub age_ms: u64,
    /// Names of the sources.
    pub source: String,
    /// Why the newest list is not in force or may be old; none: it is in force.
    pub degraded: Option<String>,
    /// The last poll of every Envoy.
    pub filters: Vec<PollView>,
    /// The last report of every Envoy.
    pub gateways: Vec<GatewayView>,
    /// Findings about the Envoys, each with what to do.
    #[serde(default)]
    pub advice: Vec<String>,
    /// Watches of the Kubernetes API.
    pub watches: Vec<Watch>,
    /// Pods that pd-control refused.
    pub refused: Vec<Refused>,
    /// Number of engine pods without an address.
    pub pending: usize,
    /// The list in force.
    pub endpoints: Vec<EndpointView>,
}

/// The last report of one Envoy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GatewayView {
    /// Random id, which changes when another worker becomes the leader.
    pub id: String,
    /// Milliseconds since its last message.
    pub seen_ms: u64,
    /// The report.
    #[serde(flatten)]
    pub report: Report,
}

/// The watch of one kind of object in one namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Watch {
    /// `pods in NAMESPACE`.
    pub name: String,
    /// Whether pd-control's view of these objects is up to date.
    pub up: bool,
    /// Why the view is not up to date.
    pub problem: Option<String>,
}

/// A pod that pd-control refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Refused {
    /// The pod, as `namespace/name`.
    pub pod: String,
    /// Why pd-control refused it.
    pub reason: String,
}

/// One endpoint and the load of its engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndpointView {
    /// The endpoint as the filters have it.
    #[serde(flatten)]
    pub endpoint: Endpoint,
    /// Pod of the endpoint, as `namespace/name`; none: it comes from another source.
    pub pod: Option<String>,
    /// Whether the engine answers pd-control; none: pd-control does not ask it.
    pub answers: Option<bool>,
    /// Problem of the endpoint; none: there is none. It says why the engine does not answer pd-control, which answers are
    /// missing, or how many Envoys ejected the endpoint, why, and since when.
    pub problem: Option<String>,
    /// Requests that wait in the engine; none: unknown, as all loads.
    pub waiting: Option<f64>,
    /// Requests that the engine computes.
    pub running: Option<f64>,
    /// Share of its KV cache in use, 0 to 1.
    pub kv_usage: Option<f64>,
    /// Share of prompt tokens that its prefix cache had, 0 to 1.
    pub hit_ratio: Option<f64>,
}

/// The status as of now.
#[must_use]
pub fn view(app: &App) -> StatusView {
    let published = app.registry.current();
    let (pods, scrapes) = (app.pods.view(), app.scrapes.view());
    let gateways: Vec<_> = app.hub.reports().into_iter().map(gateway).collect();
    let to_envoys = |address: &SocketAddr| avoided(&gateways, &address.to_string());
    let endpoint = |endpoint: &Endpoint| {
        let scraped = scrapes.get(&endpoint.address).filter(|it| it.asked > 0);
        let load = scraped.map(|it| it.load);
        EndpointView {
            endpoint: endpoint.clone(),
            pod: pods.names.get(&endpoint.id()).map(ToString::to_string),
            answers: scraped.map(|it| it.failures == 0),
            problem: scraped
                .and_then(|it| it.error.clone().or_else(|| it.refusal.clone()))
                .or_else(|| to_envoys(&endpoint.address))
                .or_else(|| scraped.and_then(Scraped::late_fetches)),
            waiting: load.and_then(|load| load.waiting),
            running: load.and_then(|load| load.running),
            kv_usage: load.and_then(|load| load.kv_usage),
            hit_ratio: load.and_then(|load| load.hit_ratio()),
        }
    };
    let reports: Vec<_> = gateways.iter().map(|it| (it.id.as_str(), &it.report)).collect();
    StatusView {
        advice: pods.busy.iter().cloned().chain(advice(&reports)).collect(),
        build: env!("CARGO_PKG_VERSION").to_owned(),
        epoch: published.epoch().to_owned(),
        version: published.version(),
        age_ms: millis(published.changed_at().elapsed().unwrap_or_default()),
        source: app.health.source().to_owned(),
        degraded: app.health.degraded(),
        filters: app.polls.view(),
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

/// How many Envoys ejected an endpoint, why, and since when; `None` where none did.
fn avoided(gateways: &[GatewayView], address: &str) -> Option<String> {
    let count = gateways.iter().filter(|of| of.report.failing.iter().any(|it| it == address)).count();
    let ejected = gateways.iter().flat_map(|of| &of.report.ejected).filter(|it| it.address == address);
    // A filter of an earlier build reports no reason.
    let first = ejected.min_by_key(|it| it.since_ms);
    let why = first.map(|it| format!(" since {}: it {}", time_of_day(it.since_ms), it.reason)).unwrap_or_default();
    (count > 0).then(|| format!("{count} of {} Envoys avoid it{why}", gateways.len()))
}

/// Hours, minutes and seconds of a time, in UTC.
#[must_use]
pub fn time_of_day(time: UnixTime) -> String {
    let seconds = time.as_millis() / 1_000;
    format!("{:02}:{:02}:{:02} UTC", seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60)
}

fn gateway((id, age, report): (u64, Duration, Report)) -> GatewayView {
    GatewayView { id: format!("{id:016x}"), seen_ms: millis(age), report }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
