//! Where endpoints come from. Each source sends whole lists; none decides what is in force.

pub mod allow;
pub mod file;
pub mod kubernetes;
pub mod names;
pub mod yaml;
