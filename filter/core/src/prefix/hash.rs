//! Block hashes. Two prompts with equal hashes of a block are equal up to the end of that block.
//!
//! A block is a piece of the request body as it stands, without a tokenizer or a template. Its hash is XXH3-64 with the hash
//! of the block before as the seed. The first seed is made of the model and the `cache_salt`, so equal text with another
//! model, adapter or salt does not match. The approach is the approximate prefix index of the Gateway API Inference
//! Extension (64-token blocks, chained xxhash), on bytes in place of estimated tokens.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Hash of a prompt up to the end of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub u64);

/// Seed of every chain. Changing it, or the order of what is hashed, makes every prefix unknown on upgrade.
const CHAIN_SEED: u64 = 0x7064_2d70_7265_6669;
/// Seed of session hashes: it keeps them apart from those of prompts.
const SESSION_SEED: u64 = 0x7064_2d73_6573_7369;
/// Seed of responses' hashes.
const RESPONSE_SEED: u64 = 0x7064_2d72_6573_706f;
/// Highest 16 bits of every response's hash, and of one in 65,536 others.
const RESPONSE_MARK: u64 = 0x7265_0000_0000_0000;
const RESPONSE_MASK: u64 = 0xffff_0000_0000_0000;
/// Number of blocks of one size; the blocks behind them are twice as large. Changing it remaps affinity on upgrade.
const BLOCKS_PER_SIZE: usize = 32;
/// Number of doublings: the largest blocks have 4 times the size of the smallest. Agents add a few hundred tokens to a
/// hundred thousand, so larger blocks hide most of what two turns share. With blocks of 64 times the smallest size the
/// agents of the trace simulator had 3.2 times the oracle's p90 TTFT, with 4 times the oracle's. Changing it remaps
/// affinity on upgrade.
const MAX_DOUBLINGS: usize = 2;
/// Most blocks of one prompt: 16 MiB of prompt with blocks of 512 bytes at the front. The rest of a longer prompt is not
/// hashed and counts as not held.
pub const MAX_BLOCKS: usize = 8_192;

/// Size of the block at a position, from 0 on, in units of the smallest block.
///
/// Blocks behind the front are larger, so a long prompt has few of them. The block in which a match ends is still at most
/// 1/32 of what matches.
#[must_use]
pub fn block_units(position: usize) -> usize {
    1_usize.wrapping_shl(position.checked_div(BLOCKS_PER_SIZE).unwrap_or(0).min(MAX_DOUBLINGS) as u32)
}

/// Size of the first `blocks` blocks together, in units of the smallest block.
#[must_use]
pub fn prefix_units(blocks: usize) -> usize {
    let doublings = blocks.checked_div(BLOCKS_PER_SIZE).unwrap_or(0).min(MAX_DOUBLINGS);
    let before = doublings.saturating_mul(BLOCKS_PER_SIZE);
    let units = 1_usize.wrapping_shl(doublings as u32);
    let smaller = units.saturating_sub(1).saturating_mul(BLOCKS_PER_SIZE);
    smaller.saturating_add(blocks.saturating_sub(before).saturating_mul(units))
}

/// Hashes of one prompt. Equal beginnings of two prompts have equal first hashes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PromptHash {
    /// Hash of each whole block, in order.
    pub blocks: Vec<BlockHash>,
    /// Hash of the first block, whole or not: it names a prompt that is too short for a whole block.
    pub head: u64,
}

/// Hashes `parts` in the order in which the engine reads them: tools and system text, then the prompt. Blocks have
/// `block_bytes` bytes and, further back, [multiples](block_units) of that.
///
/// - The last block of every part but the last may be short, so the next part starts with a block of its own.
/// - The piece behind the last whole block of the last part is left out: the next request of the conversation would
///   extend it.
#[must_use]
pub fn prompt_hash(model: &[u8], cache_salt: &[u8], parts: &[&[u8]], block_bytes: usize) -> PromptHash {
    let pieces: Vec<_> = parts.iter().copied().map(Piece::Text).collect();
    pieces_hash(model, cache_salt, &pieces, block_bytes)
}

