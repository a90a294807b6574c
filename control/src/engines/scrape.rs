//! Asks the engines for their metrics and models, and tells the publisher what of it belongs in the list.
//!
//! Each engine is asked once per interval, at a moment of its own, so that a hundred of them are no burst. An engine that
//! answered before and now refuses several times in a row is taken to be down; when half of them do, the fault is more
//! likely on this side, and nobody is.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use pd_core::wire::{MAX_MODELS, MAX_NAME_BYTES};
use serde::Deserialize;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use xxhash_rust::xxh3::xxh3_64;

use crate::engines::metrics::{EngineLoad, Reader};
use crate::metrics::Metrics;
use crate::publish::registry::Registry;
use crate::publish::updates::Updates;

/// How often each engine is asked unless told otherwise.
pub const DEFAULT_INTERVAL: Duration = Duration::from_secs(5);
/// Engines that are asked at the same time.
const MAX_CONCURRENT: usize = 16;
/// How long one answer may take.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of metrics that are read; vLLM's are a hundred thousand.
const MAX_METRICS_BYTES: usize = 8 << 20;
/// Bytes of a list of models.
const MAX_MODELS_BYTES: usize = 1 << 20;
/// The models are asked for with every so many metrics.
const MODELS_EVERY: u32 = 6;
/// Failures in a row after which an engine that answered before is taken to be down.
const FAILURES: u32 = 3;
/// Tokens of a cache that are believed; the range of `cache_tokens`.
const MAX_CACHE_TOKENS: u64 = 1_000_000_000;

/// What every engine said last.
#[derive(Debug, Default)]
pub struct Scrapes(RwLock<BTreeMap<SocketAddr, Scraped>>);

/// What one engine said.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scraped {
    /// Its metrics, as of the last time it answered.
    pub load: EngineLoad,
    /// Its models, base and adapters; none: not told.
    pub models: Vec<String>,
    /// Whether it ever answered.
    pub has_answered: bool,
    /// Failures since then.
    pub failures: u32,
    /// Of the last one.
    pub error: Option<String>,
    /// Times it was asked.
    pub asked: u32,
}

/// What belongs in the list.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fact {
    /// Models, where the list says none.
    pub models: Vec<String>,
    /// Cache size, where the list says none.
    pub cache_tokens: Option<u64>,
    /// Whether it does not answer any longer.
    pub is_dead: bool,
}

/// Facts by address.
pub type Facts = BTreeMap<SocketAddr, Fact>;

/// Asks.
pub struct Scraper {
    registry: Arc<Registry>,
    metrics: Arc<Metrics>,
    scrapes: Arc<Scrapes>,
    interval: Duration,
    client: Client<HttpConnector, Empty<Bytes>>,
}

type Outcome = Result<(EngineLoad, Option<Vec<String>>), String>;

#[derive(Deserialize)]
struct Models {
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
}

impl Scrapes {
    /// What every engine said last.
    #[must_use]
    pub fn view(&self) -> BTreeMap<SocketAddr, Scraped> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn follow(&self, addresses: &BTreeSet<SocketAddr>) {
        let mut scraped = self.0.write().unwrap_or_else(PoisonError::into_inner);
        scraped.retain(|address, _| addresses.contains(address));
        for address in addresses {
            scraped.entry(*address).or_default();
        }
    }

    fn wants_models(&self, address: SocketAddr) -> bool {
        let scraped = self.0.read().unwrap_or_else(PoisonError::into_inner);
        scraped.get(&address).is_none_or(|known| known.asked.is_multiple_of(MODELS_EVERY))
    }

    /// Takes an answer; returns all facts where it changed what they are made of.
    fn take(&self, address: SocketAddr, outcome: Outcome) -> Option<Facts> {
        let mut scraped = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let known = scraped.get_mut(&address)?;
        let before = known.basis();
        known.take(outcome);
        (known.basis() != before).then(|| facts(&scraped))
    }
}

