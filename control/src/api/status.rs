//! The answer of `/v1/status`, which the status page and the commands in a terminal show.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pd_core::envoys::report::Report;
use pd_core::time::UnixTime;
use pd_core::wire::{Endpoint, Role, State};
use serde::{Deserialize, Serialize};

use crate::api::advice::advice;
use crate::api::app::App;
use crate::api::since::today;
use crate::api::traffic::Figures;
use crate::envoys::polls::PollView;
use crate::list::role;

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
    /// Time of the day at which this status was made, Unix milliseconds.
    #[serde(default)]
    pub now_ms: UnixTime,
    /// The pools, by name.
    #[serde(default)]
    pub pools: Vec<PoolView>,
    /// The list in force.
    pub endpoints: Vec<EndpointView>,
}

/// One pool: sums over its endpoints.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PoolView {
    /// Name.
    pub name: String,
    /// Endpoints of the pool, by role: `prefill`, `decode`, `both`. A role without endpoints is left out.
    pub roles: BTreeMap<String, RoleCount>,
    /// Requests for which the pool's queues have no prefill endpoint with room yet.
    pub waiting: u64,
    /// Requests that wait in the engines; none: no engine reports it.
    pub waiting_in_engines: Option<f64>,
    /// Prefill legs in flight; none: no Envoy exchanges.
    pub prefill_in_flight: Option<u64>,
    /// Requests in flight at decode and aggregated endpoints; none: no Envoy exchanges.
    pub decode_in_flight: Option<u64>,
    /// Figures of the pool's requests. A split request counts once, at its decode endpoint; its errors count at both.
    pub figures: Figures,
}

/// Endpoints of one role.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleCount {
    /// All of them.
    pub all: u64,
    /// Those that are `ready` and have no problem.
    pub ready: u64,
}

/// The last report of one Envoy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GatewayView {
    /// Random id, which changes when another worker becomes the leader.
    pub id: String,
    /// Milliseconds since its last message.
    pub seen_ms: u64,
    /// Requests a second that its filter answered with an error.
    #[serde(default)]
    pub refused: f64,
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
    /// missing, how many Envoys ejected the endpoint and why, or why it is `down`.
    pub problem: Option<String>,
    /// When the problem began, Unix milliseconds; none: there is no problem, or the time is unknown.
    #[serde(default)]
    pub since_ms: Option<UnixTime>,
    /// Prefill legs that all Envoys have in flight here; none: no Envoy exchanges.
    #[serde(default)]
    pub prefill_in_flight: Option<u64>,
    /// Requests that all Envoys have in flight here for decoding; none: no Envoy exchanges.
    #[serde(default)]
    pub decode_in_flight: Option<u64>,
    /// Figures of its requests.
    #[serde(default)]
    pub figures: Figures,
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
    let mut refused = app.traffic.of_envoys();
    let gateways = app.hub.reports().into_iter().map(|(id, age, report)| GatewayView {
        id: format!("{id:016x}"),
        seen_ms: millis(age),
        refused: refused.remove(&id).map_or(0.0, |figures| figures.errors),
        report,
    });
    let gateways: Vec<_> = gateways.collect();
    let to_envoys = |address: &SocketAddr| avoided(&gateways, &address.to_string());
    let (mut figures, loads) = (app.traffic.of_endpoints(), app.hub.loads());
    let endpoint = |endpoint: &Endpoint| {
        let scraped = scrapes.get(&endpoint.address).filter(|it| it.asked > 0);
        let load = scraped.map(|it| it.load);
        let pod = pods.names.get(&endpoint.id()).map(ToString::to_string);
        let key = endpoint.id().key();
        let problem = scraped
            .and_then(|it| Some((it.error.clone()?, it.failing_since.map(unix))))
            .or_else(|| scraped.and_then(|it| Some((it.refusal.clone()?, None))))
            .or_else(|| to_envoys(&endpoint.address))
            .or_else(|| why_down(endpoint, pod.is_some()).map(|why| (why, app.since.of(key))))
            .or_else(|| scraped.and_then(|it| Some((it.late_fetches()?, None))));
        let (problem, since_ms) = problem.unzip();
        let totals = loads.as_ref().map(|loads| loads.get(&key).copied().unwrap_or_default());
        EndpointView {
            endpoint: endpoint.clone(),
            answers: scraped.map(|it| it.failures == 0),
            pod,
            problem,
            since_ms: since_ms.flatten(),
            prefill_in_flight: totals.map(|totals| above_zero(totals.legs)),
            decode_in_flight: totals.map(|totals| above_zero(totals.requests)),
            figures: figures.remove(&key).unwrap_or_default(),
            waiting: load.and_then(|load| load.waiting),
            running: load.and_then(|load| load.running),
            kv_usage: load.and_then(|load| load.kv_usage),
            hit_ratio: load.and_then(|load| load.hit_ratio()),
        }
    };
    let endpoints: Vec<_> = published.endpoints().iter().map(endpoint).collect();
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
        now_ms: today(),
        pools: pools(app, &endpoints, &gateways),
        endpoints,
        gateways,
    }
}

