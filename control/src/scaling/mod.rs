//! What scales each role of a pool: demand from the exchange and the scrapes, as metrics and for KEDA.

pub mod demand;
pub mod history;
pub mod messages;
pub mod metrics;
pub mod scaler;
