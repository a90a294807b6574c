//! The simulator over real sockets.

mod api;
mod binary;
mod cache;
mod client;
mod faults;
mod nixl;
mod protocols;
mod shared;
