//! The hub of the exchange between Envoys, shared by the HTTP handlers and the relay.
//!
//! [`pd_core::envoys::hub`] decides; this module adds the lock, the clock and waiting.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hashbrown::HashMap;
use pd_core::endpoints::elsewhere::Totals;
use pd_core::envoys::hub::Hub;
use pd_core::envoys::message::{ExchangeRequest, ExchangeResponse, Record};
use pd_core::envoys::outside::EngineReport;
use pd_core::envoys::report::Report;
use pd_core::time::{Monotonic, UnixTime};
use pd_core::wire::Role;
use pd_core::workers::waits::PoolWaits;
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::time::{Instant, interval, sleep, sleep_until};
use xxhash_rust::xxh3::xxh3_64;

use crate::access::token::Token;
use crate::counters::Counters;
use crate::publish::registry::Published;

/// Longest time that a request waits for news.
const MAX_WAIT: Duration = Duration::from_secs(5);
/// Time between the first news and the response, in which more news may arrive.
const GATHER: Duration = Duration::from_millis(5);
/// How often the hub drops Envoys that no longer send.
const PRUNE_EVERY: Duration = Duration::from_millis(500);

/// The hub behind a lock, and a counter of news for requests that wait.
#[derive(Debug)]
pub struct SharedHub {
    hub: Mutex<Hub>,
    /// Counts messages with news.
    news: watch::Sender<u64>,
    began: Instant,
    /// Version of the list whose endpoints count.
    listed: Mutex<u64>,
}

/// Requests of a pool that wait or are parked at the Envoys.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Unbound {
    /// Requests that wait for a prefill endpoint with room.
    pub waiting: f64,
    /// Prefill work of those in seconds of an endpoint.
    pub work_seconds: f64,
    /// Requests for which no endpoint is ready.
    pub parked: f64,
    /// Seconds since the arrival of the oldest of all of them.
    pub oldest_seconds: f64,
}

impl Unbound {
    fn add(&mut self, waits: &PoolWaits) {
        self.waiting += waits.waiting as f64;
        self.work_seconds += waits.work_ms as f64 * 1e-3;
        self.parked += waits.parked as f64;
        self.oldest_seconds = self.oldest_seconds.max(waits.oldest_ms as f64 * 1e-3);
    }
}

impl Default for SharedHub {
    fn default() -> Self {
        Self::new(None)
    }
}

