//! A registry of images that the cluster can reach, over plain HTTP and over TLS.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::net::TcpStream;
use tokio::process::Child;
use tokio::time::sleep;

use crate::network::{NODE, REGISTRY};
use crate::pki::Pki;
use crate::program::{logged, tail};

/// Its ports.
const PORT: u16 = 5000;
const TLS_PORT: u16 = 5443;

/// A running registry: two processes with the same images. Dropping it kills them.
#[derive(Debug)]
pub struct Registry {
    /// Its address and port for plain HTTP.
    pub plain: String,
    /// Its name and port for TLS, with a certificate of the cluster's authority.
    pub tls: String,
    _processes: [Child; 2],
}

impl Registry {
    /// Starts it: `registry` among the programs, or else Debian's `docker-registry`.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn start(programs: &Path, state: &Path, pki: &Pki) -> anyhow::Result<Self> {
        let (certificate, key) = (pki.path("registry.crt"), pki.path("registry.key"));
        let tls = format!(", tls: {{certificate: {}, key: {}}}", certificate.display(), key.display());
        let processes = [serve(programs, state, PORT, "").await?, serve(programs, state, TLS_PORT, &tls).await?];
        Ok(Self { plain: format!("{NODE}:{PORT}"), tls: format!("{REGISTRY}:{TLS_PORT}"), _processes: processes })
    }
}

/// Starts one process and waits until it accepts connections.
async fn serve(programs: &Path, state: &Path, port: u16, tls: &str) -> anyhow::Result<Child> {
    let built = programs.join("registry");
    let program = if built.exists() { built } else { "docker-registry".into() };
    let config = state.join(format!("registry-{port}.yml"));
    let text = format!(
        "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '{NODE}:{port}'{tls}}}\n",
        state.join("registry").display(),
    );
    std::fs::write(&config, text)?;
    let log = state.join(format!("registry-{port}.log"));
    let mut child = logged(&program, &log)?
        .arg("serve")
        .arg(&config)
        .spawn()
        .context("docker-registry (Debian, Ubuntu: apt-get install docker-registry)")?;
    while TcpStream::connect((NODE, port)).await.is_err() {
        if child.try_wait()?.is_some() {
            bail!("the registry ended: {}", tail(&log, 5));
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok(child)
}
