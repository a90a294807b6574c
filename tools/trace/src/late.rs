//! Gateways that hold requests until a prefill server has room: the rule of [`pd_core::choose::queue`].
//!
//! They know either everything, at once (a bound), or what pd-core knows: its approximate index of prefixes and its
//! ledger of work. Several gateways announce waiting, bound and ended requests to each other, after a delay. Each gateway
//! computes the same order from its knowledge and binds its own requests only.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Result, anyhow};
use hashbrown::HashMap;
use pd_bench::trace::BLOCK_TOKENS;
use pd_core::choose::queue::{Binding, Held, PrefillEndpoint, Queue, Request, Rule};
use pd_core::config::Cost;
use pd_core::endpoints::load::{Left, PrefillQueue};
use pd_core::prefix::hash::{BlockHash, prefix_units, prompt_hash, rendezvous_weight};
use pd_core::prefix::index::PrefixIndex;
use pd_core::time::Monotonic;

use crate::filter::{BYTES_PER_TOKEN, Brains, HASH_BLOCK_BYTES, prompt};
use crate::load::{Job, Pods};
use crate::prefill::Prefill;

/// pd-core's own figures: `pools.*.cost`, `prefix.index_bytes`, `prefix.hot_share`.
const COST: Cost = Cost { a: 0.015, b: 25e-6, c: 5.24e-10 };
const INDEX_BYTES: usize = 256 << 20;
const HOT_SHARE: f64 = 0.02;
const BLOCK: f64 = HASH_BLOCK_BYTES as f64 / BYTES_PER_TOKEN;

/// What the gateways know of the servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Knowledge {
    /// Caches and work as they are.
    Exact,
    /// pd-core's index and ledger.
    Own,
}

/// Priorities and fairness ids of the requests.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Classes {
    /// Share of the requests, 0 to 1, that go before all others.
    pub high: f64,
    /// Fairness ids with as many requests each; 0 and 1: one.
    pub fairness_ids: u64,
}

impl Classes {
    /// Whether a request goes before others, and whose it is.
    #[must_use]
    pub fn of(&self, number: usize) -> (bool, u64) {
        let draw = rendezvous_weight(number as u64, 1) as f64 / u64::MAX as f64;
        (draw < self.high, rendezvous_weight(number as u64, 2) % self.fairness_ids.max(1))
    }
}

/// A request that waits or is computed.
struct Known {
    job: Job,
    gateway: usize,
    blocks: Vec<BlockHash>,
}

/// What gateways announce to each other about a request.
#[derive(Clone, Copy)]
enum News {
    Waits(Request),
    Bound(Binding),
    Computed { id: u64, server: usize },
}

/// The gateways.
pub struct Late {
    knowledge: Knowledge,
    pods: Pods,
    gateways: Vec<Gateway>,
    known: HashMap<u64, Known>,
    classes: Classes,
    rng: fastrand::Rng,
    delay: Duration,
    /// What the other gateways receive, and when.
    news: VecDeque<(Duration, usize, News)>,
    /// Since when requests wait, a server is idle, and no gateway binds any.
    stuck: Option<Duration>,
}

struct Gateway {
    queue: Queue,
    index: PrefixIndex,
    /// Work in flight at each server.
    ledgers: Vec<PrefillQueue>,
}

impl Late {
    /// Gateways in front of these servers.
    #[must_use]
    pub fn new(knowledge: Knowledge, pods: &Pods, brains: &Brains, classes: Classes, seed: u64) -> Self {
        let count = if knowledge == Knowledge::Exact { 1 } else { brains.count.max(1) };
        let gateway = |_| {
            let mut index = PrefixIndex::new(INDEX_BYTES);
            for endpoint in 0..pods.prefill {
                index.set_capacity(endpoint as u32, (pods.cache_tokens as f64 / BLOCK) as usize);
            }
            // The simulation refuses no request, so that it shows the queue under overload.
            let mut rule = Rule { most_requests: usize::MAX, most_bytes: usize::MAX, ..Rule::new(COST) };
            rule.room.batch_tokens = pods.batch_tokens as f64;
            let ledgers = (0..pods.prefill).map(|_| PrefillQueue::default()).collect();
            Gateway { queue: Queue::new(rule), index, ledgers }
        };
        Self {
            knowledge,
            pods: *pods,
            gateways: (0..count).map(gateway).collect(),
            known: HashMap::new(),
            classes,
            rng: fastrand::Rng::with_seed(seed),
            delay: brains.exchange.unwrap_or(Duration::MAX),
            news: VecDeque::new(),
            stuck: None,
        }
    }

