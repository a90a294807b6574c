//! Request traces in Mooncake's format: JSON lines with `timestamp` (ms), `input_length` and `output_length` (tokens)
//! and `hash_ids`, one per block of [`BLOCK_TOKENS`]; equal ids mean equal text.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use pd_sim::Timing;
use serde::Deserialize;

/// Tokens of a trace's block.
pub const BLOCK_TOKENS: u64 = 512;

/// One request.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Entry {
    /// Milliseconds since the trace's begin.
    #[serde(rename = "timestamp")]
    pub at_ms: f64,
    /// Tokens of the prompt.
    #[serde(rename = "input_length")]
    pub input_tokens: u64,
    /// Tokens of the answer.
    #[serde(rename = "output_length")]
    pub output_tokens: u64,
    /// Its blocks; the last may be cut.
    #[serde(rename = "hash_ids")]
    pub blocks: Vec<u64>,
}

impl Entry {
    fn check(&self) -> Result<()> {
        let blocks = self.input_tokens.div_ceil(BLOCK_TOKENS);
        ensure!(self.at_ms.is_finite() && self.at_ms >= 0.0, "timestamp must not be negative");
        ensure!(
            self.blocks.len() as u64 == blocks,
            "{} tokens are {blocks} blocks of {BLOCK_TOKENS}, hash_ids has {}",
            self.input_tokens,
            self.blocks.len()
        );
        Ok(())
    }

    /// Cuts the prompt to at most so many tokens; says whether it was longer.
    pub fn cut(&mut self, tokens: u64) -> bool {
        let longer = self.input_tokens > tokens;
        if longer {
            self.input_tokens = tokens;
            self.blocks.truncate(tokens.div_ceil(BLOCK_TOKENS) as usize);
        }
        longer
    }
}

/// Entries in the order of their time.
pub type Entries = Box<dyn Iterator<Item = Result<Entry>> + Send>;

/// Reads a file, line by line.
///
/// # Errors
/// When it cannot be opened. Lines that are not as they should be are errors of the iterator, with their number.
pub fn read(path: &Path) -> Result<Entries> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let path = path.display().to_string();
    let lines = BufReader::new(file).lines().enumerate();
    Ok(Box::new(lines.filter(|(_, line)| !matches!(line, Ok(line) if line.trim().is_empty())).map(move |(i, line)| {
        let parse = || -> Result<Entry> {
            let entry: Entry = serde_json::from_str(&line?)?;
            entry.check()?;
            Ok(entry)
        };
        parse().with_context(|| format!("{path}, line {}", i + 1))
    })))
}

/// Spreads requests of one timestamp evenly over the time until the next one: traces round to buckets. The last bucket
/// is taken to be as long as the one before.
pub struct Spread<I> {
    entries: I,
    ready: VecDeque<Entry>,
    next: Option<Entry>,
    width_ms: f64,
}

impl<I: Iterator<Item = Result<Entry>>> Spread<I> {
    /// Spreads these.
    pub fn new(entries: I) -> Self {
        Self { entries, ready: VecDeque::new(), next: None, width_ms: 0.0 }
    }

    fn fill(&mut self) -> Result<()> {
        let Some(first) = self.next.take().map(Ok).or_else(|| self.entries.next()).transpose()? else { return Ok(()) };
        let begin = first.at_ms;
        self.ready.push_back(first);
        while let Some(entry) = self.entries.next().transpose()? {
            ensure!(entry.at_ms >= begin, "the trace goes back in time, from {begin} to {} ms", entry.at_ms);
            if entry.at_ms > begin {
                self.width_ms = entry.at_ms - begin;
                self.next = Some(entry);
                break;
            }
            self.ready.push_back(entry);
        }
        let count = self.ready.len() as f64;
        for (i, entry) in self.ready.iter_mut().enumerate() {
            entry.at_ms = begin + self.width_ms * i as f64 / count;
        }
        Ok(())
    }
}

impl<I: Iterator<Item = Result<Entry>>> Iterator for Spread<I> {
    type Item = Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ready.is_empty()
            && let Err(error) = self.fill()
        {
            return Some(Err(error));
        }
        self.ready.pop_front().map(Ok)
    }
}

