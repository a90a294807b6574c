//! The HTTP API: long polls of the filters, the exchange between Envoys, status page, probes and metrics.

pub mod advice;
pub mod app;
pub mod http;
pub mod in_flight;
pub mod metrics;
pub mod server;
pub mod since;
pub mod status;
pub mod traffic;
