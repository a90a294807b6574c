//! Which workers there are: each holds a worker slot and renews it.

use core::time::Duration;

use crate::codec::{Reader, Writer};
use crate::workers::shared::{ABSENT, Shared};

/// Workers of one Envoy that share; more decide for themselves alone. Two generations of 31 and the main thread's.
pub const WORKER_SLOTS: usize = 64;
/// Time without renewal after which a worker slot is free and its worker's ledger retracted.
const SLOT_LIFE: Duration = Duration::from_millis(700);
pub(super) const SLOTS_KEY: &str = "pd/1/seats";

/// The slot of one worker.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct WorkerSlot {
    pub(super) worker_id: u64,
    pub(super) renewed: Duration,
}

impl WorkerSlot {
    /// Whether its worker is alive.
    pub(super) fn is_taken(&self, now: Duration) -> bool {
        self.worker_id != 0 && now.saturating_sub(self.renewed) <= SLOT_LIFE
    }
}

/// The worker slots, and the version to write them with.
pub(super) fn slots(shared: &impl Shared) -> (Vec<WorkerSlot>, u32) {
    let value = shared.get(SLOTS_KEY);
    let mut slots = vec![WorkerSlot::default(); WORKER_SLOTS];
    let mut rest = Reader(value.as_ref().map_or(&[], |(bytes, _)| bytes));
    for slot in &mut slots {
        if let (Some(worker_id), Some(renewed)) = (rest.word(), rest.word()) {
            *slot = WorkerSlot { worker_id, renewed: Duration::from_millis(renewed) };
        }
    }
    (slots, value.map_or(ABSENT, |(_, version)| version))
}

/// As [`worker slots`] reads them.
pub(super) fn to_bytes(slots: &[WorkerSlot]) -> Vec<u8> {
    let mut out = Writer::default();
    for slot in slots {
        out.word(slot.worker_id);
        out.word(u64::try_from(slot.renewed.as_millis()).unwrap_or(u64::MAX));
    }
    out.0
}
