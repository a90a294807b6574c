//! TLS: the server's certificate and key, which are read again when the files change, and the certificates that clients
//! of other servers trust.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use hyper_rustls::{ConfigBuilderExt, FixedServerNameResolver, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};

/// Time after which the files are read again. Operators replace certificates days before they expire.
const MAX_AGE: Duration = Duration::from_secs(30);

/// Protocol of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 and nothing else, as gRPC needs it; without TLS by prior knowledge.
    Http2,
}

/// Files of the server's certificate and key.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Certificate chain, PEM, the server's own certificate first.
    pub certificate: PathBuf,
    /// Private key, PEM.
    pub key: PathBuf,
}

/// The certificate in force.
#[derive(Debug)]
pub struct Tls {
    files: TlsFiles,
    protocol: Protocol,
    present: Mutex<(Arc<ServerConfig>, Instant)>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// When a file is missing or is no PEM, or the key is not the certificate's.
    pub fn open(files: TlsFiles, protocol: Protocol) -> anyhow::Result<Self> {
        let config = files.read(protocol)?;
        Ok(Self { files, protocol, present: Mutex::new((config, Instant::now())) })
    }

    /// The acceptor for the next connection. When the files have become unreadable, the last good certificate stays in
    /// force.
    pub fn acceptor(&self) -> TlsAcceptor {
        let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        if present.1.elapsed() >= MAX_AGE {
            match self.files.read(self.protocol) {
                Ok(config) => present.0 = config,
                Err(error) => {
                    tracing::error!("cannot read the new certificate, the last good one stays in force: {error:#}")
                }
            }
            present.1 = Instant::now();
        }
        TlsAcceptor::from(Arc::clone(&present.0))
    }
}

/// Certificates that a client trusts.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Trust<'a> {
    /// None: the client connects over plain HTTP only.
    Nobody,
    /// The system's certificates.
    System,
    /// Those of a PEM file, which an option of the command line names.
    File { option: &'static str, path: &'a Path },
}

/// A connector for HTTP and HTTPS.
///
/// A server's certificate must be for `name`; without `name`, for the host in the URL.
///
/// # Errors
/// When the certificates cannot be read.
pub(crate) fn connector(
    trust: Trust<'_>,
    name: Option<ServerName<'static>>,
) -> anyhow::Result<HttpsConnector<HttpConnector>> {
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?;
    let config = match trust {
        Trust::Nobody => builder.with_root_certificates(RootCertStore::empty()),
        Trust::System => builder.with_native_roots().context("the system's certificates")?,
        Trust::File { option, path } => {
            let mut roots = RootCertStore::empty();
            certificates(path)
                .and_then(|found| found.into_iter().try_for_each(|certificate| Ok(roots.add(certificate)?)))
                .with_context(|| format!("{option} {}", path.display()))?;
            builder.with_root_certificates(roots)
        }
    };
    let builder = HttpsConnectorBuilder::new().with_tls_config(config.with_no_client_auth()).https_or_http();
    let builder = match name {
        Some(name) => builder.with_server_name_resolver(FixedServerNameResolver::new(name)),
        None => builder,
    };
    Ok(builder.enable_http1().build())
}

/// The certificates of a PEM file, at least one.
fn certificates(file: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let certificates = CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>)?;
    if certificates.is_empty() {
        anyhow::bail!("the file has no certificate");
    }
    Ok(certificates)
}

impl TlsFiles {
    fn read(&self, protocol: Protocol) -> anyhow::Result<Arc<ServerConfig>> {
        let certificates =
            certificates(&self.certificate).with_context(|| format!("--tls-cert {}", self.certificate.display()))?;
        let key =
            PrivateKeyDer::from_pem_file(&self.key).with_context(|| format!("--tls-key {}", self.key.display()))?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(certificates, key)
            .with_context(|| format!("--tls-cert {}", self.certificate.display()))?;
        let name: &[u8] = match protocol {
            Protocol::Http1 => b"http/1.1",
            Protocol::Http2 => b"h2",
        };
        config.alpn_protocols = vec![name.to_vec()];
        Ok(Arc::new(config))
    }
}
