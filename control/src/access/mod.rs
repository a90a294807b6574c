//! Authentication: the bearer token and TLS certificates, of the server and of its clients.

pub mod rights;
pub mod tls;
pub mod token;
