//! The shell of a worker, which its root context and its streams share: core's parts, with the host calls that each needs.

use std::collections::BTreeMap;
use std::ffi::OsString;

use log::{error, info, warn};
use pd_core::envoys::client::{ExchangeCall, ExchangeClient};
use pd_core::envoys::pace::Pace;
use pd_core::envoys::report::Report;
use pd_core::headers::Headers;
use pd_core::metrics::Metric;
use pd_core::time::{Clocks, Monotonic, UnixTime};
use pd_core::workers::log::WorkersLog;
use pd_core::workers::push::{News, Poll, Push};
use pd_core::workers::shared::Shared;
use pd_core::workers::worker::{Configured, Worker};

use crate::host::{self, HostError, HostResult};
use crate::metrics::MetricIds;
use crate::version::{BUILD, VERSION};
use crate::waiting::WaitingStream;
use crate::wake::WakeQueues;

/// The parts of core at one worker, and the worker's access to the host.
#[derive(Default)]
pub struct Shell {
    /// State and configuration of the worker.
    pub worker: Worker,
    /// The push of the endpoint list.
    pub push: Push,
    log: WorkersLog,
    /// The exchange with other Envoys.
    pub exchange: ExchangeClient,
    /// Envoy's numbers of the metrics, and shared data.
    pub metrics: MetricIds,
    /// Pace of the ticks.
    pub pace: Pace,
    /// Streams whose requests wait, by the request's number.
    pub waiting: BTreeMap<u64, WaitingStream>,
    /// Queues that wake workers.
    pub wakes: WakeQueues,
    /// Whether the host could not wake this worker, so that its next tick takes a turn.
    pub is_turn_missed: bool,
}

impl Shell {
    /// Applies lists that other workers announced, and their events. Call it before every decision.
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

    /// Wakes the workers that may have a turn. Call it after the events of this worker are published.
    pub fn wake_workers(&mut self) {
        let own = self.push.worker_id();
        let workers: Vec<u64> = self.worker.workers_to_wake().collect();
        for worker in workers {
            self.worker.counts.count(Metric::Wakes);
            if worker == own {
                self.wake_self();
            } else if let Some(slot) = self.log.slot_of(worker) {
                self.wakes.wake(slot);
            }
        }
    }

    /// Takes a turn after this callback.
    pub fn wake_self(&mut self) {
        if !self.wakes.wake_self() {
            self.is_turn_missed = true;
        }
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
    pub fn log_news(&self, news: Option<News>) {
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

    /// Passes counts and changed gauges on to Envoy.
    pub fn flush(&mut self) {
        self.metrics.flush(&mut self.worker);
    }

    /// Puts a configuration in force. If it is refused, the last good one of any worker of this Envoy is in force.
    pub fn configure(&mut self, text: &[u8]) {
        // A variable that is not UTF-8 cannot stand in a header.
        let text_of = |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
        self.worker.environment = std::env::vars_os().filter_map(text_of).collect();
        self.worker.name =
            host::property("xds\0node\0id").map(|id| String::from_utf8_lossy(&id).into_owned()).unwrap_or_default();
        let config = match self.worker.configure_or_last_good(text, &self.metrics) {
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
        self.push.configure(config.control.clone(), &self.metrics, now);
        let worker_id = self.push.worker_id();
        self.exchange.configure(&mut self.worker, config.control.as_ref());
        self.log.introduce(VERSION, BUILD, &config.revision);
        self.log.configure(&mut self.worker, &self.metrics, worker_id, now);
        self.wakes.hold(self.log.slot().filter(|_| config.has_queue()));
        info!(
            "worker {}: revision {:?}, {} static endpoints, pd-control: {}",
            self.push.worker_id(),
            config.revision,
            config.endpoints.len(),
            config.control.as_ref().map_or("none", |control| &control.cluster),
        );
    }

    /// Does the work of a push's tick, and returns the poll if one is due.
    pub fn whole_tick(&mut self, now: Monotonic) -> Option<Poll> {
        self.flush();
        let Self { worker, push, log, metrics, wakes, .. } = self;
        worker.prune(now);
        log.tick(worker, metrics, now);
        let has_queue = worker.config.as_ref().is_ok_and(|config| config.has_queue());
        wakes.hold(log.slot().filter(|_| has_queue));
        let poll = push.tick(metrics, now);
        metrics.set_levels(push.levels(worker, now), unix_time());
        poll
    }

    /// Calls of the exchange that are due.
    pub fn exchange(&mut self, now: Monotonic) -> Vec<ExchangeCall> {
        let Self { worker, push, log, exchange, metrics, .. } = self;
        exchange.take_lead(worker, metrics, push.holds_lease(), random_number, now);
        exchange.tick(worker, push.holds_lease(), now, |worker| {
            let clocks = Clocks { monotonic: now, unix: unix_time() };
            let (decisions, parked) = (log.decisions(worker, metrics), log.parked(worker, metrics));
            let served = log.served(worker, metrics);
            Report::of(worker, log.generations(metrics), decisions, parked, served, clocks).to_json()
        })
    }

    /// Sets the time between two ticks, where it has changed.
    pub fn set_tick_period(&mut self, now: Monotonic) {
        let look = self.worker.next_look(now);
        let Some(period) = self.pace.new_period(self.exchange.is_busy(), look) else { return };
        if let Err(HostError(status)) = host::set_tick_period(period) {
            error!("no ticks, so no poll of pd-control: host status {status}");
        }
    }

    /// Headers of a request to `pd-control`.
    pub fn control_headers(&self, method: &str, path: String, authority: String) -> Headers {
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