impl Scraper {
    /// Asks the engines of the list in force every `interval`.
    #[must_use]
    pub fn new(registry: Arc<Registry>, metrics: Arc<Metrics>, scrapes: Arc<Scrapes>, interval: Duration) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(TIMEOUT));
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_max_idle_per_host(1)
            .build(connector);
        Self { registry, metrics, scrapes, interval, client }
    }

    /// Asks until the publisher is gone.
    pub async fn run(self, updates: Updates) {
        let mut published = self.registry.subscribe();
        let mut due: BTreeMap<SocketAddr, Instant> = BTreeMap::new();
        let mut asking: JoinSet<(SocketAddr, Outcome)> = JoinSet::new();
        let mut told = Facts::new();
        let mut is_new = true;
        loop {
            if is_new {
                let current = Arc::clone(&published.borrow_and_update());
                let now = Instant::now();
                let addresses: BTreeSet<_> = current.endpoints().iter().map(|it| it.address).collect();
                self.scrapes.follow(&addresses);
                due.retain(|address, _| addresses.contains(address));
                for address in addresses {
                    due.entry(address).or_insert(now);
                }
                is_new = false;
            }
            let next = due.iter().min_by_key(|(_, at)| **at).map(|(address, at)| (*address, *at));
            tokio::select! {
                () = updates.closed() => return,
                changed = published.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    is_new = true;
                }
                Some(Ok((address, outcome))) = asking.join_next(), if !asking.is_empty() => {
                    self.metrics.scraped(outcome.is_ok());
                    let Some(facts) = self.scrapes.take(address, outcome) else { continue };
                    if facts != told {
                        for (address, fact) in &facts {
                            if fact.is_dead && !told.get(address).is_some_and(|fact| fact.is_dead) {
                                tracing::warn!(%address, "does not answer any longer: it is down until it does");
                            }
                        }
                        if updates.send_facts(facts.clone()).await.is_err() {
                            return;
                        }
                        told = facts;
                    }
                }
                () = async { if let Some((_, at)) = next { sleep_until(at).await } },
                    if next.is_some() && asking.len() < MAX_CONCURRENT =>
                {
                    let Some((address, at)) = next else { continue };
                    due.insert(address, self.next_turn(address, at));
                    let wants_models = self.scrapes.wants_models(address);
                    asking.spawn(ask(self.client.clone(), address, wants_models));
                }
            }
        }
    }

    /// Intervals differ by up to an eighth from address to address, so that those that begin together drift apart.
    fn next_turn(&self, address: SocketAddr, last: Instant) -> Instant {
        let share = (xxh3_64(address.to_string().as_bytes()) % 1_024) as f64 / 4_096.0;
        // Late turns are not made up for.
        last.max(Instant::now()) + self.interval.mul_f64(0.875 + share)
    }
}

impl Scraped {
    fn take(&mut self, outcome: Outcome) {
        self.asked = self.asked.wrapping_add(1);
        match outcome {
            Ok((load, models)) => {
                self.load = load;
                if let Some(models) = models {
                    self.models = models;
                }
                (self.has_answered, self.failures, self.error) = (true, 0, None);
            }
            Err(reason) => {
                self.failures = self.failures.saturating_add(1);
                self.error = Some(reason);
            }
        }
    }

    /// What facts are made of.
    fn basis(&self) -> (Vec<String>, Option<u64>, bool, bool) {
        (self.models.clone(), self.load.cache_tokens, self.has_answered, self.is_silent())
    }

    /// Whether it answered before and does not any longer.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        self.has_answered && self.failures >= FAILURES
    }
}

/// What of all answers belongs in the list.
fn facts(scraped: &BTreeMap<SocketAddr, Scraped>) -> Facts {
    let answered = scraped.values().filter(|it| it.has_answered).count();
    let silent = scraped.values().filter(|it| it.is_silent()).count();
    let is_believed = silent * 2 < answered;
    let fact = |scraped: &Scraped| Fact {
        models: scraped.models.clone(),
        cache_tokens: scraped.load.cache_tokens.map(|tokens| tokens.min(MAX_CACHE_TOKENS)),
        is_dead: is_believed && scraped.is_silent(),
    };
    scraped
        .iter()
        .map(|(address, scraped)| (*address, fact(scraped)))
        .filter(|(_, it)| *it != Fact::default())
        .collect()
}

