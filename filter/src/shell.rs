//! Root context: configuration, ticks, the poll of `pd-control`, metrics. One per worker.

use core::cell::{OnceCell, RefCell};
use core::time::Duration;
use std::collections::BTreeMap;
use std::rc::Rc;

use log::{error, info, warn};
use pd_core::exchange::report::Report;
use pd_core::exchange::{self, Call, Exchange};
use pd_core::headers::Headers;
use pd_core::metrics::{Kind, Level, Metric};
use pd_core::push::{News, Poll, Push, TICK};
use pd_core::share::{SEATS, Share, Shared};
use pd_core::time::{Clocks, Monotonic, UnixTime};
use pd_core::wire::WIRE_VERSION;
use pd_core::worker::Worker;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::ContextType;

use crate::host::{self, Buffer, HostError, HostResult, Map, MetricKind};
use crate::stream::Stream;

/// Release.
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Source revision, set by the Makefile.
const BUILD: &str = match option_env!("PD_BUILD") {
    Some(build) => build,
    None => "unknown",
};
/// What this build was made with.
const FEATURES: &str = if cfg!(target_feature = "simd128") { "simd128" } else { "none" };

const LAST_GOOD_CONFIG_KEY: &str = "pd/config";
/// Number of the worker's time as this Envoy's voice that was the last to begin.
const VOICE_KEY: &str = "pd/voice";
/// How much earlier than asked for a tick may come.
const TICK_SLACK: Duration = Duration::from_millis(20);
const NOT_FOUND: HostError = HostError(1);

/// What the root context and the streams of a worker share.
#[derive(Default)]
pub struct Shell {
    /// Decisions.
    pub worker: Worker,
    push: Push,
    share: Share,
    exchange: Exchange,
    metrics: MetricIds,
    ticks: Ticks,
}

/// When the host ticks, and when the last whole tick was.
#[derive(Default)]
struct Ticks {
    period: Duration,
    whole: Monotonic,
}

impl Shell {
    /// Takes over what other workers have learnt and decided. Before every decision.
    pub fn catch_up(&mut self, now: Monotonic) {
        let announced = self.metrics.announced();
        let news = self.push.catch_up(&mut self.worker, &self.metrics, announced);
        self.share.catch_up(&mut self.worker, &self.metrics, announced, now);
        self.tell(news);
    }

