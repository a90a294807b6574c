//! What is in flight at endpoints that this worker's list lacks: they left the list, or another worker has a newer list.
//!
//! Requests go on when their endpoint leaves the list. When the endpoint comes to the list, its entry in the ledger begins
//! with what is in flight there.

use hashbrown::HashMap;

use crate::endpoints::load::{Load, PrefillQueue};
use crate::time::Monotonic;

/// What is in flight at one endpoint.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    pub(super) prefill: PrefillQueue,
    pub(super) decode: Load,
}

impl InFlight {
    fn is_empty(&self) -> bool {
        self.prefill.is_empty() && self.decode == Load::default()
    }
}

/// What is in flight at endpoints that the list lacks, by their keys. After a [`prune`](Self::prune) there are at most as
/// many entries as requests.
#[derive(Debug, Default)]
pub(super) struct Departed(HashMap<u64, InFlight>);

impl Departed {
    /// Keeps what is in flight at an endpoint that left the list.
    pub(super) fn left(&mut self, key: u64, in_flight: InFlight) {
        if !in_flight.is_empty() {
            self.0.insert(key, in_flight);
        }
    }

    /// Takes what is in flight at an endpoint that comes to the list.
    pub(super) fn comes(&mut self, key: u64) -> InFlight {
        self.0.remove(&key).unwrap_or_default()
    }

    /// The entry of an endpoint that the list lacks.
    pub(super) fn entry(&mut self, key: u64) -> &mut InFlight {
        self.0.entry(key).or_default()
    }

    /// Drops legs that expired, and entries with nothing in flight.
    pub(super) fn prune(&mut self, now: Monotonic) {
        self.0.retain(|_, in_flight| {
            in_flight.prefill.prune(now);
            !in_flight.is_empty()
        });
    }
}
