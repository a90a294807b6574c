//! What is asked of the servers: copies of a trace, shifted in time, with disjoint users.

use std::time::Duration;

use fastrand::Rng;
use hashbrown::{HashMap, HashSet};
use pd_bench::trace::{BLOCK_TOKENS, Entry, entries_before, unloaded_time};
use pd_sim::Timing;

use crate::cache::{Held, Tiers};

/// Tokens that an engine computes in one step: vLLM's default `max_num_batched_tokens` for an API server on a GPU of
/// 70 GiB or more (`EngineArgs.get_batch_defaults`). For smaller ones it is 2,048.
pub const BATCH_TOKENS: u64 = 8_192;

/// Share of a trace's requests in which a block must stand to belong to the system prompt, which copies share too.
const SYSTEM_SHARE: f64 = 0.5;
/// Share of the arrivals that warms the caches and is not measured.
pub const WARM_UP: f64 = 0.25;

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// When it comes, since the begin.
    pub at: Duration,
    /// Tokens of the prompt.
    pub tokens: u64,
    /// Tokens of the answer.
    pub output: u64,
    /// Blocks of [`BLOCK_TOKENS`]; the last may be cut.
    pub blocks: Vec<u64>,
}

impl Job {
    /// Blocks that a server can hold: the whole ones.
    #[must_use]
    pub fn whole(&self) -> &[u64] {
        &self.blocks[..((self.tokens / BLOCK_TOKENS) as usize).min(self.blocks.len())]
    }

    /// Key that the prompts of a conversation have in common: the second block, for the first one may be shared by all.
    #[must_use]
    pub fn key(&self) -> u64 {
        self.blocks.get(1).or(self.blocks.first()).copied().unwrap_or(0)
    }
}

#[derive(Clone, Copy, Debug)]
struct Arrival {
    at: Duration,
    copy: u64,
    entry: usize,
}

/// Requests in the order of their time.
#[derive(Clone, Debug)]
pub struct Load<'a> {
    entries: &'a [Entry],
    system: HashSet<u64>,
    arrivals: Vec<Arrival>,
}

/// Servers that a load is made for.
#[derive(Clone, Copy, Debug)]
pub struct Pods {
    /// Prefill servers.
    pub prefill: usize,
    /// Decode servers.
    pub decode: usize,
    /// Tokens that each prefill server's cache holds, both tiers.
    pub cache_tokens: u64,
    /// Of these, tokens in the fast tier.
    pub fast_tokens: u64,
    /// Tokens that each decode server's cache holds beside what it generates from.
    pub decode_cache_tokens: u64,
    /// Tokens that a prefill server computes in one step; 0: one prompt after another.
    pub batch_tokens: u64,
}

impl Pods {
    /// So many servers of each role, whose caches hold so many tokens without a slow tier.
    #[must_use]
    pub const fn new(prefill: usize, decode: usize, cache_tokens: u64) -> Self {
        Self {
            prefill,
            decode,
            cache_tokens,
            fast_tokens: cache_tokens,
            decode_cache_tokens: cache_tokens,
            batch_tokens: BATCH_TOKENS,
        }
    }

    /// Blocks of all, and of the fast tier.
    #[must_use]
    pub fn blocks(&self) -> (usize, usize) {
        ((self.cache_tokens / BLOCK_TOKENS) as usize, (self.fast_tokens / BLOCK_TOKENS) as usize)
    }

    /// Time of prefill for a prompt: to compute its new blocks, and to fetch blocks from the slow tier.
    #[must_use]
    pub fn prefill_time(&self, timing: &Timing, job: &Job, held: Held) -> Duration {
        timing.prefill(job.tokens, held.blocks as u64 * BLOCK_TOKENS) + Self::fetch_time(timing, held)
    }

    /// Time to fetch blocks from the slow tier.
    pub(crate) fn fetch_time(timing: &Timing, held: Held) -> Duration {
        match held.slow as u64 * BLOCK_TOKENS {
            0 => Duration::ZERO,
            tokens => timing.transfer(tokens),
        }
    }
}

impl<'a> Load<'a> {
    /// As many copies of a trace, shifted by random times round its span, as give the prefill servers a `share` (0 to 1)
    /// of what they could do if they had one queue and one cache in common; the times are stretched to make it exact.
    #[must_use]
    pub fn new(entries: &'a [Entry], pods: &Pods, timing: &Timing, share: f64, seed: u64) -> Self {
        let span = entries.last().map_or(0.0, |entry| entry.at_ms * 1e-3).max(1e-3);
        let mut this = Self { entries, system: system_blocks(entries), arrivals: Vec::new() };
        let wanted = share * pods.prefill as f64 * span;
        this.shift_copies(1, span, seed);
        let copies = (wanted / this.pooled_work(pods, timing)).round().max(1.0) as u64;
        this.shift_copies(copies, span, seed);
        let stretch = this.pooled_work(pods, timing) / wanted;
        for arrival in &mut this.arrivals {
            arrival.at = arrival.at.mul_f64(stretch);
        }
        this
    }

