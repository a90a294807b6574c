//! The file source: its format, and how an edit is noticed.

pub mod endpoints;
pub mod source;
pub mod watch;
