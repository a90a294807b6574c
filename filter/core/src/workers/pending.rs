//! Events that a worker has not published yet.

use crate::workers::event::Event;
use crate::workers::ledger::WorkerLedger;

/// Events of this worker that the others cannot read yet, and what this worker has in flight.
#[derive(Debug, Default)]
pub(crate) struct PendingEvents {
    /// The encoded events; `None` without a workers' log, because no other worker reads them then.
    pub(crate) unpublished: Option<Vec<u8>>,
    /// Whether one of the events must be published at once. The end of a leg or request may wait, and so may the choice of
    /// a decode endpoint behind a prefill leg: one write to shared data then serves several requests.
    pub(crate) is_urgent: bool,
    /// Whether one of the events that may wait says which endpoint got a request. Such an event waits no longer than
    /// until the request ends, because no callback may follow soon after the end.
    has_choice: bool,
    /// What this worker has in flight, published or not.
    pub(crate) own_ledger: WorkerLedger,
    /// Whether the ledger has changed since it was written to shared data.
    pub(crate) is_ledger_new: bool,
}

impl PendingEvents {
    /// Adds an event at the endpoint, or pool, with that key.
    pub(crate) fn push(&mut self, endpoint: u64, event: &Event<'_>) {
        let Some(unpublished) = &mut self.unpublished else { return };
        event.write(endpoint, unpublished);
        let is_end = matches!(event, Event::PrefillEnded { .. } | Event::DecodeEnded { .. } | Event::Released { .. });
        let is_choice = matches!(event, Event::DecodeStarted { .. } | Event::Holds { .. });
        self.is_urgent |= !is_end && !is_choice;
        self.has_choice |= is_choice;
        self.own_ledger.note(endpoint, event);
        self.is_ledger_new = true;
    }

    /// A request ended: its waiting events become urgent.
    pub(crate) fn request_ended(&mut self) {
        self.is_urgent |= self.has_choice;
    }

    /// Whether no event waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.unpublished.as_ref().is_none_or(Vec::is_empty)
    }

    /// Bytes of the events that wait.
    pub(crate) fn bytes(&self) -> usize {
        self.unpublished.as_ref().map_or(0, Vec::len)
    }

    /// Takes the events that wait.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        self.is_urgent = false;
        self.has_choice = false;
        self.unpublished.as_mut().map(core::mem::take).unwrap_or_default()
    }

    /// Takes back the memory of events that were [taken](Self::take), for the next ones.
    pub(crate) fn reuse(&mut self, mut published: Vec<u8>) {
        published.clear();
        self.unpublished = Some(published);
    }
}
