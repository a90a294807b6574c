//! Asks every engine for its metrics and models at intervals, and sends facts to the publisher and
//! numbers of requests to the hub.
//!
//! Each engine has a time of its own within the interval, so that requests to a hundred engines do not come in a burst.
//! An engine that answered before counts as down after several failures in a row. When half of the engines fail, none
//! counts as down: the fault is more likely in pd-control's network.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use xxhash_rust::xxh3::xxh3_64;

use crate::counters::Counters;
use crate::engines::access::{EngineAccess, Reach};
use crate::engines::answers::{Outcome, Scrapes};
use crate::engines::fetch::ask;
use crate::envoys::hub::SharedHub;
use crate::publish::registry::Registry;
use crate::publish::updates::{Facts, Updates};

/// Default of the interval between two requests to an engine.
pub const DEFAULT_INTERVAL: Duration = Duration::from_secs(5);
/// Requests that run at the same time.
const MAX_CONCURRENT: usize = 16;

/// Asks the engines of the list in force.
pub struct Scraper {
    registry: Arc<Registry>,
    counters: Arc<Counters>,
    scrapes: Arc<Scrapes>,
    hub: Arc<SharedHub>,
    interval: Duration,
    reach: Arc<Reach>,
}

impl Scraper {
    /// A scraper that asks each engine of the list in force every `interval`.
    ///
    /// # Errors
    /// One line where the way to the engines cannot be had.
    pub fn new(
        registry: Arc<Registry>,
        counters: Arc<Counters>,
        (scrapes, hub): (Arc<Scrapes>, Arc<SharedHub>),
        (interval, access): (Duration, &EngineAccess),
    ) -> anyhow::Result<Self> {
        Ok(Self { registry, counters, scrapes, hub, interval, reach: Arc::new(access.reach()?) })
    }

    /// Asks until the publisher has ended.
    pub async fn run(self, updates: Updates) {
        let mut published = self.registry.subscribe();
        let mut due: BTreeMap<SocketAddr, Instant> = BTreeMap::new();
        let mut asking: JoinSet<(SocketAddr, Outcome)> = JoinSet::new();
        let mut sent = Facts::new();
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
                    self.counters.scraped(outcome.is_ok());
                    let had_late_fetch = self.scrapes.late_fetch(address);
                    let has_answered = outcome.is_ok();
                    let taken = self.scrapes.take(address, outcome);
                    if has_answered {
                        self.report(address);
                    }
                    if self.scrapes.late_fetch(address) != had_late_fetch {
                        tracing::warn!(%address, "decode servers fetched KV caches from this engine after their KV lease: the answers were refused, or had wrong text");
                    }
                    if let Some(news) = taken.news {
                        tracing::warn!(%address, "{news}");
                    }
                    let Some(facts) = taken.facts else { continue };
                    if facts != sent {
                        for (address, fact) in &facts {
                            if fact.is_down && !sent.get(address).is_some_and(|fact| fact.is_down) {
                                tracing::warn!(%address, "the engine stopped answering: its endpoints are down until it answers");
                            }
                        }
                        if updates.send_facts(facts.clone()).await.is_err() {
                            return;
                        }
                        sent = facts;
                    }
                }
                () = async { if let Some((_, at)) = next { sleep_until(at).await } },
                    if next.is_some() && asking.len() < MAX_CONCURRENT =>
                {
                    let Some((address, at)) = next else { continue };
                    due.insert(address, self.next_turn(address, at));
                    asking.spawn(ask(Arc::clone(&self.reach), address));
                }
            }
        }
    }

    /// Passes on to the hub what the engine at an address reported of its requests.
    fn report(&self, address: SocketAddr) {
        let list = self.registry.current();
        let those = list.endpoints().iter().filter(|endpoint| endpoint.address == address);
        let mut endpoints: Vec<_> = those.map(|endpoint| (endpoint.id().key(), endpoint.role)).collect();
        endpoints.sort_unstable_by_key(|(key, _)| *key);
        if let Some(report) = self.scrapes.report(address, endpoints.len()) {
            self.hub.engine_reports(&endpoints, report);
        }
    }

    /// Intervals differ by up to an eighth between addresses, so that engines that are first asked together drift
    /// apart.
    fn next_turn(&self, address: SocketAddr, last: Instant) -> Instant {
        let share = (xxh3_64(address.to_string().as_bytes()) % 1_024) as f64 / 4_096.0;
        // A late request does not move later ones closer together.
        last.max(Instant::now()) + self.interval.mul_f64(0.875 + share)
    }
}
