//! A prefill server, with the service times of the engine simulator.

use std::collections::VecDeque;
use std::time::Duration;

use pd_bench::trace::BLOCK_TOKENS;
use pd_sim::Timing;

use crate::cache::{Held, Tiers};
use crate::load::{Job, Pods};

/// A prefill server: it computes prompts in steps, in the order of their coming.
///
/// A step takes tokens of one prompt after another until it has [`Pods::batch_tokens`], as vLLM's scheduler does. What is
/// left of a prompt comes first in the next step. A step in which a prompt begins takes the fixed time of a prompt, whatever
/// the number of those that begin in it; so a prompt alone takes as long as the formula says. A prompt is through at the
/// end of the step that has its last token.
///
/// A prompt enters the cache when it joins the queue: what comes behind it finds it there.
#[derive(Clone, Debug)]
pub struct Prefill {
    /// What it holds.
    pub cache: Tiers,
    /// Time of the steps with measured prompts.
    pub busy: Duration,
    /// Prompts that are not through, the oldest first.
    prompts: VecDeque<Prompt>,
    /// End of the step under way.
    step: Option<Duration>,
    /// Sums over the prompts: under a bad rule there are tens of thousands.
    sums: Sums,
}

#[derive(Clone, Copy, Debug)]
struct Prompt {
    number: usize,
    tokens: u64,
    cached: u64,
    /// Tokens that are computed at the end of the step under way, the cached ones included.
    done: u64,
    /// Whether it was in a step.
    has_begun: bool,
    /// To fetch what is in the slow tier.
    fetch: Duration,
    measured: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    tokens: u64,
    uncached: u64,
    /// Of what no step has taken: seconds without the fixed ones, tokens, and prompts that have not begun.
    waiting_seconds: f64,
    waiting_tokens: u64,
    waiting: usize,
    /// Fixed seconds of a step.
    fixed: f64,
}

impl Prompt {
    /// Seconds of the tokens between, without the fixed ones.
    fn seconds(&self, timing: &Timing, from: u64, to: u64) -> f64 {
        (timing.prefill(to, from).saturating_sub(timing.prefill(0, 0))).as_secs_f64()
    }
}

impl Prefill {
    /// An idle server.
    #[must_use]
    pub fn new(pods: &Pods) -> Self {
        let (blocks, fast) = pods.blocks();
        Self {
            cache: Tiers::new(blocks, fast),
            busy: Duration::ZERO,
            prompts: VecDeque::new(),
            step: None,
            sums: Sums::default(),
        }
    }

    /// Seconds until the step under way is over; 0 without one.
    #[must_use]
    pub fn step_left(&self, now: Duration) -> f64 {
        self.step.map_or(0.0, |end| end.saturating_sub(now).as_secs_f64())
    }

    /// Seconds of the steps that follow the one under way, by what it has now.
    #[must_use]
    pub fn behind_step(&self, pods: &Pods) -> f64 {
        let Sums { waiting_seconds, waiting_tokens, waiting, fixed, .. } = self.sums;
        let steps = match pods.batch_tokens {
            0 => waiting,
            batch => waiting.min(waiting_tokens.div_ceil(batch) as usize),
        };
        waiting_seconds + fixed * steps as f64
    }

    /// Seconds until it is through with what it has.
    #[must_use]
    pub fn work(&self, pods: &Pods, now: Duration) -> f64 {
        self.step_left(now) + self.behind_step(pods)
    }

