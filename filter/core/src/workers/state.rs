//! What a worker knows of the endpoints, of the prefixes that they hold, and of what pools with limits have in flight.
//! [Events](super::event) change it.

use crate::choose::admission::Admission;
use crate::endpoints::table::Table;
use crate::prefix::hash::BlockHash;
use crate::prefix::index::{EndpointIndex, PrefixIndex};
use crate::workers::keepers::Keepers;
use crate::workers::waiting::Waiting;

/// Everything that decisions read. A worker can lose it and build it again.
#[derive(Debug)]
pub struct State {
    /// The endpoint list, and the state of each endpoint.
    pub table: Table,
    /// Which endpoint holds which blocks.
    pub index: PrefixIndex,
    /// What pools with limits have in flight.
    pub admission: Admission,
    /// Requests that wait for a prefill endpoint with room.
    pub waiting: Waiting,
    /// Which endpoint keeps which response.
    pub(super) keepers: Keepers,
}

impl State {
    /// Notes that an endpoint holds blocks of a prompt, or keeps a response.
    pub(super) fn insert(&mut self, endpoint: EndpointIndex, blocks: &[BlockHash]) {
        if let ([block], Some(state)) = (blocks, self.table.get(endpoint))
            && block.is_response()
        {
            self.keepers.insert(*block, state.key);
        }
        // A new worker takes over the index.
        self.index.insert(endpoint, blocks);
    }

    /// The endpoint that keeps a response, by the hash of its id; `None` where it is not known, or has left the list.
    pub(crate) fn keeper_of(&self, response: BlockHash) -> Option<EndpointIndex> {
        match self.keepers.get(response) {
            Some(key) => self.table.index_of_key(key),
            None => self.index.holders(core::slice::from_ref(&response), 1).first().copied(),
        }
    }
}

impl Default for State {
    fn default() -> Self {
        Self {
            table: Table::default(),
            index: PrefixIndex::new(0),
            admission: Admission::default(),
            waiting: Waiting::default(),
            keepers: Keepers::default(),
        }
    }
}
