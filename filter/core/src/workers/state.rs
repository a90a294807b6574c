//! What a worker knows of the endpoints, of who holds which prefix, and of what pools with limits have in flight.
//! [Events](super::event) change it.

use crate::choose::admission::Admission;
use crate::endpoints::table::Table;
use crate::prefix::index::PrefixIndex;

/// State that decisions are taken from. All of it may be lost and built again.
#[derive(Debug)]
pub struct State {
    /// Endpoints.
    pub table: Table,
    /// Who holds which prefix.
    pub index: PrefixIndex,
    /// What pools with limits have in flight.
    pub admission: Admission,
}

impl Default for State {
    fn default() -> Self {
        Self { table: Table::default(), index: PrefixIndex::new(0), admission: Admission::default() }
    }
}