    /// When a server without room has room again, as far as a gateway knows that holds requests; `None` where none does.
    #[must_use]
    pub fn next_room(&self, pods: &[Prefill], now: Duration) -> Option<Duration> {
        let holding = self.gateways.iter().enumerate().filter(|(_, of)| !of.queue.is_empty());
        let rooms = holding.flat_map(|(gateway, of)| {
            let until = move |server| of.queue.rule().room.seconds_until(&self.endpoint(gateway, server, pods, now));
            (0..pods.len()).map(until)
        });
        let next = rooms.filter(|seconds| *seconds > 0.0).reduce(f64::min);
        let next = next.map(|seconds| now + Duration::from_secs_f64(seconds) + Duration::from_micros(1));
        let passes_over = self.passes_over_at().filter(|at| *at > now);
        next.into_iter().chain(passes_over).min()
    }

    /// When each gateway passes over the requests of the others, because they may wait for each other: two gateways whose
    /// indexes differ can each take a server for the place of a request of the other one.
    fn passes_over_at(&self) -> Option<Duration> {
        Some(self.stuck?.saturating_add(2 * self.delay()?))
    }

    /// A server, as far as a gateway knows it.
    fn endpoint(&self, gateway: usize, server: usize, pods: &[Prefill], now: Duration) -> PrefillEndpoint {
        let left = match self.knowledge {
            Knowledge::Exact => {
                pods.get(server).map(|pod| Left { begun: pod.step_left(now), behind: pod.behind_step(&self.pods) })
            }
            Knowledge::Own => self.gateways.get(gateway).and_then(|gateway| {
                let fixed = if gateway.queue.rule().room.batch_tokens > 0.0 { COST.a } else { 0.0 };
                Some(gateway.ledgers.get(server)?.left(fixed, Monotonic::new(now)))
            }),
        };
        PrefillEndpoint { index: server as u32, key: server as u64, left: left.unwrap_or_default(), cost: COST }
    }

    /// After how long what one gateway does is news to the others, if there are any.
    #[must_use]
    pub fn delay(&self) -> Option<Duration> {
        (self.gateways.len() > 1 && self.delay < Duration::MAX).then_some(self.delay)
    }

    /// Requests that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.gateways.first().map_or(0, |gateway| gateway.queue.len())
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A request comes.
    ///
    /// # Errors
    /// When the queue does not take it.
    pub fn arrive(&mut self, number: usize, job: &Job, pods: &[Prefill]) -> Result<()> {
        let gateway = if self.gateways.len() > 1 { self.rng.usize(..self.gateways.len()) } else { 0 };
        let id = number as u64;
        let (mut blocks, mut key) = (Vec::new(), job.key());
        if self.knowledge == Knowledge::Own {
            blocks = prompt_hash(b"m", b"", &[&prompt(job)], HASH_BLOCK_BYTES).blocks;
            if let Some(block) = self.gateways[gateway].index.distinctive(&blocks, HOT_SHARE) {
                key = block.0;
            }
        }
        let (is_high, fairness) = self.classes.of(number);
        let request = Request {
            id,
            arrival: job.at,
            tokens: job.tokens as f64,
            key,
            priority: i32::from(is_high),
            fairness,
            deadline: None,
            bytes: 0,
        };
        self.known.insert(id, Known { job: job.clone(), gateway, blocks });
        self.announce(gateway, News::Waits(request), job.at, pods)
    }

    /// A prompt is computed.
    ///
    /// # Errors
    /// When a gateway does not understand what another one did.
    pub fn prefilled(&mut self, number: usize, server: usize, now: Duration, pods: &[Prefill]) -> Result<()> {
        let id = number as u64;
        let Some(known) = self.known.get(&id) else { return Ok(()) };
        self.announce(known.gateway, News::Computed { id, server }, now, pods)?;
        if self.delay().is_none() {
            self.known.remove(&id);
        }
        Ok(())
    }

    /// The next request to send, to which server.
    ///
    /// # Errors
    /// When a gateway does not understand what another one did.
    pub fn next(&mut self, pods: &[Prefill], now: Duration) -> Result<Option<(usize, usize, Job)>> {
        while self.news.front().is_some_and(|(due, ..)| *due <= now) {
            let Some((_, from, news)) = self.news.pop_front() else { break };
            for gateway in (0..self.gateways.len()).filter(|gateway| *gateway != from) {
                self.apply(gateway, &news, now, pods)?;
            }
        }
        let passes_over = self.passes_over_at().is_some_and(|at| at <= now);
        for gateway in 0..self.gateways.len() {
            if let Some(binding) = self.bind(gateway, pods, passes_over, now) {
                self.stuck = None;
                let known = self.known.get(&binding.id).ok_or_else(|| anyhow!("no such request"))?;
                let job = known.job.clone();
                self.announce(gateway, News::Bound(binding), now, pods)?;
                return Ok(Some((binding.id as usize, binding.endpoint as usize, job)));
            }
        }
        let is_stuck = !self.is_empty() && pods.iter().any(Prefill::is_idle);
        self.stuck = if is_stuck { self.stuck.or(Some(now)) } else { None };
        Ok(None)
    }

