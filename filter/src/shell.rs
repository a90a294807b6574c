//! Root context: configuration, ticks, the poll of `pd-control`, metrics. One per worker.

use core::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use log::{error, info, warn};
use pd_core::envoys::client::{self, ExchangeCall, ExchangeClient};
use pd_core::envoys::pace::Pace;
use pd_core::envoys::report::Report;
use pd_core::headers::Headers;
use pd_core::metrics::{Level, Metric, MetricKind};
use pd_core::time::{Clocks, Monotonic, UnixTime};
use pd_core::wire::WIRE_VERSION;
use pd_core::workers::log::WorkersLog;
use pd_core::workers::push::{News, Poll, Push};
use pd_core::workers::shared::Shared;
use pd_core::workers::slots::WORKER_SLOTS;
use pd_core::workers::worker::{Configured, Worker};
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::ContextType;

use crate::host::{self, Buffer, HostError, HostResult, Map};
use crate::stream::Stream;

/// Release.
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Source revision, set by the Makefile.
const BUILD: &str = match option_env!("PD_BUILD") {
    Some(build) => build,
    None => "unknown",
};
/// Target features that this build was made with.
const FEATURES: &str = if cfg!(target_feature = "simd128") { "simd128" } else { "none" };

const NOT_FOUND: HostError = HostError(1);

/// What the root context and the streams of a worker share.
#[derive(Default)]
pub struct Shell {
    /// State and configuration of the worker.
    pub worker: Worker,
    push: Push,
    log: WorkersLog,
    exchange: ExchangeClient,
    metrics: MetricIds,
    pace: Pace,
}

impl Shell {
    /// Applies what other workers learnt and decided. Call it before every decision.
    pub fn catch_up(&mut self, now: Monotonic) {
        let announced = self.metrics.announced();
        let news = self.push.catch_up(&mut self.worker, &self.metrics, announced);
        self.log.catch_up(&mut self.worker, &self.metrics, announced, now);
        self.log_news(news);
    }

    /// Publishes this worker's events to the other workers.
    pub fn publish(&mut self, now: Monotonic) {
        self.log.publish(&mut self.worker, &self.metrics, now);
    }

    /// Counts a host call that failed where none should.
    pub fn expect_ok<T>(&mut self, what: &str, result: HostResult<T>) -> Option<T> {
        result
            .inspect_err(|HostError(status)| {
                self.worker.counts.count(Metric::HostErrors);
                warn!("{what}: host status {status}");
            })
            .ok()
    }

    /// Logs what an operator should know of the push.
    fn log_news(&self, news: Option<News>) {
        let (epoch, version) = self.worker.state.table.version();
        let endpoints = self.worker.state.table.len();
        match news {
            None => {}
            Some(News::Applied) => info!("list {epoch}/{version} in force: {endpoints} endpoints"),
            Some(News::Refused(why)) => error!("list refused, {epoch}/{version} stays in force: {why}"),
            Some(News::Empty) => warn!("empty list refused, {epoch}/{version} stays in force"),
            Some(News::Lost) => warn!("pd-control does not answer, {epoch}/{version} stays in force"),
            Some(News::Found) => info!("pd-control answers again"),
        }
    }
}

/// Envoy's numbers of the metrics.
#[derive(Default)]
struct MetricIds {
    metrics: Vec<u32>,
    levels: Vec<u32>,
    seen: Option<u32>,
    /// Gauges that are set when they change: number, and the value that Envoy has.
    gauges: BTreeMap<String, (u32, u64)>,
    announced: Option<u32>,
    /// Gauges of the worker slots, defined when one is first looked at.
    positions: Vec<OnceCell<Option<u32>>>,
}

