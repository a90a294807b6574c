//! The whole gateway: real Envoy with the shipped configuration, real pd-control, simulated engines.

mod apis;
mod blame;
mod cache;
mod chaos;
mod compat;
mod connections;
mod decode_failure;
mod engines;
mod errors;
mod exchange;
mod hostile;
mod kv_params;
mod leaving;
mod list;
mod models;
mod observe;
mod outliers;
mod pass;
mod paths;
mod phase;
mod plugin;
mod prefill_failure;
mod soak;
mod split;
mod stripping;
mod support;
