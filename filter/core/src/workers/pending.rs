//! What a worker has to tell the others.

use crate::workers::event::Event;
use crate::workers::ledger::WorkerLedger;

/// What this worker did since it last told the others, and what it has in flight.
#[derive(Debug, Default)]
pub(crate) struct Log {
    /// Events to tell, encoded; `None` where nobody listens.
    pub(crate) untold: Option<Vec<u8>>,
    /// Whether one of them matters to the next decision; the end of something may wait for company.
    pub(crate) is_pressing: bool,
    /// This worker's own ledger: what it has in flight.
    pub(crate) own_ledger: WorkerLedger,
    /// Whether it has changed since it was last written down.
    pub(crate) is_ledger_new: bool,
}

impl Log {
    pub(crate) fn push(&mut self, endpoint: u64, event: &Event<'_>) {
        let Some(untold) = &mut self.untold else { return };
        event.write(endpoint, untold);
        let is_end = matches!(event, Event::PrefillEnded { .. } | Event::DecodeEnded { .. } | Event::Released { .. });
        self.is_pressing |= !is_end;
        self.own_ledger.note(endpoint, event);
        self.is_ledger_new = true;
    }

    /// Whether there is nothing to tell.
    pub(crate) fn is_told(&self) -> bool {
        self.untold.as_ref().is_none_or(Vec::is_empty)
    }

    /// Takes the events that are to be told.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        self.is_pressing = false;
        self.untold.as_mut().map(core::mem::take).unwrap_or_default()
    }

    /// Gives the memory of events that were [taken](Self::take) back.
    pub(crate) fn reuse(&mut self, mut told: Vec<u8>) {
        told.clear();
        self.untold = Some(told);
    }
}
