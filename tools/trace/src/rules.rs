//! The field's rules for choosing a prefill server, as published, and some that know everything.
//!
//! They see the servers' queues as they are at that moment, where the real ones scrape them every 50 ms or more.

use std::time::Duration;

use clap::ValueEnum;
use fastrand::Rng;
use pd_bench::trace::BLOCK_TOKENS;
use pd_core::choose::weight::affinity_weight;
use pd_core::prefix::hash::rendezvous_weight;
use pd_sim::Timing;

use crate::cache::Lru;
use crate::load::{Job, Pods};
use crate::prefill::Prefill;

/// `w` of [`Policy::GreedyTrue`].
const AFFINITY_WEIGHT: f64 = 3.0;

/// What chooses the servers of a simulated load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Policy {
    /// Every prompt is begun at once, with one cache as large as those of all servers: no answer can come sooner.
    NoWait,
    /// One queue in the order of arrival and one cache for all prefill servers: a bound of choosing at arrival.
    Pooled,
    /// One queue with the shortest prompt first and one cache for all prefill servers: a bound of choosing late.
    PooledShortest,
    /// Held in the gateway by pd-core's queue, with the exact work and the exact caches: what knowing more could give.
    LateTrue,
    /// Held in the gateway by pd-core's queue, with pd-core's own index and ledger.
    Late,
    /// At arrival: `W + 3·S`, a constant weight, with the exact work ahead and the exact cache.
    GreedyTrue,
    /// At arrival: the same, where the weight follows the load as pd-core's does.
    GreedyLoad,
    /// pd-core, as it ships.
    PdCore,
    /// One after another.
    RoundRobin,
    /// Any.
    Random,
    /// Two at random, of these the one with fewer requests (Mitzenmacher 2001).
    PowerOfTwo,
    /// Fewest requests.
    LeastRequests,
    /// Least work ahead, in exact seconds.
    LeastWork,
    /// Gateway API Inference Extension: 2·queue + 2·KV use + 3·prefix; an index of 31,250 blocks of 64 tokens per
    /// server, of which the first 256 of a prompt are compared.
    Gie,
    /// The same with an index as large as the servers' caches that compares all blocks.
    GieSized,
    /// llm-d's guide: of the servers that match 80 % or more (all, if none does), least uncached tokens in flight.
    LlmD,
    /// The same as it ships (prefix-cache-affinity-filter): until the best of those has 18 s more in flight than the best
    /// of the others, at 15,928 tokens per second.
    LlmDBound,
    /// SGLang `cache_aware`: shortest queue when `max − min > 64` and `max > 1.5·min`; the longest match when it is over
    /// 30 %; else the server with the smallest tree.
    Sglang,
    /// AIBrix `prefix-cache`: fewest requests when `max − min > 8`; of the servers at most one standard deviation over
    /// the mean, lowest `(100 − match%)·0.1 + requests/max`.
    Aibrix,
    /// Dynamo's KV router: fewest blocks to compute and in use, from exact caches (its servers publish them).
    Dynamo,
    /// Consistent hashing with bounded loads (Mirrokni 2018, factor 1.25) on the prompt's first block, as in KubeAI.
    Chwbl,
}

impl Policy {
    /// Whether it is pd-core's rule, or that with more knowledge.
    #[must_use]
    pub fn is_ours(self) -> bool {
        matches!(self, Self::GreedyTrue | Self::GreedyLoad | Self::Late | Self::LateTrue | Self::PdCore)
    }

    /// Whether it is a bound without servers: requests have a queue and a cache in common.
    #[must_use]
    pub fn is_pooled(self) -> bool {
        matches!(self, Self::NoWait | Self::Pooled | Self::PooledShortest)
    }

    /// The name used on the command line.
    #[must_use]
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// What a rule needs to know.
pub struct Rules<'a> {
    policy: Policy,
    pods: &'a Pods,
    timing: &'a Timing,
    index: Vec<Lru>,
    rng: Rng,
    next: usize,
}

