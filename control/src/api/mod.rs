//! The HTTP server: long polls of the filters, the exchange, the status page, probes and metrics.

pub mod advice;
pub mod app;
pub mod http;
pub mod metrics;
pub mod server;
pub mod status;
