//! Bodies of requests: where their members are, and how bytes change.
//!
//! [`scan`] checks the whole body in one pass and keeps the offsets of its top-level members. A [`Scan`] borrows nothing: it
//! outlives the bytes that it describes.

mod api;
mod forbidden;
pub mod form;
pub mod json;
mod key;
pub mod markers;
pub mod media;
mod percent;
mod scan;
pub mod splice;

pub use api::Api;
pub use forbidden::{FORBIDDEN, cuts, is_content};
pub use key::{Key, KeySet, MAX_MEMBERS};
pub(crate) use percent::decode_percent;
pub use scan::{Member, Scan, scan};
