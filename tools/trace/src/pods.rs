//! Prefill and decode servers, with the service times of the engine simulator.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use pd_bench::trace::BLOCK_TOKENS;
use pd_sim::Timing;

use crate::cache::{Held, Lru, Tiers};
use crate::load::{Job, Pods};

/// A prefill server: prompts one after another, in the order of their coming.
///
/// What it holds when a prompt's turn comes follows from what came before, so a prompt enters the cache when it joins
/// the queue and its end is known then.
#[derive(Clone, Debug)]
pub struct Prefill {
    /// What it holds.
    pub cache: Tiers,
    /// When it is through with everything it has.
    pub free_at: Duration,
    /// Seconds of work that were measured.
    pub busy: Duration,
    jobs: VecDeque<(u64, u64)>,
    /// Sums over the jobs: under a bad rule there are tens of thousands.
    sums: (u64, u64),
}

impl Prefill {
    /// An idle server.
    #[must_use]
    pub fn new(pods: &Pods) -> Self {
        let (blocks, fast) = pods.blocks();
        Self {
            cache: Tiers::new(blocks, fast),
            free_at: Duration::ZERO,
            busy: Duration::ZERO,
            jobs: VecDeque::new(),
            sums: (0, 0),
        }
    }

    /// Seconds until it is through with what it has.
    #[must_use]
    pub fn work(&self, now: Duration) -> f64 {
        self.free_at.saturating_sub(now).as_secs_f64()
    }

    /// Prompts that it computes or that wait.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.jobs.len()
    }

    /// Tokens of the prompt under way.
    #[must_use]
    pub fn running_tokens(&self) -> u64 {
        self.jobs.front().map_or(0, |(tokens, _)| *tokens)
    }

    /// Tokens of all prompts that it has.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.sums.0
    }

    /// Of these, those that it has to compute.
    #[must_use]
    pub fn uncached_tokens(&self) -> u64 {
        self.sums.1
    }

    /// Takes a prompt in; what it held of it, and when it is through.
    pub fn enqueue(
        &mut self,
        pods: &Pods,
        timing: &Timing,
        job: &Job,
        now: Duration,
        measured: bool,
    ) -> (Held, Duration) {
        let held = self.cache.held(job.whole());
        self.cache.hold(job.whole());
        let time = pods.prefill_time(timing, job, held);
        self.free_at = self.free_at.max(now) + time;
        if measured {
            self.busy += time;
        }
        let cached = held.blocks as u64 * BLOCK_TOKENS;
        self.jobs.push_back((job.tokens, job.tokens - cached));
        self.sums = (self.sums.0 + job.tokens, self.sums.1 + job.tokens - cached);
        (held, self.free_at)
    }

    /// The oldest prompt is computed.
    pub fn finish(&mut self) {
        if let Some((tokens, uncached)) = self.jobs.pop_front() {
            self.sums = (self.sums.0 - tokens, self.sums.1 - uncached);
        }
    }
}

/// A decode server: every request gets a token per step, and a step takes longer the more requests there are.
#[derive(Clone, Debug)]
pub struct Decode {
    /// What it holds: of a prompt it fetches the rest only.
    pub cache: Lru,
    /// Requests that were sent here and are not through.
    pub assigned: usize,
    /// Their tokens: prompts, and answers so far as a gateway expects them.
    pub tokens: u64,
    running: BinaryHeap<Reverse<(u64, usize)>>,
    /// Thousandths of tokens that each running request would have got since the begin.
    given: f64,
    since: Duration,
    batch: u64,
}

/// Scale of [`Decode::given`]: integers order a heap, and a thousandth of a token is nothing.
const PARTS: f64 = 1_000.0;

impl Decode {
    /// An idle server.
    #[must_use]
    pub fn new(pods: &Pods) -> Self {
        Self {
            cache: Lru::new((pods.decode_cache_tokens / BLOCK_TOKENS) as usize),
            assigned: 0,
            tokens: 0,
            running: BinaryHeap::new(),
            given: 0.0,
            since: Duration::ZERO,
            batch: 0,
        }
    }

    /// Requests that get tokens.
    #[must_use]
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// A request has its first token, `more` are to come. Next time to [look](Self::next), if that has changed.
    pub fn join(&mut self, timing: &Timing, job: usize, more: u64, now: Duration) {
        self.advance(timing, now);
        self.running.push(Reverse(((self.given + more as f64 * PARTS) as u64, job)));
        self.batch += 1;
    }

