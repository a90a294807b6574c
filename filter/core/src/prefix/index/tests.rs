use super::*;
use proptest::prelude::*;
use std::collections::{HashMap, VecDeque};

fn chain(id: u64, len: u64) -> Vec<BlockHash> {
    (0..len).map(|i| BlockHash((id * 1_000 + i).wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect()
}

fn index(endpoints: u32, capacity: usize) -> PrefixIndex {
    let mut index = PrefixIndex::new(1 << 20);
    for endpoint in 0..endpoints {
        index.set_capacity(endpoint, capacity);
    }
    index
}

#[test]
fn of_several_holders_the_one_that_was_touched_last_comes_first() {
    let mut index = PrefixIndex::new(1 << 20);
    let block = [BlockHash(7)];
    for endpoint in 0..3 {
        index.set_capacity(endpoint, 8);
        index.insert(endpoint, &block);
    }
    assert_eq!(index.holders(&block, 8), [2, 1, 0]);
    index.insert(0, &block);
    assert_eq!(index.holders(&block, 8), [0, 2, 1]);
    index.insert(2, &block);
    assert_eq!(index.holders(&block, 2), [2, 0]);
}

#[test]
fn a_longer_prompt_matches_what_its_prefix_left() {
    let mut index = index(2, 100);
    index.insert(1, &chain(1, 4));
    assert_eq!(index.matched(1, &chain(1, 9)), 4);
    assert_eq!(index.matched(0, &chain(1, 9)), 0);
    assert_eq!(index.holders(&chain(1, 9), 8), [1]);
    assert_eq!(index.matched(7, &chain(1, 9)), 0, "an endpoint that was never added holds nothing");
}

#[test]
fn what_an_endpoint_never_got_is_taken_back_and_no_more() {
    let mut index = index(8, 100);
    for endpoint in 0..8 {
        index.insert(endpoint, &chain(1, 6));
    }
    for endpoint in [0, 7] {
        index.remove(endpoint, &chain(1, 6)[2..]);
        index.remove(endpoint, &chain(2, 3));
        assert_eq!(index.matched(endpoint, &chain(1, 6)), 2);
        index.insert(endpoint, &chain(1, 6));
        assert_eq!(index.matched(endpoint, &chain(1, 6)), 6);
    }
    for endpoint in 0..8 {
        index.remove(endpoint, &chain(1, 6));
    }
    assert!(index.is_empty() && !index.knows(chain(1, 6)[0]));
}

#[test]
fn a_full_cache_forgets_its_oldest_prompts_tail_first() {
    let mut index = index(1, 6);
    index.insert(0, &chain(1, 4));
    index.insert(0, &chain(2, 4));
    assert_eq!(index.matched(0, &chain(2, 4)), 4);
    assert_eq!(index.matched(0, &chain(1, 4)), 2);
    index.insert(0, &chain(3, 10));
    assert_eq!(index.matched(0, &chain(3, 10)), 6, "a prompt longer than the cache keeps its front");
    assert_eq!(index.len(), 6);
}

#[test]
fn the_longest_match_comes_first_among_holders() {
    let mut index = index(3, 100);
    index.insert(0, &chain(1, 2));
    index.insert(1, &chain(1, 8));
    index.insert(2, &chain(1, 5));
    assert_eq!(index.holders(&chain(1, 8), 8), [1, 2, 0]);
    assert_eq!(index.holders(&chain(1, 8), 2), [1, 2]);
}

#[test]
fn a_removed_endpoint_leaves_nothing_behind() {
    let mut index = index(2, 100);
    index.insert(0, &chain(1, 8));
    index.insert(1, &chain(1, 3));
    index.remove_endpoint(0);
    assert_eq!(index.len(), 3);
    assert_eq!(index.holders(&chain(1, 8), 8), [1]);
    index.insert(0, &chain(2, 8));
    assert_eq!(index.len(), 3, "it takes nothing until it has a capacity again");
}

#[test]
fn large_blocks_fill_a_cache_as_large_blocks_do() {
    let mut index = index(1, 100);
    index.insert(0, &chain(1, 64));
    assert_eq!(index.matched(0, &chain(1, 64)), 64, "32 of one unit, 32 of two");
    index.insert(0, &chain(2, 10));
    assert_eq!(index.matched(0, &chain(1, 64)), 61, "six units are free, two more blocks of two must go");
    index.insert(0, &chain(3, 70));
    assert_eq!(index.matched(0, &chain(3, 70)), 65);
}

#[test]
fn memory_stays_within_its_bound() {
    assert_eq!(size_of::<Block>(), BLOCK_BYTES);
    for bytes in [65_536, 300_000, 1 << 20] {
        // Prompts of one endpoint each, and prompts that all of them hold.
        for holders in [1, 16] {
            let mut index = PrefixIndex::new(bytes);
            for endpoint in 0..16 {
                index.set_capacity(endpoint, 1_000_000);
            }
            for id in 0..20_000 {
                for endpoint in 0..holders {
                    index.insert((id % 16) as u32 ^ endpoint, &chain(id / u64::from(holders), 40));
                }
            }
            assert!(index.bytes() <= bytes, "{} of {bytes}, {holders} holders", index.bytes());
            assert!(holders > 1 || index.bytes() >= bytes / 3, "{} of {bytes}", index.bytes());
            assert!((max_pairs(bytes) / 16 * 16..=max_pairs(bytes)).contains(&index.len()), "{}", index.len());
        }
    }
}

#[test]
fn what_others_do_not_need_is_anybodys_until_they_do() {
    let mut index = PrefixIndex { max_nodes: 100, ..PrefixIndex::new(0) };
    for endpoint in 0..4 {
        index.set_capacity(endpoint, 1_000_000);
    }
    let held = |index: &PrefixIndex| [0, 1, 2, 3].map(|number| index.lru.list(number).unwrap().nodes);
    for id in 0..9 {
        index.insert(0, &chain(id, 10));
    }
    assert_eq!(held(&index), [90, 0, 0, 0]);
    for id in 10..30 {
        index.insert(1 + (id % 3) as u32, &chain(id, 10));
        assert!(index.len() <= 100 && index.lru.nodes() <= 100);
    }
    assert_eq!(held(&index), [25; 4]);
    assert_eq!(index.matched(0, &chain(8, 10)), 10, "its newest are still there");
}

#[test]
fn a_shared_system_prompt_becomes_hot_and_says_nothing() {
    let mut index = index(1, 10_000);
    let prompt = |id: u64| [chain(999, 2), chain(id, 2)].concat();
    assert_eq!(index.distinctive(&prompt(0), 0.02), Some(chain(999, 2)[0]));
    for id in 0..100 {
        index.insert(0, &prompt(id));
        index.distinctive(&prompt(id), 0.02);
    }
    assert_eq!(index.distinctive(&prompt(7), 0.02), Some(chain(7, 2)[0]));
    assert_eq!(index.distinctive(&chain(999, 2), 0.02), None);
}

/// What the index must equal: per endpoint a queue of blocks, oldest first.
#[derive(Default)]
struct Oracle(HashMap<u32, VecDeque<BlockHash>>);

impl Oracle {
    fn insert(&mut self, endpoint: u32, blocks: &[BlockHash], capacity: usize) {
        let queue = self.0.entry(endpoint).or_default();
        for block in blocks.iter().take(capacity).rev() {
            if let Some(number) = queue.iter().position(|held| held == block) {
                queue.remove(number);
            } else if queue.len() >= capacity {
                queue.pop_front();
            }
            queue.push_back(*block);
        }
    }
}

proptest! {
    #[test]
    fn equals_a_plain_lru_per_endpoint(inserts in prop::collection::vec((0_u32..9, 0_u64..6, 1_u64..12, 0_u64..4), 1..90)) {
        let mut index = index(9, 20);
        let mut oracle = Oracle::default();
        for (endpoint, id, len, fork) in inserts {
            let blocks = [chain(id, len.min(4)), chain(100 + id * 10 + fork, len.saturating_sub(4))].concat();
            index.insert(endpoint, &blocks);
            oracle.insert(endpoint, &blocks, 20);
            for endpoint in 0..9 {
                let held = oracle.0.get(&endpoint);
                let matched = blocks.iter().take_while(|block| held.is_some_and(|held| held.contains(block))).count();
                prop_assert_eq!(index.matched(endpoint, &blocks), matched);
                prop_assert_eq!(index.lru.list(endpoint).unwrap().nodes, held.map_or(0, VecDeque::len));
            }
            prop_assert_eq!(index.len(), oracle.0.values().map(VecDeque::len).sum::<usize>());
        }
    }
}
