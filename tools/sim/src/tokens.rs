//! Tokens: a prompt's bytes cut into fours, block hashes over them, and text that depends on the prompt alone.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// Bytes of rendered prompt that make one token, and bytes of every generated token.
pub const BYTES_PER_TOKEN: usize = 4;
/// Fewest tokens of a text that ends by itself.
pub const NATURAL_TOKENS_MIN: u64 = 16;
/// Most tokens of a text that ends by itself.
pub const NATURAL_TOKENS_MAX: u64 = 48;
/// What a text made from another prompt's KV begins with.
pub const WRONG_PREFIX: &str = "WRONG";

/// One prompt as the engine sees it.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// What a chat template would render, or four bytes per token id.
    pub rendered: Vec<u8>,
    /// Identifies model and prompt; the text follows from it.
    pub digest: u64,
    /// Start of the block hash chain: model and cache salt.
    chain_seed: u64,
}

impl Prompt {
    /// A prompt of `model`; `cache_salt` separates its blocks from others' and does not change the text.
    #[must_use]
    pub fn new(model: &str, cache_salt: Option<&str>, rendered: Vec<u8>) -> Self {
        let model_seed = xxh3_64(model.as_bytes());
        let chain_seed = cache_salt.map_or(model_seed, |salt| xxh3_64_with_seed(salt.as_bytes(), model_seed));
        Self { digest: xxh3_64_with_seed(&rendered, model_seed), chain_seed, rendered }
    }

    /// Tokens, at least 1.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.rendered.len().div_ceil(BYTES_PER_TOKEN).max(1) as u64
    }

    /// Chained hashes of the full blocks of the prompt.
    #[must_use]
    pub fn blocks(&self, block_tokens: u32) -> Vec<u64> {
        let block_bytes = block_tokens as usize * BYTES_PER_TOKEN;
        let mut hashes = Vec::with_capacity(self.rendered.len() / block_bytes + 4);
        chain(&mut hashes, self.chain_seed, &self.rendered, block_bytes);
        hashes
    }

    /// Hashes of the full blocks that `text` completes after the prompt's own; `blocks` are the prompt's.
    #[must_use]
    pub fn blocks_after(&self, blocks: &[u64], block_tokens: u32, text: &str) -> Vec<u64> {
        let block_bytes = block_tokens as usize * BYTES_PER_TOKEN;
        let mut bytes = self.rendered.get(blocks.len() * block_bytes..).unwrap_or_default().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        let mut hashes = Vec::new();
        chain(&mut hashes, blocks.last().copied().unwrap_or(self.chain_seed), &bytes, block_bytes);
        hashes
    }
}

fn chain(hashes: &mut Vec<u64>, seed: u64, bytes: &[u8], block_bytes: usize) {
    let mut parent = seed;
    for block in bytes.chunks_exact(block_bytes) {
        parent = xxh3_64_with_seed(block, parent);
        hashes.push(parent);
    }
}

/// Where a text ends.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    /// Most tokens.
    pub max_tokens: u64,
    /// Tokens before the end or a stop string counts.
    pub min_tokens: u64,
    /// Go on to `max_tokens`.
    pub ignore_eos: bool,
    /// Strings that end the text before them.
    pub stop: Vec<String>,
}

/// Why a text ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// By itself.
    End,
    /// At this stop string.
    Stop(String),
    /// At `max_tokens`.
    Length,
}

impl Finish {
    /// `finish_reason` of the API.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::End | Self::Stop(_) => "stop",
            Self::Length => "length",
        }
    }
}

/// A generated text.
#[derive(Clone, Debug)]
pub struct Output {
    /// The whole text.
    pub text: String,
    /// Tokens, also those that a stop string cut off.
    pub tokens: u64,
    /// Why it ended.
    pub finish: Finish,
}

impl Output {
    /// The text that token `i` adds; empty where a stop string cut it off.
    #[must_use]
    pub fn token(&self, i: u64) -> &str {
        let end = self.text.len();
        let start = (i as usize).saturating_mul(BYTES_PER_TOKEN).min(end);
        // The last token takes the rest. Only wrong text leaves more than four bytes.
        let stop = if i + 1 >= self.tokens { end } else { start.saturating_add(BYTES_PER_TOKEN).min(end) };
        self.text.get(start..stop).unwrap_or_default()
    }
}

