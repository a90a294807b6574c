//! Caches of prompt blocks: least recently used first out, in two tiers, as of a server with a GPU and a CPU tier.

use hashbrown::HashMap;

const NIL: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Node {
    block: u64,
    newer: u32,
    older: u32,
}

/// Blocks in the order of their use.
#[derive(Clone, Debug)]
pub struct Lru {
    places: HashMap<u64, u32>,
    nodes: Vec<Node>,
    spare: Vec<u32>,
    newest: u32,
    oldest: u32,
    capacity: usize,
}

impl Lru {
    /// Room for so many blocks.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { places: HashMap::new(), nodes: Vec::new(), spare: Vec::new(), newest: NIL, oldest: NIL, capacity }
    }

    /// Blocks held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Whether this block is held.
    #[must_use]
    pub fn holds(&self, block: u64) -> bool {
        self.places.contains_key(&block)
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
        if let Some(&index) = self.places.get(&block) {
            self.unlink(index);
            self.link_newest(index);
            return None;
        }
        let out = (self.len() >= self.capacity).then(|| self.nodes[self.oldest as usize].block);
        if let Some(out) = out {
            self.remove(out);
        }
        let node = Node { block, newer: NIL, older: NIL };
        let index = match self.spare.pop() {
            Some(index) => {
                self.nodes[index as usize] = node;
                index
            }
            None => {
                self.nodes.push(node);
                (self.nodes.len() - 1) as u32
            }
        };
        self.places.insert(block, index);
        self.link_newest(index);
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
        if let Some(index) = self.places.remove(&block) {
            self.unlink(index);
            self.spare.push(index);
        }
    }

    fn link_newest(&mut self, index: u32) {
        let second = self.newest;
        self.nodes[index as usize].newer = NIL;
        self.nodes[index as usize].older = second;
        match second {
            NIL => self.oldest = index,
            second => self.nodes[second as usize].newer = index,
        }
        self.newest = index;
    }

    fn unlink(&mut self, index: u32) {
        let Node { newer, older, .. } = self.nodes[index as usize];
        match older {
            NIL => self.oldest = newer,
            older => self.nodes[older as usize].newer = newer,
        }
        match newer {
            NIL => self.newest = older,
            newer => self.nodes[newer as usize].older = older,
        }
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