/// Blocks of 64 tokens that GIE keeps per server, in tokens.
const GIE_TOKENS: u64 = 31_250 * 64;
/// Tokens that GIE compares: 256 blocks of 64.
const GIE_MATCH_TOKENS: u64 = 256 * 64;
/// Match at which llm-d keeps a request where its prefix is, and when it stops: seconds more in flight than elsewhere, at
/// this pace (`affinityThreshold`, `maxTTFTPenaltyMs` and `peakPrefillThroughput` of llm-d-router's
/// prefix-cache-affinity-filter, as of commit ebab687).
const LLM_D_MATCH: f64 = 0.8;
const LLM_D_PENALTY_SECONDS: f64 = 18.0;
const LLM_D_TOKENS_PER_SECOND: f64 = 15_928.0;
/// Tokens that SGLang's tree keeps per server: 2^26 characters, four to a token.
const SGLANG_TOKENS: u64 = (1 << 26) / 4;

impl<'a> Rules<'a> {
    /// A rule in front of these servers.
    #[must_use]
    pub fn new(policy: Policy, pods: &'a Pods, timing: &'a Timing, seed: u64) -> Self {
        let tokens = match policy {
            Policy::Gie => GIE_TOKENS,
            Policy::GieSized | Policy::LlmD | Policy::LlmDBound | Policy::Aibrix => pods.cache_tokens,
            Policy::Sglang => SGLANG_TOKENS,
            _ => 0,
        };
        let index = (0..pods.prefill).map(|_| Lru::new((tokens / BLOCK_TOKENS) as usize)).collect();
        Self { policy, pods, timing, index, rng: Rng::with_seed(seed), next: 0 }
    }

    /// The server for a prompt; `None` when there is none.
    pub fn pick(&mut self, job: &Job, pods: &[Prefill], now: Duration) -> Option<usize> {
        let pick = match self.policy {
            Policy::NoWait
            | Policy::Pooled
            | Policy::PooledShortest
            | Policy::PdCore
            | Policy::Late
            | Policy::LateTrue => None,
            Policy::RoundRobin => {
                self.next += 1;
                Some(self.next % pods.len().max(1))
            }
            Policy::Random => Some(self.rng.usize(..pods.len())),
            Policy::PowerOfTwo => {
                let (one, other) = (self.rng.usize(..pods.len()), self.rng.usize(..pods.len()));
                Some(if pods[other].in_flight() < pods[one].in_flight() { other } else { one })
            }
            Policy::LeastRequests => self.lowest(pods, |_, pod| pod.in_flight() as f64),
            Policy::LeastWork => {
                let servers = self.pods;
                self.lowest(pods, |_, pod| pod.work(servers, now))
            }
            Policy::GreedyTrue | Policy::GreedyLoad => self.greedy(job, pods, now),
            Policy::Gie | Policy::GieSized => self.gie(job, pods),
            Policy::LlmD | Policy::LlmDBound => self.llm_d(job, pods),
            Policy::Sglang => self.sglang(job, pods),
            Policy::Aibrix => self.aibrix(job, pods),
            Policy::Dynamo => self.lowest(pods, |_, pod| {
                let cached = pod.cache.held(job.whole()).blocks as u64 * BLOCK_TOKENS;
                (pod.uncached_tokens() + job.tokens - cached) as f64 + pod.tokens() as f64
            }),
            Policy::Chwbl => chwbl(job, pods),
        }?;
        let compared = self.compared(job);
        self.index[pick].hold(compared);
        Some(pick)
    }

