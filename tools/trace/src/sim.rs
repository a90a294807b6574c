//! The simulation: a request comes, is computed, handed over, generated.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use hashbrown::HashSet;
use pd_bench::trace::BLOCK_TOKENS;
use pd_core::choose::decode_cost::{DecodeCost, DecodeLoad};
use pd_core::envoys::outside::EngineReport;
use pd_core::prefix::hash::rendezvous_weight;
use pd_sim::Timing;

use crate::cache::Lru;
use crate::decode::Decode;
use crate::filter::{Brains, Filter};
use crate::late::{Classes, Knowledge, Late};
use crate::load::{Job, Load, Pods};
use crate::outcome::Outcome;
use crate::pooled::{Order, pooled};
use crate::prefill::Prefill;
use crate::rules::{Policy, Rules};

/// What a decode server is chosen by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DecodeBy {
    /// Fewest requests.
    Requests,
    /// Fewest assigned tokens.
    Tokens,
    /// A conversation keeps its server; else assigned tokens, and tokens to be moved: `pd_core::choose::decode_cost`.
    #[default]
    Cost,
    /// Most tokens held, whatever is assigned: the fewest that can be moved without knowing what comes.
    Held,
}

fn choose_decode(by: DecodeBy, pods: &[Decode], job: &Job) -> Option<usize> {
    let lowest =
        |load: fn(&Decode) -> u64| pods.iter().enumerate().min_by_key(|(_, pod)| load(pod)).map(|(index, _)| index);
    match by {
        DecodeBy::Requests => lowest(|pod| pod.assigned as u64),
        DecodeBy::Tokens => lowest(|pod| pod.tokens),
        DecodeBy::Held => {
            let key = |pod: &Decode| (Reverse(pod.cache.matched(job.whole())), pod.tokens);
            pods.iter().enumerate().min_by_key(|(_, pod)| key(pod)).map(|(index, _)| index)
        }
        DecodeBy::Cost => {
            let load = |pod: &Decode| DecodeLoad {
                assigned: pod.tokens as f64,
                held: (pod.cache.matched(job.whole()) as u64 * BLOCK_TOKENS) as f64,
                ..DecodeLoad::default()
            };
            // Of several with equal cost the first, as in pd-core's decode profile.
            let mut places: Vec<usize> = (0..pods.len()).collect();
            places.sort_by_key(|place| Reverse(rendezvous_weight(job.key(), *place as u64)));
            let loads: Vec<DecodeLoad> = places.iter().map(|place| load(&pods[*place])).collect();
            DecodeCost { stay: 10.0, ..DecodeCost::default() }
                .choose(job.tokens as f64, &loads)
                .map(|chosen| places[chosen])
        }
    }
}

/// A gateway of another make in front of the same servers. Its requests are not measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Other {
    /// Share of the requests that come through it, 0 to 1.
    pub share: f64,
    /// Number of prefill and of decode servers that it takes, in turn; 0: all.
    pub servers: usize,
    /// Time between two reports of the servers to the gateways that exchange; `None`: never.
    pub reports: Option<Duration>,
}

impl Other {
    fn has(&self, number: usize) -> bool {
        (rendezvous_weight(number as u64, 3) as f64 / u64::MAX as f64) < self.share
    }

    fn server(&self, turn: usize, of: usize) -> usize {
        turn % if self.servers == 0 { of } else { self.servers.min(of) }
    }
}

/// One run.
#[derive(Clone, Copy, Debug)]
pub struct Setup<'a> {
    /// Servers.
    pub pods: &'a Pods,
    /// Their service times.
    pub timing: &'a Timing,
    /// For [`Policy::PdCore`] and [`Policy::Late`].
    pub brains: &'a Brains,
    /// Priorities and fairness ids of the requests, for the policies that hold requests.
    pub classes: Classes,
    /// How our policies choose a decode server.
    pub decode_by: DecodeBy,
    /// Whether a turn of a session comes when the one before is answered, and not at the time in the trace.
    pub closed_loop: bool,
    /// A gateway of another make.
    pub other: Other,
    /// Of everything that is random in a policy.
    pub seed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// The step of a prefill server is over.
    Stepped(usize),
    /// A prefill server may have room.
    Room,
    /// The servers report.
    Reports,
    /// The first token of a request is there.
    Joined(usize),
    /// A decode server may be through with a request.
    Finished { decode: usize, batch: u64 },
    /// A request comes.
    Arrives(usize),
    /// A prefill server may begin a step. Last, so that what comes at the same time is in the step.
    Begins(usize),
}