impl MetricIds {
    fn define() -> HostResult<Self> {
        let metrics = Metric::ALL.iter().map(|metric| host::define_metric(metric.kind(), metric.name()));
        let levels = Level::ALL.iter().map(|level| host::define_metric(MetricKind::Gauge, level.name()));
        // Workers set the gauge of their own build at each tick, so that of a build that no worker runs stops moving.
        let seen = format!("pd_build_seen_seconds;version={VERSION};build={BUILD};wire={WIRE_VERSION}");
        Ok(Self {
            metrics: metrics.collect::<HostResult<_>>()?,
            levels: levels.collect::<HostResult<_>>()?,
            seen: Some(host::define_metric(MetricKind::Gauge, &seen)?),
            gauges: BTreeMap::new(),
            announced: Some(host::define_metric(MetricKind::Counter, "pd_announced_total")?),
            positions: vec![OnceCell::new(); WORKER_SLOTS],
        })
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

/// Root context.
#[derive(Default)]
pub struct Root {
    shell: Rc<RefCell<Shell>>,
    poll: Option<u32>,
    calls: Vec<(u32, client::CallKind)>,
}

impl Shell {
    /// Passes counts and changed gauges on to Envoy.
    fn flush(&mut self) {
        let Self { worker, metrics, .. } = self;
        worker.counts.flush(|metric, value| {
            let Some(id) = metrics.metrics.get(metric as usize) else { return };
            let _ = match metric.kind() {
                MetricKind::Histogram => host::record_metric(*id, value.unsigned_abs()),
                MetricKind::Counter | MetricKind::Gauge => host::increment_metric(*id, value),
            };
        });
        for (name, value) in worker.gauges() {
            let (id, set) = match metrics.gauges.get(&name) {
                Some(known) => *known,
                None => match host::define_metric(MetricKind::Gauge, &name) {
                    Ok(id) => (id, !value),
                    Err(_) => continue,
                },
            };
            if set != value {
                let _ = host::record_metric(id, value);
                metrics.gauges.insert(name, (id, value));
            }
        }
    }
}

impl Shell {
    fn whole_tick(&mut self, now: Monotonic) -> Option<Poll> {
        self.flush();
        let Self { worker, push, log, metrics, .. } = self;
        worker.prune(now);
        log.tick(worker, metrics, now);
        let poll = push.tick(metrics, now);
        for (level, value) in push.levels(worker, now) {
            if let Some(id) = metrics.levels.get(level as usize) {
                let _ = host::record_metric(*id, value);
            }
        }
        if let Some(id) = metrics.seen {
            let _ = host::record_metric(id, unix_time().as_secs());
        }
        poll
    }

    /// Calls of the exchange that are due.
    fn exchange(&mut self, now: Monotonic) -> Vec<ExchangeCall> {
        let Self { worker, push, log, exchange, metrics, .. } = self;
        exchange.take_lead(worker, metrics, push.holds_lease(), random_number, now);
        exchange.tick(worker, push.holds_lease(), now, |worker| {
            let clocks = Clocks { monotonic: now, unix: unix_time() };
            Report::of(worker, log.generations(metrics), log.decisions(worker, metrics), clocks).to_json()
        })
    }

    /// Sets the time between two ticks, where it has changed.
    fn set_tick_period(&mut self) {
        let Some(period) = self.pace.new_period(self.exchange.is_busy()) else { return };
        if let Err(HostError(status)) = host::set_tick_period(period) {
            error!("no ticks, so no poll of pd-control: host status {status}");
        }
    }

    /// Headers of a request to `pd-control`.
    fn control_headers(&self, method: &str, path: String, authority: String) -> Headers {
        let mut pairs = vec![
            (":method", method.to_owned()),
            (":path", path),
            (":authority", authority),
            (":scheme", "http".to_owned()),
            ("x-pd-filter", format!("version={VERSION};build={BUILD};worker={}", self.push.worker_id())),
        ];
        let control = self.worker.config.as_ref().ok().and_then(|config| config.control.as_ref());
        if let Some(token) = control.and_then(|control| std::env::var(&control.token_env).ok()) {
            pairs.push(("authorization", format!("Bearer {token}")));
        }
        Headers::from_pairs(pairs.iter().map(|(name, value)| (*name, value.as_str())))
    }
}

impl Root {
    fn start(&mut self, poll: Option<Poll>) {
        let Some(poll) = poll else { return };
        let Ok(mut shell) = self.shell.try_borrow_mut() else { return };
        let headers = shell.control_headers("GET", poll.path, poll.authority);
        match host::call(&poll.cluster, &headers, None, poll.timeout) {
            Ok(token) => self.poll = Some(token),
            Err(HostError(status)) => {
                let shell = &mut *shell;
                let news = shell.push.not_started(&mut shell.worker, host::now());
                if news.is_some() {
                    warn!("cluster {}: host status {status}", poll.cluster);
                }
                shell.log_news(news);
            }
        }
    }

    /// Starts calls of the exchange.
    fn exchange(&mut self, calls: Vec<ExchangeCall>) {
        let Ok(mut shell) = self.shell.try_borrow_mut() else { return };
        let shell = &mut *shell;
        for ExchangeCall { kind, path, body, timeout } in calls {
            let control = shell.worker.config.as_ref().ok().and_then(|config| config.control.clone());
            let started = control.ok_or(NOT_FOUND).and_then(|control| {
                let headers = shell.control_headers("POST", path, control.authority);
                host::call(&control.cluster, &headers, Some(&body), timeout)
            });
            match started {
                Ok(token) => self.calls.push((token, kind)),
                Err(_) => shell.exchange.failed(&mut shell.worker, kind, host::now()),
            }
        }
    }

    fn exchanged(&mut self, kind: client::CallKind, has_answer: bool) {
        let Ok(mut shell) = self.shell.try_borrow_mut() else { return };
        let now = host::now();
        // The answer is compared with what all workers of this Envoy know.
        shell.catch_up(now);
        let status = if has_answer { host::status(Map::Call) } else { None };
        let body = host::buffer(Buffer::CallBody).unwrap_or_default();
        {
            let Shell { worker, exchange, .. } = &mut *shell;
            exchange.answered(worker, kind, status, &body, now);
        }
        shell.publish(now);
        shell.set_tick_period();
    }

    /// Puts a configuration in force, or the last good one that any worker of this policy had.
    fn configure(shell: &mut Shell, text: &[u8]) {
        let config = match shell.worker.configure_or_last_good(text, &shell.metrics) {
            Configured::New(config) => config,
            Configured::LastGood(config, refusal) => {
                error!("plugin configuration refused: {refusal}");
                warn!("the last good plugin configuration stays in force");
                config
            }
            Configured::Refused(refusal) => {
                error!("plugin configuration refused: {refusal}");
                return;
            }
        };
        let now = host::now();
        shell.push.configure(config.control.clone(), &shell.metrics, now);
        let worker_id = shell.push.worker_id();
        shell.exchange.configure(&mut shell.worker, config.control.as_ref());
        shell.log.introduce(VERSION, BUILD, &config.revision);
        shell.log.configure(&mut shell.worker, &shell.metrics, worker_id, now);
        info!(
            "worker {}: revision {:?}, {} static endpoints, pd-control: {}",
            shell.push.worker_id(),
            config.revision,
            config.endpoints.len(),
            config.control.as_ref().map_or("none", |control| &control.cluster),
        );
    }
}

impl Context for Root {
    fn on_http_call_response(&mut self, token: u32, num_headers: usize, _: usize, _: usize) {
        if let Some(at) = self.calls.iter().position(|(started, _)| *started == token) {
            let (_, kind) = self.calls.swap_remove(at);
            self.exchanged(kind, num_headers > 0);
            return;
        }
        if self.poll != Some(token) {
            return;
        }
        self.poll = None;
        let poll = {
            let Ok(mut shell) = self.shell.try_borrow_mut() else { return };
            let shell = &mut *shell;
            let status = if num_headers > 0 { host::status(Map::Call) } else { None };
            let body = host::buffer(Buffer::CallBody).unwrap_or_default();
            let (poll, news) = shell.push.answered(&mut shell.worker, &shell.metrics, status, &body, host::now());
            shell.log_news(news);
            poll
        };
        self.start(poll);
    }

    /// The root context ticks no more. Without this flush gauges that its last requests lowered would stay up.
    fn on_done(&mut self) -> bool {
        if let Ok(mut shell) = self.shell.try_borrow_mut() {
            shell.flush();
        }
        true
    }
}

impl RootContext for Root {
    fn on_vm_start(&mut self, _: usize) -> bool {
        info!("pd-filter {VERSION} build {BUILD} features {FEATURES} wire {WIRE_VERSION}");
        true
    }

    /// Always true: where a plugin refuses its configuration, Envoy may fail every request until the next change.
    fn on_configure(&mut self, _: usize) -> bool {
        let Ok(mut shell) = self.shell.try_borrow_mut() else { return true };
        match MetricIds::define() {
            Ok(metrics) => shell.metrics = metrics,
            Err(HostError(status)) => warn!("metrics cannot be defined: host status {status}"),
        }
        match host::buffer(Buffer::PluginConfiguration) {
            Ok(text) => Self::configure(&mut shell, &text),
            // No configuration at all.
            Err(NOT_FOUND) => Self::configure(&mut shell, b""),
            Err(HostError(status)) => error!("plugin configuration cannot be read: host status {status}"),
        }
        shell.set_tick_period();
        true
    }

    fn on_tick(&mut self) {
        let (poll, calls) = {
            let Ok(mut shell) = self.shell.try_borrow_mut() else { return };
            let now = host::now();
            shell.catch_up(now);
            let calls = shell.exchange(now);
            shell.publish(now);
            // The exchange may tick more often than the rest.
            let is_exchanging = shell.exchange.is_busy();
            let is_whole = shell.pace.is_whole(is_exchanging, now);
            let poll = if is_whole { shell.whole_tick(now) } else { None };
            shell.set_tick_period();
            (poll, calls)
        };
        self.start(poll);
        self.exchange(calls);
    }

    fn create_http_context(&self, _: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Stream::new(Rc::clone(&self.shell))))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

/// A random number of the host.
fn random_number() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(host::now())
}

fn unix_time() -> UnixTime {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or_else(|_| UnixTime::default(), UnixTime::new)
}
