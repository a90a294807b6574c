//! The bounds: one queue before all prefill servers or none, and one cache as large as all of theirs.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::time::Duration;

use pd_bench::trace::BLOCK_TOKENS;
use pd_sim::Timing;

use crate::cache::{Held, Tiers};
use crate::load::{Job, Load, Pods, pooled_cache};
use crate::outcome::Outcome;

/// Order in which the requests of the one queue are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// None: each is begun when it comes.
    AtOnce,
    /// As they came.
    Arrival,
    /// The shortest first, by the seconds that it took when it came.
    Shortest,
}

struct Bound<'a> {
    pods: &'a Pods,
    timing: &'a Timing,
    cache: Tiers,
    outcome: Outcome,
}

impl Bound<'_> {
    /// Computes a prompt: when it is through. The decode servers, too, have one cache: only new blocks are moved.
    fn serve(&mut self, job: &Job, server: usize, begin: Duration, measured: bool) -> Duration {
        let held = self.cache.held(job.whole());
        self.cache.hold(job.whole());
        let time = self.pods.prefill_time(self.timing, job, held);
        let (end, cached) = (begin + time, held.blocks as u64 * BLOCK_TOKENS);
        if measured {
            let first = end + self.timing.transfer(job.tokens - cached) + self.timing.token(1);
            self.outcome.requests += 1;
            self.outcome.tokens += job.tokens;
            self.outcome.cached_tokens += cached;
            self.outcome.busy[server] += time.as_secs_f64();
            self.outcome.ttft.push((first - job.at).as_secs_f64());
        }
        end
    }
}

/// Runs a load through one queue before all prefill servers, or none, and one cache as large as all of theirs.
pub(crate) fn pooled(
    load: &Load<'_>,
    order: Order,
    pods: &Pods,
    timing: &Timing,
    mut progress: impl FnMut(),
) -> Outcome {
    let outcome = Outcome { busy: vec![0.0; pods.prefill], ..Outcome::default() };
    let mut bound = Bound { pods, timing, cache: pooled_cache(pods), outcome };
    let mut free: BinaryHeap<Reverse<(Duration, usize)>> =
        (0..pods.prefill).map(|server| Reverse((Duration::ZERO, server))).collect();
    let mut waiting: BTreeSet<(Duration, usize)> = BTreeSet::new();
    let mut coming = (0..load.len()).peekable();
    while let Some(Reverse((free_at, server))) = free.pop() {
        let mut now = free_at;
        if waiting.is_empty() {
            let Some(next) = coming.peek() else { break };
            now = now.max(load.at(*next));
        }
        while let Some(number) = coming.next_if(|number| load.at(*number) <= now || order == Order::AtOnce) {
            progress();
            let job = load.job(number);
            let rank = match order {
                Order::Shortest => {
                    let blocks = bound.cache.leading(job.whole());
                    pods.prefill_time(timing, &job, Held { blocks, slow: 0 })
                }
                Order::AtOnce | Order::Arrival => job.at,
            };
            if order == Order::AtOnce {
                bound.serve(&job, server, job.at, number >= load.warm_up());
            } else {
                waiting.insert((rank, number));
            }
        }
        if let Some((_, number)) = waiting.pop_first() {
            let end = bound.serve(&load.job(number), server, now, number >= load.warm_up());
            free.push(Reverse((end, server)));
        }
    }
    bound.outcome.sorted()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::Shape;

    #[test]
    fn a_bound_that_waits_less_answers_sooner() {
        let timing = Timing::new(&pd_sim::Config { speed: 1.0, ..pd_sim::Config::default() });
        let pods = Pods { fast_tokens: 400_000, ..Pods::new(4, 4, 1_000_000) };
        for shape in [Shape::Agents, Shape::Unique] {
            let entries = shape.entries(1);
            let load = Load::new(&entries, &pods, &timing, 0.9, 1);
            let [at_once, shortest, arrival] = [Order::AtOnce, Order::Shortest, Order::Arrival].map(|order| {
                let mut sent = 0;
                let outcome = pooled(&load, order, &pods, &timing, || sent += 1);
                assert_eq!((sent, outcome.requests), (load.len(), load.len() - load.warm_up()));
                outcome.mean_ttft()
            });
            assert!(at_once < 0.95 * shortest && shortest < 0.95 * arrival, "{at_once} {shortest} {arrival}");
        }
    }
}
