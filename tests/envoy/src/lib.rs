//! End-to-end rig: simulated engines in this process, a real pd-control and a real Envoy that runs the shipped
//! `envoy/local.yaml`.
//!
//! Environment: `PD_ENVOY` names the Envoy to run, or `PD_ENVOY_VERSION` one of the installed versions; `PD_WASM` the
//! module and `PD_CONTROL` the pd-control binary.
#![forbid(unsafe_code)]

pub mod answer;
pub mod builder;
pub mod rig;
pub mod shared;
pub mod tls;
pub mod traffic;
