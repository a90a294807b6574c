//! End-to-end rig: simulated engines in this process, a real pd-control and a real Envoy that runs the shipped
//! `envoy/local.yaml`, and an HTTP client that sends and receives bytes as they are.
//!
//! Environment: `PD_ENVOY` names the Envoy to run, or `PD_ENVOY_VERSION` one of the installed versions; `PD_WASM` the
//! module and `PD_CONTROL` the pd-control binary.
#![forbid(unsafe_code)]

pub mod admin;
pub mod body;
pub mod client;
pub mod config;
pub mod places;
pub mod port;
pub mod process;
pub mod rig;
pub mod shared;
pub mod traffic;
pub mod wait;
