//! Demand of the last minutes, so that an autoscaler gets means. Autoscalers ask every 15 to 30 s, and a queue can fill
//! and empty within a second.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::engines::answers::Scrapes;
use crate::envoys::hub::{SharedHub, Unbound};
use crate::publish::registry::Registry;
use crate::scaling::demand::{Demand, PoolRole, demand};

/// Time between two samples: the Envoys report no more often when little happens.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);
/// Looks at which endpoints are busy, in each sample: a prompt may take less than a sample.
pub const LOOKS: u32 = 4;
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
        self.with(&self.hub.unbound())
    }

    fn with(&self, unbound: &BTreeMap<String, Unbound>) -> BTreeMap<PoolRole, Demand> {
        demand(self.registry.current().endpoints(), self.hub.loads().as_ref(), &self.scrapes.view(), unbound)
    }

    /// A sample of now.
    fn sample(&self) -> Sample {
        let unbound = self.hub.unbound();
        let parked = unbound.iter().filter(|(_, of)| of.parked > 0.0).map(|(pool, _)| pool.clone()).collect();
        Sample { roles: self.with(&unbound), parked }
    }
}

/// Demand at one time.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Demand of each pool and role that has endpoints.
    pub roles: BTreeMap<PoolRole, Demand>,
    /// Pools with parked requests. A pool without any endpoint is not in `roles`, and its requests are parked in `default`.
    pub parked: BTreeSet<String>,
}

/// Busy endpoints since the last sample.
#[derive(Debug, Default)]
pub struct Busy {
    looks: u32,
    sums: BTreeMap<PoolRole, f64>,
}

impl Busy {
    /// Adds one look, and replaces the number of busy endpoints in the sample by the mean. Returns the number of looks.
    fn look(&mut self, sample: &mut Sample) -> u32 {
        self.looks += 1;
        for (of, demand) in &mut sample.roles {
            if let Some(busy) = &mut demand.prefill_busy {
                let sum = self.sums.entry(of.clone()).or_default();
                *sum += *busy;
                *busy = *sum / f64::from(self.looks);
            }
        }
        self.looks
    }
}

/// Samples of the demand.
#[derive(Debug, Default)]
struct Samples {
    /// Oldest first.
    taken: VecDeque<(Instant, Sample)>,
    /// Pools and roles that had an endpoint since pd-control started. Scaled to zero, they have none.
    known: BTreeSet<PoolRole>,
}

/// Samples of the demand over time.
#[derive(Debug)]
pub struct History {
    samples: Mutex<Samples>,
    taken: watch::Sender<u64>,
}

