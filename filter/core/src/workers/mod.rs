//! One Envoy: the state of a worker, and what its workers tell each other.

pub(crate) mod event;
mod inheritance;
pub(crate) mod ledger;
pub mod log;
mod peer;
mod pending;
pub mod push;
pub mod recent;
pub mod shared;
pub mod slots;
pub mod state;
pub mod worker;
