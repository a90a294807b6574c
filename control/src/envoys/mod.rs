//! What several Envoys tell each other through pd-control, and its replicas among themselves.

pub mod exchange;
