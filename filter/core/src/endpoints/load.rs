//! What this Envoy has in flight at one endpoint: the ledger's entry for it.

use core::time::Duration;
use std::collections::VecDeque;

use crate::codec::{Reader, Writer};
use crate::time::Monotonic;

/// Prefill legs in flight at one endpoint, oldest first, in seconds of the endpoint's time. The model of the endpoint is one
/// leg after the other: only the oldest makes progress.
#[derive(Clone, Debug, Default)]
pub struct PrefillQueue {
    jobs: VecDeque<Job>,
    /// Sum over the legs, kept because it is read far more often than it changes.
    seconds: f64,
    head_since: Monotonic,
}

/// Seconds of an endpoint that computes prompts together; each 0 or more.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Left {
    /// Until the prompts that the endpoint computes now are through.
    pub begun: f64,
    /// Of the prompts that it has not begun.
    pub behind: f64,
}

#[derive(Clone, Copy, Debug)]
struct Job {
    id: u64,
    seconds: f64,
    added: Monotonic,
    expires: Monotonic,
    /// Whether work of other Envoys was ahead of the leg, so that the leg's time does not show the endpoint's speed.
    is_behind: bool,
}

impl PrefillQueue {
    /// Adds a leg of so many seconds. It counts until [`remove`](Self::remove), and at most until `expires`.
    pub fn add(&mut self, id: u64, seconds: f64, now: Monotonic, expires: Monotonic) {
        self.add_behind(0.0, id, seconds, now, expires);
    }

    /// As [`add`](Self::add), behind `ahead` seconds of work that is not in this queue. In an empty queue the leg makes no
    /// progress for these seconds.
    pub fn add_behind(&mut self, ahead: f64, id: u64, seconds: f64, now: Monotonic, expires: Monotonic) {
        if self.jobs.is_empty() {
            self.head_since = now.saturating_add(self::seconds(ahead));
        }
        self.jobs.push_back(Job { id, seconds, added: now, expires, is_behind: ahead > 0.0 });
        self.add_up();
    }

    /// Seconds that the endpoint has spent on a leg. `None` where the leg is not the oldest one, had work of other Envoys
    /// ahead of it, or is not in the queue.
    #[must_use]
    pub fn service_seconds(&self, id: u64, now: Monotonic) -> Option<f64> {
        let head = self.jobs.front().filter(|job| job.id == id && !job.is_behind)?;
        Some(now.saturating_sub(self.head_since).as_secs_f64()).filter(|seconds| head.seconds > 0.0 && *seconds > 0.0)
    }

    /// Removes a leg that ended; `false` where the leg is not in the queue.
    pub fn remove(&mut self, id: u64, now: Monotonic) -> bool {
        let Some(index) = self.jobs.iter().position(|job| job.id == id) else { return false };
        if index == 0 {
            self.head_since = now;
        }
        let is_removed = self.jobs.remove(index).is_some();
        self.add_up();
        is_removed
    }

    /// Notes that the client of a leg is gone: no answer comes, and the endpoint may still compute the leg. The leg counts
    /// until the endpoint would have computed the queue up to it.
    pub fn abandon(&mut self, id: u64, now: Monotonic) {
        let mut left = -self.progress(now);
        for job in &mut self.jobs {
            left += job.seconds;
            if job.id == id {
                job.expires = job.expires.min(now.saturating_add(seconds(left)));
                return;
            }
        }
    }

    /// Drops legs that have expired. If the oldest leg is among them, the progress of the next one starts at `now`.
    pub fn prune(&mut self, now: Monotonic) {
        let head = self.jobs.front().map(|job| job.id);
        self.jobs.retain(|job| job.expires > now);
        if self.jobs.front().map(|job| job.id) != head {
            self.head_since = now;
        }
        self.add_up();
    }

    /// W: seconds of work in flight, minus the progress of the oldest leg. 0 or more.
    #[must_use]
    pub fn work(&self, now: Monotonic) -> f64 {
        self.seconds - self.progress(now)
    }

    /// What is left to do at an endpoint that computes together the prompts that it finds when it begins. Of such prompts
    /// only one counts with the `fixed` seconds of a prompt.
    ///
    /// An endpoint begins when a leg comes while it has none, or when a leg ends. If its prompts take longer than expected,
    /// they are expected to need as long again as they are late.
    #[must_use]
    pub fn left(&self, fixed: f64, now: Monotonic) -> Left {
        let has_begun = |job: &&Job| job.added <= self.head_since;
        let together =
            |seconds: f64, job: &Job| seconds + if seconds > 0.0 { job.seconds - fixed } else { job.seconds };
        let begun = self.jobs.iter().filter(has_begun).fold(0.0, together);
        let behind = self.jobs.iter().filter(|job| !has_begun(job)).fold(0.0, together);
        let since = if begun > 0.0 { now.saturating_sub(self.head_since).as_secs_f64() } else { 0.0 };
        Left { begun: (begun - since).abs(), behind: behind.max(0.0) }
    }

    /// Legs in flight.
    #[must_use]
    pub fn len(&self) -> usize {
        self.jobs.len()
    }

