//! Text for a trace's blocks: equal ids give equal bytes, different ids different ones from the first word on.

use pd_sim::BYTES_PER_TOKEN;

use crate::trace::{BLOCK_TOKENS, Entry};

/// The body of an entry's chat request: its first block is the system message, the others are the user's. Answers have
/// the length that the trace says.
#[must_use]
pub fn chat_body(model: &str, entry: &Entry, stream: bool) -> Vec<u8> {
    let bytes = entry.input_tokens as usize * BYTES_PER_TOKEN;
    let mut body = Vec::with_capacity(bytes + 256);
    body.extend_from_slice(b"{\"model\":");
    body.extend_from_slice(serde_json::Value::from(model).to_string().as_bytes());
    body.extend_from_slice(b",\"messages\":[{\"role\":\"system\",\"content\":\"");
    let mut left = entry.input_tokens;
    for (i, id) in entry.blocks.iter().enumerate() {
        if i == 1 {
            body.extend_from_slice(USER);
        }
        push_block(&mut body, *id, left.min(BLOCK_TOKENS));
        left = left.saturating_sub(BLOCK_TOKENS);
    }
    if entry.blocks.len() < 2 {
        body.extend_from_slice(USER);
    }
    body.extend_from_slice(b"\"}],");
    let tokens = entry.output_tokens.max(1);
    let usage = if stream { ",\"stream_options\":{\"include_usage\":true}" } else { "" };
    let tail = format!("\"max_tokens\":{tokens},\"ignore_eos\":true,\"temperature\":0.7,\"stream\":{stream}{usage}}}");
    body.extend_from_slice(tail.as_bytes());
    body
}

const USER: &[u8] = b"\"},{\"role\":\"user\",\"content\":\"";

/// A word of [`BYTES_PER_TOKEN`] bytes per token. The first four words spell the id, so that no two ids share a prefix
/// longer than that.
fn push_block(body: &mut Vec<u8>, id: u64, tokens: u64) {
    const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    for token in 0..tokens {
        let mut bits = if token < 4 { id >> (15 * (3 - token)) } else { mixed(id.rotate_left(32) ^ token) };
        for _ in 1..BYTES_PER_TOKEN {
            body.push(LETTERS[(bits & 31) as usize]);
            bits >>= 5;
        }
        body.push(b' ');
    }
}

/// SplitMix64's finaliser.
fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BLOCK_BYTES: usize = BLOCK_TOKENS as usize * BYTES_PER_TOKEN;

    fn entry(blocks: Vec<u64>, cut: u64) -> Entry {
        let input_tokens = (blocks.len() as u64 * BLOCK_TOKENS).saturating_sub(cut);
        Entry { at_ms: 0.0, input_tokens, output_tokens: 3, blocks }
    }

    fn common(a: &[u8], b: &[u8]) -> usize {
        a.iter().zip(b).take_while(|(a, b)| a == b).count()
    }

    #[test]
    fn a_body_is_a_chat_request_of_the_length_asked_for() {
        for entry in [entry(vec![1, 2, 3], 100), entry(vec![7], 500), entry(vec![7], 0)] {
            let body: serde_json::Value = serde_json::from_slice(&chat_body("m", &entry, true)).unwrap();
            let content = |i: usize| body["messages"][i]["content"].as_str().unwrap().len();
            assert_eq!((content(0) + content(1)) as u64, entry.input_tokens * BYTES_PER_TOKEN as u64);
            assert_eq!(body["max_tokens"], 3);
            assert!(!pd_sim::expected_text("m", chat_body("m", &entry, false)).is_empty());
        }
    }

    proptest! {
        #[test]
        fn equal_leading_ids_are_equal_leading_bytes_and_no_more(
            shared in prop::collection::vec(0..u64::MAX >> 4, 0..6),
            a in prop::collection::vec(0..1_000_u64, 1..4),
            b in prop::collection::vec(1_000..2_000_u64, 1..4),
        ) {
            let join = |rest: &[u64]| entry(shared.iter().chain(rest).copied().collect(), 0);
            let (a, b) = (chat_body("m", &join(&a), true), chat_body("m", &join(&b), true));
            let head = chat_body("m", &entry(vec![], 0), true).windows(USER.len()).position(|w| w == USER).unwrap();
            let between = if shared.is_empty() { 0 } else { USER.len() };
            let expected = head + between + shared.len() * BLOCK_BYTES;
            let same = common(&a, &b);
            prop_assert!((expected..expected + 4 * BYTES_PER_TOKEN).contains(&same), "{same} of {expected}");
        }

        #[test]
        fn a_cut_block_is_the_begin_of_the_whole_one(blocks in prop::collection::vec(0..50_u64, 2..6), cut in 1..512_u64) {
            let (whole, short) = (entry(blocks.clone(), 0), entry(blocks, cut));
            let (whole, short) = (chat_body("m", &whole, true), chat_body("m", &short, true));
            let text = short.windows(3).rposition(|window| window == b"\"}]").unwrap();
            prop_assert_eq!(&whole[..text], &short[..text]);
        }
    }
}
