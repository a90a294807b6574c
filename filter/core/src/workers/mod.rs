//! One Envoy: the state of a worker, and what its workers tell each other.

pub(crate) mod event;
pub(crate) mod ledger;
pub mod push;
pub mod recent;
pub mod share;
pub mod state;
pub mod worker;
