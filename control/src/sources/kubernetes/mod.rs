//! The Kubernetes source: pods of some namespaces, and what makes endpoints of them.

pub mod config;
pub mod follow;
pub mod pod;
pub mod pods;
pub mod pools;
pub mod source;

pub use config::KubernetesConfig;
pub use source::KubernetesSource;