/// A request in flight.
#[derive(Clone, Copy, Debug, Default)]
struct Flight {
    at: Duration,
    tokens: u64,
    output: u64,
    measured: bool,
    is_other: bool,
    prefill: usize,
    decode: usize,
    first: Duration,
}

/// The policy that chooses servers, with its state.
enum Gateway<'a> {
    Filter(Box<Filter>),
    Rules(Rules<'a>),
    Late(Box<Late>),
}

/// Output tokens that a gateway expects of a request which does not say: pd-core's figure, for those that count tokens.
const EXPECTED_OUTPUT_TOKENS: u64 = 256;

/// Runs a load under a policy; it calls `progress` for every request that it sent.
///
/// # Errors
/// When pd-core does not choose.
pub fn run(load: &Load<'_>, policy: Policy, setup: &Setup<'_>, mut progress: impl FnMut()) -> Result<Outcome> {
    let late =
        |knowledge| Gateway::Late(Box::new(Late::new(knowledge, setup.pods, setup.brains, setup.classes, setup.seed)));
    let gateway = match policy {
        Policy::NoWait => return Ok(pooled(load, Order::AtOnce, setup.pods, setup.timing, progress)),
        Policy::Pooled => return Ok(pooled(load, Order::Arrival, setup.pods, setup.timing, progress)),
        Policy::PooledShortest => return Ok(pooled(load, Order::Shortest, setup.pods, setup.timing, progress)),
        Policy::PdCore => Gateway::Filter(Box::new(Filter::new(setup.pods, setup.brains, setup.seed)?)),
        Policy::Late => late(Knowledge::Own),
        Policy::LateTrue => late(Knowledge::Exact),
        policy => Gateway::Rules(Rules::new(policy, setup.pods, setup.timing, setup.seed)),
    };
    let turns = if setup.closed_loop { load.turns(setup.timing) } else { vec![None; load.len()] };
    let mut next_turns = vec![Vec::new(); load.len()];
    let mut events = BinaryHeap::new();
    for (number, turn) in turns.iter().enumerate() {
        match turn {
            Some(turn) => next_turns[turn.after].push((number, turn.pause)),
            None => events.push(Reverse((load.at(number), Event::Arrives(number)))),
        }
    }
    if setup.other.reports.is_some() {
        events.push(Reverse((Duration::ZERO, Event::Reports)));
    }
    let mut world = World {
        setup,
        load,
        gateway,
        decode_by: if policy.is_ours() { setup.decode_by } else { DecodeBy::Requests },
        decode_pool: Lru::new((setup.pods.decode_cache_tokens / BLOCK_TOKENS) as usize * setup.pods.decode),
        seen: HashSet::new(),
        prefill: (0..setup.pods.prefill).map(|_| Prefill::new(setup.pods)).collect(),
        decode: (0..setup.pods.decode).map(|_| Decode::new(setup.pods)).collect(),
        flights: vec![Flight::default(); load.len()],
        next_turns,
        coming: load.len(),
        turn: 0,
        looked: Duration::ZERO,
        next_room: Duration::MAX,
        events,
        outcome: Outcome {
            seconds_by_fairness_id: vec![0.0; setup.classes.fairness_ids.max(1) as usize],
            ..Outcome::default()
        },
    };
    world.run(&mut progress)?;
    world.outcome.busy = world.prefill.iter().map(|pod| pod.busy.as_secs_f64()).collect();
    Ok(world.outcome.sorted())
}

struct World<'a> {
    setup: &'a Setup<'a>,
    load: &'a Load<'a>,
    gateway: Gateway<'a>,
    /// How the decode server is chosen, where pd-core does not choose.
    decode_by: DecodeBy,
    /// One cache as large as those of all decode servers: what would be moved to it is about the least that can be.
    decode_pool: Lru,
    /// Blocks that were in a prompt before.
    seen: HashSet<u64>,
    prefill: Vec<Prefill>,
    decode: Vec<Decode>,
    flights: Vec<Flight>,
    /// Requests that come so long after the end of each.
    next_turns: Vec<Vec<(usize, Duration)>>,
    /// Requests of the other gateway so far.
    turn: usize,
    /// Requests that are still to come.
    coming: usize,
    /// When the simulation last counted the idle servers.
    looked: Duration,
    /// When the gateways that hold requests look at the servers again.
    next_room: Duration,
    events: BinaryHeap<Reverse<(Duration, Event)>>,
    outcome: Outcome,
}

