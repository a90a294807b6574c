//! Who may connect: certificates of this server, and those that other servers are trusted by.

pub mod tls;