    /// Whether no leg is in flight.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    fn add_up(&mut self) {
        self.seconds = self.jobs.iter().map(|job| job.seconds).sum();
    }

    fn progress(&self, now: Monotonic) -> f64 {
        let Some(head) = self.jobs.front() else { return 0.0 };
        now.saturating_sub(self.head_since).as_secs_f64().min(head.seconds)
    }
}

/// Requests in flight at an endpoint or in a pool, and their KV tokens. Sums stop at the largest number and at 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// KV tokens: prompts and expected output of the requests in flight.
    pub tokens: u64,
    /// Requests in flight.
    pub requests: u32,
}

impl Load {
    /// Adds a request of `tokens` KV tokens. Both sums stay at their largest value instead of wrapping.
    pub fn add(&mut self, tokens: u64) {
        self.tokens = self.tokens.saturating_add(tokens);
        self.requests = self.requests.saturating_add(1);
    }

    /// Removes a request that was [added](Self::add) with the same `tokens`.
    pub fn remove(&mut self, tokens: u64) {
        self.subtract(&Self { tokens, requests: 1 });
    }

    /// Adds the load of another worker.
    pub(crate) fn merge(&mut self, other: &Self) {
        self.tokens = self.tokens.saturating_add(other.tokens);
        self.requests = self.requests.saturating_add(other.requests);
    }

    /// Removes the load of another worker.
    pub(crate) fn subtract(&mut self, other: &Self) {
        self.tokens = self.tokens.saturating_sub(other.tokens);
        self.requests = self.requests.saturating_sub(other.requests);
    }

    pub(crate) fn write(&self, out: &mut Writer) {
        out.word(self.tokens);
        out.word(u64::from(self.requests));
    }

    pub(crate) fn read(rest: &mut Reader<'_>) -> Option<Self> {
        Some(Self { tokens: rest.word()?, requests: u32::try_from(rest.word()?).ok()? })
    }
}

fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value.max(0.0)).unwrap_or(Duration::MAX)
}

/// The ledger's entry of an endpoint.
#[derive(Debug)]
pub(crate) struct LedgerEntry<'a> {
    /// Prefill legs in flight there.
    pub(crate) prefill: &'a mut PrefillQueue,
    /// Decode legs in flight there.
    pub(crate) decode: &'a mut Load,
    /// Seconds of prefill work that other Envoys have in flight there.
    pub(crate) elsewhere_seconds: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAR: Monotonic = Monotonic::from_secs(60);

    fn ms(ms: u64) -> Monotonic {
        Monotonic::from_millis(ms)
    }

    #[test]
    fn work_is_what_is_in_flight_minus_the_heads_progress() {
        let mut queue = PrefillQueue::default();
        queue.add(1, 2.0, ms(0), FAR);
        queue.add(2, 3.0, ms(500), FAR);
        assert_eq!(queue.work(ms(1_000)), 4.0);
        assert_eq!(queue.work(ms(9_000)), 3.0, "an overdue head makes no more progress than its length");
        assert!(queue.remove(1, ms(9_000)));
        assert_eq!(queue.work(ms(10_000)), 2.0);
        assert!(!queue.remove(1, ms(10_000)));
        assert!(queue.remove(2, ms(10_000)));
        assert_eq!(queue.work(ms(10_000)), 0.0);
    }

    #[test]
    fn legs_that_came_before_the_last_one_ended_are_computed_together() {
        let left = |queue: &PrefillQueue, at: u64| {
            let Left { begun, behind } = queue.left(0.1, ms(at));
            ((begun * 1e3).round(), (behind * 1e3).round())
        };
        let mut queue = PrefillQueue::default();
        assert_eq!(left(&queue, 0), (0.0, 0.0));
        queue.add(1, 0.5, ms(0), FAR);
        assert_eq!(left(&queue, 200), (300.0, 0.0));
        queue.add(2, 0.3, ms(200), FAR);
        queue.add(3, 0.4, ms(250), FAR);
        assert_eq!(left(&queue, 300), (200.0, 600.0), "the fixed seconds count once");
        assert_eq!(left(&queue, 600), (100.0, 600.0), "100 ms late");
        queue.remove(1, ms(600));
        assert_eq!(left(&queue, 600), (600.0, 0.0));
        assert_eq!(left(&queue, 800), (400.0, 0.0));
        queue.add(4, 0.2, ms(800), FAR);
        assert_eq!(left(&queue, 1_000), (200.0, 200.0));
    }

    #[test]
    fn an_abandoned_leg_counts_until_the_endpoint_must_be_through_with_it() {
        let mut queue = PrefillQueue::default();
        queue.add(1, 1.0, ms(0), FAR);
        queue.add(2, 1.0, ms(0), FAR);
        queue.abandon(2, ms(500));
        queue.prune(ms(1_900));
        assert_eq!(queue.len(), 2);
        queue.prune(ms(2_000));
        assert_eq!(queue.len(), 1);
        queue.prune(FAR);
        assert!(queue.is_empty());
    }

    #[test]
    fn decode_load_returns_to_zero() {
        let mut load = Load::default();
        load.add(10);
        load.add(u64::MAX);
        load.remove(u64::MAX);
        load.remove(10);
        assert_eq!(load, Load::default());
    }
}