    /// The lowest score; of several, any.
    fn lowest(&mut self, pods: &[Prefill], score: impl Fn(usize, &Prefill) -> f64) -> Option<usize> {
        let scores = pods.iter().enumerate().map(|(server, pod)| (score(server, pod), self.rng.u32(..), server));
        scores.min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))).map(|(.., server)| server)
    }

    /// Ties go by rendezvous, as pd-core's: for the rule's own cost they make no difference, for later hits they do.
    fn greedy(&self, job: &Job, pods: &[Prefill], now: Duration) -> Option<usize> {
        let in_flight: usize = pods.iter().map(Prefill::in_flight).sum();
        let each = in_flight as f64 / pods.len().max(1) as f64;
        let weight = |pod: &Prefill| match self.policy {
            Policy::GreedyTrue => AFFINITY_WEIGHT,
            _ => affinity_weight(pod.in_flight() as f64, each),
        };
        let cost = |pod: &Prefill| {
            let own = self.pods.prefill_time(self.timing, job, pod.cache.held(job.whole()));
            pod.work(self.pods, now) + weight(pod) * own.as_secs_f64()
        };
        let key = job.key();
        let scores =
            pods.iter().enumerate().map(|(server, pod)| (cost(pod), rendezvous_weight(key, server as u64), server));
        scores.min_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1))).map(|(.., server)| server)
    }

    fn compared<'j>(&self, job: &'j Job) -> &'j [u64] {
        let most = if self.policy == Policy::Gie { (GIE_MATCH_TOKENS / BLOCK_TOKENS) as usize } else { usize::MAX };
        job.whole().get(..most).unwrap_or(job.whole())
    }

    /// Share of the prompt's blocks, as far as they are compared, that the index has at each server.
    fn matches(&self, job: &Job) -> Vec<f64> {
        let blocks = self.compared(job);
        self.index.iter().map(|index| index.matched(blocks) as f64 / blocks.len().max(1) as f64).collect()
    }

    fn gie(&mut self, job: &Job, pods: &[Prefill]) -> Option<usize> {
        let matches = self.matches(job);
        let waiting = |pod: &Prefill| pod.in_flight().saturating_sub(1) as f64;
        let least = pods.iter().map(waiting).fold(f64::INFINITY, f64::min);
        let most = pods.iter().map(waiting).fold(0.0, f64::max);
        let fast = self.pods.fast_tokens.max(1) as f64;
        self.lowest(pods, |server, pod| {
            let queue = if most > least { (most - waiting(pod)) / (most - least) } else { 1.0 };
            let kv_free = 1.0 - (pod.running_tokens() as f64 / fast).min(1.0);
            -(2.0 * queue + 2.0 * kv_free + 3.0 * matches[server])
        })
    }

    fn llm_d(&mut self, job: &Job, pods: &[Prefill]) -> Option<usize> {
        let matches = self.matches(job);
        let is_sticky = |server: usize| matches[server] >= LLM_D_MATCH;
        let least = |sticky: bool| {
            let of = pods.iter().enumerate().filter(|(server, _)| is_sticky(*server) == sticky);
            of.map(|(_, pod)| pod.uncached_tokens()).min()
        };
        let lead = least(true).zip(least(false)).map_or(0, |(sticky, other)| sticky.saturating_sub(other));
        let is_over = self.policy == Policy::LlmDBound && lead as f64 / LLM_D_TOKENS_PER_SECOND > LLM_D_PENALTY_SECONDS;
        let any = !is_over && (0..pods.len()).any(is_sticky);
        self.lowest(pods, |server, pod| {
            let out = any && !is_sticky(server);
            pod.uncached_tokens() as f64 + if out { f64::MAX / 2.0 } else { 0.0 }
        })
    }

    fn sglang(&mut self, job: &Job, pods: &[Prefill]) -> Option<usize> {
        let (least, most) = queues(pods)?;
        if most - least > 64 && most as f64 > 1.5 * least as f64 {
            return self.lowest(pods, |_, pod| pod.in_flight() as f64);
        }
        let matches = self.matches(job);
        if matches.iter().any(|share| *share > 0.3) {
            return self.lowest(pods, |server, _| -matches[server]);
        }
        let sizes: Vec<usize> = self.index.iter().map(Lru::len).collect();
        self.lowest(pods, |server, _| sizes[server] as f64)
    }

    fn aibrix(&mut self, job: &Job, pods: &[Prefill]) -> Option<usize> {
        let (least, most) = queues(pods)?;
        if most - least > 8 {
            return self.lowest(pods, |_, pod| pod.in_flight() as f64);
        }
        let matches = self.matches(job);
        let count = pods.len() as f64;
        let mean = pods.iter().map(|pod| pod.in_flight() as f64).sum::<f64>() / count;
        let deviation = (pods.iter().map(|pod| (pod.in_flight() as f64 - mean).powi(2)).sum::<f64>() / count).sqrt();
        self.lowest(pods, |server, pod| {
            let requests = pod.in_flight() as f64;
            let out = requests > mean + deviation;
            let load = if most > 0 { requests / most as f64 } else { 0.0 };
            (100.0 - 100.0 * matches[server]) * 0.1 + load + if out { f64::MAX / 2.0 } else { 0.0 }
        })
    }
}

