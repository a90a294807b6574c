//! What operators install beside the gateway, as files and in a real Prometheus.

mod alerts;
mod chart;
mod dashboard;
mod files;
mod names;
mod pictures;
mod release;