/// Why a window has no mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unknown {
    /// In a part of the window no Envoy exchanged, or pd-control did not run.
    Window,
    /// The list never had an endpoint of that pool and role, and no request waits for one.
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
    /// Takes a sample each second, of the mean of busy endpoints over that second; never returns. After a second without an exchanging Envoy, the demand is unknown, not zero.
    pub async fn sample(self: Arc<Self>, source: Arc<DemandSource>) {
        let mut ticks = interval(SAMPLE_EVERY / LOOKS);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut busy = Busy::default();
        loop {
            let at = ticks.tick().await;
            if source.hub.loads().is_none() {
                busy = Busy::default();
                continue;
            }
            self.look(&mut busy, at, source.sample());
        }
    }

    /// Takes a look, four times a second. Every fourth look becomes a sample.
    pub fn look(&self, busy: &mut Busy, at: Instant, mut sample: Sample) {
        if busy.look(&mut sample) == LOOKS {
            *busy = Busy::default();
            self.push(at, sample);
        }
    }

    fn push(&self, at: Instant, sample: Sample) {
        let mut all = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        let Samples { taken: samples, known } = &mut *all;
        for of in sample.roles.keys().filter(|of| !known.contains(*of)).cloned().collect::<Vec<_>>() {
            known.insert(of);
        }
        if samples.back().is_some_and(|(last, _)| at.duration_since(*last) > MAX_AGE) {
            samples.clear();
        }
        samples.push_back((at, sample));
        // One sample older than the longest window shows that the window is whole.
        while samples.get(1).is_some_and(|(second, _)| at.duration_since(*second) > MAX_WINDOW) {
            samples.pop_front();
        }
        drop(all);
        self.taken.send_modify(|count| *count += 1);
    }

    /// Becomes another number whenever a sample is taken.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.taken.subscribe()
    }

    /// Mean of a value over the samples of a window. 0 for a role that is scaled to zero: it had endpoints before, or
    /// requests are parked because it has none.
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
        self.over(window, now, |samples, known| {
            let found: Vec<_> = samples.iter().filter_map(|sample| sample.roles.get(of)).collect();
            if found.is_empty() {
                let is_at_zero = known.contains(of) || samples.iter().any(|sample| sample.parked.contains(&of.pool));
                return if is_at_zero { Ok(0.0) } else { Err(Unknown::PoolRole) };
            }
            let values: Vec<f64> = found.into_iter().filter_map(value).collect();
            if values.is_empty() {
                return Err(Unknown::Value);
            }
            Ok(values.iter().sum::<f64>() / values.len() as f64)
        })
    }

    /// The newest sample of a role. `None`: the list has no endpoint of it.
    #[must_use]
    pub fn newest(&self, of: &PoolRole) -> Option<Demand> {
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        samples.taken.back()?.1.roles.get(of).copied()
    }

    /// Whether a pool had anything to do within a window, in any role.
    ///
    /// # Errors
    /// [`Unknown`]
    pub fn was_active(&self, pool: &str, window: Duration, now: Instant) -> Result<bool, Unknown> {
        self.over(window, now, |samples, known| {
            if samples.iter().any(|sample| sample.parked.contains(pool)) {
                return Ok(true);
            }
            if !known.iter().any(|of| of.pool == pool) {
                return Err(Unknown::PoolRole);
            }
            let mut of_pool = samples.iter().flat_map(|sample| &sample.roles).filter(|(of, _)| of.pool == pool);
            Ok(of_pool.any(|(_, demand)| demand.is_active()))
        })
    }

    fn over<T>(
        &self,
        window: Duration,
        now: Instant,
        read: impl FnOnce(&[&Sample], &BTreeSet<PoolRole>) -> Result<T, Unknown>,
    ) -> Result<T, Unknown> {
        let all = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        let samples = &all.taken;
        let age = |(at, _): &(Instant, _)| now.duration_since(*at);
        let is_whole = samples.front().is_some_and(|first| age(first) >= window);
        if !is_whole || samples.back().is_none_or(|last| age(last) > MAX_AGE) {
            return Err(Unknown::Window);
        }
        // The newest at least, however short the window.
        let newest = samples.len().saturating_sub(1);
        let inside = samples.iter().enumerate().filter(|(index, sample)| *index == newest || age(sample) <= window);
        read(&inside.map(|(_, (_, sample))| sample).collect::<Vec<_>>(), &all.known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_secs(10);

    fn of(role: &'static str) -> PoolRole {
        PoolRole { pool: "default".into(), role }
    }

    fn work(seconds: f64) -> Sample {
        let demand = Demand { ready: 1, prefill_work_seconds: Some(seconds), ..Demand::default() };
        Sample { roles: BTreeMap::from([(of("prefill"), demand)]), ..Sample::default() }
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
    fn the_looks_of_a_sample_are_averaged() {
        let mut busy = Busy::default();
        let means = [2.0, 0.0, 1.0, 1.0].map(|count| {
            let demand = Demand { ready: 2, prefill_busy: Some(count), ..Demand::default() };
            let mut sample = Sample { roles: BTreeMap::from([(of("prefill"), demand)]), ..Sample::default() };
            (busy.look(&mut sample), sample.roles[&of("prefill")].prefill_busy)
        });
        assert_eq!(means, [(1, Some(2.0)), (2, Some(1.0)), (3, Some(1.0)), (4, Some(1.0))]);
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
    fn a_role_at_zero_has_no_load_and_is_active_while_requests_are_parked() {
        let (history, now) = history(30, |_| 1.0);
        let push = |from: u64, parked: &[&str]| {
            for second in from..from + 30 {
                let parked = parked.iter().map(|pool| (*pool).to_owned()).collect();
                history.push(now + Duration::from_secs(second), Sample { parked, ..Sample::default() });
            }
            now + Duration::from_secs(from + 29)
        };
        let at = push(1, &[]);
        assert_eq!(history.mean(&of("prefill"), WINDOW, at, read), Ok(0.0));
        assert_eq!(history.was_active("default", WINDOW, at), Ok(false));
        assert_eq!(history.mean(&of("decode"), WINDOW, at, read), Err(Unknown::PoolRole), "it never had an endpoint");
        let at = push(31, &["default"]);
        assert_eq!(history.mean(&of("decode"), WINDOW, at, read), Ok(0.0));
        assert_eq!(history.was_active("default", WINDOW, at), Ok(true));
        assert_eq!(history.was_active("other", WINDOW, at), Err(Unknown::PoolRole));
    }

    #[test]
    fn samples_beyond_the_longest_window_are_forgotten() {
        let (history, now) = history(MAX_WINDOW.as_secs() * 2, |_| 1.0);
        assert_eq!(history.samples.lock().unwrap().taken.len() as u64, MAX_WINDOW.as_secs() + 2);
        assert_eq!(history.mean(&of("prefill"), MAX_WINDOW, now, read), Ok(1.0));
    }
}
