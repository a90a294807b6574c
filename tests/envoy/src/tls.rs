//! TLS in front of an engine, as a proxy in an engine's pod would be, and TLS to a gateway, as a client speaks it.

use std::net::SocketAddr;
use std::sync::Arc;

use pd_support::certificate::Certificate;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// The listener; it ends when this is dropped. Connections go on.
#[derive(Debug)]
pub struct TlsFront {
    /// Where it listens.
    pub address: SocketAddr,
    task: JoinHandle<()>,
}

impl TlsFront {
    /// Starts one in front of a plain listener.
    ///
    /// # Panics
    /// When the certificate cannot be read or no port is free.
    pub async fn start(engine: SocketAddr, certificate: &Certificate) -> Self {
        let chain = chain(certificate);
        let key = PrivateKeyDer::from_pem_file(&certificate.key).expect("a key");
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .expect("the certificate's key");
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind((engine.ip(), 0)).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let (Ok(mut outside), Ok(mut inside)) =
                        (acceptor.accept(stream).await, TcpStream::connect(engine).await)
                    else {
                        return;
                    };
                    // Either side may reset its connection.
                    let _ = copy_bidirectional(&mut outside, &mut inside).await;
                });
            }
        });
        Self { address, task }
    }
}

/// A plain listener whose connections go on over TLS; it ends when this is dropped.
#[derive(Debug)]
pub struct TlsTunnel {
    /// Where it listens.
    pub address: SocketAddr,
    task: JoinHandle<()>,
}

impl TlsTunnel {
    /// Starts one to a gateway that proves to be `name` by a certificate.
    ///
    /// # Panics
    /// When the certificate cannot be read or no port is free.
    pub async fn start(gateway: SocketAddr, name: &'static str, certificate: &Certificate) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(chain(certificate));
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connector = TlsConnector::from(Arc::new(config));
        let name = ServerName::try_from(name).expect("a name");
        let listener = TcpListener::bind((gateway.ip(), 0)).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let task = tokio::spawn(async move {
            while let Ok((mut inside, _)) = listener.accept().await {
                let (connector, name) = (connector.clone(), name.clone());
                tokio::spawn(async move {
                    let Ok(stream) = TcpStream::connect(gateway).await else { return };
                    let Ok(mut outside) = connector.connect(name, stream).await else { return };
                    // Either side may reset its connection.
                    let _ = copy_bidirectional(&mut inside, &mut outside).await;
                });
            }
        });
        Self { address, task }
    }
}

impl Drop for TlsTunnel {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn chain(certificate: &Certificate) -> Vec<CertificateDer<'static>> {
    let chain = CertificateDer::pem_file_iter(&certificate.certificate).expect("PEM");
    chain.collect::<Result<Vec<_>, _>>().expect("a certificate")
}

impl Drop for TlsFront {
    fn drop(&mut self) {
        self.task.abort();
    }
}
