//! The host's shared data, as core uses it.

/// Data that the workers of one Envoy share. The shell implements it by host calls, which may fail.
pub trait Shared {
    /// Value and version of a key; `None` where the key is absent or cannot be read.
    fn get(&self, key: &str) -> Option<(Vec<u8>, u32)>;
    /// Writes a key; returns whether it did. With a `version` it writes only while the key has that version or is absent.
    fn set(&self, key: &str, value: &[u8], version: Option<u32>) -> bool;
    /// Number of calls of [`announce`](Self::announce) by all workers; 0 where it cannot be read.
    fn announced(&self) -> u64;
    /// Announces a new endpoint list or a new worker to all workers.
    fn announce(&self);
    /// Position up to which the log of a worker slot is written; 0 where there is none.
    fn position(&self, slot: usize) -> u64;
    /// Sets the position up to which the log of a worker slot is written.
    fn set_position(&self, slot: usize, position: u64);
}

/// Version to write an absent key with. Envoy compares the version of a key only where the key exists, so of two workers
/// that write an absent key at the same time the second one fails. No key has this version before 2³² − 1 writes.
pub(crate) const ABSENT: u32 = u32::MAX;

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use hashbrown::HashMap;
    use std::cell::{Cell, RefCell};

    /// Envoy's shared data: versions start at 1, a write without a version or of a new key always succeeds.
    #[derive(Default)]
    pub(crate) struct Store {
        pub(crate) data: RefCell<HashMap<String, (Vec<u8>, u32)>>,
        pub(crate) announced: Cell<u64>,
        positions: RefCell<HashMap<usize, u64>>,
    }

    impl Shared for Store {
        fn get(&self, key: &str) -> Option<(Vec<u8>, u32)> {
            self.data.borrow().get(key).cloned()
        }
        fn set(&self, key: &str, value: &[u8], version: Option<u32>) -> bool {
            let mut data = self.data.borrow_mut();
            let current = data.get(key).map(|(_, version)| *version);
            if current.is_some_and(|current| version.is_some_and(|version| version != current)) {
                return false;
            }
            data.insert(key.to_owned(), (value.to_vec(), current.unwrap_or(0) + 1));
            true
        }
        fn announced(&self) -> u64 {
            self.announced.get()
        }
        fn announce(&self) {
            self.announced.set(self.announced.get() + 1);
        }
        fn position(&self, slot: usize) -> u64 {
            self.positions.borrow().get(&slot).copied().unwrap_or(0)
        }
        fn set_position(&self, slot: usize, position: u64) {
            self.positions.borrow_mut().insert(slot, position);
        }
    }
}