/// Public name of an Envoy. The Envoy's own number cannot be computed from it, and all replicas that have
/// the same secret make the same one.
fn public_name(secret: &[u8], gateway: u64) -> u64 {
    let digest = Sha256::new_with_prefix(secret).chain_update(gateway.to_le_bytes()).finalize();
    digest.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// A number of a host, the same in all replicas; never 0.
fn origin(host: IpAddr) -> u64 {
    xxh3_64(host.to_canonical().to_string().as_bytes()).max(1)
}

impl SharedHub {
    /// A hub without records. `secret` is the token that replicas share.
    #[must_use]
    pub fn new(secret: Option<&Token>) -> Self {
        let id = RandomState::new().hash_one(std::process::id());
        let secret = secret.map(|token| token.secret().to_vec()).unwrap_or_default();
        let hub = Hub::new(id.max(1)).with_public_names(move |gateway| public_name(&secret, gateway));
        Self { hub: Mutex::new(hub), news: watch::Sender::new(0), began: Instant::now(), listed: Mutex::default() }
    }

    /// From now on, the hub counts the load of this list's endpoints only. An empty list changes nothing: filters refuse
    /// it and keep their list.
    pub fn count_only(&self, list: &Published) {
        let mut listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        if *listed == list.version() || list.endpoints().is_empty() {
            return;
        }
        *listed = list.version();
        let keys = list.endpoints().iter().map(|endpoint| endpoint.id().key()).collect();
        self.hub().count_only(Some(keys));
    }

    fn hub(&self) -> MutexGuard<'_, Hub> {
        self.hub.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Monotonic {
        Monotonic::new(self.began.elapsed())
    }

    /// Takes the records of a message of an Envoy or a replica on this host. Returns the rest of the message, for
    /// [`answer`](Self::answer).
    #[must_use]
    pub fn take(&self, mut request: ExchangeRequest, host: IpAddr) -> ExchangeRequest {
        if self.hub().take(&request, origin(host), self.now()) {
            self.news.send_modify(|count| *count += 1);
        }
        for record in &mut request.records {
            *record = Record { gateway: record.gateway, ..Record::default() };
        }
        request
    }

    /// Answers a message when there is news for its sender or after `wait`.
    ///
    /// `watching` is the number of Envoys that follow the list. When `stopping` becomes true, it answers at once.
    pub async fn answer(
        &self,
        request: &ExchangeRequest,
        wait: Duration,
        watching: u64,
        mut stopping: watch::Receiver<bool>,
    ) -> ExchangeResponse {
        let deadline = Instant::now() + wait.min(MAX_WAIT);
        let mut news = self.news.subscribe();
        while Instant::now() < deadline && !self.hub().has_news(request) {
            tokio::select! {
                _ = news.changed() => {}
                _ = stopping.wait_for(|is_stopping| *is_stopping) => break,
                () = sleep_until(deadline) => break,
            }
            sleep(GATHER).await;
        }
        self.hub().answer(request, watching)
    }

    /// A receiver that changes whenever there is news.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }

    /// Messages for a replica that has these records: for each gateway, the newest one.
    #[must_use]
    pub fn messages(&self, have: &HashMap<u64, u64>) -> Vec<ExchangeRequest> {
        self.hub().relay(have, self.now())
    }

    /// The reports of all gateways, sorted by public name: name, time since its last message, report.
    #[must_use]
    pub fn reports(&self) -> Vec<(u64, Duration, Report)> {
        let today = SystemTime::now().duration_since(UNIX_EPOCH).map(UnixTime::new).unwrap_or_default();
        let (hub, now) = (self.hub(), self.now());
        let read = |text: &[u8]| Report::from_json(text).unwrap_or_default().for_people(today);
        let mut reports: Vec<_> = hub.reports(now).map(|(name, age, text)| (name, age, read(text))).collect();
        reports.sort_unstable_by_key(|(name, ..)| *name);
        reports
    }

    /// Requests of all Envoys that no endpoint has yet, by pool.
    #[must_use]
    pub fn unbound(&self) -> BTreeMap<String, Unbound> {
        let mut pools: BTreeMap<String, Unbound> = BTreeMap::new();
        for waits in self.reports().into_iter().flat_map(|(.., report)| report.waits) {
            pools.entry(waits.pool.clone()).or_default().add(&waits);
        }
        pools
    }

    /// Takes what the engine of these endpoints, all those at its address, reports of now.
    pub fn engine_reports(&self, endpoints: &[(u64, Role)], report: EngineReport) {
        if self.hub().engine_reports(endpoints, report, self.now()) {
            self.news.send_modify(|count| *count += 1);
        }
    }

    /// What all Envoys together have in flight, by endpoint key. `None`: no Envoy exchanges.
    #[must_use]
    pub fn loads(&self) -> Option<HashMap<u64, Totals>> {
        self.hub().in_flight().cloned()
    }

    /// Drops gateways that no longer send. Never returns.
    pub async fn prune(self: Arc<Self>, counters: Arc<Counters>) {
        let mut ticks = interval(PRUNE_EVERY);
        loop {
            ticks.tick().await;
            let (is_news, count) = {
                let mut hub = self.hub();
                (hub.prune(self.now()), hub.reports(self.now()).count())
            };
            counters.gateways.set(i64::try_from(count).unwrap_or(i64::MAX));
            if is_news {
                self.news.send_modify(|count| *count += 1);
            }
        }
    }
}
