//! The HTTP server: long polls of the filters, the exchange, the status page, probes and metrics.

pub mod advice;
pub mod http;
pub mod server;
pub mod status;
