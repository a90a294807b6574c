//! Demand of the last minutes, so that an autoscaler gets means. Autoscalers ask every 15 to 30 s, and a queue can fill
//! and empty within a second.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::engines::answers::Scrapes;
use crate::envoys::hub::SharedHub;
use crate::publish::registry::Registry;
use crate::scaling::demand::{Demand, PoolRole, demand};

/// Time between two samples: the Envoys report no more often when little happens.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);
/// Longest window that may be asked for.
pub const MAX_WINDOW: Duration = Duration::from_secs(600);
/// Age of the newest sample above which nothing is known any longer.
const MAX_AGE: Duration = Duration::from_secs(5);

/// What demand is made of.
#[derive(Debug)]
pub struct DemandSource {
    /// The list in force.
    pub registry: Arc<Registry>,
    /// What the Envoys have in flight.
    pub hub: Arc<SharedHub>,
    /// What the engines report.
    pub scrapes: Arc<Scrapes>,
}

impl DemandSource {
    /// Demand as of now.
    #[must_use]
    pub fn now(&self) -> BTreeMap<PoolRole, Demand> {
        demand(self.registry.current().endpoints(), self.hub.loads().as_ref(), &self.scrapes.view())
    }
}

/// Samples of the demand, oldest first.
#[derive(Debug)]
pub struct History {
    samples: Mutex<VecDeque<(Instant, BTreeMap<PoolRole, Demand>)>>,
    taken: watch::Sender<u64>,
}

/// Why a window has no mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unknown {
    /// In a part of the window no Envoy exchanged, or pd-control did not run.
    Window,
    /// The list has no endpoint of that pool and role.
    PoolRole,
    /// Neither the Envoys nor the engines report the value.
    Value,
}

impl Default for History {
    fn default() -> Self {
        Self { samples: Mutex::default(), taken: watch::Sender::new(0) }
    }
}

impl History {
    /// Takes a sample each second; never returns. After a second without an exchanging Envoy, the demand is unknown, not zero.
    pub async fn sample(self: Arc<Self>, source: Arc<DemandSource>) {
        let mut ticks = interval(SAMPLE_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let at = ticks.tick().await;
            if source.hub.loads().is_some() {
                self.push(at, source.now());
            }
        }
    }

    fn push(&self, at: Instant, sample: BTreeMap<PoolRole, Demand>) {
        let mut samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        if samples.back().is_some_and(|(last, _)| at.duration_since(*last) > MAX_AGE) {
            samples.clear();
        }
        samples.push_back((at, sample));
        // One sample older than the longest window shows that the window is whole.
        while samples.get(1).is_some_and(|(second, _)| at.duration_since(*second) > MAX_WINDOW) {
            samples.pop_front();
        }
        drop(samples);
        self.taken.send_modify(|count| *count += 1);
    }

