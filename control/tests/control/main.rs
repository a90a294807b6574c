//! pd-control from the outside: files are edited, polls are answered.

mod api;
mod edits;
mod hosts;
mod process;
mod push;
mod support;
