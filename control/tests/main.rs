//! pd-control from the outside: files are edited, polls are answered.

mod api;
mod api_server;
mod attack;
mod browser;
mod chaos;
mod check;
mod check_lists;
mod check_readiness;
mod cluster;
mod edits;
mod engines;
mod exchange;
mod hosts;
mod kubernetes;
mod migrate;
mod names;
mod page;
mod process;
mod push;
mod scaling;
mod support;
mod tls;
mod wire;
