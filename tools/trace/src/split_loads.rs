//! Made-up loads of four uses, for the choice between split and whole.

use clap::ValueEnum;
use fastrand::Rng;
use pd_bench::trace::{BLOCK_TOKENS, Entry};

use crate::generate::Shape;

/// A use of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Use {
    /// Conversations: short questions, long answers, and everything before them in each prompt.
    Chat,
    /// An editor that completes code: many requests with a file of some thousand tokens, and short answers.
    Code,
    /// Coding agents: [`Shape::Agents`].
    Agents,
    /// Questions about documents of 20,000 to 80,000 tokens, few about each.
    Documents,
}

const SPAN_MS: f64 = 300_000.0;

impl Use {
    /// The name used on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Code => "code",
            Self::Agents => "agents",
            Self::Documents => "documents",
        }
    }

    /// Requests over five minutes; agents over twenty, in the order of their time.
    #[must_use]
    pub fn entries(self, seed: u64) -> Vec<Entry> {
        let mut rng = Rng::with_seed(seed);
        let mut ids = 1..;
        let mut entries = match self {
            Self::Agents => return Shape::Agents.entries(seed),
            Self::Chat => sessions(&mut rng, &mut ids, &CHAT),
            Self::Code => sessions(&mut rng, &mut ids, &CODE),
            Self::Documents => sessions(&mut rng, &mut ids, &DOCUMENTS),
        };
        entries.sort_by(|a, b| a.at_ms.total_cmp(&b.at_ms));
        entries
    }
}

/// What sessions of a use are like. Ranges are log-uniform.
struct Sessions {
    count: usize,
    /// Tokens that all sessions begin with.
    common: u64,
    /// Tokens of the session's own begin.
    begin: (f64, f64),
    turns: (u32, u32),
    /// Tokens that each turn adds to the prompt.
    question: (f64, f64),
    answer: (f64, f64),
    /// Whether the answer is part of the next prompt.
    keeps_answer: bool,
    /// Mean seconds between turns.
    pause: f64,
}

const CHAT: Sessions = Sessions {
    count: 150,
    common: 1_024,
    begin: (20.0, 2_000.0),
    turns: (1, 9),
    question: (20.0, 800.0),
    answer: (60.0, 900.0),
    keeps_answer: true,
    pause: 40.0,
};

const CODE: Sessions = Sessions {
    count: 40,
    common: 512,
    begin: (800.0, 8_000.0),
    turns: (10, 60),
    question: (30.0, 300.0),
    answer: (8.0, 80.0),
    keeps_answer: false,
    pause: 5.0,
};

const DOCUMENTS: Sessions = Sessions {
    count: 100,
    common: 512,
    begin: (20_000.0, 80_000.0),
    turns: (1, 4),
    question: (30.0, 200.0),
    answer: (100.0, 1_200.0),
    keeps_answer: true,
    pause: 45.0,
};

fn log_uniform(rng: &mut Rng, (least, most): (f64, f64)) -> u64 {
    (least * ((most / least).ln() * rng.f64()).exp()) as u64
}

fn sessions(rng: &mut Rng, ids: &mut impl Iterator<Item = u64>, of: &Sessions) -> Vec<Entry> {
    let mut fill = |blocks: &mut Vec<u64>, tokens: u64| {
        let missing = (tokens.div_ceil(BLOCK_TOKENS) as usize).saturating_sub(blocks.len());
        blocks.extend(ids.by_ref().take(missing));
    };
    let mut common = Vec::new();
    fill(&mut common, of.common);
    let mut entries = Vec::new();
    for _ in 0..of.count {
        let mut blocks = common.clone();
        let mut tokens = of.common + log_uniform(rng, of.begin);
        let mut at_ms = rng.f64() * SPAN_MS;
        for _ in 0..rng.u32(of.turns.0..=of.turns.1) {
            tokens += log_uniform(rng, of.question);
            let output_tokens = log_uniform(rng, of.answer);
            fill(&mut blocks, tokens);
            entries.push(Entry { at_ms, input_tokens: tokens, output_tokens, blocks: blocks.clone() });
            tokens += if of.keeps_answer { output_tokens } else { 0 };
            at_ms += of.pause * 1e3 * 2.0 * rng.f64();
            if at_ms > SPAN_MS {
                break;
            }
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uses_differ_as_their_names_say() {
        let mean = |of: Use, value: fn(&Entry) -> u64| {
            let entries = of.entries(1);
            assert!(entries.is_sorted_by(|a, b| a.at_ms <= b.at_ms) && entries.len() > 100, "{of:?}");
            entries.iter().map(value).sum::<u64>() / entries.len() as u64
        };
        let prompt = |of| mean(of, |entry| entry.input_tokens);
        let answer = |of| mean(of, |entry| entry.output_tokens);
        assert!(prompt(Use::Documents) > 30_000 && prompt(Use::Chat) < 5_000);
        assert!(answer(Use::Code) < 40 && answer(Use::Chat) > 200);
        assert_eq!(Use::Code.entries(2), Use::Code.entries(2));
        assert_ne!(Use::Code.entries(2), Use::Code.entries(3));
    }
}
