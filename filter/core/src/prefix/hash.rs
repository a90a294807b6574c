//! Prefix hashes: equal chains mean equal prompts up to and including that block.
//!
//! Blocks are bytes of the request body as they stand (no tokenizer, no rendering), hashed by XXH3-64 with the hash of
//! the block before as the seed. The first seed is the model and the `cache_salt`, so that equal text under another
//! model, adapter or tenant never matches. The approach is the approximate prefix index of the Gateway API Inference
//! Extension (64-token blocks, chained xxhash), on bytes in place of estimated tokens.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Chained hash of a prompt up to and including one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub u64);

/// Seed of every chain. Changing it, or the order of what is hashed, makes every prefix unknown on upgrade.
const CHAIN_SEED: u64 = 0x7064_2d70_7265_6669;
/// Seed of session hashes: a session is no prompt.
const SESSION_SEED: u64 = 0x7064_2d73_6573_7369;
/// Blocks of one size before the next size, which is twice as large. Changing it remaps affinity on upgrade.
const BLOCKS_PER_SIZE: usize = 32;
/// Doublings after which blocks grow no more: 4 times the smallest. Agents add a few hundred tokens to a hundred
/// thousand, so a block that grows with the prompt hides most of what they share: with 64 times the smallest the
/// trace simulator's agents had 3.2 times the oracle's p90 TTFT, with 4 times none more. Changing it remaps affinity on
/// upgrade.
const MAX_DOUBLINGS: usize = 2;
/// Blocks that one prompt may have; what lies behind is not hashed and counts as not cached. With blocks of 512 bytes
/// at the front this is 16 MiB of prompt.
pub const MAX_BLOCKS: usize = 8_192;

/// Size of the block at a position, in units of the smallest block.
///
/// Blocks behind the front are larger, so that hashing and indexing a long prompt costs little and the last block that
/// does not match is still a small part of what does: 1/32 of it or less.
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

/// Hashes of one prompt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PromptHash {
    /// Chain over the whole blocks, first block first.
    pub blocks: Vec<BlockHash>,
    /// Hash of the prompt's first bytes, at most one block: names prompts that are too short for a whole block.
    pub head: u64,
}

/// Hashes what the engine puts in front (`parts`: tools and system text, then the prompt) in blocks of `block_bytes`
/// and, further back, [multiples](block_units) of it.
///
/// Every part but the last ends its last block early, so that the parts behind start on a block of their own; the last
/// part's trailing piece, which the next turn of the conversation would extend, is left out.
#[must_use]
pub fn prompt_hash(model: &[u8], cache_salt: &[u8], parts: &[&[u8]], block_bytes: usize) -> PromptHash {
    let block_bytes = block_bytes.max(1);
    let mut seed = xxh3_64_with_seed(model, CHAIN_SEED);
    if !cache_salt.is_empty() {
        seed = xxh3_64_with_seed(cache_salt, seed);
    }
    let mut blocks = Vec::with_capacity(BLOCKS_PER_SIZE);
    let mut head = None;
    for (i, part) in parts.iter().enumerate() {
        let last = i.saturating_add(1) == parts.len();
        let mut rest = *part;
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

/// A session as a block of its own: what the client sent as its id, under the model.
#[must_use]
pub fn session_hash(model: &str, id: &[u8]) -> BlockHash {
    BlockHash(xxh3_64_with_seed(id, xxh3_64_with_seed(model.as_bytes(), SESSION_SEED)))
}

/// Weight of an endpoint for a key under rendezvous hashing (highest random weight, Thaler and Ravishankar 1998): the
/// endpoint with the highest weight owns the key, and only its keys move when it leaves.
#[must_use]
pub fn rendezvous_weight(key: u64, endpoint: u64) -> u64 {
    // Two multiply-xorshift rounds (SplitMix64's finaliser) on the pair: enough mixing for a choice, at two nanoseconds.
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
