//! LRU lists: for each endpoint the blocks that it holds, the one touched last first.

/// Index of an endpoint in the [table](crate::endpoints::table).
pub type EndpointIndex = u32;

/// Bytes of a [`Node`].
pub(super) const NODE_BYTES: usize = 20;
/// Number of no node, no block and no endpoint.
pub(super) const NIL: u32 = u32::MAX;

/// The lists of all endpoints. Their nodes lie in one vector.
#[derive(Debug, Default)]
pub(super) struct Lru {
    nodes: Vec<Node>,
    free_nodes: Vec<u32>,
    lists: Vec<List>,
    len: usize,
    /// List at which the last search for a list above its share ended.
    cursor: usize,
}

/// A block that an endpoint holds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Node {
    pub(super) block: u32,
    pub(super) endpoint: EndpointIndex,
    pub(super) units: u32,
    newer: u32,
    older: u32,
}

/// The list of one endpoint.
#[derive(Clone, Copy, Debug)]
pub(super) struct List {
    newest: u32,
    pub(super) oldest: u32,
    pub(super) nodes: usize,
    pub(super) units: usize,
    pub(super) capacity: usize,
    /// Number of times that a block was touched.
    pub(super) touches: u64,
}

const EMPTY: List = List { newest: NIL, oldest: NIL, nodes: 0, units: 0, capacity: 0, touches: 0 };

impl Lru {
    /// Number of nodes in use.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Number of lists, those of endpoints without a capacity included.
    pub(super) fn lists(&self) -> usize {
        self.lists.len()
    }

    /// Bytes of memory in use, without the lists.
    pub(super) fn bytes(&self) -> usize {
        let free = self.free_nodes.capacity().saturating_mul(size_of::<u32>());
        self.nodes.capacity().saturating_mul(NODE_BYTES).saturating_add(free)
    }

    /// The node with that number; `None` where there never was one.
    pub(super) fn get(&self, node: u32) -> Option<&Node> {
        self.nodes.get(node as usize)
    }

    /// Sets the size of an endpoint's cache, in units. Nodes beyond it stay until they are removed.
    pub(super) fn set_capacity(&mut self, endpoint: EndpointIndex, units: usize) {
        let index = endpoint as usize;
        if self.lists.len() <= index {
            self.lists.resize(index.saturating_add(1), EMPTY);
        }
        if let Some(list) = self.lists.get_mut(index) {
            list.capacity = units;
        }
    }

    /// Adds a node that is in no list yet, and returns its number; `None` where there is no number left.
    pub(super) fn add(&mut self, block: u32, endpoint: EndpointIndex, units: u32) -> Option<u32> {
        let node = Node { block, endpoint, units, newer: NIL, older: NIL };
        let number = put(&mut self.nodes, &mut self.free_nodes, node)?;
        self.len = self.len.saturating_add(1);
        Some(number)
    }

    /// Removes a node. Another one may get its number.
    pub(super) fn remove(&mut self, number: u32) -> Option<Node> {
        let node = self.get(number).copied()?;
        self.unlink(number);
        self.free_nodes.push(number);
        self.len = self.len.saturating_sub(1);
        Some(node)
    }

    /// The nodes of an endpoint, the one touched last first.
    pub(super) fn newest(&self, endpoint: EndpointIndex) -> impl Iterator<Item = &Node> {
        let mut number = self.list(endpoint).map_or(NIL, |list| list.newest);
        core::iter::from_fn(move || {
            let node = self.get(number)?;
            number = node.older;
            Some(node)
        })
    }

    /// The next endpoint whose list has more than `room` nodes.
    pub(super) fn next_over(&mut self, room: usize) -> Option<EndpointIndex> {
        let lists = self.lists.len();
        let places = (1..=lists).filter_map(|step| self.cursor.saturating_add(step).checked_rem(lists));
        let over = places.into_iter().find(|number| self.lists.get(*number).is_some_and(|list| list.nodes > room))?;
        self.cursor = over;
        EndpointIndex::try_from(over).ok()
    }

    pub(super) fn list(&self, endpoint: EndpointIndex) -> Option<&List> {
        self.lists.get(endpoint as usize)
    }

    /// Takes a node out of its list; it keeps its number.
    pub(super) fn unlink(&mut self, number: u32) {
        let Some(node) = self.nodes.get(number as usize).copied() else { return };
        if let Some(newer) = self.nodes.get_mut(node.newer as usize) {
            newer.older = node.older;
        }
        if let Some(older) = self.nodes.get_mut(node.older as usize) {
            older.newer = node.newer;
        }
        if let Some(list) = self.lists.get_mut(node.endpoint as usize) {
            if list.newest == number {
                list.newest = node.older;
            }
            if list.oldest == number {
                list.oldest = node.newer;
            }
            list.nodes = list.nodes.saturating_sub(1);
            list.units = list.units.saturating_sub(node.units as usize);
        }
    }

    /// Puts a node that is in no list at the front of its endpoint's list.
    pub(super) fn link_newest(&mut self, number: u32) {
        let Some(Node { endpoint, units, .. }) = self.nodes.get(number as usize).copied() else { return };
        let Some(list) = self.lists.get_mut(endpoint as usize) else { return };
        list.touches = list.touches.wrapping_add(1);
        let second = list.newest;
        list.newest = number;
        if list.oldest == NIL {
            list.oldest = number;
        }
        list.nodes = list.nodes.saturating_add(1);
        list.units = list.units.saturating_add(units as usize);
        if let Some(node) = self.nodes.get_mut(number as usize) {
            node.newer = NIL;
            node.older = second;
        }
        if let Some(node) = self.nodes.get_mut(second as usize) {
            node.newer = number;
        }
    }
}

/// Puts an item at a free place, or at the end, and returns the place; `None` where there are too many.
pub(super) fn put<T>(all: &mut Vec<T>, free: &mut Vec<u32>, new: T) -> Option<u32> {
    let Some(number) = free.pop() else {
        let number = u32::try_from(all.len()).ok()?;
        all.push(new);
        return Some(number);
    };
    *all.get_mut(number as usize)? = new;
    Some(number)
}

#[cfg(test)]
impl Lru {
    /// Places for nodes, empty ones included.
    pub(super) fn nodes(&self) -> usize {
        self.nodes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_as_large_as_the_bound_of_the_index_counts_on() {
        assert_eq!(size_of::<Node>(), NODE_BYTES);
    }
}
