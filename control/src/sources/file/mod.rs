//! The file source: the format of the endpoints file, and how pd-control notices an edit.

pub mod endpoints;
pub mod source;
pub mod watch;