/// A piece of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Text as it stands.
    Text(&'a [u8]),
    /// One of the media. It fills blocks of its own.
    Media {
        /// Payload, which is hashed.
        payload: &'a [u8],
        /// Units of the smallest block that its tokens take in a cache; 0 counts as 1.
        units: usize,
    },
}

/// As [`prompt_hash`], of pieces of text and media. Media end on a block, so that the text behind them begins one.
#[must_use]
pub fn pieces_hash(model: &[u8], cache_salt: &[u8], pieces: &[Piece<'_>], block_bytes: usize) -> PromptHash {
    let block_bytes = block_bytes.max(1);
    let mut seed = xxh3_64_with_seed(model, CHAIN_SEED);
    if !cache_salt.is_empty() {
        seed = xxh3_64_with_seed(cache_salt, seed);
    }
    let mut blocks = Vec::with_capacity(BLOCKS_PER_SIZE);
    let mut head = None;
    for (i, piece) in pieces.iter().enumerate() {
        let last = i.saturating_add(1) == pieces.len();
        let mut rest = match *piece {
            Piece::Text(text) => text,
            Piece::Media { payload, units } => {
                let identity = xxh3_64_with_seed(payload, 0).to_le_bytes();
                let mut left = units.max(1);
                while left > 0 && blocks.len() < MAX_BLOCKS {
                    left = left.saturating_sub(block_units(blocks.len()));
                    seed = xxh3_64_with_seed(&identity, seed);
                    head.get_or_insert(seed);
                    blocks.push(BlockHash(seed));
                }
                continue;
            }
        };
        while !rest.is_empty() && blocks.len() < MAX_BLOCKS {
            let size = block_bytes.saturating_mul(block_units(blocks.len()));
            let (block, behind, whole) = match rest.split_at_checked(size) {
                Some((block, behind)) => (block, behind, true),
                None => (rest, Default::default(), false),
            };
            rest = behind;
            if head.is_none() || whole || !last {
                seed = xxh3_64_with_seed(block, seed);
                head.get_or_insert(seed);
            }
            if whole || !last {
                blocks.push(BlockHash(seed));
            }
        }
    }
    PromptHash { blocks, head: head.unwrap_or(seed) }
}

/// A session as a block of its own: the hash of the model and the session's id.
#[must_use]
pub fn session_hash(model: &str, id: &[u8]) -> BlockHash {
    BlockHash(xxh3_64_with_seed(id, xxh3_64_with_seed(model.as_bytes(), SESSION_SEED)))
}

/// A response of `/v1/responses` as a block of its own: the hash of its id.
#[must_use]
pub fn response_hash(id: &str) -> BlockHash {
    BlockHash(xxh3_64_with_seed(id.as_bytes(), RESPONSE_SEED) & !RESPONSE_MASK | RESPONSE_MARK)
}

impl BlockHash {
    /// Whether this may be the hash of a response. It is also true of one in 65,536 hashes of prompts and sessions.
    #[must_use]
    pub fn is_response(self) -> bool {
        self.0 & RESPONSE_MASK == RESPONSE_MARK
    }
}

/// Weight of the endpoint with the key `endpoint` for a prompt's `key`, under rendezvous hashing (highest random weight,
/// Thaler and Ravishankar 1998). The endpoint with the highest weight owns the prompt's key. When an endpoint leaves, only
/// the keys that it owned move.
#[must_use]
pub fn rendezvous_weight(key: u64, endpoint: u64) -> u64 {
    // Two multiply-xorshift rounds (SplitMix64's finaliser) on the pair. They mix well enough for a choice and take 2 ns.
    let mut x = key ^ endpoint.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(parts: &[&[u8]]) -> PromptHash {
        prompt_hash(b"m", b"", parts, 4)
    }

    #[test]
    fn a_longer_prompt_keeps_the_hashes_of_its_prefix() {
        let short = hash(&[b"abcdefgh"]);
        let long = hash(&[b"abcdefghijk"]);
        assert_eq!(short.blocks.len(), 2);
        assert_eq!(long.blocks, short.blocks, "the trailing piece is no block");
        assert_eq!(hash(&[b"abcdefghijkl"]).blocks[..2], short.blocks);
        assert_eq!(short.head, long.head);
    }

    #[test]
    fn equal_blocks_behind_different_prefixes_differ() {
        assert_ne!(hash(&[b"aaaabbbb"]).blocks[1], hash(&[b"ccccbbbb"]).blocks[1]);
    }

    #[test]
    fn model_and_salt_separate_prompts() {
        let a = prompt_hash(b"m", b"", &[b"abcd"], 4);
        assert_ne!(a, prompt_hash(b"n", b"", &[b"abcd"], 4));
        assert_ne!(a, prompt_hash(b"m", b"s", &[b"abcd"], 4));
    }

    #[test]
    fn tools_end_on_a_block_of_their_own() {
        let first = hash(&[b"tools!", b"aaaa"]);
        let second = hash(&[b"tools!", b"bbbb"]);
        assert_eq!(first.blocks.len(), 3);
        assert_eq!(first.blocks[..2], second.blocks[..2]);
        assert_ne!(first.blocks[2], second.blocks[2]);
    }

    #[test]
    fn different_media_hash_differently_and_fill_blocks_by_their_tokens() {
        let of = |payload: &'static [u8], units| {
            let media = Piece::Media { payload, units };
            pieces_hash(b"m", b"", &[Piece::Text(b"abcdef"), media, Piece::Text(b"ghijkl")], 4)
        };
        let (one, other) = (of(b"an image", 3), of(b"another image", 3));
        assert_eq!(one.blocks.len(), 2 + 3 + 1);
        assert_eq!(one.blocks[..2], other.blocks[..2]);
        assert!(one.blocks[2..].iter().all(|block| !other.blocks.contains(block)));
        assert_eq!(of(b"an image", 0).blocks.len(), 2 + 1 + 1);
        assert_eq!(of(b"an image", usize::MAX).blocks.len(), MAX_BLOCKS);
        // A longer conversation keeps the hashes.
        let longer =
            [Piece::Text(b"abcdef"), Piece::Media { payload: b"an image", units: 3 }, Piece::Text(b"ghijklmnop")];
        assert_eq!(pieces_hash(b"m", b"", &longer, 4).blocks[..6], one.blocks);
    }

    #[test]
    fn short_prompts_have_a_head_but_no_block() {
        let short = hash(&[b"ab"]);
        assert!(short.blocks.is_empty());
        assert_ne!(short.head, hash(&[b"ba"]).head);
    }

    #[test]
    fn blocks_grow_and_their_sizes_add_up() {
        let mut sum = 0;
        for position in 0..MAX_BLOCKS {
            assert_eq!(prefix_units(position), sum);
            assert!(position < BLOCKS_PER_SIZE || block_units(position) * 32 <= sum + 32);
            sum += block_units(position);
        }
        let prompt = vec![b'x'; 220_000];
        let hashed = prompt_hash(b"m", b"", &[&prompt], 512).blocks.len();
        assert!(hashed < 150 && prefix_units(hashed) * 512 <= 220_000 && prefix_units(hashed + 1) * 512 > 220_000);
    }

    #[test]
    fn rendezvous_moves_only_the_keys_of_an_endpoint_that_leaves() {
        let owner = |key, endpoints: &[u64]| *endpoints.iter().max_by_key(|e| rendezvous_weight(key, **e)).unwrap();
        let mut per_endpoint = [0_u32; 4];
        for key in 0..4_000 {
            let key = xxh3_64_with_seed(b"", key);
            let four = owner(key, &[0, 1, 2, 3]);
            per_endpoint[four as usize] += 1;
            let three = owner(key, &[0, 1, 2]);
            assert!(four == 3 || four == three);
        }
        assert!(per_endpoint.iter().all(|n| (850..1_150).contains(n)), "{per_endpoint:?}");
    }
}
