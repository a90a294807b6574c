//! What a worker has to tell the others.

use crate::workers::event::Event;
use crate::workers::ledger::WorkerLedger;

/// What this worker did since it last told the others, and what it has in flight.
#[derive(Debug, Default)]
pub(crate) struct PendingEvents {
    /// Events to tell, encoded; `None` where nobody listens.
    pub(crate) unpublished: Option<Vec<u8>>,
    /// Whether one of them matters to the next decision; the end of something may wait for company.
    pub(crate) is_urgent: bool,
    /// This worker's own ledger: what it has in flight.
    pub(crate) own_ledger: WorkerLedger,
    /// Whether it has changed since it was last written down.
    pub(crate) is_ledger_new: bool,
}

impl PendingEvents {
    pub(crate) fn push(&mut self, endpoint: u64, event: &Event<'_>) {
        let Some(unpublished) = &mut self.unpublished else { return };
        event.write(endpoint, unpublished);
        let is_end = matches!(event, Event::PrefillEnded { .. } | Event::DecodeEnded { .. } | Event::Released { .. });
        self.is_urgent |= !is_end;
        self.own_ledger.note(endpoint, event);
        self.is_ledger_new = true;
    }

    /// Whether there is nothing to tell.
    pub(crate) fn is_empty(&self) -> bool {
        self.unpublished.as_ref().is_none_or(Vec::is_empty)
    }

    /// Takes the events that are to be told.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        self.is_urgent = false;
        self.unpublished.as_mut().map(core::mem::take).unwrap_or_default()
    }

    /// Gives the memory of events that were [taken](Self::take) back.
    pub(crate) fn reuse(&mut self, mut published: Vec<u8>) {
        published.clear();
        self.unpublished = Some(published);
    }
}
