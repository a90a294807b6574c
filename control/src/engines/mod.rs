//! What the engines themselves answer: their metrics and their models.

pub mod metrics;
pub mod scrape;
