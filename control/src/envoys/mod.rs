//! Several Envoys and several replicas of pd-control: the exchange between Envoys, the relay between replicas, and
//! which Envoys poll.

pub mod hub;
pub mod polls;
pub mod relay;
