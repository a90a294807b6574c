//! The Kubernetes source: follows pods and InferencePools and makes endpoints of the pods.

pub mod aibrix;
pub mod annotations;
pub mod classify;
pub mod cluster;
pub mod config;
pub mod follow;
pub mod keys;
pub mod pod;
pub mod pods;
pub mod pools;
pub mod readiness;
pub mod rule;
pub mod source;
pub mod stated;
pub mod vocabulary;

pub use config::KubernetesConfig;
pub use source::KubernetesSource;