impl World<'_> {
    /// Everything that happens.
    fn run(&mut self, progress: &mut impl FnMut()) -> Result<()> {
        while let Some(Reverse((now, event))) = self.events.pop() {
            self.count_idle(now);
            match event {
                Event::Stepped(server) => {
                    self.events.push(Reverse((now, Event::Begins(server))));
                    for number in self.prefill[server].end() {
                        self.prefilled(number, now)?;
                    }
                }
                Event::Begins(server) => {
                    if let Some(end) = self.prefill[server].begin(self.setup.pods, self.setup.timing, now) {
                        self.events.push(Reverse((end, Event::Stepped(server))));
                    }
                }
                Event::Room => {
                    if now >= self.next_room {
                        self.next_room = Duration::MAX;
                    }
                    self.bind(now)?;
                }
                Event::Reports => self.report(now),
                Event::Joined(number) => self.joined(number, now),
                Event::Finished { decode, batch } => self.finished(decode, batch, now),
                Event::Arrives(number) => {
                    self.arrive(number, now)?;
                    progress();
                }
            }
        }
        Ok(())
    }

    fn count_idle(&mut self, now: Duration) {
        if let Gateway::Late(late) = &self.gateway
            && self.coming > 0
            && !late.is_empty()
        {
            let idle = self.prefill.iter().filter(|pod| pod.is_idle()).count();
            self.outcome.idle_seconds += idle as f64 * now.saturating_sub(self.looked).as_secs_f64();
        }
        self.looked = now;
    }

    /// The servers report, and will again while anything comes.
    fn report(&mut self, now: Duration) {
        let prefill = self.prefill.iter();
        let prefill = prefill.map(|pod| EngineReport { requests: pod.in_flight() as f64, kv_tokens: None });
        let decode = self.decode.iter();
        let decode =
            decode.map(|pod| EngineReport { requests: pod.assigned as f64, kv_tokens: Some(pod.tokens as f64) });
        let (prefill, decode): (Vec<_>, Vec<_>) = (prefill.collect(), decode.collect());
        if let Gateway::Filter(filter) = &mut self.gateway {
            filter.engines_report(&prefill, &decode, now);
        }
        if let Some(period) = self.setup.other.reports.filter(|_| self.coming > 0) {
            self.events.push(Reverse((now + period, Event::Reports)));
        }
    }

    fn arrive(&mut self, number: usize, now: Duration) -> Result<()> {
        self.coming -= 1;
        let job = Job { at: now, ..self.load.job(number) };
        let is_other = self.setup.other.has(number);
        let measured = number >= self.load.warm_up() && !is_other;
        let Job { at, tokens, output, .. } = job;
        self.flights[number] = Flight { at, tokens, output, measured, is_other, ..Flight::default() };
        if is_other {
            self.turn += 1;
            let server = self.setup.other.server(self.turn, self.prefill.len());
            return self.enqueue(number, server, &job, now);
        }
        let prefill = match &mut self.gateway {
            Gateway::Filter(filter) => filter.arrive(number, &job, now)?,
            Gateway::Rules(rules) => rules.pick(&job, &self.prefill, now).context("no server")?,
            Gateway::Late(late) => {
                late.arrive(number, &job, &self.prefill)?;
                if let Some(delay) = late.delay() {
                    self.events.push(Reverse((now + delay, Event::Room)));
                }
                return self.bind(now);
            }
        };
        self.enqueue(number, prefill, &job, now)
    }

    /// A request goes to a prefill server.
    fn enqueue(&mut self, number: usize, prefill: usize, job: &Job, now: Duration) -> Result<()> {
        let pod = self.prefill.get_mut(prefill).context("no such server")?;
        let flight = &mut self.flights[number];
        flight.prefill = prefill;
        let held = pod.enqueue(self.setup.timing, number, job, flight.measured);
        if flight.measured {
            self.outcome.requests += 1;
            self.outcome.tokens += job.tokens;
            self.outcome.cached_tokens += held.blocks as u64 * BLOCK_TOKENS;
        }
        if self.coming > 0 {
            let (_, fairness) = self.setup.classes.of(number);
            self.outcome.seconds_by_fairness_id[fairness as usize] +=
                self.setup.pods.prefill_time(self.setup.timing, job, held).as_secs_f64();
        }
        self.events.push(Reverse((now, Event::Begins(prefill))));
        Ok(())
    }

    /// The gateways send what they hold, where there is room.
    fn bind(&mut self, now: Duration) -> Result<()> {
        while let Gateway::Late(late) = &mut self.gateway
            && let Some((number, prefill, job)) = late.next(&self.prefill, now)?
        {
            self.enqueue(number, prefill, &job, now)?;
            if let Gateway::Late(late) = &mut self.gateway {
                late.bound(&job, &self.prefill);
            }
        }
        if let Gateway::Late(late) = &self.gateway
            && let Some(at) = late.next_room(&self.prefill, now).filter(|at| *at < self.next_room)
        {
            self.next_room = at;
            self.events.push(Reverse((at, Event::Room)));
        }
        Ok(())
    }

    fn prefilled(&mut self, number: usize, now: Duration) -> Result<()> {
        let prefill = self.flights[number].prefill;
        let is_other = self.flights[number].is_other;
        if let Gateway::Late(late) = &mut self.gateway
            && !is_other
        {
            late.prefilled(number, prefill, now, &self.prefill)?;
            if let Some(delay) = late.delay() {
                self.events.push(Reverse((now + delay, Event::Room)));
            }
            self.bind(now)?;
        }
        let job = self.load.job(number);
        let flight = &mut self.flights[number];
        let decode = match &mut self.gateway {
            _ if is_other => self.setup.other.server(number, self.decode.len()),
            Gateway::Filter(filter) => filter.prefilled(number, now)?,
            Gateway::Rules(_) | Gateway::Late(_) => {
                choose_decode(self.decode_by, &self.decode, &job).context("no decode server")?
            }
        };
        flight.decode = decode;
        let pod = self.decode.get_mut(decode).context("no such decode server")?;
        pod.assigned += 1;
        pod.tokens += flight.tokens + EXPECTED_OUTPUT_TOKENS;
        let moved_to = |cache: &mut Lru| {
            let matched = cache.matched(job.whole()) as u64 * BLOCK_TOKENS;
            cache.hold(job.whole());
            flight.tokens - matched
        };
        let (moved, least) = (moved_to(&mut pod.cache), moved_to(&mut self.decode_pool));
        let seen = job.whole().iter().take_while(|block| self.seen.contains(*block)).count();
        self.seen.extend(job.whole());
        if flight.measured {
            self.outcome.moved_tokens += moved;
            self.outcome.least_moved_tokens += least;
            self.outcome.new_tokens += flight.tokens - seen as u64 * BLOCK_TOKENS;
        }
        let first = self.setup.timing.transfer(moved) + self.setup.timing.token(pod.running() + 1);
        self.events.push(Reverse((now + first, Event::Joined(number))));
        Ok(())
    }

    fn joined(&mut self, number: usize, now: Duration) {
        let flight = &mut self.flights[number];
        if let Gateway::Filter(filter) = &mut self.gateway
            && !flight.is_other
        {
            filter.first_token(number, now);
        }
        flight.first = now;
        if flight.measured {
            let ttft = (now - flight.at).as_secs_f64();
            self.outcome.ttft.push(ttft);
            if self.setup.classes.of(number).0 {
                self.outcome.high_ttft.push(ttft);
            }
        }
        let (decode, more) = (flight.decode, flight.output - 1);
        self.decode[decode].join(self.setup.timing, number, more, now);
        self.look_again(decode);
    }

    fn finished(&mut self, decode: usize, batch: u64, now: Duration) {
        let Some(number) = self.decode[decode].finish(self.setup.timing, batch, now) else { return };
        self.look_again(decode);
        let flight = self.flights[number];
        let pod = &mut self.decode[decode];
        pod.assigned -= 1;
        pod.tokens -= flight.tokens + EXPECTED_OUTPUT_TOKENS;
        if flight.measured && flight.output > 1 {
            let ms = (now - flight.first).as_secs_f64() * 1e3;
            self.outcome.tpot_ms.push(ms / (flight.output - 1) as f64);
        }
        if let Gateway::Filter(filter) = &mut self.gateway
            && !flight.is_other
        {
            filter.done(number, now);
        }
        for (next, pause) in core::mem::take(&mut self.next_turns[number]) {
            self.events.push(Reverse((now + pause, Event::Arrives(next))));
        }
    }

    fn look_again(&mut self, decode: usize) {
        if let Some((at, batch)) = self.decode[decode].next(self.setup.timing) {
            self.events.push(Reverse((at, Event::Finished { decode, batch })));
        }
    }
}
