//! Sources of endpoints: a file, the command line, Kubernetes. Each sends whole lists to the publisher, which decides
//! which list is in force.

pub mod allow;
pub mod file;
pub mod kubernetes;
pub mod names;
pub mod yaml;
