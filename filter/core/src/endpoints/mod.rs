//! The endpoints: the list that `pd-control` pushed, and what a worker knows of each endpoint.
//!
//! - [`table`]: the list in force; [`endpoint_state`]: one endpoint; [`candidates`]: the sets that a choice picks from;
//!   [`pairings`]: which of them can hand over to each other; `known_models`: models that are or were in the list.
//! - [`load`]: what this Envoy has in flight, `departed` at endpoints that are not in the list; [`elsewhere`]: what other
//!   Envoys have in flight.
//! - [`health`]: ejection and probe; [`outliers`]: whether an endpoint answers errors that its peers do not answer;
//!   [`retry_budget`]: how many prefill legs may be run again.
//! - `beliefs`: whether an endpoint holds what the index has for it.
//! - [`fitted_cost`]: what a prefill costs, learnt from [`usage`] and times; [`fitted_media`]: tokens of media.

pub(crate) mod beliefs;
pub mod candidates;
mod departed;
pub mod elsewhere;
pub mod endpoint_state;
pub mod fitted_cost;
pub mod fitted_media;
pub mod health;
mod known_models;
pub mod load;
pub mod outliers;
pub mod pairings;
pub mod retry_budget;
pub mod table;
pub mod usage;
