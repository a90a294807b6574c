//! Worker slots: which workers of this Envoy are alive. Each worker holds a slot and renews it.

use core::time::Duration;

use crate::codec::{Reader, Writer};
use crate::time::Monotonic;
use crate::workers::shared::{ABSENT, Shared};

/// Slots of one Envoy: two generations of 31 worker threads and the main thread. A worker without a slot decides alone.
pub const WORKER_SLOTS: usize = 64;
/// Time since the last renewal after which a slot is free and the other workers retract its worker ledger.
const SLOT_LIFE: Duration = Duration::from_millis(700);
/// Key of the slots. Workers of two releases share it, so its name stays.
pub(super) const SLOTS_KEY: &str = "pd/1/seats";

/// The slot of one worker. A slot that no worker ever held has worker id 0.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct WorkerSlot {
    pub(super) worker_id: u64,
    pub(super) renewed: Monotonic,
}

impl WorkerSlot {
    /// Whether a worker holds the slot.
    pub(super) fn is_taken(&self, now: Monotonic) -> bool {
        self.worker_id != 0 && now.saturating_sub(self.renewed) <= SLOT_LIFE
    }
}

/// All slots, and the version to write them with.
pub(super) fn slots(shared: &impl Shared) -> (Vec<WorkerSlot>, u32) {
    let value = shared.get(SLOTS_KEY);
    let mut slots = vec![WorkerSlot::default(); WORKER_SLOTS];
    let mut rest = Reader(value.as_ref().map_or(&[], |(bytes, _)| bytes));
    for slot in &mut slots {
        if let (Some(worker_id), Some(renewed)) = (rest.word(), rest.word()) {
            *slot = WorkerSlot { worker_id, renewed: Monotonic::from_millis(renewed) };
        }
    }
    (slots, value.map_or(ABSENT, |(_, version)| version))
}

/// The bytes that [`slots`] reads.
pub(super) fn to_bytes(slots: &[WorkerSlot]) -> Vec<u8> {
    let mut out = Writer::default();
    for slot in slots {
        out.word(slot.worker_id);
        out.word(slot.renewed.as_millis());
    }
    out.0
}
