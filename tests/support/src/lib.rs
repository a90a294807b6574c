//! What tests and tools share: free ports, processes that end with their test, an HTTP client that sends and receives
//! bytes as they are, the shipped Envoy configuration, and the places of the parts under test.
#![forbid(unsafe_code)]

pub mod admin;
pub mod body;
pub mod budgets;
pub mod certificate;
pub mod client;
pub mod config;
pub mod file;
pub mod headers;
pub mod places;
pub mod port;
pub mod process;
pub mod spans;
pub mod wait;
