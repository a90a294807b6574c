//! Asks the engines for their metrics and their models.

pub mod access;
pub mod answers;
mod fetch;
pub mod metrics;
pub mod scrape;
