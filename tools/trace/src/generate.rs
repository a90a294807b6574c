//! Loads to make up where there is no trace.

use clap::ValueEnum;
use fastrand::Rng;
use pd_bench::trace::{BLOCK_TOKENS, Entry};

/// What a made-up load is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// Groups of very different size, each with a long prompt in common: retrieval over documents, few-shot prompts.
    SharedPrefix,
    /// Sessions of many quick steps, each with everything before it and a little more: coding agents.
    Agents,
    /// Sessions of long prompts, of which nearly all was seen before: as a trace of coding agents has them, with 116,000
    /// tokens on average.
    LongAgents,
    /// No two prompts have anything in common.
    Unique,
    /// The same with short prompts: 25 to 10,000 tokens, 500 in the middle.
    Short,
}

impl Shape {
    /// The name used on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SharedPrefix => "shared-prefix",
            Self::Agents => "agents",
            Self::LongAgents => "long-agents",
            Self::Unique => "unique",
            Self::Short => "short",
        }
    }

    /// Requests over twenty minutes, [`Short`](Self::Short) over two, in the order of their time.
    #[must_use]
    pub fn entries(self, seed: u64) -> Vec<Entry> {
        let mut rng = Rng::with_seed(seed);
        let mut ids = 1..;
        let mut entries = match self {
            Self::SharedPrefix => shared_prefix(&mut rng, &mut ids),
            Self::Agents => agents(&mut rng, &mut ids),
            Self::LongAgents => long_agents(&mut rng, &mut ids),
            Self::Unique => (0..3_000).map(|_| unique(&mut rng, &mut ids, 4_000.0, SPAN_MS)).collect(),
            Self::Short => (0..2_000).map(|_| unique(&mut rng, &mut ids, 500.0, 0.1 * SPAN_MS)).collect(),
        };
        entries.sort_by(|a, b| a.at_ms.total_cmp(&b.at_ms));
        entries
    }
}

const SPAN_MS: f64 = 1_200_000.0;

fn entry(at_ms: f64, input_tokens: u64, output_tokens: u64, blocks: Vec<u64>) -> Entry {
    Entry { at_ms, input_tokens, output_tokens, blocks }
}

/// Adds blocks of their own up to so many tokens.
fn fill(blocks: &mut Vec<u64>, tokens: u64, ids: &mut impl Iterator<Item = u64>) {
    let missing = (tokens.div_ceil(BLOCK_TOKENS) as usize).saturating_sub(blocks.len());
    blocks.extend(ids.take(missing));
}

/// Log-uniform from `least` to `median²/least`.
fn skewed(rng: &mut Rng, least: f64, median: f64) -> u64 {
    (least * (2.0 * (median / least).ln() * rng.f64()).exp()) as u64
}

fn unique(rng: &mut Rng, ids: &mut impl Iterator<Item = u64>, median: f64, span_ms: f64) -> Entry {
    let tokens = skewed(rng, median * 0.05, median);
    let mut blocks = Vec::new();
    fill(&mut blocks, tokens, ids);
    entry(rng.f64() * span_ms, tokens, skewed(rng, 20.0, 200.0), blocks)
}

/// 300 groups whose popularity falls as 1/rank (Zipf), with 2,000 to 30,000 tokens in common.
fn shared_prefix(rng: &mut Rng, ids: &mut impl Iterator<Item = u64>) -> Vec<Entry> {
    let groups: Vec<Vec<u64>> = (0..300)
        .map(|_| {
            let mut blocks = Vec::new();
            fill(&mut blocks, skewed(rng, 2_000.0, 8_000.0), ids);
            blocks
        })
        .collect();
    let total: f64 = (1..=groups.len()).map(|rank| 1.0 / rank as f64).sum();
    let requests = 4_000;
    let mut entries = Vec::with_capacity(requests);
    for _ in 0..requests {
        let mut left = rng.f64() * total;
        let rank = (1..groups.len()).find(|rank| {
            left -= 1.0 / *rank as f64;
            left < 0.0
        });
        let mut blocks = groups[rank.unwrap_or(groups.len()) - 1].clone();
        let tokens = blocks.len() as u64 * BLOCK_TOKENS + skewed(rng, 50.0, 500.0);
        fill(&mut blocks, tokens, ids);
        entries.push(entry(rng.f64() * SPAN_MS, tokens, skewed(rng, 20.0, 200.0), blocks));
    }
    entries
}