    /// Becomes another number whenever a sample is taken.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.taken.subscribe()
    }

    /// Mean of a value over the samples of a window.
    ///
    /// # Errors
    /// [`Unknown`]
    pub fn mean(
        &self,
        of: &PoolRole,
        window: Duration,
        now: Instant,
        value: fn(&Demand) -> Option<f64>,
    ) -> Result<f64, Unknown> {
        self.over(window, now, |samples| {
            let found: Vec<_> = samples.iter().filter_map(|sample| sample.get(of)).collect();
            if found.is_empty() {
                return Err(Unknown::PoolRole);
            }
            let values: Vec<f64> = found.into_iter().filter_map(value).collect();
            if values.is_empty() {
                return Err(Unknown::Value);
            }
            Ok(values.iter().sum::<f64>() / values.len() as f64)
        })
    }

    /// Whether a pool had anything to do within a window, in any role.
    ///
    /// # Errors
    /// [`Unknown`]
    pub fn was_active(&self, pool: &str, window: Duration, now: Instant) -> Result<bool, Unknown> {
        self.over(window, now, |samples| {
            let mut found =
                samples.iter().flat_map(|sample| sample.iter()).filter(|(of, _)| of.pool == pool).peekable();
            if found.peek().is_none() {
                return Err(Unknown::PoolRole);
            }
            Ok(found.any(|(_, demand)| demand.is_active()))
        })
    }

    fn over<T>(
        &self,
        window: Duration,
        now: Instant,
        read: impl FnOnce(&[&BTreeMap<PoolRole, Demand>]) -> Result<T, Unknown>,
    ) -> Result<T, Unknown> {
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        let age = |(at, _): &(Instant, _)| now.duration_since(*at);
        let is_whole = samples.front().is_some_and(|first| age(first) >= window);
        if !is_whole || samples.back().is_none_or(|last| age(last) > MAX_AGE) {
            return Err(Unknown::Window);
        }
        // The newest at least, however short the window.
        let newest = samples.len().saturating_sub(1);
        let inside = samples.iter().enumerate().filter(|(index, sample)| *index == newest || age(sample) <= window);
        read(&inside.map(|(_, (_, sample))| sample).collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_secs(10);

    fn of(role: &'static str) -> PoolRole {
        PoolRole { pool: "default".into(), role }
    }

    fn work(seconds: f64) -> BTreeMap<PoolRole, Demand> {
        let demand = Demand { ready: 1, prefill_work_seconds: Some(seconds), ..Demand::default() };
        BTreeMap::from([(of("prefill"), demand)])
    }

    fn read(demand: &Demand) -> Option<f64> {
        demand.prefill_work_seconds
    }

    fn history(seconds: u64, work_at: impl Fn(u64) -> f64) -> (History, Instant) {
        let (history, start) = (History::default(), Instant::now());
        let time = |second| start + Duration::from_secs(second);
        (0..=seconds).for_each(|second| history.push(time(second), work(work_at(second))));
        (history, time(seconds))
    }

    #[test]
    fn a_mean_is_of_the_window_only() {
        let (history, now) = history(30, |second| if second < 20 { 100.0 } else { (second % 2) as f64 });
        let mean = history.mean(&of("prefill"), WINDOW, now, read).unwrap();
        assert!((mean - 5.0 / 11.0).abs() < 1e-9, "{mean}");
    }

    #[test]
    fn a_window_that_is_not_whole_says_nothing() {
        let (history, now) = history(9, |_| 1.0);
        assert_eq!(history.mean(&of("prefill"), WINDOW, now, read), Err(Unknown::Window));
        assert_eq!(history.was_active("default", WINDOW, now), Err(Unknown::Window));
        history.push(now + Duration::from_secs(1), work(1.0));
        assert_eq!(history.mean(&of("prefill"), WINDOW, now + Duration::from_secs(1), read), Ok(1.0));
    }

    #[test]
    fn silence_is_not_zero() {
        let (history, now) = history(30, |_| 1.0);
        let later = now + MAX_AGE + Duration::from_secs(1);
        assert_eq!(history.mean(&of("prefill"), WINDOW, later, read), Err(Unknown::Window));
        history.push(later, work(0.0));
        assert_eq!(history.mean(&of("prefill"), WINDOW, later, read), Err(Unknown::Window), "the window begins anew");
    }

    #[test]
    fn what_is_not_in_the_list_and_what_nobody_reports_is_named() {
        let (history, now) = history(30, |_| 1.0);
        assert_eq!(history.mean(&of("decode"), WINDOW, now, read), Err(Unknown::PoolRole));
        assert_eq!(history.mean(&of("prefill"), WINDOW, now, |it| it.requests_waiting), Err(Unknown::Value));
        assert_eq!(history.was_active("other", WINDOW, now), Err(Unknown::PoolRole));
    }

    #[test]
    fn a_pool_is_active_until_a_whole_window_was_idle() {
        let (history, now) = history(30, |second| if second == 25 { 1.0 } else { 0.0 });
        assert_eq!(history.was_active("default", WINDOW, now), Ok(true));
        assert_eq!(history.was_active("default", Duration::from_secs(3), now), Ok(false));
    }

    #[test]
    fn samples_beyond_the_longest_window_are_forgotten() {
        let (history, now) = history(MAX_WINDOW.as_secs() * 2, |_| 1.0);
        assert_eq!(history.samples.lock().unwrap().len() as u64, MAX_WINDOW.as_secs() + 2);
        assert_eq!(history.mean(&of("prefill"), MAX_WINDOW, now, read), Ok(1.0));
    }
}
