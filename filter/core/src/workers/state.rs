//! What a worker knows of the endpoints, of the prefixes that they hold, and of what pools with limits have in flight.
//! [Events](super::event) change it.

use crate::choose::admission::Admission;
use crate::endpoints::table::Table;
use crate::prefix::index::PrefixIndex;
use crate::workers::waiting::Waiting;

/// What decisions are taken from. All of it may be lost and built again.
#[derive(Debug)]
pub struct State {
    /// The endpoint list, and the state of each endpoint.
    pub table: Table,
    /// Which endpoint holds which blocks.
    pub index: PrefixIndex,
    /// What pools with limits have in flight.
    pub admission: Admission,
    /// Requests that wait for a prefill endpoint with room.
    pub waiting: Waiting,
}

impl Default for State {
    fn default() -> Self {
        Self {
            table: Table::default(),
            index: PrefixIndex::new(0),
            admission: Admission::default(),
            waiting: Waiting::default(),
        }
    }
}
