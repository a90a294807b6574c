//! Data that the workers of one Envoy share.

/// Data that the workers of one Envoy share.
pub trait Shared {
    /// Value and version of a key.
    fn get(&self, key: &str) -> Option<(Vec<u8>, u32)>;
    /// Writes a key, when its version is still `version` (`None`: whatever is there) or it is not there; whether it did.
    fn set(&self, key: &str, value: &[u8], version: Option<u32>) -> bool;
    /// How often something was announced.
    fn announced(&self) -> u64;
    /// Announces a list of endpoints or a worker.
    fn announce(&self);
    /// How far the log of a worker slot goes.
    fn position(&self, slot: usize) -> u64;
    /// Says how far it goes.
    fn set_position(&self, slot: usize, position: u64);
}

/// Version to write a key with that is not there yet. Envoy looks at the version of a key that is there only, so of two
/// workers that write such a key at the same time the second fails. No key has this version before 2³² − 1 writes.
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
