//! Split or whole: the decider of pd-core on servers of which those for decode compute prompts as well.
//!
//! A decode server computes one prompt at a time, in chunks. A step makes a token for each stream, and computes a chunk if
//! there is a prompt: it then takes the time of both. So streams stand still for as long as the prompt's tokens take, and
//! the prompt waits for a step of the streams with each chunk.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use anyhow::{Context as _, Result};
use pd_bench::trace::BLOCK_TOKENS;
use pd_sim::Timing;

use crate::cache::Lru;
use crate::filter::{Brains, Filter, Sent};
use crate::load::{Job, Load, Pods};
use crate::outcome::Outcome;
use crate::prefill::Prefill;

/// A decode server that computes prompts too.
#[derive(Clone, Debug)]
struct Mixed {
    cache: Lru,
    /// Prompts, the oldest is computed.
    prompts: VecDeque<Prompt>,
    /// End of each stream by [`given`](Self::given), in thousandths of tokens, and its request.
    streams: BinaryHeap<Reverse<(u64, usize)>>,
    /// Tokens that a stream since the begin would have got.
    given: f64,
    since: f64,
    /// Number of the next promise; others are void.
    promise: u64,
}

#[derive(Clone, Copy, Debug)]
struct Prompt {
    number: usize,
    /// Seconds that are no computation.
    fixed: f64,
    /// Seconds of computation.
    computed: f64,
    /// Seconds of a chunk.
    chunk: f64,
}

/// What a promise was for.
enum Due {
    Prompt(usize),
    Stream(usize),
}

/// Scale of the ends in the heap.
const PARTS: f64 = 1_000.0;
/// Seconds that are nothing.
const NOTHING: f64 = 1e-9;

impl Mixed {
    fn new(pods: &Pods) -> Self {
        Self {
            cache: Lru::new((pods.decode_cache_tokens / BLOCK_TOKENS) as usize),
            prompts: VecDeque::new(),
            streams: BinaryHeap::new(),
            given: 0.0,
            since: 0.0,
            promise: 0,
        }
    }

    /// A prompt comes.
    fn prompt(&mut self, number: usize, pods: &Pods, timing: &Timing, job: &Job, now: f64) {
        self.advance(timing, now);
        let cached = self.cache.matched(job.whole()) as u64 * BLOCK_TOKENS;
        self.cache.hold(job.whole());
        let fixed = timing.prefill(0, 0).as_secs_f64();
        let computed = timing.prefill(job.tokens, cached).as_secs_f64() - fixed;
        let chunks = ((job.tokens - cached) as f64 / pods.batch_tokens.max(1) as f64).max(1.0);
        self.prompts.push_back(Prompt { number, fixed, computed, chunk: computed / chunks });
        self.promise += 1;
    }

    /// A stream begins, of which so many tokens are to come.
    fn stream(&mut self, number: usize, timing: &Timing, more: u64, now: f64) {
        self.advance(timing, now);
        self.streams.push(Reverse((((self.given + more as f64) * PARTS) as u64, number)));
        self.promise += 1;
    }

    /// Seconds of a step's streams; 0 without any.
    fn step(&self, timing: &Timing) -> f64 {
        if self.streams.is_empty() { 0.0 } else { timing.token(self.streams.len()).as_secs_f64() }
    }

    /// Seconds of one token of each stream, and seconds in which the prompt gets one second of computation.
    fn rates(&self, timing: &Timing) -> (f64, f64) {
        let step = self.step(timing);
        match self.prompts.front() {
            Some(prompt) if prompt.fixed <= NOTHING => {
                let chunk = prompt.chunk.max(NOTHING);
                (step + chunk, (step + chunk) / chunk)
            }
            _ => (step, 1.0),
        }
    }

    fn advance(&mut self, timing: &Timing, now: f64) {
        let (token, slow) = self.rates(timing);
        let time = (now - self.since).max(0.0);
        if !self.streams.is_empty() {
            self.given += time / token.max(NOTHING);
        }
        if let Some(prompt) = self.prompts.front_mut() {
            if prompt.fixed > NOTHING {
                prompt.fixed = (prompt.fixed - time).max(0.0);
            } else {
                prompt.computed = (prompt.computed - time / slow).max(0.0);
            }
        }
        self.since = now;
    }

    /// When something happens next, and the promise's number.
    fn next(&self, timing: &Timing) -> Option<(f64, u64)> {
        let (token, slow) = self.rates(timing);
        let prompt = self.prompts.front().map(|of| if of.fixed > NOTHING { of.fixed } else { of.computed * slow });
        let stream = self.streams.peek().map(|Reverse((end, _))| (*end as f64 / PARTS - self.given).max(0.0) * token);
        let first = prompt.into_iter().chain(stream).reduce(f64::min)?;
        Some((self.since + first, self.promise))
    }