    /// What a gateway binds now.
    fn bind(&mut self, gateway: usize, pods: &[Prefill], passes_over: bool, now: Duration) -> Option<Binding> {
        let mut servers: Vec<PrefillEndpoint> =
            (0..pods.len()).map(|server| self.endpoint(gateway, server, pods, now)).collect();
        let mut claimed = Vec::new();
        loop {
            let is_own = |id: u64| self.known.get(&id).is_some_and(|known| known.gateway == gateway);
            let passed_over = |id| passes_over && !is_own(id) || claimed.contains(&id);
            let binding = self.gateways.get(gateway)?.queue.next_without(&servers, now, &passed_over)?;
            let held = self.held(gateway, binding.id, pods);
            let queue = &mut self.gateways.get_mut(gateway)?.queue;
            let before = queue.held(binding.id).to_vec();
            queue.set_held(binding.id, &held);
            if queue.held(binding.id) != before {
                continue;
            }
            if self.known.get(&binding.id).is_some_and(|known| known.gateway == gateway) {
                return Some(binding);
            }
            // Another gateway's request is the one to go there: that gateway sends it.
            claimed.push(binding.id);
            if let Some(server) = servers.get_mut(binding.endpoint as usize) {
                server.left.behind += binding.seconds;
            }
        }
    }

    /// What the servers hold of a request, as far as this gateway knows.
    fn held(&self, gateway: usize, id: u64, pods: &[Prefill]) -> Vec<Held> {
        let (Some(gateway), Some(known)) = (self.gateways.get(gateway), self.known.get(&id)) else { return Vec::new() };
        let tokens = |server: usize, pod: &Prefill| match self.knowledge {
            Knowledge::Exact => (pod.cache.leading(known.job.whole()) as u64 * BLOCK_TOKENS) as f64,
            Knowledge::Own => prefix_units(gateway.index.matched(server as u32, &known.blocks)) as f64 * BLOCK,
        };
        let servers = pods.iter().enumerate();
        let held = servers.map(|(server, pod)| Held { endpoint: server as u32, tokens: tokens(server, pod) });
        held.filter(|held| held.tokens > 0.0).collect()
    }

    /// One gateway does something; the other gateways receive it after the delay.
    fn announce(&mut self, gateway: usize, news: News, now: Duration, pods: &[Prefill]) -> Result<()> {
        self.apply(gateway, &news, now, pods)?;
        if let Some(delay) = self.delay() {
            self.news.push_back((now.saturating_add(delay), gateway, news));
        }
        Ok(())
    }

    fn apply(&mut self, gateway: usize, news: &News, now: Duration, pods: &[Prefill]) -> Result<()> {
        match *news {
            News::Waits(request) => {
                let held = self.held(gateway, request.id, pods);
                self.gateways[gateway].queue.push(request, &held).map_err(|full| anyhow!("the queue: {full:?}"))?;
            }
            News::Bound(Binding { id, endpoint, seconds, .. }) => {
                let of = &mut self.gateways[gateway];
                if let Some(known) = self.known.get(&id) {
                    of.index.insert(endpoint, &known.blocks);
                }
                let ledger = &mut of.ledgers[endpoint as usize];
                ledger.add(id, seconds, Monotonic::new(now), Monotonic::new(Duration::MAX));
                let Some(request) = of.queue.bind(id, seconds) else { return Ok(()) };
                // The server may now hold a begin of those that share one with it. In the exact case it does so once
                // the request is in its queue, see `bound`.
                if self.knowledge == Knowledge::Own {
                    self.refresh(gateway, request.key, pods);
                }
            }
            News::Computed { id, server } => {
                let ledger = &mut self.gateways[gateway].ledgers[server];
                ledger.remove(id, Monotonic::new(now));
            }
        }
        Ok(())
    }

    /// A request has joined its server's queue.
    pub fn bound(&mut self, job: &Job, pods: &[Prefill]) {
        if self.knowledge == Knowledge::Exact {
            self.refresh(0, job.key(), pods);
        }
    }

    fn refresh(&mut self, gateway: usize, key: u64, pods: &[Prefill]) {
        let sharing: Vec<u64> = self.gateways[gateway].queue.sharing(key).collect();
        for id in sharing {
            let held = self.held(gateway, id, pods);
            self.gateways[gateway].queue.set_held(id, &held);
        }
    }
}

#[cfg(test)]
mod tests {
    use pd_bench::trace::Entry;
    use pd_sim::Timing;

