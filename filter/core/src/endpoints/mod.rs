//! The endpoints: the pushed list, what is in flight at each, how healthy it is, and what a prefill costs there.

pub mod elsewhere;
pub mod fit;
pub mod load;
pub mod table;
