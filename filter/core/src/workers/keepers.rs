//! Which endpoint keeps which response of `/v1/responses`, in bounded memory.

use std::collections::VecDeque;

use hashbrown::HashMap;

use crate::prefix::hash::BlockHash;

/// Most responses that a worker remembers. It forgets the oldest first. They take 3 MB at most.
const MAX_RESPONSES: usize = 65_536;

/// Keepers by the hash of the response's id.
#[derive(Debug, Default)]
pub(super) struct Keepers {
    /// Keys of endpoints.
    keys: HashMap<u64, u64>,
    /// The oldest first.
    order: VecDeque<u64>,
}

impl Keepers {
    /// Notes that the endpoint with that key keeps a response.
    pub(super) fn insert(&mut self, response: BlockHash, endpoint: u64) {
        if self.keys.insert(response.0, endpoint).is_some() {
            return;
        }
        self.order.push_back(response.0);
        if self.order.len() > MAX_RESPONSES
            && let Some(oldest) = self.order.pop_front()
        {
            self.keys.remove(&oldest);
        }
    }

    /// The key of the endpoint that keeps a response; `None` where it is not known.
    pub(super) fn get(&self, response: BlockHash) -> Option<u64> {
        self.keys.get(&response.0).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_are_forgotten() {
        let mut keepers = Keepers::default();
        for response in 0..MAX_RESPONSES as u64 + 2 {
            keepers.insert(BlockHash(response), 7);
            keepers.insert(BlockHash(response), 8);
        }
        assert_eq!([0, 1, 2].map(|response| keepers.get(BlockHash(response))), [None, None, Some(8)]);
        assert_eq!((keepers.keys.len(), keepers.order.len()), (MAX_RESPONSES, MAX_RESPONSES));
    }
}
