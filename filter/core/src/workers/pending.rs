//! Events that a worker has not published yet.

use crate::workers::event::Event;
use crate::workers::ledger::WorkerLedger;

/// Events of this worker that the others cannot read yet, and what this worker has in flight.
#[derive(Debug, Default)]
pub(crate) struct PendingEvents {
    /// The events, encoded; `None` where there is no workers' log: then no event is kept.
    pub(crate) unpublished: Option<Vec<u8>>,
    /// Whether one of the events matters to the next decision of another worker. The end of a leg or request may wait.
    pub(crate) is_urgent: bool,
    /// What this worker has in flight, published or not.
    pub(crate) own_ledger: WorkerLedger,
    /// Whether the ledger has changed since it was written to shared data.
    pub(crate) is_ledger_new: bool,
}

impl PendingEvents {
    /// Adds an event at the endpoint, or pool, of that key.
    pub(crate) fn push(&mut self, endpoint: u64, event: &Event<'_>) {
        let Some(unpublished) = &mut self.unpublished else { return };
        event.write(endpoint, unpublished);
        let is_end = matches!(event, Event::PrefillEnded { .. } | Event::DecodeEnded { .. } | Event::Released { .. });
        self.is_urgent |= !is_end;
        self.own_ledger.note(endpoint, event);
        self.is_ledger_new = true;
    }

    /// Whether no event waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.unpublished.as_ref().is_none_or(Vec::is_empty)
    }

    /// Takes the events that wait.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        self.is_urgent = false;
        self.unpublished.as_mut().map(core::mem::take).unwrap_or_default()
    }

    /// Gives back the memory of events that were [taken](Self::take).
    pub(crate) fn reuse(&mut self, mut published: Vec<u8>) {
        published.clear();
        self.unpublished = Some(published);
    }
}