    /// Tells the other workers what happened.
    pub fn publish(&mut self, now: Monotonic) {
        self.share.publish(&mut self.worker, &self.metrics, now);
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

    fn tell(&self, news: Option<News>) {
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

/// Numbers under which Envoy knows the metrics.
#[derive(Default)]
struct MetricIds {
    metrics: Vec<u32>,
    levels: Vec<u32>,
    seen: Option<u32>,
    /// Gauges that are told when they change: number, and the value that Envoy has.
    gauges: BTreeMap<String, (u32, u64)>,
    announced: Option<u32>,
    /// Gauges of the seats that were looked at.
    positions: Vec<OnceCell<Option<u32>>>,
}

impl MetricIds {
    fn define() -> HostResult<Self> {
        let kind = |metric: &Metric| match metric.kind() {
            Kind::Counter => MetricKind::Counter,
            Kind::Gauge => MetricKind::Gauge,
            Kind::Histogram => MetricKind::Histogram,
        };
        let metrics = Metric::ALL.iter().map(|metric| host::define_metric(kind(metric), metric.name()));
        let levels = Level::ALL.iter().map(|level| host::define_metric(MetricKind::Gauge, level.name()));
        // The gauge of a version that no worker runs any more stops moving.
        let seen = format!("pd_build_seen_seconds;version={VERSION};build={BUILD};wire={WIRE_VERSION}");
        Ok(Self {
            metrics: metrics.collect::<HostResult<_>>()?,
            levels: levels.collect::<HostResult<_>>()?,
            seen: Some(host::define_metric(MetricKind::Gauge, &seen)?),
            gauges: BTreeMap::new(),
            announced: Some(host::define_metric(MetricKind::Counter, "pd_announced_total")?),
            positions: vec![OnceCell::new(); SEATS],
        })
    }

    fn position(&self, seat: usize) -> Option<u32> {
        let define = || host::define_metric(MetricKind::Gauge, &format!("pd_log_position;seat={seat}")).ok();
        *self.positions.get(seat)?.get_or_init(define)
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

    fn position(&self, seat: usize) -> u64 {
        self.position(seat).and_then(|id| host::metric(id).ok()).unwrap_or(0)
    }

    fn set_position(&self, seat: usize, position: u64) {
        if let Some(id) = self.position(seat) {
            let _ = host::record_metric(id, position);
        }
    }
}

/// Root context.
#[derive(Default)]
pub struct Root {
    shell: Rc<RefCell<Shell>>,
    poll: Option<u32>,
    calls: Vec<(u32, exchange::Kind)>,
}

impl Shell {
    /// Tells Envoy what was counted.
    fn flush(&mut self) {
        let Self { worker, metrics, .. } = self;
        worker.counts.flush(|metric, value| {
            let Some(id) = metrics.metrics.get(metric as usize) else { return };
            let _ = match metric.kind() {
                Kind::Histogram => host::record_metric(*id, value.unsigned_abs()),
                Kind::Counter | Kind::Gauge => host::increment_metric(*id, value),
            };
        });
        for (name, value) in worker.gauges() {
            let (id, told) = match metrics.gauges.get(&name) {
                Some(known) => *known,
                None => match host::define_metric(MetricKind::Gauge, &name) {
                    Ok(id) => (id, !value),
                    Err(_) => continue,
                },
            };
            if told != value {
                let _ = host::record_metric(id, value);
                metrics.gauges.insert(name, (id, value));
            }
        }
    }
}

impl Shell {
    fn whole_tick(&mut self, now: Monotonic) -> Option<Poll> {
        self.ticks.whole = now;
        self.flush();
        let Self { worker, push, share, metrics, .. } = self;
        worker.prune(now);
        share.tick(worker, metrics, now);
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
    fn exchange(&mut self, now: Monotonic) -> Vec<Call> {
        let Self { worker, push, share, exchange, metrics, .. } = self;
        if exchange.wants_to_speak(push.holds_lease()) {
            let before = metrics.get(VOICE_KEY).and_then(|(bytes, _)| Some(u64::from_le_bytes(*bytes.first_chunk()?)));
            let voice = random_number();
            metrics.set(VOICE_KEY, &voice.to_le_bytes(), None);
            exchange.speak(worker, voice, before.unwrap_or(0), now);
        }
        exchange.tick(worker, push.holds_lease(), now, |worker| {
            let clocks = Clocks { monotonic: now, unix: unix_time() };
            Report::of(worker, share.generations(metrics), share.decisions(worker, metrics), clocks).to_json()
        })
    }

    /// Ticks more often while Envoys exchange.
    fn set_tick_period(&mut self) {
        let period = if self.exchange.is_busy() { exchange::TICK } else { TICK };
        if self.ticks.period == period {
            return;
        }
        self.ticks.period = period;
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
                shell.tell(news);
            }
        }
    }

    /// Starts calls of the exchange.
    fn exchange(&mut self, calls: Vec<Call>) {
        let Ok(mut shell) = self.shell.try_borrow_mut() else { return };
        let shell = &mut *shell;
        for Call { kind, path, body, timeout } in calls {
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

    fn exchanged(&mut self, kind: exchange::Kind, has_answer: bool) {
        let Ok(mut shell) = self.shell.try_borrow_mut() else { return };
        let now = host::now();
        // What the others of this Envoy told before is not news to them.
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
        let configured = match shell.worker.configure(text) {
            Ok(config) => {
                if host::set_shared_data(LAST_GOOD_CONFIG_KEY, text, None).is_err() {
                    shell.worker.counts.count(Metric::HostErrors);
                }
                Ok(config)
            }
            Err(refusal) => {
                error!("plugin configuration refused: {refusal}");
                host::shared_data(LAST_GOOD_CONFIG_KEY).map_err(|_| refusal).and_then(|(last_good, _)| {
                    warn!("the last good plugin configuration stays in force");
                    shell.worker.configure(&last_good)
                })
            }
        };
        let Ok(config) = configured else { return };
        let now = host::now();
        shell.push.configure(config.control.clone(), &shell.metrics, now);
        let worker_id = shell.push.worker_id();
        shell.exchange.configure(&mut shell.worker, config.control.as_ref());
        shell.share.introduce(VERSION, BUILD, &config.revision);
        shell.share.configure(&mut shell.worker, &shell.metrics, worker_id, now);
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
            shell.tell(news);
            poll
        };
        self.start(poll);
    }

    /// The root retires and ticks no more: gauges that its last requests lowered would stay up for good.
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

    /// Always true: a plugin that refuses its configuration through the host may fail closed until the next change.
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
            // The exchange may want to be asked more often than the rest.
            let is_whole =
                !shell.exchange.is_busy() || now.saturating_sub(shell.ticks.whole).saturating_add(TICK_SLACK) >= TICK;
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

/// Of the host's making, and never 0.
fn random_number() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(host::now()).max(1)
}

fn unix_time() -> UnixTime {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or_else(|_| UnixTime::default(), UnixTime::new)
}
