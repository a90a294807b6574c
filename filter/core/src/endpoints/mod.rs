//! The endpoints: the pushed list, what is in flight at each, how healthy it is, and what a prefill costs there.

pub mod candidates;
pub mod elsewhere;
pub mod endpoint_state;
pub mod fitted_cost;
pub mod health;
pub mod load;
pub mod retry_budget;
pub mod table;
pub mod usage;