/// The pools of these endpoints.
fn pools(app: &App, endpoints: &[EndpointView], gateways: &[GatewayView]) -> Vec<PoolView> {
    let pool_of: BTreeMap<u64, (&str, Role)> =
        endpoints.iter().map(|it| (it.endpoint.id().key(), (it.endpoint.pool.as_str(), it.endpoint.role))).collect();
    let mut whole = app.traffic.of_groups(|key| Some(pool_of.get(key)?.0));
    let decoding = |role: Role| role != Role::Prefill;
    let mut requests = app.traffic.of_groups(|key| pool_of.get(key).filter(|it| decoding(it.1)).map(|it| it.0));
    let mut pools: BTreeMap<&str, PoolView> = BTreeMap::new();
    for it in endpoints {
        let name = it.endpoint.pool.as_str();
        let pool = pools.entry(name).or_insert_with(|| {
            let all = whole.remove(name).unwrap_or_default();
            let requests = requests.remove(name).unwrap_or_default();
            let figures = Figures { errors: all.errors, hit_share: all.hit_share, ..requests };
            let of_pool = |it: &GatewayView| {
                it.report.waits.iter().filter(|it| it.pool == name).map(|it| it.waiting + it.parked).sum::<u64>()
            };
            PoolView {
                name: name.to_owned(),
                waiting: gateways.iter().map(of_pool).sum(),
                figures,
                ..PoolView::default()
            }
        });
        let count = pool.roles.entry(role(it.endpoint.role).to_owned()).or_default();
        count.all += 1;
        count.ready += u64::from(it.endpoint.state == State::Ready && it.problem.is_none());
        let add = |sum: &mut Option<u64>, more: Option<u64>| *sum = more.map(|more| sum.unwrap_or(0) + more).or(*sum);
        add(&mut pool.prefill_in_flight, it.prefill_in_flight);
        add(&mut pool.decode_in_flight, it.decode_in_flight);
        if let Some(waiting) = it.waiting {
            pool.waiting_in_engines = Some(pool.waiting_in_engines.unwrap_or(0.0) + waiting);
        }
    }
    pools.into_values().collect()
}

/// Why an endpoint is `down`; `None` where it is not.
fn why_down(endpoint: &Endpoint, has_pod: bool) -> Option<String> {
    let why = if has_pod { "its pod is not ready, or an annotation takes it out" } else { "the list says so" };
    (endpoint.state == State::Down).then(|| format!("down: {why}"))
}

/// How many Envoys ejected an endpoint and why, and the time of the first failure; `None` where none did.
fn avoided(gateways: &[GatewayView], address: &str) -> Option<(String, Option<UnixTime>)> {
    let count = gateways.iter().filter(|of| of.report.failing.iter().any(|it| it == address)).count();
    let ejected = gateways.iter().flat_map(|of| &of.report.ejected).filter(|it| it.address == address);
    // A filter of an earlier build reports no reason.
    let first = ejected.min_by_key(|it| it.since_ms);
    let why = first.map(|it| format!(": it {}", it.reason)).unwrap_or_default();
    (count > 0).then(|| (format!("{count} of {} Envoys avoid it{why}", gateways.len()), first.map(|it| it.since_ms)))
}

/// Hours, minutes and seconds of a time, in UTC.
#[must_use]
pub fn time_of_day(time: UnixTime) -> String {
    let seconds = time.as_millis() / 1_000;
    format!("{:02}:{:02}:{:02} UTC", seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60)
}

/// How long ago a time was, such as `4 s`, `12 min`, `3 h` or `2 d`.
#[must_use]
pub fn ago(time: UnixTime, now: UnixTime) -> String {
    match now.as_millis().saturating_sub(time.as_millis()) / 1_000 {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7_200 => format!("{} min", seconds / 60),
        seconds @ 7_200..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

fn unix(time: SystemTime) -> UnixTime {
    time.duration_since(UNIX_EPOCH).map(UnixTime::new).unwrap_or_default()
}

/// Sums of the exchange are differences that may be below zero for a moment.
fn above_zero(sum: u64) -> u64 {
    sum.cast_signed().max(0).cast_unsigned()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