    /// Keeps a promise: what is through.
    fn keep(&mut self, timing: &Timing, promise: u64, now: f64) -> Option<Due> {
        if promise != self.promise {
            return None;
        }
        self.advance(timing, now);
        self.promise += 1;
        if self.prompts.front().is_some_and(|prompt| prompt.fixed <= NOTHING && prompt.computed <= NOTHING) {
            return self.prompts.pop_front().map(|prompt| Due::Prompt(prompt.number));
        }
        let is_over = |end: u64| end as f64 / PARTS <= self.given + 1e-3;
        self.streams.peek().filter(|Reverse((end, _))| is_over(*end))?;
        self.streams.pop().map(|Reverse((_, number))| Due::Stream(number))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// The step of a prefill server is over.
    Stepped(usize),
    /// The KV cache is there.
    Moved(usize),
    /// Something is through at a decode server.
    Due { decode: usize, promise: u64 },
    /// A request comes.
    Arrives(usize),
    /// A prefill server may begin a step. Last, so that what comes at the same time is in the step.
    Begins(usize),
}

#[derive(Clone, Copy, Debug, Default)]
struct Flight {
    decode: usize,
    first: Duration,
}

/// What came of a run.
#[derive(Clone, Debug, Default)]
pub struct SplitOutcome {
    /// Times.
    pub outcome: Outcome,
    /// Requests that a decode server served whole.
    pub whole: usize,
}

impl SplitOutcome {
    /// Milliseconds per token, mean over requests.
    #[must_use]
    pub fn mean_tpot_ms(&self) -> f64 {
        let tpot = &self.outcome.tpot_ms;
        tpot.iter().sum::<f64>() / tpot.len().max(1) as f64
    }

    /// Percent of requests that were served whole.
    #[must_use]
    pub fn whole_percent(&self) -> f64 {
        100.0 * self.whole as f64 / self.outcome.requests.max(1) as f64
    }
}

/// Runs a load under pd-core with this configuration; its `split.mode` is the policy.
///
/// # Errors
/// When pd-core does not choose.
pub fn run(load: &Load<'_>, pods: &Pods, timing: &Timing, brains: &Brains, seed: u64) -> Result<SplitOutcome> {
    let events = (0..load.len()).map(|number| Reverse((load.at(number), Event::Arrives(number)))).collect();
    let mut world = World {
        pods,
        timing,
        load,
        filter: Filter::new(pods, brains, seed)?,
        prefill: (0..pods.prefill).map(|_| Prefill::new(pods)).collect(),
        decode: (0..pods.decode).map(|_| Mixed::new(pods)).collect(),
        flights: vec![Flight::default(); load.len()],
        events,
        result: SplitOutcome::default(),
    };
    while let Some(Reverse((now, event))) = world.events.pop() {
        world.happens(event, now)?;
    }
    let SplitOutcome { outcome, whole } = world.result;
    Ok(SplitOutcome { outcome: outcome.sorted(), whole })
}

struct World<'a> {
    pods: &'a Pods,
    timing: &'a Timing,
    load: &'a Load<'a>,
    filter: Filter,
    prefill: Vec<Prefill>,
    decode: Vec<Mixed>,
    flights: Vec<Flight>,
    events: BinaryHeap<Reverse<(Duration, Event)>>,
    result: SplitOutcome,
}

