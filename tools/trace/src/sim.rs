//! The simulation: a request comes, is computed, handed over, generated.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use anyhow::{Context as _, Result};
use pd_bench::trace::BLOCK_TOKENS;
use pd_sim::Timing;

use crate::filter::{Brains, Filter};
use crate::load::{Job, Load, Pods, pooled_cache};
use crate::pods::{Decode, Prefill};
use crate::rules::{Policy, Rules};

/// What came of one run, without its warm-up.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Requests.
    pub requests: usize,
    /// Prompt tokens.
    pub tokens: u64,
    /// Of these, tokens found in the cache of the server that computed the prompt.
    pub cached_tokens: u64,
    /// Seconds of work of each prefill server.
    pub busy: Vec<f64>,
    /// Seconds to the first token, sorted.
    pub ttft: Vec<f64>,
    /// Milliseconds per further token of each request, sorted.
    pub tpot_ms: Vec<f64>,
}

impl Outcome {
    /// Percent of prompt tokens found in a cache.
    #[must_use]
    pub fn hit_percent(&self) -> f64 {
        100.0 * self.cached_tokens as f64 / self.tokens.max(1) as f64
    }

    /// Work of the busiest prefill server over the mean; 1 is even.
    #[must_use]
    pub fn busy_over_mean(&self) -> f64 {
        let mean = self.busy.iter().sum::<f64>() / self.busy.len().max(1) as f64;
        self.busy.iter().copied().fold(0.0, f64::max) / mean.max(1e-9)
    }

    /// Seconds to the first token at a share of the requests, 0 to 1.
    #[must_use]
    pub fn ttft(&self, share: f64) -> f64 {
        at_share(&self.ttft, share)
    }

    /// Milliseconds per further token at a share of the requests, 0 to 1.
    #[must_use]
    pub fn tpot_ms(&self, share: f64) -> f64 {
        at_share(&self.tpot_ms, share)
    }

    /// Percent of requests whose first token came within so many seconds.
    #[must_use]
    pub fn slo_percent(&self, seconds: f64) -> f64 {
        100.0 * self.ttft.partition_point(|ttft| *ttft <= seconds) as f64 / self.ttft.len().max(1) as f64
    }

    fn sort(mut self) -> Self {
        self.ttft.sort_by(f64::total_cmp);
        self.tpot_ms.sort_by(f64::total_cmp);
        self
    }
}

fn at_share(sorted: &[f64], share: f64) -> f64 {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied().unwrap_or(0.0)
}

/// One run.
#[derive(Clone, Copy, Debug)]
pub struct Setup<'a> {
    /// Servers.
    pub pods: &'a Pods,
    /// Their service times.
    pub timing: &'a Timing,
    /// For [`Policy::PdCore`].
    pub brains: &'a Brains,
    /// Of everything that is random in a policy.
    pub seed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A prompt is computed.
    Prefilled(usize),
    /// The first token of a request is there.
    Joined(usize),
    /// A decode server may be through with a request.
    Finished { decode: usize, epoch: u64 },
}

/// A request in flight.
#[derive(Clone, Copy, Debug)]
struct Flight {
    at: Duration,
    tokens: u64,
    output: u64,
    measured: bool,
    prefill: usize,
    decode: usize,
    first: Duration,
}

/// Who chooses servers.
enum Gateway<'a> {
    Filter(Box<Filter>),
    Rules(Rules<'a>),
}

/// Output tokens that a gateway expects of a request which does not say: pd-core's figure, for those that count tokens.
const EXPECTED_OUTPUT_TOKENS: u64 = 256;

/// Runs a load under a policy; `progress` is told of every request that was sent.
///
/// # Errors
/// When pd-core does not choose.
pub fn run(load: &Load<'_>, policy: Policy, setup: &Setup<'_>, mut progress: impl FnMut()) -> Result<Outcome> {
    let gateway = match policy {
        Policy::Pooled => return Ok(pooled(load, setup, progress)),
        Policy::PdCore => Gateway::Filter(Box::new(Filter::new(setup.pods, setup.brains, setup.seed)?)),
        policy => Gateway::Rules(Rules::new(policy, setup.pods, setup.timing, setup.seed)),
    };
    let mut world = World {
        setup,
        gateway,
        by_tokens: policy == Policy::Oracle,
        prefill: (0..setup.pods.prefill).map(|_| Prefill::new(setup.pods)).collect(),
        decode: (0..setup.pods.decode).map(|_| Decode::default()).collect(),
        flights: Vec::with_capacity(load.len()),
        events: BinaryHeap::new(),
        outcome: Outcome::default(),
    };
    for (number, job) in load.jobs().enumerate() {
        world.advance(job.at)?;
        world.arrive(number, &job, number >= load.warm_up())?;
        progress();
    }
    world.advance(Duration::MAX)?;
    world.outcome.busy = world.prefill.iter().map(|pod| pod.busy.as_secs_f64()).collect();
    Ok(world.outcome.sort())
}

struct World<'a> {
    setup: &'a Setup<'a>,
    gateway: Gateway<'a>,
    /// Whether decode goes by assigned tokens, in place of requests, where pd-core does not choose.
    by_tokens: bool,
    prefill: Vec<Prefill>,
    decode: Vec<Decode>,
    flights: Vec<Flight>,
    events: BinaryHeap<Reverse<(Duration, Event)>>,
    outcome: Outcome,
}

