//! Several Envoys: each learns through `pd-control`, about 50 ms later, what the others have in flight and which endpoint got
//! which blocks.
//!
//! The worker that holds the [lease](crate::workers::push) is its Envoy's leader, and the only one that exchanges. It
//! passes what it learns on to the other workers as its own [events](crate::workers::event). When the leader dies, the
//! others retract its ledger, and the next leader starts with nothing and receives everything again.
//!
//! The leader makes two calls, each with an exchange request that the [`hub`] answers:
//! - The sending call goes out when there is something new, or after a second. The hub answers at once.
//! - The receiving call goes out while other Envoys exchange. The hub answers when it has something new.
//!
//! An Envoy that is alone sends once a second. An Envoy without an answer for 2.5 s uses its own view alone.

pub mod client;
pub mod hub;
pub mod message;
pub mod outside;
pub mod pace;
pub mod report;

#[cfg(test)]
mod tests;