    /// Whether it has nothing to compute.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.prompts.is_empty()
    }

    /// Prompts that it computes or that wait.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.prompts.len()
    }

    /// Tokens of the oldest prompt.
    #[must_use]
    pub fn running_tokens(&self) -> u64 {
        self.prompts.front().map_or(0, |prompt| prompt.tokens)
    }

    /// Tokens of all prompts that it has.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.sums.tokens
    }

    /// Of these, those that it has to compute.
    #[must_use]
    pub fn uncached_tokens(&self) -> u64 {
        self.sums.uncached
    }

    /// Takes a prompt in; what it held of it. The caller then lets a [step begin](Self::begin).
    pub fn enqueue(&mut self, timing: &Timing, number: usize, job: &Job, measured: bool) -> Held {
        let held = self.cache.held(job.whole());
        self.cache.hold(job.whole());
        let cached = held.blocks as u64 * BLOCK_TOKENS;
        let fetch = Pods::fetch_time(timing, held);
        let prompt = Prompt { number, tokens: job.tokens, cached, done: cached, has_begun: false, fetch, measured };
        let sums = &mut self.sums;
        sums.fixed = timing.prefill(0, 0).as_secs_f64();
        sums.tokens += job.tokens;
        sums.uncached += job.tokens - cached;
        sums.waiting += 1;
        sums.waiting_tokens += job.tokens - cached;
        sums.waiting_seconds += fetch.as_secs_f64() + prompt.seconds(timing, cached, job.tokens);
        self.prompts.push_back(prompt);
        held
    }

    /// Begins a step if none is under way and there is a prompt; when the step is over.
    pub fn begin(&mut self, pods: &Pods, timing: &Timing, now: Duration) -> Option<Duration> {
        if self.step.is_some() || self.prompts.is_empty() {
            return None;
        }
        let mut room = if pods.batch_tokens == 0 { u64::MAX } else { pods.batch_tokens };
        let (mut seconds, mut begins, mut measured) = (0.0, false, false);
        for prompt in &mut self.prompts {
            // An engine computes one token at least of a prompt that is cached as a whole.
            let tokens = (prompt.tokens - prompt.done).min(room);
            if room == 0 {
                break;
            }
            let mut of_prompt = prompt.seconds(timing, prompt.done, prompt.done + tokens);
            if !prompt.has_begun {
                of_prompt += prompt.fetch.as_secs_f64();
                self.sums.waiting -= 1;
                begins = true;
            }
            seconds += of_prompt;
            self.sums.waiting_seconds = (self.sums.waiting_seconds - of_prompt).max(0.0);
            self.sums.waiting_tokens -= tokens;
            prompt.has_begun = true;
            prompt.done += tokens;
            measured |= prompt.measured;
            room -= tokens.max(1);
            if pods.batch_tokens == 0 {
                break;
            }
        }
        let time = Duration::from_secs_f64(seconds + if begins { self.sums.fixed } else { 0.0 });
        if measured {
            self.busy += time;
        }
        self.step = Some(now + time);
        self.step
    }

    /// The step is over: numbers of the prompts that are computed.
    pub fn end(&mut self) -> Vec<usize> {
        self.step = None;
        let mut computed = Vec::new();
        while let Some(prompt) = self.prompts.front().filter(|prompt| prompt.has_begun && prompt.done == prompt.tokens)
        {
            self.sums.tokens -= prompt.tokens;
            self.sums.uncached -= prompt.tokens - prompt.cached;
            computed.push(prompt.number);
            self.prompts.pop_front();
        }
        computed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PODS: Pods = Pods::new(1, 1, 51_200);

    fn timing() -> Timing {
        Timing::new(&pd_sim::Config { speed: 1.0, ..pd_sim::Config::default() })
    }

    fn job(tokens: u64, blocks: &[u64]) -> Job {
        Job { at: Duration::ZERO, tokens, output: 1, blocks: blocks.to_vec() }
    }

    /// Milliseconds of each step until the server is idle, and what was computed then.
    fn steps(pod: &mut Prefill, pods: &Pods) -> Vec<(f64, Vec<usize>)> {
        let mut now = Duration::ZERO;
        let mut steps = Vec::new();
        while let Some(end) = pod.begin(pods, &timing(), now) {
            let ms = (end - now).as_secs_f64() * 1e3;
            now = end;
            steps.push(((ms * 1e3).round() / 1e3, pod.end()));
        }
        assert!(pod.is_idle() && pod.work(pods, now) < 1e-9 && pod.uncached_tokens() == 0);
        steps
    }

    fn ms(tokens: u64, cached: u64) -> f64 {
        timing().prefill(tokens, cached).as_secs_f64() * 1e3
    }

    #[test]
    fn short_prompts_share_a_step_and_its_fixed_time() {
        let mut pod = Prefill::new(&PODS);
        for number in 0..3 {
            pod.enqueue(&timing(), number, &job(1_000, &[]), true);
        }
        assert!((pod.work(&PODS, Duration::ZERO) * 1e3 - (3.0 * ms(1_000, 0) - 30.0)).abs() < 1e-3);
        let together = steps(&mut pod, &PODS);
        assert_eq!(together.len(), 1);
        assert!((together[0].0 - (3.0 * ms(1_000, 0) - 30.0)).abs() < 0.01, "{together:?}");
        assert_eq!(together[0].1, [0, 1, 2]);
    }

    #[test]
    fn without_batches_prompts_are_computed_one_after_another() {
        let pods = Pods { batch_tokens: 0, ..PODS };
        let mut pod = Prefill::new(&pods);
        for number in 0..2 {
            pod.enqueue(&timing(), number, &job(1_000, &[]), true);
        }
        assert_eq!((pod.in_flight(), pod.uncached_tokens()), (2, 2_000));
        let after = steps(&mut pod, &pods);
        assert_eq!(after.iter().map(|(_, computed)| computed.clone()).collect::<Vec<_>>(), [[0], [1]]);
        assert!((after[1].0 - ms(1_000, 0)).abs() < 0.01, "{after:?}");
    }

    #[test]
    fn a_long_prompt_takes_as_long_as_the_formula_says_and_shares_its_last_step() {
        let mut pod = Prefill::new(&PODS);
        pod.enqueue(&timing(), 0, &job(10_000, &[]), true);
        pod.enqueue(&timing(), 1, &job(7_000, &[]), true);
        let both = steps(&mut pod, &PODS);
        // 8,192 tokens; 1,808 and 6,384; 616.
        assert_eq!(both.iter().map(|(_, computed)| computed.as_slice()).collect::<Vec<_>>(), [&[][..], &[0], &[1]]);
        let sum: f64 = both.iter().map(|(ms, _)| ms).sum();
        assert!((sum - ms(10_000, 0) - ms(7_000, 0)).abs() < 0.01, "{both:?}");
        let mut alone = Prefill::new(&PODS);
        alone.enqueue(&timing(), 0, &job(20_000, &[]), true);
        let sum: f64 = steps(&mut alone, &PODS).iter().map(|(ms, _)| ms).sum();
        assert!((sum - ms(20_000, 0)).abs() < 0.01);
    }

    #[test]
    fn prompts_find_what_those_before_them_left_and_fetch_what_is_in_the_slow_tier() {
        let pods = Pods { fast_tokens: 1_024, ..PODS };
        let mut pod = Prefill::new(&pods);
        let held = pod.enqueue(&timing(), 0, &job(1_024, &[1, 2]), true);
        assert_eq!(held.blocks, 0);
        let held = pod.enqueue(&timing(), 1, &job(1_124, &[1, 2, 3]), true);
        assert_eq!((held.blocks, pod.uncached_tokens()), (2, 1_124));
        pod.enqueue(&timing(), 2, &job(1_024, &[3, 4]), true);
        steps(&mut pod, &pods);
        let held = pod.enqueue(&timing(), 3, &job(1_024, &[1, 2]), true);
        assert_eq!(held, Held { blocks: 2, slow: 2 });
        let fetched = steps(&mut pod, &pods);
        let expected = ms(1_024, 1_024) + timing().transfer(1_024).as_secs_f64() * 1e3;
        assert!((fetched[0].0 - expected).abs() < 0.01, "{fetched:?}");
    }
}
