//! Authentication: the bearer token and TLS certificates, of the server and of its clients.

pub mod tls;
pub mod token;