/// For each entry the latest one before it whose whole blocks, at least one, it begins with: the turn of a session that
/// it follows. `None`: it begins a session.
#[must_use]
pub fn entries_before(entries: &[Entry]) -> Vec<Option<usize>> {
    let mut ends: HashMap<u64, usize> = HashMap::new();
    let whole = |entry: &Entry| ((entry.input_tokens / BLOCK_TOKENS) as usize).min(entry.blocks.len());
    let mut before = Vec::with_capacity(entries.len());
    for (index, entry) in entries.iter().enumerate() {
        let whole = whole(entry);
        // Equal ids mean an equal prefix, so the last block says it all.
        before.push(entry.blocks[..whole].iter().rev().find_map(|block| ends.get(block).copied()));
        if let Some(last) = whole.checked_sub(1) {
            ends.insert(entry.blocks[last], index);
        }
    }
    before
}

/// How long a request takes from its coming to the end of its answer, when it waits for nothing and all that the turn
/// `before` it had is cached.
#[must_use]
pub fn unloaded_time(entry: &Entry, before: Option<&Entry>, timing: &Timing) -> Duration {
    let cached = before.map_or(0, |before| before.input_tokens);
    timing.prefill(entry.input_tokens, cached)
        + timing.transfer(entry.input_tokens)
        + timing.token(1).mul_f64(entry.output_tokens as f64)
}

/// What a trace holds, for choosing its pace.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Requests.
    pub requests: u64,
    /// From the first request to the last, milliseconds.
    pub span_ms: f64,
    /// Tokens of all prompts.
    pub input_tokens: u64,
    /// Of these, tokens in whole leading blocks that an earlier prompt had too: what a cache without bound would hit.
    pub seen_tokens: u64,
}

impl Summary {
    /// Reads all entries once.
    ///
    /// # Errors
    /// The first error of the entries.
    pub fn of(entries: impl Iterator<Item = Result<Entry>>) -> Result<Self> {
        let mut summary = Self::default();
        let mut seen = HashSet::new();
        let mut first = None;
        for entry in entries {
            let entry = entry?;
            summary.requests += 1;
            summary.span_ms = entry.at_ms - *first.get_or_insert(entry.at_ms);
            summary.input_tokens += entry.input_tokens;
            let whole = (entry.input_tokens / BLOCK_TOKENS) as usize;
            let known = entry.blocks.iter().take(whole).take_while(|id| seen.contains(*id)).count();
            summary.seen_tokens += known as u64 * BLOCK_TOKENS;
            seen.extend(entry.blocks);
        }
        Ok(summary)
    }
}

/// Conversations to make up where there is no trace: `conversations=20,turns=4,…`.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversations {
    /// How many.
    pub conversations: u64,
    /// Questions in each.
    pub turns: u64,
    /// Tokens of the system prompt that all share.
    pub system: u64,
    /// Tokens of a question.
    pub question: u64,
    /// Tokens of an answer.
    pub answer: u64,
    /// Milliseconds between two questions of a conversation.
    pub gap_ms: u64,
}

impl Default for Conversations {
    fn default() -> Self {
        Self { conversations: 50, turns: 4, system: 1_024, question: 1_500, answer: 200, gap_ms: 10_000 }
    }
}

impl FromStr for Conversations {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut this = Self::default();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').with_context(|| format!("{part}: write key=number"))?;
            let value: u64 = value.parse().with_context(|| part.to_owned())?;
            *match key {
                "conversations" => &mut this.conversations,
                "turns" => &mut this.turns,
                "system" => &mut this.system,
                "question" => &mut this.question,
                "answer" => &mut this.answer,
                "gap_ms" => &mut this.gap_ms,
                _ => {
                    let keys = "conversations, turns, system, question, answer, gap_ms";
                    return Err(anyhow!("{key}: none of {keys}"));
                }
            } = value;
        }
        ensure!(this.conversations > 0 && this.turns > 0 && this.question > 0, "nothing to ask");
        Ok(this)
    }
}

impl Conversations {
    /// All questions in the order of their time: every conversation asks its first one before any asks its second.
    pub fn entries(&self) -> impl Iterator<Item = Entry> + Send + use<> {
        let this = self.clone();
        let count = this.conversations;
        (0..this.turns).flat_map(move |turn| {
            let this = this.clone();
            (0..count).map(move |conversation| this.entry(turn, conversation))
        })
    }

