//! pd-control from the outside: files are edited, polls are answered.

mod api;
mod api_server;
mod check;
mod cluster;
mod edits;
mod engines;
mod hosts;
mod kubernetes;
mod names;
mod process;
mod push;
mod support;
mod tls;
mod wire;