    /// As many copies of a trace, shifted as by [`new`](Self::new), as give `rate` requests a second, above 0; the times are
    /// stretched to make it exact.
    #[must_use]
    pub fn at_rate(entries: &'a [Entry], rate: f64, seed: u64) -> Self {
        let span = entries.last().map_or(0.0, |entry| entry.at_ms * 1e-3).max(1e-3);
        let mut this = Self { entries, system: system_blocks(entries), arrivals: Vec::new() };
        let wanted = rate * span;
        let copies = (wanted / entries.len().max(1) as f64).round().max(1.0) as u64;
        this.shift_copies(copies, span, seed);
        let stretch = this.len() as f64 / wanted;
        for arrival in &mut this.arrivals {
            arrival.at = arrival.at.mul_f64(stretch);
        }
        this
    }

    /// Seconds from the end of the warm-up to the last request.
    #[must_use]
    pub fn measured_seconds(&self) -> f64 {
        let at = |number: usize| self.arrivals.get(number).map_or(Duration::ZERO, |arrival| arrival.at);
        at(self.len().saturating_sub(1)).saturating_sub(at(self.warm_up())).as_secs_f64()
    }

    fn shift_copies(&mut self, copies: u64, span: f64, seed: u64) {
        let mut rng = Rng::with_seed(seed);
        self.arrivals.clear();
        for copy in 0..copies {
            let shift = rng.f64() * span;
            for (entry, of) in self.entries.iter().enumerate() {
                let at = Duration::from_secs_f64((of.at_ms * 1e-3 + shift) % span);
                self.arrivals.push(Arrival { at, copy, entry });
            }
        }
        self.arrivals.sort_by_key(|arrival| (arrival.at, arrival.copy, arrival.entry));
    }

    /// Seconds of prefill per span, after warm-up, with one cache as large as all together.
    fn pooled_work(&self, pods: &Pods, timing: &Timing) -> f64 {
        let mut cache = pooled_cache(pods);
        let mut work = 0.0;
        for (i, job) in self.jobs().enumerate() {
            let held = cache.held(job.whole());
            cache.hold(job.whole());
            if i >= self.warm_up() {
                work += pods.prefill_time(timing, &job, held).as_secs_f64();
            }
        }
        work / (1.0 - WARM_UP)
    }

    /// Requests.
    #[must_use]
    pub fn len(&self) -> usize {
        self.arrivals.len()
    }

    /// Whether there is no request.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.arrivals.is_empty()
    }

    /// Requests that are not measured.
    #[must_use]
    pub fn warm_up(&self) -> usize {
        (self.len() as f64 * WARM_UP) as usize
    }

    /// The requests.
    pub fn jobs(&self) -> impl Iterator<Item = Job> {
        (0..self.len()).map(|number| self.job(number))
    }

    /// One of them.
    ///
    /// # Panics
    /// When there are not so many.
    #[must_use]
    pub fn job(&self, number: usize) -> Job {
        let arrival = &self.arrivals[number];
        let entry = &self.entries[arrival.entry];
        let own = |id: &u64| if self.system.contains(id) { *id } else { *id | (arrival.copy + 1) << 40 };
        Job {
            at: arrival.at,
            tokens: entry.input_tokens,
            output: entry.output_tokens.max(1),
            blocks: entry.blocks.iter().map(own).collect(),
        }
    }

    /// When it comes in the trace.
    ///
    /// # Panics
    /// When there are not so many.
    #[must_use]
    pub fn at(&self, number: usize) -> Duration {
        self.arrivals[number].at
    }

    /// For each request the one that it follows in its session, if there is one.
    ///
    /// A request follows the latest one whose whole blocks it begins with. It comes as long after the answer as it came
    /// after the request in the trace, less what the answer takes when nothing waits and all but the new blocks is cached.
    #[must_use]
    pub fn turns(&self, timing: &Timing) -> Vec<Option<Turn>> {
        let before = entries_before(self.entries);
        let places: HashMap<(u64, usize), usize> =
            self.arrivals.iter().enumerate().map(|(number, arrival)| ((arrival.copy, arrival.entry), number)).collect();
        let turn = |(number, arrival): (usize, &Arrival)| {
            let after = *places.get(&(arrival.copy, before[arrival.entry]?))?;
            let index = self.arrivals[after].entry;
            let answer = unloaded_time(&self.entries[index], before[index].map(|before| &self.entries[before]), timing);
            // A session that the shift cut in two begins anew.
            (after < number).then(|| Turn {
                after,
                pause: arrival.at.saturating_sub(self.arrivals[after].at).saturating_sub(answer),
            })
        };
        self.arrivals.iter().enumerate().map(turn).collect()
    }
}