async fn ask(
    client: Client<HttpConnector, Empty<Bytes>>,
    address: SocketAddr,
    wants_models: bool,
) -> (SocketAddr, Outcome) {
    let outcome = timeout(TIMEOUT, async {
        let load = metrics_of(&client, address).await?;
        // An engine may hide its models behind a key; that is no failure.
        let models = if wants_models { models_of(&client, address).await.ok() } else { None };
        Ok((load, models))
    });
    (address, outcome.await.unwrap_or_else(|_| Err(format!("no answer in {TIMEOUT:?}"))))
}

/// TensorRT-LLM has its metrics at a path of their own, and something else where the others have them.
async fn metrics_of(client: &Client<HttpConnector, Empty<Bytes>>, address: SocketAddr) -> Result<EngineLoad, String> {
    let usual = metrics_at(client, address, "/metrics").await;
    if usual.as_ref().is_ok_and(EngineLoad::is_known) {
        return usual;
    }
    let other = metrics_at(client, address, "/prometheus/metrics").await;
    if other.as_ref().is_ok_and(EngineLoad::is_known) { other } else { usual }
}

async fn metrics_at(
    client: &Client<HttpConnector, Empty<Bytes>>,
    address: SocketAddr,
    path: &str,
) -> Result<EngineLoad, String> {
    let mut body = get(client, address, path).await?;
    let (mut reader, mut len) = (Reader::default(), 0_usize);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| error.to_string())?;
        if let Some(data) = frame.data_ref() {
            len = len.saturating_add(data.len());
            if len > MAX_METRICS_BYTES {
                return Err(format!("more than {MAX_METRICS_BYTES} bytes of metrics"));
            }
            reader.push(data);
        }
    }
    Ok(reader.finish())
}

async fn models_of(client: &Client<HttpConnector, Empty<Bytes>>, address: SocketAddr) -> Result<Vec<String>, String> {
    let body = Limited::new(get(client, address, "/v1/models").await?, MAX_MODELS_BYTES);
    let bytes = body.collect().await.map_err(|error| error.to_string())?.to_bytes();
    let models: Models = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
    let mut ids: Vec<_> = models.data.into_iter().map(|model| model.id).collect();
    ids.sort_unstable();
    ids.dedup();
    if ids.len() > MAX_MODELS || ids.iter().any(|id| id.is_empty() || id.len() > MAX_NAME_BYTES) {
        return Err("names that the list cannot hold".to_owned());
    }
    Ok(ids)
}

async fn get(
    client: &Client<HttpConnector, Empty<Bytes>>,
    address: SocketAddr,
    path: &str,
) -> Result<hyper::body::Incoming, String> {
    let request =
        Request::get(format!("http://{address}{path}")).body(Empty::new()).map_err(|error| error.to_string())?;
    let response = client.request(request).await.map_err(|error| {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        format!("{error}{cause}")
    })?;
    match response.status() {
        StatusCode::OK => Ok(response.into_body()),
        other => Err(format!("{path} is answered with {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scraped(failures: u32) -> Scraped {
        Scraped { has_answered: true, failures, ..Scraped::default() }
    }

    fn all(failures: &[u32]) -> BTreeMap<SocketAddr, Scraped> {
        (1_u8..).zip(failures).map(|(n, failures)| (([10, 0, 0, n], 80).into(), scraped(*failures))).collect()
    }

    fn dead(failures: &[u32]) -> usize {
        facts(&all(failures)).values().filter(|fact| fact.is_dead).count()
    }

    #[test]
    fn the_few_that_fall_silent_are_down_and_the_many_are_not_believed() {
        assert_eq!(dead(&[0, 0, 2]), 0);
        assert_eq!(dead(&[0, 0, 3]), 1);
        assert_eq!(dead(&[0, 3]), 0, "half of them");
        assert_eq!(dead(&[3, 3, 3]), 0);
        let mut never = all(&[0, 0, 9]);
        for scraped in never.values_mut() {
            scraped.has_answered = scraped.failures == 0;
        }
        assert!(facts(&never).is_empty(), "who never answered may be out of reach from here only");
    }

    #[test]
    fn a_cache_beyond_belief_is_cut() {
        let load = EngineLoad { cache_tokens: Some(u64::MAX), ..EngineLoad::default() };
        let map = BTreeMap::from([(([10, 0, 0, 1], 80).into(), Scraped { load, ..Scraped::default() })]);
        assert_eq!(facts(&map).values().next().unwrap().cache_tokens, Some(MAX_CACHE_TOKENS));
    }
}
