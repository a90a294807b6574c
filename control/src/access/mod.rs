//! Who may connect, as a server and as a client: the bearer token, and certificates.

pub mod tls;
pub mod token;