/// How a request follows another one in a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// The other one.
    pub after: usize,
    /// How long after its answer.
    pub pause: Duration,
}

/// One cache as large as those of all servers together.
#[must_use]
pub fn pooled_cache(pods: &Pods) -> Tiers {
    let (blocks, fast) = pods.blocks();
    Tiers::new(blocks * pods.prefill, fast * pods.prefill)
}

fn system_blocks(entries: &[Entry]) -> HashSet<u64> {
    let mut counts: HashMap<u64, usize> = HashMap::new();
    for id in entries.iter().flat_map(|entry| &entry.blocks) {
        *counts.entry(*id).or_default() += 1;
    }
    let least = (entries.len() as f64 * SYSTEM_SHARE) as usize;
    counts.into_iter().filter(|(_, count)| *count > least).map(|(id, _)| id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries() -> Vec<Entry> {
        let entry = |i: u64| Entry {
            at_ms: i as f64 * 100.0,
            input_tokens: 2_000,
            output_tokens: 5,
            blocks: vec![0, 1 + i % 7, 100 + i * 2, 101 + i * 2],
        };
        (0..400).map(entry).collect()
    }

    const PODS: Pods = Pods { decode_cache_tokens: 0, ..Pods::new(4, 4, 100_000) };

    fn timing() -> Timing {
        Timing::new(&pd_sim::Config { speed: 1.0, ..pd_sim::Config::default() })
    }

    #[test]
    fn copies_share_the_system_prompt_and_nothing_else() {
        let entries = entries();
        let load = Load::new(&entries, &PODS, &timing(), 0.7, 1);
        let copies = load.len() / entries.len();
        assert!(copies > 1, "{copies}");
        let seconds: HashSet<u64> = load.jobs().map(|job| job.blocks[1]).collect();
        assert_eq!(seconds.len(), 7 * copies);
        assert!(load.jobs().all(|job| job.blocks[0] == 0 && job.whole().len() == 3));
    }

    #[test]
    fn the_load_is_the_share_that_was_asked_for() {
        let entries = entries();
        for share in [0.3, 0.7] {
            let load = Load::new(&entries, &PODS, &timing(), share, 1);
            let jobs: Vec<Job> = load.jobs().collect();
            assert!(jobs.is_sorted_by_key(|job| job.at));
            let span = jobs.last().unwrap().at.as_secs_f64();
            let per_second = load.pooled_work(&PODS, &timing()) / span / PODS.prefill as f64;
            assert!((per_second / share - 1.0).abs() < 0.02, "{per_second}");
        }
    }

    #[test]
    fn a_turn_follows_the_one_that_it_begins_with() {
        let entry = |at_ms: f64, blocks: &[u64]| Entry {
            at_ms,
            input_tokens: blocks.len() as u64 * BLOCK_TOKENS + 10,
            output_tokens: 100,
            blocks: [blocks, &[1_000 + at_ms as u64]].concat(),
        };
        let entries = [
            entry(0.0, &[1, 2]),
            entry(10.0, &[1, 9]),
            entry(5_000.0, &[1, 2, 3]),
            entry(9_000.0, &[1, 2, 3, 4, 5]),
            entry(9_001.0, &[1]),
        ];
        assert_eq!(entries_before(&entries), [None, None, Some(0), Some(2), None]);
        let arrivals =
            (0..entries.len()).map(|entry| Arrival { at: Duration::from_secs(entry as u64 * 4), copy: 0, entry });
        let load = Load { entries: &entries, system: HashSet::new(), arrivals: arrivals.collect() };
        let turns = load.turns(&timing());
        let answer = timing().prefill(1_034, 0) + timing().transfer(1_034) + timing().token(1) * 100;
        assert_eq!(turns[2], Some(Turn { after: 0, pause: Duration::from_secs(8) - answer }));
        assert_eq!(turns[3].map(|turn| turn.after), Some(2));
        assert_eq!((turns[0], turns[1], turns[4]), (None, None, None));
    }

    #[test]
    fn a_seed_gives_the_same_load_and_another_one_another() {
        let entries = entries();
        let load = |seed| Load::new(&entries, &PODS, &timing(), 0.7, seed).jobs().collect::<Vec<_>>();
        assert_eq!(load(1), load(1));
        assert_ne!(load(1), load(2));
    }
}
