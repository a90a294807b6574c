//! Certificates for tests of TLS, made by `openssl`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A certificate and its key, PEM.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// The certificate, which vouches for itself.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl Certificate {
    /// Makes one for a name such as `DNS:engines.internal`, as files of a directory.
    ///
    /// # Panics
    /// When `openssl` cannot make it.
    #[must_use]
    pub fn made(directory: &Path, name: &str) -> Self {
        let path = |name: &str| directory.join(name);
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"])
            .args(["-addext", "basicConstraints=critical,CA:FALSE"])
            .args(["-addext", &format!("subjectAltName={name}"), "-keyout"])
            .args([path("key.pem"), "-out".into(), path("cert.pem")])
            .stderr(Stdio::null())
            .status();
        assert!(made.is_ok_and(|status| status.success()), "openssl makes a certificate");
        Self { certificate: path("cert.pem"), key: path("key.pem") }
    }
}
