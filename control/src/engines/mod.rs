//! Asks the engines for their metrics and their models.

pub mod answers;
pub mod fetch;
pub mod metrics;
pub mod scrape;