impl World<'_> {
    fn arrive(&mut self, number: usize, job: &Job, measured: bool) -> Result<()> {
        let at = match &mut self.gateway {
            Gateway::Filter(filter) => filter.arrive(number, job, job.at)?,
            Gateway::Rules(rules) => rules.pick(job, &self.prefill, job.at).context("no server")?,
        };
        let pod = self.prefill.get_mut(at).context("no such server")?;
        let (held, end) = pod.enqueue(self.setup.pods, self.setup.timing, job, measured);
        if measured {
            self.outcome.requests += 1;
            self.outcome.tokens += job.tokens;
            self.outcome.cached_tokens += held.blocks as u64 * BLOCK_TOKENS;
        }
        let (tokens, output) = (job.tokens, job.output);
        let first = Duration::ZERO;
        self.flights.push(Flight { at: job.at, tokens, output, measured, prefill: at, decode: 0, first });
        self.events.push(Reverse((end, Event::Prefilled(number))));
        Ok(())
    }

    /// Everything that happens until then.
    fn advance(&mut self, until: Duration) -> Result<()> {
        while let Some(Reverse((now, event))) = self.events.peek().copied()
            && now <= until
        {
            self.events.pop();
            match event {
                Event::Prefilled(number) => self.prefilled(number, now)?,
                Event::Joined(number) => self.joined(number, now),
                Event::Finished { decode, epoch } => self.finished(decode, epoch, now),
            }
        }
        Ok(())
    }

    fn prefilled(&mut self, number: usize, now: Duration) -> Result<()> {
        let flight = &mut self.flights[number];
        self.prefill[flight.prefill].finish();
        let at = match &mut self.gateway {
            Gateway::Filter(filter) => filter.prefilled(number, now)?,
            Gateway::Rules(_) => {
                let by_tokens = self.by_tokens;
                let load = |pod: &Decode| if by_tokens { pod.tokens } else { pod.assigned as u64 };
                let decode = self.decode.iter().enumerate().min_by_key(|(_, pod)| load(pod));
                decode.context("no decode server")?.0
            }
        };
        flight.decode = at;
        let pod = self.decode.get_mut(at).context("no such decode server")?;
        pod.assigned += 1;
        pod.tokens += flight.tokens + EXPECTED_OUTPUT_TOKENS;
        let first = self.setup.timing.transfer(flight.tokens) + self.setup.timing.token(pod.running() + 1);
        self.events.push(Reverse((now + first, Event::Joined(number))));
        Ok(())
    }

    fn joined(&mut self, number: usize, now: Duration) {
        if let Gateway::Filter(filter) = &mut self.gateway {
            filter.first_token(number, now);
        }
        let flight = &mut self.flights[number];
        flight.first = now;
        if flight.measured {
            self.outcome.ttft.push((now - flight.at).as_secs_f64());
        }
        let (decode, more) = (flight.decode, flight.output - 1);
        self.decode[decode].join(self.setup.timing, number, more, now);
        self.look_again(decode);
    }

    fn finished(&mut self, decode: usize, epoch: u64, now: Duration) {
        let Some(number) = self.decode[decode].finish(self.setup.timing, epoch, now) else { return };
        self.look_again(decode);
        let flight = self.flights[number];
        let pod = &mut self.decode[decode];
        pod.assigned -= 1;
        pod.tokens -= flight.tokens + EXPECTED_OUTPUT_TOKENS;
        if flight.measured && flight.output > 1 {
            let ms = (now - flight.first).as_secs_f64() * 1e3;
            self.outcome.tpot_ms.push(ms / (flight.output - 1) as f64);
        }
        if let Gateway::Filter(filter) = &mut self.gateway {
            filter.done(number, now);
        }
    }

    fn look_again(&mut self, decode: usize) {
        if let Some((at, epoch)) = self.decode[decode].next(self.setup.timing) {
            self.events.push(Reverse((at, Event::Finished { decode, epoch })));
        }
    }
}

/// One queue before all prefill servers, one cache as large as all of theirs. No policy can be better at both.
fn pooled(load: &Load<'_>, setup: &Setup<'_>, mut progress: impl FnMut()) -> Outcome {
    let Setup { pods, timing, .. } = setup;
    let mut cache = pooled_cache(pods);
    let mut free: BinaryHeap<Reverse<(Duration, usize)>> =
        (0..pods.prefill).map(|at| Reverse((Duration::ZERO, at))).collect();
    let mut outcome = Outcome { busy: vec![0.0; pods.prefill], ..Outcome::default() };
    for (number, job) in load.jobs().enumerate() {
        progress();
        let held = cache.held(job.whole());
        cache.enter(job.whole());
        let Some(Reverse((free_at, at))) = free.pop() else { break };
        let time = pods.prefill_time(timing, &job, held);
        let end = free_at.max(job.at) + time;
        free.push(Reverse((end, at)));
        if number >= load.warm_up() {
            let first = end + timing.transfer(job.tokens) + timing.token(1);
            outcome.requests += 1;
            outcome.tokens += job.tokens;
            outcome.cached_tokens += held.blocks as u64 * BLOCK_TOKENS;
            outcome.busy[at] += time.as_secs_f64();
            outcome.ttft.push((first - job.at).as_secs_f64());
        }
    }
    outcome.sort()
}
