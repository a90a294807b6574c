//! The KV cache: reference-counted blocks, an LRU over those that nobody uses, as in vLLM's block pool.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hashlink::LinkedHashSet;
use tokio::sync::Notify;

/// A block that holds KV under a hash.
#[derive(Clone, Copy)]
struct Block {
    id: u32,
    /// Requests and leases that hold it.
    refs: u32,
}

struct Blocks {
    capacity: usize,
    /// By hash.
    named: HashMap<u64, Block>,
    /// Hashes of the named blocks that nobody holds, the least recently used first.
    unused: LinkedHashSet<u64>,
    /// Ids of evicted blocks.
    spare: Vec<u32>,
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
    /// Hashes of the named blocks.
    named: Vec<u64>,
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
                named: HashMap::new(),
                unused: LinkedHashSet::new(),
                spare: Vec::new(),
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
        (blocks.held() + blocks.private) as f64 / blocks.capacity as f64
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
        let mut named = Vec::with_capacity(total);
        named.extend(hashes.iter().take(limit).take_while(|hash| blocks.named.contains_key(hash)));
        let hits = named.len();
        let need = total - hits;
        let unused_hits = named.iter().filter(|hash| blocks.unused.contains(*hash)).count();
        if blocks.held() + unused_hits + blocks.private + need > blocks.capacity {
            return None;
        }
        for hash in &named {
            blocks.pin(*hash);
        }
        while blocks.named.len() + blocks.private + need > blocks.capacity && blocks.evict_oldest() {}
        blocks.private += need;
        drop(blocks);
        Some(Allocation { cache: Arc::clone(self), named, private: need, hits })
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
    #[must_use]
    pub fn ids(&self) -> Vec<u32> {
        let blocks = self.cache.lock();
        // Private blocks have no id of their own here; any that no named block has will do.
        let private = (1..).take(self.private).map(|index| blocks.capacity as u32 + index);
        self.named.iter().filter_map(|hash| blocks.named.get(hash)).map(|block| block.id).chain(private).collect()
    }

    /// Names the next blocks, now computed and full: from here on others hit them. `hashes` are those after what is
    /// named already.
    pub fn commit(&mut self, hashes: &[u64]) {
        let mut blocks = self.cache.lock();
        for hash in hashes.iter().take(self.private) {
            self.private -= 1;
            blocks.private -= 1;
            // Somebody may have computed the same block meanwhile: it is shared, the copy is free.
            if !blocks.named.contains_key(hash) {
                blocks.insert(*hash);
            }
            blocks.pin(*hash);
            self.named.push(*hash);
        }
    }

    /// Blocks with a name.
    #[must_use]
    pub fn named(&self) -> usize {
        self.named.len()
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let mut blocks = self.cache.lock();
        // The end of a prompt goes to the list first and so is evicted first: a prefix is of use without its tail.
        for hash in self.named.iter().rev() {
            blocks.unpin(*hash);
        }
        blocks.private -= self.private;
        drop(blocks);
        self.cache.freed.notify_waiters();
    }
}

impl Blocks {
    /// Named blocks that requests and leases hold.
    fn held(&self) -> usize {
        self.named.len() - self.unused.len()
    }

    fn insert(&mut self, hash: u64) {
        let id = self.spare.pop().unwrap_or(self.named.len() as u32 + 1);
        self.named.insert(hash, Block { id, refs: 0 });
        self.unused.insert(hash);
    }

    fn pin(&mut self, hash: u64) {
        if let Some(block) = self.named.get_mut(&hash) {
            block.refs += 1;
            self.unused.remove(&hash);
        }
    }

    fn unpin(&mut self, hash: u64) {
        let Some(block) = self.named.get_mut(&hash) else { return };
        block.refs -= 1;
        if block.refs == 0 {
            self.unused.insert(hash);
        }
    }

    fn evict_oldest(&mut self) -> bool {
        let Some(hash) = self.unused.pop_front() else { return false };
        self.spare.extend(self.named.remove(&hash).map(|block| block.id));
        true
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
