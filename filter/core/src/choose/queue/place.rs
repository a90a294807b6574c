//! The place of a request in the order of a queue.

use core::cmp::Reverse;

use crate::prefix::index::EndpointIndex;

/// Numbers in the order of [`f64::total_cmp`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Rank(pub(super) f64);

impl PartialEq for Rank {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Rank {}

impl PartialOrd for Rank {
    fn partial_cmp(&self, other: &Self) -> Option<core::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Rank {
    fn cmp(&self, other: &Self) -> core::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// Requests that are compared with each other: those of which one endpoint holds a prefix, or all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Group {
    /// `None`: all requests, as if no endpoint held anything of them.
    pub(super) endpoint: Option<EndpointIndex>,
    pub(super) priority: Reverse<i32>,
    pub(super) account: u8,
}

/// A request's place in a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) group: Group,
    pub(super) rank: Rank,
    pub(super) id: u64,
}
