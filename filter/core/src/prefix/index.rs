//! The prefix index: which endpoint holds which blocks. It learns from the requests that this worker and others sent.
//!
//! Each endpoint has an LRU list of blocks, as long as the endpoint's cache. A prompt's blocks are touched from the last to
//! the first, as vLLM frees them, so an endpoint that holds a block holds every block before it. The length of a match is
//! found by bisection.

use hashbrown::HashTable;

use crate::prefix::hash::{BlockHash, block_units, prefix_units};
use crate::prefix::lru::{List, Lru, NIL, NODE_BYTES, put};

pub use crate::prefix::lru::EndpointIndex;

/// Endpoints that a block lists as its holders, newest first. Other holders match, but [`PrefixIndex::holders`] does not find
/// them. With five holders a block fills one cache line. Cache misses determine the time of the index.
const RECENT_HOLDERS: usize = 5;
/// Bytes of one place of the table of blocks, its control byte included.
const PLACE_BYTES: usize = size_of::<u32>() + 1;
/// Bytes of a block.
const BLOCK_BYTES: usize = 64;
/// Places of the table for so many (endpoint, block) pairs. At that load the table does not grow because of removals.
const PLACES: usize = 16;
const PAIRS: usize = 7;
/// Bytes of a pair: its block, its node, the lists of free ones, its part of the table, and the table of other holders if
/// all endpoints hold the same blocks. Vectors and tables grow by doubling, so they may take twice that.
const BYTES_PER_PAIR: usize =
    2 * (BLOCK_BYTES + NODE_BYTES + 4 * size_of::<u32>() + (PLACES * PLACE_BYTES).div_ceil(PAIRS));
/// Number of requests over which the share of requests with a block is averaged.
const SHARE_WINDOW: f32 = 1_000.0;

/// Which endpoint holds which blocks, as one worker knows it: a bounded table with an LRU list per endpoint.
#[derive(Debug)]
pub struct PrefixIndex {
    lru: Lru,
    /// The blocks. A new block takes the place of the block that was dropped last. Blocks of a prompt are dropped together,
    /// so the blocks of the next prompt lie side by side. Blocks in the table itself would cost two cache misses each.
    blocks: Vec<Block>,
    free_blocks: Vec<u32>,
    /// Numbers of the blocks, by hash.
    by_hash: HashTable<u32>,
    /// Nodes of holders that their blocks do not list.
    others: HashTable<u32>,
    max_nodes: usize,
    requests: u32,
}

#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Block {
    hash: BlockHash,
    recent: [Holder; RECENT_HOLDERS],
    /// Number of holders that are not in `recent`.
    others: u32,
    seen: f32,
    seen_at: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holder {
    endpoint: EndpointIndex,
    node: u32,
}

/// An empty place for a holder.
const NOBODY: Holder = Holder { endpoint: NIL, node: NIL };

impl Block {
    /// Number of endpoints that hold it.
    fn holders(&self) -> usize {
        let listed = self.recent.iter().filter(|holder| holder.endpoint != NIL).count();
        listed.saturating_add(self.others as usize)
    }
}

