//! Another worker of this Envoy: its log and its ledger, as this worker reads them.

use crate::codec::Reader;
use crate::workers::event::Event;
use crate::workers::ledger::WorkerLedger;
use crate::workers::shared::Shared;
use crate::workers::worker::Worker;

/// Segments that shared data keeps of a log: 100 kB or more, which a busy worker writes in a tenth of a second.
const RING: u64 = 32;
/// Bytes before a segment's events: worker, segment, hash scheme.
pub(super) const HEAD_BYTES: usize = 24;

/// Another worker.
#[derive(Debug)]
pub(super) struct OtherWorker {
    pub(super) slot: usize,
    pub(super) worker_id: u64,
    pub(super) position: u64,
    pub(super) ledger: WorkerLedger,
    /// Whether this worker could not read a part of the log. It then waits for the next ledger.
    pub(super) is_behind: bool,
}

impl OtherWorker {
    /// Reads and applies the worker's ledger as a whole; the log goes on from the ledger's position.
    pub(super) fn join(&mut self, worker: &mut Worker, shared: &impl Shared) {
        self.ledger = WorkerLedger::default();
        self.position = shared.position(self.slot);
        self.is_behind = false;
        let Some((bytes, _)) = shared.get(&ledger_key(self.slot)) else { return };
        let mut rest = Reader(&bytes);
        if rest.word() != Some(self.worker_id) {
            // The worker has taken the slot and not written its ledger yet.
            self.is_behind = true;
            return;
        }
        if let (Some(position), Some(ledger)) = (rest.word(), WorkerLedger::from_bytes(rest.0)) {
            self.position = position;
            ledger.apply(&mut worker.state);
            self.ledger = ledger;
        }
    }

    /// Reads and applies the log up to `position`. Where a segment is missing, the worker counts as behind.
    pub(super) fn read(&mut self, worker: &mut Worker, shared: &impl Shared, hash_scheme: u64, position: u64) {
        let last = position.wrapping_shr(16);
        let mut segment = self.position.wrapping_shr(16);
        let mut from = usize::try_from(self.position & 0xffff).unwrap_or(HEAD_BYTES).max(HEAD_BYTES);
        while segment <= last {
            let value = shared.get(&log_key(self.slot, segment));
            let bytes = value.as_ref().map_or(&[][..], |(bytes, _)| bytes);
            let mut head = Reader(bytes);
            let (worker_id, number, log_scheme) = (head.word(), head.word(), head.word());
            let Some(events) =
                bytes.get(from..).filter(|_| worker_id == Some(self.worker_id) && number == Some(segment))
            else {
                self.is_behind = true;
                return;
            };
            for (endpoint, event) in Event::read(events) {
                let is_blocks = matches!(event, Event::Holds { .. } | Event::HoldsByOthers { .. });
                if !is_blocks || log_scheme == Some(hash_scheme) {
                    event.apply(endpoint, &mut worker.state);
                    if let Event::Holds { blocks } = &event {
                        worker.queue_for_gateways(endpoint, blocks);
                    }
                }
                self.ledger.note(endpoint, &event);
            }
            self.position = segment.wrapping_shl(16) | bytes.len() as u64;
            segment = segment.wrapping_add(1);
            from = HEAD_BYTES;
        }
    }
}

/// Key of a segment of the log in a slot.
pub(super) fn log_key(slot: usize, segment: u64) -> String {
    format!("pd/1/log/{slot}/{}", segment % RING)
}

/// Key of the ledger of the worker in a slot.
pub(super) fn ledger_key(slot: usize) -> String {
    format!("pd/1/ledger/{slot}")
}
