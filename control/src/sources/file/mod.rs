//! The endpoints file: its format, and how an edit is noticed.

pub mod parse;
pub mod watch;
