//! Load through a real Envoy: what the filter costs beside plain Envoy, and traces of real requests.

pub mod blocks;
pub mod client;
pub mod drive;
pub mod engine;
pub mod envoy;
pub mod figures;
pub mod plot;
pub mod pods;
pub mod process;
pub mod prompt;
pub mod serve;
pub mod trace;