    fn entry(&self, turn: u64, conversation: u64) -> Entry {
        let input_tokens = self.system + (turn + 1) * self.question + turn * self.answer;
        let shared = self.system / BLOCK_TOKENS;
        let own =
            |block: u64| if block < shared { block } else { shared + (block * self.conversations) + conversation };
        let offset_ms = self.gap_ms as f64 * conversation as f64 / self.conversations as f64;
        Entry {
            at_ms: (turn * self.gap_ms) as f64 + offset_ms,
            input_tokens,
            output_tokens: self.answer.max(1),
            blocks: (0..input_tokens.div_ceil(BLOCK_TOKENS)).map(own).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(at_ms: f64, input_tokens: u64, blocks: &[u64]) -> Entry {
        Entry { at_ms, input_tokens, output_tokens: 1, blocks: blocks.to_vec() }
    }

    #[test]
    fn buckets_are_spread_until_the_next_one() {
        let times = [0.0, 0.0, 0.0, 3_000.0, 3_000.0, 4_000.0, 4_000.0];
        let spread: Vec<f64> = Spread::new(times.into_iter().map(|at_ms| Ok(entry(at_ms, 0, &[]))))
            .map(|entry| entry.unwrap().at_ms)
            .collect();
        assert_eq!(spread, [0.0, 1_000.0, 2_000.0, 3_000.0, 3_500.0, 4_000.0, 4_500.0]);
    }

    #[test]
    fn a_trace_that_goes_back_is_refused() {
        let mut spread = Spread::new([5.0, 1.0].into_iter().map(|at_ms| Ok(entry(at_ms, 0, &[]))));
        assert!(spread.next().unwrap().is_err());
    }

    #[test]
    fn a_line_is_checked() {
        let parse = |text: &str| serde_json::from_str::<Entry>(text).map(|entry| entry.check().is_ok());
        let line = r#"{"timestamp": 7, "input_length": 513, "output_length": 3, "hash_ids": [0, 9]}"#;
        assert!(parse(line).unwrap());
        assert!(!parse(&line.replace("[0, 9]", "[0]")).unwrap());
        assert!(parse("{}").is_err());
    }

    #[test]
    fn a_cut_prompt_keeps_its_leading_blocks() {
        let mut long = entry(0.0, 1_500, &[1, 2, 3]);
        assert!(!long.cut(1_500));
        assert!(long.cut(600));
        assert_eq!(long, entry(0.0, 600, &[1, 2]));
    }

    #[test]
    fn a_turn_follows_the_latest_one_that_it_begins_with() {
        let entries = [
            entry(0.0, 1_034, &[1, 2, 90]),
            entry(1.0, 1_034, &[1, 9, 91]),
            entry(2.0, 1_546, &[1, 2, 3, 92]),
            entry(3.0, 2_570, &[1, 2, 3, 4, 5, 93]),
            entry(4.0, 522, &[1, 94]),
            entry(5.0, 100, &[95]),
        ];
        assert_eq!(entries_before(&entries), [None, None, Some(0), Some(2), None, None]);
    }

    #[test]
    fn the_bound_of_hits_counts_whole_blocks_seen_before() {
        let entries = [entry(0.0, 1_100, &[1, 2, 3]), entry(5.0, 1_536, &[1, 2, 4]), entry(9.0, 600, &[9, 1])];
        let summary = Summary::of(entries.into_iter().map(Ok)).unwrap();
        assert_eq!((summary.requests, summary.seen_tokens, summary.span_ms), (3, 1_024, 9.0));
    }

    #[test]
    fn turns_extend_one_another_and_conversations_share_the_system_prompt() {
        let spec: Conversations = "conversations=3,turns=2,system=1024,question=700,answer=100".parse().unwrap();
        let entries: Vec<Entry> = spec.entries().collect();
        assert_eq!(entries.len(), 6);
        for entry in &entries {
            entry.check().unwrap();
        }
        let (first, other, second) = (&entries[0], &entries[1], &entries[3]);
        assert_eq!(second.blocks[..first.blocks.len()], first.blocks);
        assert_eq!(first.blocks[..2], other.blocks[..2]);
        assert_ne!(first.blocks[2], other.blocks[2]);
        assert!(entries.is_sorted_by(|a, b| a.at_ms <= b.at_ms));
        assert!("conversation=3".parse::<Conversations>().is_err());
    }
}
