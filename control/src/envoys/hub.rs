//! The exchange between Envoys: [`pd_core::exchange::hub`] behind HTTP.

use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hashbrown::HashMap;
use pd_core::exchange::hub::Hub;
use pd_core::exchange::message::{Heard, Told, Totals};
use pd_core::exchange::report::Report;
use tokio::sync::watch;
use tokio::time::{Instant, interval, sleep, sleep_until};

use crate::counters::Counters;

/// How long a question waits at most.
const MAX_WAIT: Duration = Duration::from_secs(5);
/// Time that news waits for company before a question is answered.
const COMPANY: Duration = Duration::from_millis(5);
/// How often to look for gateways that are gone.
const PRUNE_EVERY: Duration = Duration::from_millis(500);

/// The hub, and who waits for it.
#[derive(Debug)]
pub struct SharedHub {
    hub: Mutex<Hub>,
    /// Counts what mattered to somebody.
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

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Takes what somebody tells and answers when there is something new, or after `wait`. `watching` is the number of
    /// Envoys that follow the list.
    pub async fn answer(
        &self,
        told: &Told,
        wait: Duration,
        watching: u64,
        mut stopping: watch::Receiver<bool>,
    ) -> Heard {
        if self.hub().take(told, self.now()) {
            self.news.send_modify(|count| *count += 1);
        }
        let deadline = Instant::now() + wait.min(MAX_WAIT);
        let mut news = self.news.subscribe();
        while Instant::now() < deadline && !self.hub().has_news(told) {
            tokio::select! {
                _ = news.changed() => {}
                _ = stopping.wait_for(|is_stopping| *is_stopping) => break,
                () = sleep_until(deadline) => break,
            }
            sleep(COMPANY).await;
        }
        self.hub().answer(told, watching)
    }

    /// Becomes another number whenever there is news.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }

    /// What another replica has to be told that has these records of each gateway.
    #[must_use]
    pub fn messages(&self, have: &HashMap<u64, u64>) -> Vec<Told> {
        self.hub().relay(have, self.now())
    }

    /// What the gateways report of themselves: number, time since it was heard of, the report.
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
        // The answer to somebody who has told nothing and heard nothing.
        let listener = Told { wants: true, ..Told::default() };
        let heard = self.hub().answer(&listener, 0);
        (heard.exchanging > 0).then(|| heard.loads.unwrap_or_default().into_iter().collect())
    }

    /// Lets go of gateways that are silent, for good.
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