impl World<'_> {
    fn happens(&mut self, event: Event, now: Duration) -> Result<()> {
        match event {
            Event::Arrives(number) => self.arrives(number, now),
            Event::Stepped(server) => {
                self.events.push(Reverse((now, Event::Begins(server))));
                self.prefill[server].end().into_iter().try_for_each(|number| self.prefilled(number, now))
            }
            Event::Begins(server) => {
                if let Some(end) = self.prefill[server].begin(self.pods, self.timing, now) {
                    self.events.push(Reverse((end, Event::Stepped(server))));
                }
                Ok(())
            }
            Event::Moved(number) => {
                self.first_token(number, now);
                Ok(())
            }
            Event::Due { decode, promise } => {
                match self.decode[decode].keep(self.timing, promise, now.as_secs_f64()) {
                    Some(Due::Prompt(number)) => self.first_token(number, now),
                    Some(Due::Stream(number)) => self.finished(number, now),
                    // Only the fixed time of a prompt is over, or the promise is void.
                    None => {}
                }
                if promise + 1 == self.decode[decode].promise {
                    self.look_again(decode);
                }
                Ok(())
            }
        }
    }

    fn arrives(&mut self, number: usize, now: Duration) -> Result<()> {
        let job = Job { at: now, ..self.load.job(number) };
        let measured = number >= self.load.warm_up();
        self.result.outcome.requests += usize::from(measured);
        match self.filter.arrive_anywhere(number, &job, now)? {
            Sent::Prefill(prefill) => {
                let pod = self.prefill.get_mut(prefill).context("no such server")?;
                pod.enqueue(self.timing, number, &job, measured);
                self.events.push(Reverse((now, Event::Begins(prefill))));
            }
            Sent::Whole(decode) => {
                self.result.whole += usize::from(measured);
                self.flights[number].decode = decode;
                let pod = self.decode.get_mut(decode).context("no such server")?;
                pod.prompt(number, self.pods, self.timing, &job, now.as_secs_f64());
                self.look_again(decode);
            }
        }
        Ok(())
    }

    fn prefilled(&mut self, number: usize, now: Duration) -> Result<()> {
        let job = self.load.job(number);
        let decode = self.filter.prefilled(number, now)?;
        self.flights[number].decode = decode;
        let pod = self.decode.get_mut(decode).context("no such decode server")?;
        let moved = job.tokens - pod.cache.matched(job.whole()) as u64 * BLOCK_TOKENS;
        pod.cache.hold(job.whole());
        // The first token comes with the next step, which has a chunk of a prompt in it if there is one.
        let (token, _) = pod.rates(self.timing);
        let step = token.max(self.timing.token(pod.streams.len() + 1).as_secs_f64());
        let first = self.timing.transfer(moved) + Duration::from_secs_f64(step);
        self.events.push(Reverse((now + first, Event::Moved(number))));
        Ok(())
    }

    fn first_token(&mut self, number: usize, now: Duration) {
        self.filter.first_token(number, now);
        let flight = &mut self.flights[number];
        flight.first = now;
        let (decode, job) = (flight.decode, self.load.job(number));
        if number >= self.load.warm_up() {
            self.result.outcome.ttft.push((now - self.load.at(number)).as_secs_f64());
        }
        self.decode[decode].stream(number, self.timing, job.output - 1, now.as_secs_f64());
        self.look_again(decode);
    }

    fn finished(&mut self, number: usize, now: Duration) {
        let output = self.load.job(number).output;
        if number >= self.load.warm_up() && output > 1 {
            let ms = (now - self.flights[number].first).as_secs_f64() * 1e3;
            self.result.outcome.tpot_ms.push(ms / (output - 1) as f64);
        }
        self.filter.done(number, now);
    }

    fn look_again(&mut self, decode: usize) {
        if let Some((at, promise)) = self.decode[decode].next(self.timing) {
            let at = Duration::from_secs_f64(at) + Duration::from_nanos(1);
            self.events.push(Reverse((at, Event::Due { decode, promise })));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timing() -> Timing {
        Timing::new(&pd_sim::Config { speed: 1.0, ..pd_sim::Config::default() })
    }

    #[test]
    fn a_prompt_makes_streams_stand_still_for_as_long_as_its_tokens_take() {
        let pods = Pods { batch_tokens: 2_048, ..Pods::new(1, 1, 0) };
        let timing = timing();
        let end_of_stream = |tokens: u64| {
            let mut pod = Mixed::new(&pods);
            pod.stream(1, &timing, 200, 0.0);
            if tokens > 0 {
                let job = Job { at: Duration::ZERO, tokens, output: 1, blocks: Vec::new() };
                pod.prompt(2, &pods, &timing, &job, 0.1);
            }
            let mut through = Vec::new();
            while let Some((at, promise)) = pod.next(&timing) {
                match pod.keep(&timing, promise, at + 1e-9) {
                    Some(Due::Prompt(_)) => through.push(("prompt", at)),
                    Some(Due::Stream(_)) => through.push(("stream", at)),
                    None => {}
                }
            }
            through
        };
        let alone = end_of_stream(0)[0].1;
        assert!((alone - 1.6).abs() < 1e-3, "{alone}");
        let with = end_of_stream(4_096);
        let computed = timing.prefill(4_096, 0).as_secs_f64() - 0.015;
        // Two chunks, and with each of them a step of the stream.
        assert_eq!(with[0].0, "prompt");
        assert!((with[0].1 - (0.1 + 0.015 + computed + 2.0 * 0.008)).abs() < 1e-3, "{with:?}");
        assert!((with[1].1 - (alone + computed)).abs() < 1e-2, "{with:?}");
    }
}