/// Three kinds of agents, each with its tools and instructions; a step comes one to twenty seconds after the one before
/// and adds the output of a tool.
fn agents(rng: &mut Rng, ids: &mut impl Iterator<Item = u64>) -> Vec<Entry> {
    let kinds: Vec<Vec<u64>> = [6_000, 12_000, 20_000]
        .into_iter()
        .map(|tokens| {
            let mut blocks = Vec::new();
            fill(&mut blocks, tokens, ids);
            blocks
        })
        .collect();
    let mut entries = Vec::new();
    for session in 0..160 {
        let mut blocks = kinds[session % kinds.len()].clone();
        let mut tokens = blocks.len() as u64 * BLOCK_TOKENS;
        let mut at_ms = rng.f64() * SPAN_MS * 0.9;
        for _ in 0..rng.u32(5..60) {
            let output = skewed(rng, 20.0, 120.0);
            tokens += skewed(rng, 100.0, 700.0);
            fill(&mut blocks, tokens, ids);
            entries.push(entry(at_ms, tokens, output, blocks.clone()));
            tokens += output;
            at_ms += 1_000.0 + 19_000.0 * rng.f64() * rng.f64();
            if at_ms > SPAN_MS || tokens > 120_000 {
                break;
            }
        }
    }
    entries
}

/// Three tool sets of 20,000 tokens in common; a session begins with its files and adds to them at each step. One session
/// in twenty begins with three times as much.
fn long_agents(rng: &mut Rng, ids: &mut impl Iterator<Item = u64>) -> Vec<Entry> {
    let kinds: [Vec<u64>; 3] = core::array::from_fn(|_| {
        let mut blocks = Vec::new();
        fill(&mut blocks, 20_480, ids);
        blocks
    });
    let mut entries = Vec::new();
    for session in 0..50 {
        let mut blocks = kinds[session % kinds.len()].clone();
        let mut tokens = skewed(rng, 24_000.0, 70_000.0) * if session % 20 == 19 { 3 } else { 1 };
        let mut at_ms = rng.f64() * SPAN_MS * 0.9;
        for _ in 0..rng.u32(10..60) {
            let output = skewed(rng, 40.0, 220.0);
            fill(&mut blocks, tokens, ids);
            entries.push(entry(at_ms, tokens, output, blocks.clone()));
            tokens += output + skewed(rng, 300.0, 1_600.0);
            at_ms += skewed(rng, 2_000.0, 17_000.0) as f64;
            if at_ms > SPAN_MS || tokens > 520_000 {
                break;
            }
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Share of whole blocks that an earlier request had too.
    fn repeated(shape: Shape) -> f64 {
        let (mut seen, mut hits, mut all) = (HashSet::new(), 0, 0);
        for entry in shape.entries(1) {
            assert_eq!(entry.blocks.len() as u64, entry.input_tokens.div_ceil(BLOCK_TOKENS));
            hits += entry.blocks.iter().take_while(|id| seen.contains(*id)).count();
            all += entry.blocks.len();
            seen.extend(entry.blocks);
        }
        hits as f64 / all as f64
    }

    #[test]
    fn long_agents_have_the_lengths_of_the_trace() {
        let entries = Shape::LongAgents.entries(1);
        let mut tokens: Vec<u64> = entries.iter().map(|entry| entry.input_tokens).collect();
        tokens.sort_unstable();
        let mean = tokens.iter().sum::<u64>() / tokens.len() as u64;
        assert!((100_000..135_000).contains(&mean), "{mean}");
        let at = |percent: usize| tokens[tokens.len() * percent / 100];
        assert!((80_000..120_000).contains(&at(50)), "{}", at(50));
        assert!((170_000..230_000).contains(&at(90)), "{}", at(90));
        assert!((300_000..520_000).contains(&at(99)), "{}", at(99));
    }

    #[test]
    fn shapes_repeat_as_their_names_say() {
        assert_eq!(repeated(Shape::Unique), 0.0);
        assert!((0.6..0.95).contains(&repeated(Shape::SharedPrefix)), "{}", repeated(Shape::SharedPrefix));
        assert!(repeated(Shape::Agents) > 0.9, "{}", repeated(Shape::Agents));
        assert!((0.92..0.97).contains(&repeated(Shape::LongAgents)), "{}", repeated(Shape::LongAgents));
        assert_eq!(Shape::Agents.entries(3), Shape::Agents.entries(3));
        assert_ne!(Shape::Agents.entries(3), Shape::Agents.entries(4));
    }
}
