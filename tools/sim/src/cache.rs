//! The KV cache: reference-counted blocks, an LRU over those that nobody uses, as in vLLM's block pool.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

const NONE: u32 = u32::MAX;

/// Block hashes are hashes already.
#[derive(Default)]
struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

/// A block that holds KV under a hash. In the LRU list exactly when `refs` is 0.
#[derive(Clone, Copy)]
struct Node {
    hash: u64,
    refs: u32,
    older: u32,
    newer: u32,
}

struct Blocks {
    capacity: usize,
    map: HashMap<u64, u32, BuildHasherDefault<Identity>>,
    nodes: Vec<Node>,
    spare: Vec<u32>,
    oldest: u32,
    newest: u32,
    /// Blocks with `refs` above 0.
    referenced: usize,
    /// Blocks that requests hold and that have no hash (not yet computed, or not full).
    private: usize,
}

/// The KV cache of one server.
pub struct Cache {
    blocks: Mutex<Blocks>,
    freed: Notify,
}

/// Blocks that a request or a lease holds; dropping it gives them back, and those with a hash stay cached.
pub struct Allocation {
    cache: Arc<Cache>,
    nodes: Vec<u32>,
    private: usize,
    hits: usize,
}

impl Cache {
    /// A cache of `capacity` blocks.
    #[must_use]
    pub fn new(capacity: usize) -> Arc<Self> {
        Arc::new(Self {
            blocks: Mutex::new(Blocks {
                capacity,
                map: HashMap::default(),
                nodes: Vec::new(),
                spare: Vec::new(),
                oldest: NONE,
                newest: NONE,
                referenced: 0,
                private: 0,
            }),
            freed: Notify::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks that the cache has.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.lock().capacity
    }

    /// Share of the blocks that requests and leases hold, 0 to 1; cached blocks that nobody holds are free.
    #[must_use]
    pub fn usage(&self) -> f64 {
        let blocks = self.lock();
        (blocks.referenced + blocks.private) as f64 / blocks.capacity as f64
    }

    /// Forgets every block that nobody holds.
    pub fn clear(&self) {
        let mut blocks = self.lock();
        while blocks.evict_oldest() {}
    }

    /// Holds `total` blocks for a prompt whose full blocks are `hashes`, at most `max_hits` of them from the cache;
    /// `None` while so many are not free.
    pub fn try_reserve(self: &Arc<Self>, hashes: &[u64], max_hits: usize, total: usize) -> Option<Allocation> {
        let mut blocks = self.lock();
        let limit = max_hits.min(total);
        let mut nodes = Vec::with_capacity(total);
        nodes.extend(hashes.iter().take(limit).map_while(|hash| blocks.map.get(hash).copied()));
        let hits = nodes.len();
        let need = total - hits;
        let pinned_by_hits = nodes.iter().filter(|node| blocks.nodes[**node as usize].refs == 0).count();
        if blocks.referenced + pinned_by_hits + blocks.private + need > blocks.capacity {
            return None;
        }
        for node in &nodes {
            blocks.pin(*node);
        }
        while blocks.map.len() + blocks.private + need > blocks.capacity && blocks.evict_oldest() {}
        blocks.private += need;
        drop(blocks);
        Some(Allocation { cache: Arc::clone(self), nodes, private: need, hits })
    }

    /// As [`Cache::try_reserve`], waiting until so many blocks are free; `None` if there never are.
    pub async fn reserve(self: &Arc<Self>, hashes: &[u64], max_hits: usize, total: usize) -> Option<Allocation> {
        if total > self.capacity() {
            return None;
        }
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            if let Some(allocation) = self.try_reserve(hashes, max_hits, total) {
                return Some(allocation);
            }
            freed.await;
        }
    }
}

impl Allocation {
    /// Blocks that the cache held already.
    #[must_use]
    pub fn hits(&self) -> usize {
        self.hits
    }

    /// Ids of the blocks, as a server hands them out.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        let capacity = self.cache.capacity() as u32;
        // Private blocks have no id of their own here; any that no cached block has will do.
        self.nodes.iter().map(|node| node + 1).chain((1..).take(self.private).map(move |i| capacity + i))
    }

    /// Names the next blocks, now computed and full: from here on others hit them. `hashes` are those after what is
    /// named already.
    pub fn commit(&mut self, hashes: &[u64]) {
        let mut blocks = self.cache.lock();
        for hash in hashes.iter().take(self.private) {
            self.private -= 1;
            blocks.private -= 1;
            let node = match blocks.map.get(hash) {
                // Somebody computed the same block meanwhile: share it, the copy is free.
                Some(node) => *node,
                None => blocks.insert(*hash),
            };
            blocks.pin(node);
            self.nodes.push(node);
        }
    }

