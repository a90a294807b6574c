//! One Envoy: the state of a worker, and what its workers tell each other.

pub(crate) mod ledger;
pub mod push;
pub mod share;
pub mod worker;