impl PrefixIndex {
    /// An empty index that takes at most `bytes` bytes of memory, beside a list head for each endpoint.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self {
            lru: Lru::default(),
            blocks: Vec::new(),
            free_blocks: Vec::new(),
            by_hash: HashTable::new(),
            others: HashTable::new(),
            max_nodes: max_pairs(bytes),
            requests: 0,
        }
    }

    /// Number of (endpoint, block) pairs.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lru.len()
    }

    /// Whether no endpoint holds any block.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of memory in use, at most what [`new`](Self::new) was given.
    #[must_use]
    pub fn bytes(&self) -> usize {
        // A table has a power of two of places and is at most 7/8 full.
        let places = self.by_hash.capacity().saturating_mul(8).wrapping_div(7).next_power_of_two();
        let numbers = [self.others.capacity(), self.free_blocks.capacity()];
        let parts = [
            places.saturating_mul(PLACE_BYTES),
            self.blocks.capacity().saturating_mul(BLOCK_BYTES),
            self.lru.bytes(),
            numbers.into_iter().fold(0, usize::saturating_add).saturating_mul(size_of::<u32>()),
        ];
        parts.into_iter().fold(0, usize::saturating_add)
    }

    /// Size of an endpoint's cache, in units of the smallest block; 0 for an endpoint that the index does not know.
    #[must_use]
    pub fn capacity(&self, endpoint: EndpointIndex) -> usize {
        self.lru.list(endpoint).map_or(0, |list| list.capacity)
    }

    /// Sets the size of an endpoint's cache, in units of the smallest block. Blocks beyond it are dropped, oldest first.
    pub fn set_capacity(&mut self, endpoint: EndpointIndex, units: usize) {
        self.lru.set_capacity(endpoint, units);
        while self.lru.list(endpoint).is_some_and(|list| list.units > units) {
            self.drop_oldest(endpoint);
        }
    }

    /// Drops all blocks of an endpoint. The index keeps no block of the endpoint until the endpoint has a capacity again.
    pub fn remove_endpoint(&mut self, endpoint: EndpointIndex) {
        self.set_capacity(endpoint, 0);
    }

    /// Drops all blocks of an endpoint. Its capacity stays.
    pub fn forget(&mut self, endpoint: EndpointIndex) {
        let units = self.capacity(endpoint);
        self.set_capacity(endpoint, 0);
        self.set_capacity(endpoint, units);
    }

    /// Number of leading blocks that `endpoint` holds.
    #[must_use]
    pub fn matched(&self, endpoint: EndpointIndex, blocks: &[BlockHash]) -> usize {
        blocks.partition_point(|block| self.node_of(*block, endpoint).is_some())
    }

    /// Endpoints that hold the most leading blocks, longest match first, at most `limit`. Holders that no block lists are
    /// left out. Empty where no endpoint holds the first block.
    #[must_use]
    pub fn holders(&self, blocks: &[BlockHash], limit: usize) -> Vec<EndpointIndex> {
        // Who holds any block holds the first one.
        let Some(first) = blocks.first().and_then(|hash| self.block_of(*hash)) else { return Vec::new() };
        let limit = limit.min(first.holders());
        let known = blocks.partition_point(|block| self.block_of(*block).is_some());
        let mut holders = Vec::with_capacity(limit);
        for hash in blocks.iter().take(known).rev() {
            let Some(block) = self.block_of(*hash) else { continue };
            for endpoint in block.recent.iter().map(|holder| holder.endpoint).filter(|endpoint| *endpoint != NIL) {
                if holders.len() < limit && !holders.contains(&endpoint) {
                    holders.push(endpoint);
                }
            }
            // The blocks before this one add shorter matches only.
            if holders.len() >= limit {
                break;
            }
        }
        holders
    }

    /// Whether any endpoint holds this block.
    #[must_use]
    pub fn knows(&self, block: BlockHash) -> bool {
        self.block_of(block).is_some()
    }

    /// Records that `endpoint` now holds these blocks, in the order of the prompt.
    ///
    /// - An endpoint without a capacity takes no blocks.
    /// - In a full index each endpoint has an equal part of the pairs, and what other endpoints leave of theirs.
    pub fn insert(&mut self, endpoint: EndpointIndex, blocks: &[BlockHash]) {
        let room = self.max_nodes.checked_div(self.lru.lists()).unwrap_or(0);
        let Some(capacity) = self.lru.list(endpoint).map(|list| list.capacity) else { return };
        let blocks = blocks.get(..room).unwrap_or(blocks);
        for (position, hash) in blocks.iter().enumerate().rev() {
            if prefix_units(position.saturating_add(1)) > capacity {
                continue;
            }
            let node = match self.touch(*hash, endpoint) {
                Some(node) => {
                    self.lru.unlink(node);
                    node
                }
                None => {
                    let units = block_units(position);
                    let full = |list: &List| list.units.saturating_add(units) > capacity;
                    while self.lru.list(endpoint).is_some_and(full) {
                        self.drop_oldest(endpoint);
                    }
                    if self.len() >= self.max_nodes {
                        let is_below = self.lru.list(endpoint).is_some_and(|list| list.nodes < room);
                        let over = is_below.then(|| self.lru.next_over(room)).flatten().unwrap_or(endpoint);
                        self.drop_oldest(over);
                    }
                    let Some(node) = self.add_node(*hash, endpoint, units) else { return };
                    node
                }
            };
            self.lru.link_newest(node);
        }
    }

    /// Records that `endpoint` does not hold these blocks, in the order of the prompt. Unknown blocks change nothing.
    pub fn remove(&mut self, endpoint: EndpointIndex, blocks: &[BlockHash]) {
        for hash in blocks.iter().rev() {
            if let Some(node) = self.node_of(*hash, endpoint) {
                self.drop_node(endpoint, node);
            }
        }
    }

    /// Blocks of an endpoint with their sizes in units, at most `limit`, the one touched last first.
    pub(crate) fn newest(&self, endpoint: EndpointIndex, limit: usize) -> impl Iterator<Item = (BlockHash, usize)> {
        let blocks = self.lru.newest(endpoint).map_while(|node| {
            let block = self.blocks.get(node.block as usize)?;
            Some((block.hash, node.units as usize))
        });
        blocks.take(limit)
    }

    /// Whether a block is among the `count` blocks of an endpoint that were touched last.
    pub(crate) fn is_among_newest(&self, endpoint: EndpointIndex, block: BlockHash, count: usize) -> bool {
        self.newest(endpoint, count).any(|(newest, _)| newest == block)
    }

    /// Number of times that a block of the endpoint was touched.
    pub(crate) fn touches(&self, endpoint: EndpointIndex) -> u64 {
        self.lru.list(endpoint).map_or(0, |list| list.touches)
    }

    /// Gives an endpoint the blocks that [`newest`](Self::newest) of another index returned for it, up to its capacity.
    pub(crate) fn restore(&mut self, endpoint: EndpointIndex, blocks: impl Iterator<Item = (BlockHash, usize)>) {
        let Some(list) = self.lru.list(endpoint).copied() else { return };
        let mut room = self.max_nodes.saturating_sub(self.len());
        let mut units = list.capacity.saturating_sub(list.units);
        let fits = |(_, size): &(BlockHash, usize)| {
            let fits = room > 0 && *size <= units;
            room = room.saturating_sub(1);
            units = units.saturating_sub(*size);
            fits
        };
        let blocks: Vec<_> = blocks.take_while(fits).collect();
        for (hash, size) in blocks.into_iter().rev() {
            if self.node_of(hash, endpoint).is_none()
                && let Some(node) = self.add_node(hash, endpoint, size)
            {
                self.lru.link_newest(node);
            }
        }
    }

    /// Counts a request, and returns its first block that is not hot. That block decides which endpoint should hold the
    /// prompt. `None` where every block is hot, or where there is no block.
    ///
    /// A block is hot if it occurs in more than `hot_share` (0 to 1) of recent requests, such as a block of a shared system
    /// prompt. A block occurs at least as often as the blocks behind it, so those behind the first that is not hot need no
    /// count.
    pub fn distinctive(&mut self, blocks: &[BlockHash], hot_share: f64) -> Option<BlockHash> {
        self.requests = self.requests.wrapping_add(1);
        let now = self.requests;
        for hash in blocks {
            let number = self.find(*hash).unwrap_or(NIL);
            let Some(block) = self.blocks.get_mut(number as usize) else { return Some(*hash) };
            let age = now.wrapping_sub(block.seen_at) as f32;
            block.seen = block.seen * (-age / SHARE_WINDOW).exp() + 1.0;
            block.seen_at = now;
            if f64::from(block.seen / SHARE_WINDOW) <= hot_share {
                return Some(*hash);
            }
        }
        None
    }

    /// The node of a block at an endpoint; `None` where the endpoint does not hold the block. The endpoint becomes the
    /// block's newest holder, unless the block has more holders than it lists.
    fn touch(&mut self, hash: BlockHash, endpoint: EndpointIndex) -> Option<u32> {
        let number = self.find(hash)?;
        let block = self.blocks.get_mut(number as usize)?;
        let place = block.recent.iter().position(|holder| holder.endpoint == endpoint && endpoint != NIL);
        if let Some(holders) = place.and_then(|place| block.recent.get_mut(..=place)) {
            holders.rotate_right(1);
            return holders.first().map(|holder| holder.node);
        }
        self.node_of(hash, endpoint)
    }

    fn node_of(&self, hash: BlockHash, endpoint: EndpointIndex) -> Option<u32> {
        let block = self.block_of(hash)?;
        if let Some(holder) = block.recent.iter().find(|holder| holder.endpoint == endpoint) {
            return (endpoint != NIL).then_some(holder.node);
        }
        if block.others == 0 {
            return None;
        }
        let is_pair = |number: &u32| self.pair(*number) == Some((hash, endpoint));
        self.others.find(pair_hash(hash, endpoint), is_pair).copied()
    }

    /// The block and the endpoint of a node.
    fn pair(&self, node: u32) -> Option<(BlockHash, EndpointIndex)> {
        let node = self.lru.get(node)?;
        Some((self.blocks.get(node.block as usize)?.hash, node.endpoint))
    }

    fn block_of(&self, hash: BlockHash) -> Option<&Block> {
        self.blocks.get(self.find(hash)? as usize)
    }

    fn find(&self, hash: BlockHash) -> Option<u32> {
        let is_it = |number: &u32| self.blocks.get(*number as usize).is_some_and(|block| block.hash == hash);
        self.by_hash.find(hash.0, is_it).copied()
    }

    /// Number of a block. An unknown block is added; `None` where no number is left.
    fn find_or_add(&mut self, hash: BlockHash) -> Option<u32> {
        if let Some(number) = self.find(hash) {
            return Some(number);
        }
        let block = Block { hash, recent: [NOBODY; RECENT_HOLDERS], others: 0, seen: 1.0, seen_at: self.requests };
        let number = put(&mut self.blocks, &mut self.free_blocks, block)?;
        let blocks = &self.blocks;
        self.by_hash
            .insert_unique(hash.0, number, |number| blocks.get(*number as usize).map_or(0, |block| block.hash.0));
        Some(number)
    }

    fn add_node(&mut self, hash: BlockHash, endpoint: EndpointIndex, units: usize) -> Option<u32> {
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        let block_number = self.find_or_add(hash)?;
        let node_number = self.lru.add(block_number, endpoint, units)?;
        let block = self.blocks.get_mut(block_number as usize)?;
        let places = block
            .recent
            .iter()
            .position(|holder| *holder == NOBODY)
            .map_or(RECENT_HOLDERS, |place| place.wrapping_add(1));
        if let Some(places) = block.recent.get_mut(..places) {
            places.rotate_right(1);
        }
        let named = Holder { endpoint, node: node_number };
        let pushed_out = block.recent.first_mut().map_or(named, |newest| core::mem::replace(newest, named));
        if pushed_out != NOBODY {
            block.others = block.others.saturating_add(1);
            let (lru, blocks) = (&self.lru, &self.blocks);
            self.others.insert_unique(pair_hash(hash, pushed_out.endpoint), pushed_out.node, |number| {
                let node = lru.get(*number);
                let block = node.and_then(|node| blocks.get(node.block as usize));
                node.zip(block).map_or(0, |(node, block)| pair_hash(block.hash, node.endpoint))
            });
        }
        Some(node_number)
    }

    fn drop_oldest(&mut self, endpoint: EndpointIndex) {
        if let Some(number) = self.lru.list(endpoint).map(|list| list.oldest) {
            self.drop_node(endpoint, number);
        }
    }

    fn drop_node(&mut self, endpoint: EndpointIndex, number: u32) {
        let Some(node) = self.lru.remove(number) else { return };
        let Some(block) = self.blocks.get_mut(node.block as usize) else { return };
        let hash = block.hash;
        if let Some(holder) = block.recent.iter_mut().find(|holder| holder.node == number) {
            *holder = NOBODY;
        } else if let Ok(other) = self.others.find_entry(pair_hash(hash, endpoint), |other| *other == number) {
            other.remove();
            block.others = block.others.saturating_sub(1);
        }
        if block.others == 0 && block.recent == [NOBODY; RECENT_HOLDERS] {
            self.free_blocks.push(node.block);
            if let Ok(entry) = self.by_hash.find_entry(hash.0, |number| *number == node.block) {
                entry.remove();
            }
        }
    }
}

/// Number of pairs for which so many bytes are enough in any case.
fn max_pairs(bytes: usize) -> usize {
    bytes.wrapping_div(BYTES_PER_PAIR).min(NIL as usize)
}

/// Hash of an (endpoint, block) pair. Block hashes are well mixed, so one multiplication is enough to mix in the endpoint.
fn pair_hash(hash: BlockHash, endpoint: EndpointIndex) -> u64 {
    hash.0 ^ u64::from(endpoint).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests;