    /// Blocks with a name.
    #[must_use]
    pub fn named(&self) -> usize {
        self.nodes.len()
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let mut blocks = self.cache.lock();
        // The end of a prompt goes to the list first and so is evicted first: a prefix is of use without its tail.
        for node in self.nodes.iter().rev() {
            blocks.unpin(*node);
        }
        blocks.private -= self.private;
        drop(blocks);
        self.cache.freed.notify_waiters();
    }
}

impl Blocks {
    fn insert(&mut self, hash: u64) -> u32 {
        let node = Node { hash, refs: 0, older: NONE, newer: NONE };
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
        self.map.insert(hash, index);
        self.link_newest(index);
        index
    }

    fn pin(&mut self, index: u32) {
        if self.nodes[index as usize].refs == 0 {
            self.unlink(index);
            self.referenced += 1;
        }
        self.nodes[index as usize].refs += 1;
    }

    fn unpin(&mut self, index: u32) {
        self.nodes[index as usize].refs -= 1;
        if self.nodes[index as usize].refs == 0 {
            self.referenced -= 1;
            self.link_newest(index);
        }
    }

    fn evict_oldest(&mut self) -> bool {
        let index = self.oldest;
        if index == NONE {
            return false;
        }
        self.unlink(index);
        self.map.remove(&self.nodes[index as usize].hash);
        self.spare.push(index);
        true
    }

    fn link_newest(&mut self, index: u32) {
        let newest = self.newest;
        self.nodes[index as usize].older = newest;
        self.nodes[index as usize].newer = NONE;
        match newest {
            NONE => self.oldest = index,
            newest => self.nodes[newest as usize].newer = index,
        }
        self.newest = index;
    }

    fn unlink(&mut self, index: u32) {
        let Node { older, newer, .. } = self.nodes[index as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.nodes[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.nodes[newer as usize].older = older,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(cache: &Arc<Cache>, hashes: &[u64]) -> usize {
        let mut allocation = cache.try_reserve(hashes, hashes.len(), hashes.len()).unwrap();
        let hits = allocation.hits();
        allocation.commit(&hashes[hits..]);
        hits
    }

    #[test]
    fn a_prompt_hits_its_longest_cached_prefix() {
        let cache = Cache::new(10);
        assert_eq!(run(&cache, &[1, 2, 3]), 0);
        assert_eq!(run(&cache, &[1, 2, 9]), 2);
        assert_eq!(run(&cache, &[8, 1, 2]), 0);
        assert_eq!(cache.try_reserve(&[1, 2, 3], 2, 3).unwrap().hits(), 2);
    }

    #[test]
    fn the_oldest_tail_is_evicted_first() {
        let cache = Cache::new(4);
        run(&cache, &[1, 2, 3]);
        run(&cache, &[7, 8]);
        // One of the old three had to go: the last.
        assert_eq!(run(&cache, &[1, 2, 3]), 2);
    }

    #[test]
    fn held_blocks_are_neither_evicted_nor_given_twice() {
        let cache = Cache::new(4);
        let mut held = cache.try_reserve(&[1, 2, 3], 3, 3).unwrap();
        held.commit(&[1, 2, 3]);
        assert_eq!(cache.usage(), 0.75);
        assert!(cache.try_reserve(&[5, 6], 2, 2).is_none());
        assert_eq!(cache.try_reserve(&[1, 2, 5], 3, 3).unwrap().hits(), 2);
        assert_eq!(cache.usage(), 0.75);
        drop(held);
        assert_eq!(cache.usage(), 0.0);
        assert_eq!(run(&cache, &[5, 6]), 0);
        assert_eq!(run(&cache, &[1, 2, 3]), 2);
    }

    #[test]
    fn two_requests_that_compute_the_same_blocks_share_them() {
        let cache = Cache::new(4);
        let mut a = cache.try_reserve(&[1, 2], 2, 2).unwrap();
        let mut b = cache.try_reserve(&[1, 2], 2, 2).unwrap();
        a.commit(&[1, 2]);
        b.commit(&[1, 2]);
        assert_eq!(cache.usage(), 0.5);
        drop((a, b));
        assert_eq!(cache.usage(), 0.0);
        cache.clear();
        assert_eq!(run(&cache, &[1, 2]), 0);
    }

    #[test]
    fn blocks_of_a_dropped_reservation_are_not_cached() {
        let cache = Cache::new(4);
        drop(cache.try_reserve(&[1, 2], 2, 4));
        assert_eq!(run(&cache, &[1, 2]), 0);
    }
}
