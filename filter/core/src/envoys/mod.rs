//! Several Envoys, one view: each tells `pd-control` what it has in flight and which blocks it sent where, and hears
//! the same of the others, about 50 ms later.
//!
//! The worker that holds the [lease](crate::workers::push) is its Envoy's leader. What it learns it passes on to the other workers
//! through its [log](crate::workers::log), as its own part: when it dies, the next leader starts from nothing and hears all of
//! it again. Without an answer for 2.5 s the view is that of this Envoy alone.
//!
//! Two calls: *tell*, when there is something new (or a second has passed), answered at once; and *hear*, which
//! `pd-control` answers when there is something new. An Envoy that is alone tells once a second.

pub mod client;
pub mod hub;
pub mod message;
pub mod pace;
pub mod report;

#[cfg(test)]
mod tests;