    use super::*;
    use crate::generate::Shape;
    use crate::load::Load;
    use crate::outcome::Outcome;
    use crate::rules::Policy;
    use crate::sim::{self, DecodeBy, Other, Setup};

    const PODS: Pods = Pods { fast_tokens: 400_000, ..Pods::new(4, 4, 1_000_000) };

    fn run(entries: &[Entry], share: f64, policy: Policy, change: impl FnOnce(&mut Setup<'_>, &mut Brains)) -> Outcome {
        let timing = Timing::new(&pd_sim::Config { speed: 1.0, ..pd_sim::Config::default() });
        let load = Load::new(entries, &PODS, &timing, share, 1);
        let mut brains = Brains { count: 1, workers: 1, ..Brains::default() };
        let setup = |brains| Setup {
            pods: &PODS,
            timing: &timing,
            brains,
            classes: Classes::default(),
            decode_by: DecodeBy::Tokens,
            closed_loop: false,
            other: Other::default(),
            seed: 1,
        };
        let none = Brains::default();
        let mut changed = setup(&none);
        change(&mut changed, &mut brains);
        let changed = Setup { brains: &brains, ..changed };
        let outcome = sim::run(&load, policy, &changed, || ()).unwrap();
        assert_eq!(outcome.requests, load.len() - load.warm_up(), "every request is served");
        assert_eq!(outcome.requests, outcome.ttft.len());
        outcome
    }

    fn agents() -> Vec<Entry> {
        Shape::Agents.entries(1)
    }

    #[test]
    fn held_requests_are_answered_sooner_than_those_that_were_sent_at_once() {
        let entries = agents();
        let [greedy, late, late_true] = [Policy::GreedyTrue, Policy::Late, Policy::LateTrue]
            .map(|policy| run(&entries, 0.8, policy, |_, _| ()).mean_ttft());
        assert!(late < 0.9 * greedy, "{late} {greedy}");
        assert!(late_true < 0.9 * greedy, "{late_true} {greedy}");
    }

    #[test]
    fn overload_is_shared_by_fairness_ids_and_spared_by_those_with_priority() {
        let entries = agents();
        let classes = Classes { high: 0.1, fairness_ids: 2 };
        let over = run(&entries, 1.5, Policy::Late, |setup, _| setup.classes = classes);
        assert!(over.fairness() > 0.95, "{}", over.fairness());
        assert!(over.high_ttft(0.99) < 0.5 * over.ttft(0.9), "{} {}", over.high_ttft(0.99), over.ttft(0.9));
        let busy: f64 = over.busy.iter().sum();
        assert!(over.idle_seconds < 0.02 * busy, "{} of {busy}", over.idle_seconds);
    }

    #[test]
    fn a_turn_that_follows_the_answer_does_not_wait_for_the_turn_before() {
        // The first turn takes eight seconds, and in the trace the second one comes after one.
        let turn = |session: u64, turn: u64| Entry {
            at_ms: (20_000 * session + 1_000 * turn) as f64,
            input_tokens: 100_352 + 512 * turn,
            output_tokens: 1,
            blocks: (0..196 + turn).map(|block| 1_000 * (session + 1) + block).collect(),
        };
        let entries: Vec<Entry> = (0..50).flat_map(|session| [turn(session, 0), turn(session, 1)]).collect();
        let [closed, open] = [true, false]
            .map(|closed| run(&entries, 0.1, Policy::Late, |setup, _| setup.closed_loop = closed).ttft(0.25));
        assert!(closed < 1.0 && open > 4.0, "{closed} {open}");
    }

    #[test]
    fn a_conversation_that_keeps_its_decode_server_moves_few_tokens() {
        let entries = agents();
        let by = |decode_by| run(&entries, 0.7, Policy::Late, |setup, _| setup.decode_by = decode_by);
        let [tokens, cost] = [DecodeBy::Tokens, DecodeBy::Cost].map(by);
        let bound = cost.least_moved_over_new();
        let [tokens, cost] = [tokens, cost].map(|outcome| outcome.moved_over_new());
        assert!(cost < 0.3 * tokens && bound <= cost && cost < 2.0 * bound, "{tokens} {cost} {bound}");
    }

    #[test]
    fn gateways_that_learn_of_each_other_late_do_nearly_as_well_as_one() {
        let entries = agents();
        let one = run(&entries, 0.7, Policy::Late, |_, _| ()).mean_ttft();
        let four = run(&entries, 0.7, Policy::Late, |_, brains| {
            *brains = Brains { count: 4, exchange: Some(Duration::from_millis(50)), ..brains.clone() };
        });
        assert!(four.mean_ttft() < 1.2 * one, "{} {one}", four.mean_ttft());
    }
}