fn queues(pods: &[Prefill]) -> Option<(usize, usize)> {
    let queues = || pods.iter().map(Prefill::in_flight);
    Some((queues().min()?, queues().max()?))
}

/// Servers in the order in which the ring has them behind the key; the first one under the bound.
fn chwbl(job: &Job, pods: &[Prefill]) -> Option<usize> {
    let key = job.blocks.first().copied().unwrap_or(0);
    let all: usize = pods.iter().map(Prefill::in_flight).sum();
    let bound = (1.25 * (all + 1) as f64 / pods.len().max(1) as f64).ceil();
    let open = (0..pods.len()).filter(|server| ((pods[*server].in_flight() + 1) as f64) <= bound);
    open.max_by_key(|server| rendezvous_weight(key, *server as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PODS: Pods = Pods { decode_cache_tokens: 0, ..Pods::new(4, 4, 100_000) };

    fn timing() -> Timing {
        Timing::new(&pd_sim::Config { speed: 1.0, ..pd_sim::Config::default() })
    }

    fn job(blocks: &[u64]) -> Job {
        Job { at: Duration::ZERO, tokens: blocks.len() as u64 * BLOCK_TOKENS, output: 1, blocks: blocks.to_vec() }
    }

    /// What a rule does with a prompt that server 2 holds, while `busy` has `queue` other prompts.
    fn pick(policy: Policy, busy: usize, queue: usize) -> usize {
        let timing = timing();
        let mut rules = Rules::new(policy, &PODS, &timing, 1);
        let mut pods: Vec<Prefill> = (0..4).map(|_| Prefill::new(&PODS)).collect();
        let known = job(&[1, 2, 3, 4]);
        rules.index[2].hold(known.whole());
        pods[2].enqueue(&timing, 0, &known, false);
        pods[2].begin(&PODS, &timing, Duration::ZERO);
        assert_eq!(pods[2].end(), [0]);
        for i in 0..queue {
            pods[busy].enqueue(&timing, i, &job(&[100 + i as u64; 1]), false);
        }
        rules.pick(&job(&[1, 2, 3, 4, 5]), &pods, Duration::ZERO).unwrap()
    }

    #[test]
    fn rules_that_know_prefixes_go_where_the_prefix_is() {
        for policy in Policy::value_variants() {
            let knows = [
                Policy::GreedyTrue,
                Policy::GreedyLoad,
                Policy::Gie,
                Policy::GieSized,
                Policy::LlmD,
                Policy::LlmDBound,
                Policy::Sglang,
                Policy::Aibrix,
                Policy::Dynamo,
            ];
            if knows.contains(policy) {
                assert_eq!(pick(*policy, 2, 0), 2, "{policy:?}");
            }
        }
    }

    #[test]
    fn a_long_queue_turns_them_away_each_by_its_own_rule() {
        assert_ne!(pick(Policy::GreedyTrue, 2, 40), 2);
        assert_eq!(pick(Policy::Gie, 2, 40), 2, "3·80 % outweigh 2·queue, however long it is");
        assert_ne!(pick(Policy::Dynamo, 2, 40), 2);
        assert_ne!(pick(Policy::Aibrix, 2, 9), 2);
        assert_eq!(pick(Policy::Sglang, 2, 64), 2);
        assert_ne!(pick(Policy::Sglang, 2, 65), 2);
        assert_eq!(pick(Policy::LlmD, 2, 40), 2, "nothing bounds its affinity here");
        assert_eq!(pick(Policy::LlmDBound, 2, 500), 2, "256,000 tokens are 16 s");
        assert_ne!(pick(Policy::LlmDBound, 2, 600), 2);
    }

    #[test]
    fn loads_are_balanced_by_what_each_rule_counts() {
        for policy in [Policy::LeastRequests, Policy::LeastWork, Policy::PowerOfTwo] {
            let picks: Vec<usize> = (0..4).map(|busy| pick(policy, busy, 1)).collect();
            assert!(policy == Policy::PowerOfTwo || picks.iter().enumerate().all(|(busy, pick)| busy != *pick));
        }
        let first = pick(Policy::Chwbl, 0, 0);
        assert_ne!(pick(Policy::Chwbl, first, 3), first, "over the bound");
    }
}