/// The text for a prompt: choice 0 without a seed is the plain one. `wrong` gives what another prompt's KV would.
#[must_use]
pub fn generate(digest: u64, seed: Option<i64>, choice: u32, limits: &Limits, wrong: bool) -> Output {
    let mut state = digest;
    if let Some(seed) = seed {
        state = xxh3_64_with_seed(&seed.to_le_bytes(), state);
    }
    if choice > 0 {
        state = xxh3_64_with_seed(&choice.to_le_bytes(), state);
    }
    // The length stays the right one: only the words differ.
    let natural = (NATURAL_TOKENS_MIN + state % (NATURAL_TOKENS_MAX - NATURAL_TOKENS_MIN + 1)).max(limits.min_tokens);
    if wrong {
        state = !state;
    }
    let (tokens, mut finish) = if limits.ignore_eos || natural > limits.max_tokens {
        (limits.max_tokens, Finish::Length)
    } else {
        (natural, Finish::End)
    };
    let mut text = String::with_capacity((tokens as usize).saturating_mul(BYTES_PER_TOKEN));
    for i in 0..tokens {
        push_word(&mut text, splitmix(state.wrapping_add(i)), i == 0);
    }
    if wrong {
        text.replace_range(..0, WRONG_PREFIX);
    }
    let mut kept = tokens;
    let from = (limits.min_tokens as usize).saturating_mul(BYTES_PER_TOKEN).min(text.len());
    let first_stop = limits
        .stop
        .iter()
        .filter(|stop| !stop.is_empty())
        .filter_map(|stop| text.get(from..)?.find(stop.as_str()).map(|index| (from + index, stop)))
        .min_by_key(|(index, _)| *index);
    if let Some((index, stop)) = first_stop {
        kept = ((index + stop.len()).div_ceil(BYTES_PER_TOKEN) as u64).clamp(1, tokens);
        finish = Finish::Stop(stop.clone());
        text.truncate(index);
    }
    Output { text, tokens: kept, finish }
}

fn push_word(text: &mut String, mut bits: u64, first: bool) {
    const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    text.push(if first { 'w' } else { ' ' });
    for _ in 0..BYTES_PER_TOKEN - 1 {
        text.push(char::from(LETTERS[(bits & 31) as usize]));
        bits >>= 5;
    }
}

/// A step of the SplitMix64 generator.
pub(crate) fn splitmix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(max_tokens: u64) -> Limits {
        Limits { max_tokens, ..Limits::default() }
    }

    #[test]
    fn the_same_prompt_gives_the_same_text_cut_where_asked() {
        let whole = generate(7, None, 0, &limits(1_000), false);
        assert_eq!(whole.finish, Finish::End);
        assert!((NATURAL_TOKENS_MIN..=NATURAL_TOKENS_MAX).contains(&whole.tokens));
        let cut = generate(7, None, 0, &limits(5), false);
        assert_eq!((cut.tokens, cut.finish.reason()), (5, "length"));
        assert_eq!(cut.text, whole.text[..20]);
        let long = generate(7, None, 0, &Limits { ignore_eos: true, ..limits(100) }, false);
        assert_eq!((long.tokens, long.text.len(), &long.finish), (100, 400, &Finish::Length));
        assert!(long.text.starts_with(&whole.text));
    }

    #[test]
    fn model_prompt_seed_and_choice_change_the_text_and_the_salt_does_not() {
        let text = |prompt: Prompt, seed, choice| generate(prompt.digest, seed, choice, &limits(9), false).text;
        let prompt = |model, salt, rendered: &str| Prompt::new(model, salt, rendered.into());
        let plain = text(prompt("m", None, "p"), None, 0);
        assert_eq!(plain, text(prompt("m", Some("salt"), "p"), None, 0));
        assert_ne!(prompt("m", Some("salt"), "12345678").blocks(1), prompt("m", None, "12345678").blocks(1));
        for other in [
            text(prompt("n", None, "p"), None, 0),
            text(prompt("m", None, "q"), None, 0),
            text(prompt("m", None, "p"), Some(1), 0),
            text(prompt("m", None, "p"), None, 1),
        ] {
            assert_ne!(plain, other);
        }
    }

    #[test]
    fn tokens_add_up_to_the_text() {
        for wrong in [false, true] {
            let output = generate(9, None, 0, &limits(1_000), wrong);
            let joined: String = (0..output.tokens).map(|i| output.token(i)).collect();
            assert_eq!(joined, output.text);
            assert_eq!(output.text.starts_with(WRONG_PREFIX), wrong);
        }
    }

    #[test]
    fn a_stop_string_ends_the_text_before_it_and_after_min_tokens() {
        let whole = generate(3, None, 0, &limits(12), false).text;
        let stop = whole[9..11].to_owned();
        let stopped = generate(3, None, 0, &Limits { stop: vec![stop.clone()], ..limits(12) }, false);
        assert_eq!(stopped.finish, Finish::Stop(stop.clone()));
        assert!(whole.starts_with(&stopped.text) && stopped.text.len() <= 9);
        assert!(stopped.tokens <= 3);
        let later = generate(3, None, 0, &Limits { stop: vec![stop], min_tokens: 11, ..limits(12) }, false);
        assert!(later.text.len() >= 44);
    }

    #[test]
    fn blocks_of_prompt_and_answer_are_the_next_turns_prefix() {
        let first = Prompt::new("m", None, b"one two three four five".to_vec());
        let blocks = first.blocks(2);
        assert_eq!(blocks.len(), 2);
        let mut both = blocks.clone();
        both.extend(first.blocks_after(&blocks, 2, "wabc def"));
        let second = Prompt::new("m", None, b"one two three four fivewabc def\n and more".to_vec());
        assert_eq!(second.blocks(2)[..both.len()], both);
        assert_eq!(both.len(), 3);
    }
}
