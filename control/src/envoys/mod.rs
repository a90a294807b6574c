//! What several Envoys tell each other through pd-control, and its replicas among themselves; which Envoys poll.

pub mod hub;
pub mod polls;
pub mod relay;
