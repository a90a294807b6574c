//! The hub of the exchange between Envoys, shared by the HTTP handlers and the relay.
//!
//! [`pd_core::envoys::hub`] decides; this module adds the lock, the clock and waiting.

use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hashbrown::HashMap;
use pd_core::endpoints::elsewhere::Totals;
use pd_core::envoys::hub::Hub;
use pd_core::envoys::message::{ExchangeRequest, ExchangeResponse};
use pd_core::envoys::report::Report;
use pd_core::time::Monotonic;
use tokio::sync::watch;
use tokio::time::{Instant, interval, sleep, sleep_until};

use crate::counters::Counters;

/// Longest time that a request waits for news.
const MAX_WAIT: Duration = Duration::from_secs(5);
/// Time between the first news and the response, in which more news may arrive.
const GATHER: Duration = Duration::from_millis(5);
/// How often the hub drops gateways that no longer send.
const PRUNE_EVERY: Duration = Duration::from_millis(500);

/// The hub behind a lock, and a counter of news for requests that wait.
#[derive(Debug)]
pub struct SharedHub {
    hub: Mutex<Hub>,
    /// Counts messages with news.
    news: watch::Sender<u64>,
    began: Instant,
}

impl Default for SharedHub {
    fn default() -> Self {
        let id = RandomState::new().hash_one(std::process::id());
        Self { hub: Mutex::new(Hub::new(id.max(1))), news: watch::Sender::new(0), began: Instant::now() }
    }
}

impl SharedHub {
    fn hub(&self) -> MutexGuard<'_, Hub> {
        self.hub.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Monotonic {
        Monotonic::new(self.began.elapsed())
    }

    /// Takes the message of an Envoy or a replica, and answers when there is news for it or after `wait`.
    ///
    /// `watching` is the number of Envoys that follow the list. When `stopping` becomes true, it answers at once.
    pub async fn answer(
        &self,
        request: &ExchangeRequest,
        wait: Duration,
        watching: u64,
        mut stopping: watch::Receiver<bool>,
    ) -> ExchangeResponse {
        if self.hub().take(request, self.now()) {
            self.news.send_modify(|count| *count += 1);
        }
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

    /// The reports of all gateways, sorted by id: id, time since its last message, report.
    #[must_use]
    pub fn reports(&self) -> Vec<(u64, Duration, Report)> {
        let (hub, now) = (self.hub(), self.now());
        let mut reports: Vec<_> =
            hub.reports(now).map(|(id, age, text)| (id, age, Report::from_json(text).unwrap_or_default())).collect();
        reports.sort_unstable_by_key(|(id, ..)| *id);
        reports
    }

    /// What all Envoys together have in flight, by endpoint key. `None`: no Envoy exchanges.
    #[must_use]
    pub fn loads(&self) -> Option<HashMap<u64, Totals>> {
        // The answer to an Envoy that has nothing in flight and has received nothing yet.
        let listener = ExchangeRequest { wants: true, ..ExchangeRequest::default() };
        let response = self.hub().answer(&listener, 0);
        (response.exchanging > 0).then(|| response.loads.unwrap_or_default().into_iter().collect())
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
