//! Caches of prompt blocks: least recently used first out, in two tiers, as of a server with a GPU and a CPU tier.

use hashlink::LinkedHashSet;

/// Blocks in the order of their use, at most `capacity` of them.
#[derive(Clone, Debug)]
pub struct Lru {
    /// The least recently used first.
    blocks: LinkedHashSet<u64>,
    capacity: usize,
}

impl Lru {
    /// Room for so many blocks.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { blocks: LinkedHashSet::new(), capacity }
    }

    /// Blocks held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Whether this block is held.
    #[must_use]
    pub fn holds(&self, block: u64) -> bool {
        self.blocks.contains(&block)
    }

    /// Leading blocks that are held.
    #[must_use]
    pub fn matched(&self, blocks: &[u64]) -> usize {
        blocks.iter().take_while(|block| self.holds(**block)).count()
    }

    /// Makes a block the newest; what falls out is returned.
    pub fn touch(&mut self, block: u64) -> Option<u64> {
        if self.capacity == 0 {
            return Some(block);
        }
        if self.blocks.to_back(&block) {
            return None;
        }
        let out = if self.len() >= self.capacity { self.blocks.pop_front() } else { None };
        self.blocks.insert(block);
        out
    }

    /// Enters a prompt: its last block first, so that a prefix outlives what stands behind it.
    pub fn hold(&mut self, blocks: &[u64]) {
        for block in blocks.iter().take(self.capacity).rev() {
            self.touch(*block);
        }
    }

    /// Drops a block, if it is held.
    pub fn remove(&mut self, block: u64) {
        self.blocks.remove(&block);
    }
}

/// Leading blocks of a prompt that a cache holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// All of them.
    pub blocks: usize,
    /// Of these, those that have to be fetched from the slow tier.
    pub slow: usize,
}

/// A server's cache. What falls out of the fast tier goes to the slow one; what is hit there comes back.
#[derive(Clone, Debug)]
pub struct Tiers {
    fast: Lru,
    slow: Lru,
}

impl Tiers {
    /// A cache of `capacity` blocks, of which at most `fast` are in the fast tier.
    #[must_use]
    pub fn new(capacity: usize, fast: usize) -> Self {
        let fast = fast.min(capacity);
        Self { fast: Lru::new(fast), slow: Lru::new(capacity - fast) }
    }

    /// What the cache holds of a prompt.
    #[must_use]
    pub fn held(&self, blocks: &[u64]) -> Held {
        let mut held = Held::default();
        for block in blocks {
            if !self.fast.holds(*block) {
                if !self.slow.holds(*block) {
                    break;
                }
                held.slow += 1;
            }
            held.blocks += 1;
        }
        held
    }

    /// Leading blocks that the cache holds, quickly: of a prompt the front leaves the cache last.
    #[must_use]
    pub fn leading(&self, blocks: &[u64]) -> usize {
        blocks.partition_point(|block| self.fast.holds(*block) || self.slow.holds(*block))
    }

    /// Enters a prompt that was computed.
    pub fn hold(&mut self, blocks: &[u64]) {
        let room = self.fast.capacity + self.slow.capacity;
        for block in blocks.iter().take(room).rev() {
            self.slow.remove(*block);
            if let Some(out) = self.fast.touch(*block) {
                self.slow.touch(out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_the_oldest_prompt_goes_first() {
        let mut lru = Lru::new(4);
        lru.hold(&[1, 2, 3]);
        lru.hold(&[7, 8]);
        assert_eq!((lru.matched(&[1, 2, 3]), lru.matched(&[7, 8]), lru.len()), (2, 2, 4));
        lru.hold(&[1, 2, 3, 4, 5]);
        assert_eq!(lru.matched(&[1, 2, 3, 4, 5]), 4, "a prompt longer than the cache keeps its front");
    }

    #[test]
    fn what_leaves_the_fast_tier_is_still_held() {
        let mut tiers = Tiers::new(5, 2);
        tiers.hold(&[1, 2]);
        tiers.hold(&[3, 4]);
        assert_eq!(tiers.held(&[1, 2]), Held { blocks: 2, slow: 2 });
        assert_eq!(tiers.held(&[3, 4]), Held { blocks: 2, slow: 0 });
        tiers.hold(&[1, 2]);
        assert_eq!(tiers.held(&[1, 2, 9]), Held { blocks: 2, slow: 0 });
        tiers.hold(&[5, 6]);
        assert_eq!(tiers.held(&[3, 4]), Held { blocks: 1, slow: 1 }, "five blocks in all");
    }

    #[test]
    fn a_cache_without_room_holds_nothing() {
        let mut tiers = Tiers::new(0, 10);
        tiers.hold(&[1]);
        assert_eq!(tiers.held(&[1]), Held::default());
    }
}
