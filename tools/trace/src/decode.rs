//! A decode server, with the service times of the engine simulator.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use pd_bench::trace::BLOCK_TOKENS;
use pd_sim::Timing;

use crate::cache::Lru;
use crate::load::Pods;

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

    #[test]
    fn requests_that_decode_together_slow_each_other_down() {
        let timing = timing();
        let mut pod = Decode::new(&Pods::new(1, 1, 0));
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
