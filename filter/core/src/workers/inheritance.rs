//! What a new worker takes over of the prefix index.
//!
//! The worker in the first slot writes to shared data which blocks each endpoint holds, one endpoint a tick. A new worker
//! reads all of it.

use core::time::Duration;

use hashbrown::{HashMap, HashSet};

use crate::codec::{Reader, Writer};
use crate::prefix::hash::BlockHash;
use crate::time::Monotonic;
use crate::workers::shared::Shared;
use crate::workers::worker::Worker;

/// How long after its start a worker looks for blocks of endpoints that it does not know yet.
const INHERITANCE: Duration = Duration::from_secs(10);
/// Most blocks of one endpoint that a new worker takes over.
const MAX_INHERITED: usize = 65_536;

/// Which endpoints this worker has written, and which it has taken over.
#[derive(Debug, Default)]
pub(super) struct Inheritance {
    /// This worker's hash scheme. The worker leaves out blocks of another one.
    hash_scheme: u64,
    began: Monotonic,
    /// Index of the endpoint that is written next.
    next_saved: usize,
    /// By index: the endpoint's key and touches when its blocks were written.
    saved: HashMap<u32, (u64, u64)>,
    /// Keys of the endpoints whose blocks were read or are not in shared data.
    inherited: HashSet<u64>,
}

impl Inheritance {
    /// The state of a worker that starts now.
    pub(super) fn new(hash_scheme: u64, now: Monotonic) -> Self {
        Self { hash_scheme, began: now, ..Self::default() }
    }

    /// Writes which blocks the next endpoint holds, unless that has not changed. One worker of an Envoy does so.
    pub(super) fn save(&mut self, worker: &Worker, shared: &impl Shared) {
        let places = worker.state.table.places();
        let place = self.next_saved.checked_rem(places).unwrap_or(0);
        self.next_saved = place.wrapping_add(1);
        let Ok(index) = u32::try_from(place) else { return };
        // A free index is written too: its endpoint has left the list.
        let key = worker.state.table.get(index).map_or(0, |state| state.key);
        let looks = (key, worker.state.index.touches(index));
        if self.saved.insert(index, looks) == Some(looks) {
            return;
        }
        let mut out = Writer::default();
        [self.hash_scheme, key, places as u64].into_iter().for_each(|word| out.word(word));
        for (hash, units) in worker.state.index.newest(index, MAX_INHERITED) {
            out.word(hash.0);
            out.word(units as u64);
        }
        shared.set(&index_key(place), &out.0, None);
    }

    /// Takes over the blocks of endpoints that this worker has in its list and has not read yet.
    pub(super) fn inherit(&mut self, worker: &mut Worker, shared: &impl Shared, now: Monotonic) {
        let is_new = |key: &u64| !self.inherited.contains(key);
        let is_young = now.saturating_sub(self.began) < INHERITANCE;
        if !is_young || !worker.state.table.iter().any(|(_, state)| is_new(&state.key)) {
            return;
        }
        let (mut place, mut places) = (0, 1);
        while place < places {
            let Some((bytes, _)) = shared.get(&index_key(place)) else { break };
            let mut rest = Reader(&bytes);
            let (hash_scheme, key, count) = (rest.word(), rest.word(), rest.word());
            places = count.and_then(|count| usize::try_from(count).ok()).unwrap_or(0);
            place = place.wrapping_add(1);
            let Some((index, key)) = key.and_then(|key| Some((worker.state.table.index_of_key(key)?, key))) else {
                continue;
            };
            if hash_scheme != Some(self.hash_scheme) || !self.inherited.insert(key) {
                continue;
            }
            let blocks = core::iter::from_fn(|| Some((BlockHash(rest.word()?), usize::try_from(rest.word()?).ok()?)));
            worker.state.index.restore(index, blocks);
        }
        self.inherited.extend(worker.state.table.iter().map(|(_, state)| state.key));
    }
}

fn index_key(place: usize) -> String {
    format!("pd/1/index/{place}")
}
