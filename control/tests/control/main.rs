//! pd-control from the outside: files are edited, polls are answered.

mod api;
mod api_server;
mod cluster;
mod edits;
mod engines;
mod exchange;
mod hosts;
mod kubernetes;
mod names;
mod process;
mod push;
mod support;
mod tls;
