//! The bounds: one queue before all prefill servers or none, and one cache as large as all of theirs.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use pd_bench::trace::BLOCK_TOKENS;
use pd_sim::Timing;

use crate::load::{Load, Pods, pooled_cache};
use crate::outcome::Outcome;

/// Runs a load through one queue before all prefill servers, or none, and one cache as large as all of theirs.
pub(crate) fn pooled(
    load: &Load<'_>,
    is_at_once: bool,
    pods: &Pods,
    timing: &Timing,
    mut progress: impl FnMut(),
) -> Outcome {
    let mut cache = pooled_cache(pods);
    let mut free: BinaryHeap<Reverse<(Duration, usize)>> =
        (0..pods.prefill).map(|server| Reverse((Duration::ZERO, server))).collect();
    let mut outcome = Outcome { busy: vec![0.0; pods.prefill], ..Outcome::default() };
    for (number, job) in load.jobs().enumerate() {
        progress();
        let held = cache.held(job.whole());
        cache.hold(job.whole());
        let Some(Reverse((free_at, server))) = free.pop() else { break };
        let time = pods.prefill_time(timing, &job, held);
        let end = if is_at_once { job.at } else { free_at.max(job.at) } + time;
        free.push(Reverse((end, server)));
        if number >= load.warm_up() {
            let first = end + timing.transfer(job.tokens) + timing.token(1);
            outcome.requests += 1;
            outcome.tokens += job.tokens;
            outcome.cached_tokens += held.blocks as u64 * BLOCK_TOKENS;
            outcome.busy[server] += time.as_secs_f64();
            outcome.ttft.push((first - job.at).as_secs_f64());
        }
    }
    outcome.sorted()
}