    /// When the next request is through, and the name of this promise: it is void when the name has changed.
    #[must_use]
    pub fn next(&self, timing: &Timing) -> Option<(Duration, u64)> {
        let Reverse((end, _)) = self.running.peek()?;
        let steps = (*end as f64 - self.given).max(0.0) / PARTS;
        Some((self.since + timing.token(self.running.len()).mul_f64(steps), self.batch))
    }

    /// Takes out the next request that is through, if the promise still holds.
    pub fn finish(&mut self, timing: &Timing, batch: u64, now: Duration) -> Option<usize> {
        if batch != self.batch {
            return None;
        }
        self.advance(timing, now);
        let Reverse((end, job)) = self.running.pop()?;
        self.given = self.given.max(end as f64);
        self.batch += 1;
        Some(job)
    }

    fn advance(&mut self, timing: &Timing, now: Duration) {
        let step = timing.token(self.running.len().max(1)).as_secs_f64();
        if step > 0.0 && !self.running.is_empty() {
            self.given += now.saturating_sub(self.since).as_secs_f64() / step * PARTS;
        }
        self.since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timing() -> Timing {
        Timing::new(&pd_sim::Config { speed: 1.0, ..pd_sim::Config::default() })
    }

    fn job(at_ms: u64, tokens: u64, blocks: &[u64]) -> Job {
        Job { at: Duration::from_millis(at_ms), tokens, output: 1, blocks: blocks.to_vec() }
    }

    #[test]
    fn prompts_wait_for_those_before_them_and_find_what_they_left() {
        let pods = Pods { prefill: 1, decode: 1, cache_tokens: 51_200, fast_tokens: 51_200, decode_cache_tokens: 0 };
        let mut pod = Prefill::new(&pods);
        let alone = timing().prefill(1_024, 0);
        let (held, end) = pod.enqueue(&pods, &timing(), &job(0, 1_024, &[1, 2]), Duration::from_millis(0), true);
        assert_eq!((held.blocks, end), (0, alone));
        let (held, end) = pod.enqueue(&pods, &timing(), &job(1, 1_124, &[1, 2, 3]), Duration::from_millis(1), true);
        assert_eq!((held.blocks, end), (2, alone + timing().prefill(1_124, 1_024)));
        assert_eq!((pod.in_flight(), pod.uncached_tokens(), pod.busy), (2, 1_124, end));
        pod.finish();
        assert_eq!((pod.running_tokens(), pod.work(alone)), (1_124, (end - alone).as_secs_f64()));
    }

    #[test]
    fn a_hit_in_the_slow_tier_costs_its_transfer() {
        let pods = Pods { prefill: 1, decode: 1, cache_tokens: 51_200, fast_tokens: 1_024, decode_cache_tokens: 0 };
        let mut pod = Prefill::new(&pods);
        pod.enqueue(&pods, &timing(), &job(0, 1_024, &[1, 2]), Duration::from_millis(0), true);
        let (_, before) = pod.enqueue(&pods, &timing(), &job(0, 1_024, &[3, 4]), Duration::from_millis(0), true);
        let (held, end) = pod.enqueue(&pods, &timing(), &job(0, 1_024, &[1, 2]), Duration::from_millis(0), true);
        assert_eq!(held, Held { blocks: 2, slow: 2 });
        assert_eq!(end - before, timing().prefill(1_024, 1_024) + timing().transfer(1_024));
    }

    #[test]
    fn requests_that_decode_together_slow_each_other_down() {
        let timing = timing();
        let mut pod =
            Decode::new(&Pods { prefill: 1, decode: 1, cache_tokens: 0, fast_tokens: 0, decode_cache_tokens: 0 });
        pod.join(&timing, 1, 10, Duration::ZERO);
        let (alone, first) = pod.next(&timing).unwrap();
        assert_eq!(alone, timing.token(1) * 10);
        pod.join(&timing, 2, 10, timing.token(1) * 5);
        assert_eq!(pod.finish(&timing, first, alone), None, "the batch has changed");
        let (together, second) = pod.next(&timing).unwrap();
        assert_eq!(together, timing.token(1) * 5 + timing.token(2) * 5);
        assert_eq!(pod.finish(&timing, second, together), Some(1));
        let (end, third) = pod.next(&timing).unwrap();
        let expected = together + timing.token(1) * 5;
        assert!(end.abs_diff(expected) < Duration::from_micros(20), "{end:?} {expected:?}");
        assert_eq!(pod.finish(&timing, third, end), Some(2));
        assert!(pod.next(&timing).is_none());
    }
}
