//! The Kubernetes source: pods of some namespaces, and what makes endpoints of them.

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
pub mod rule;
pub mod source;
pub mod vocabulary;

pub use config::KubernetesConfig;
pub use source::KubernetesSource;
