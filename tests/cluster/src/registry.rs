//! A registry of images that the cluster can reach.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::net::TcpStream;
use tokio::process::Child;
use tokio::time::sleep;

use crate::network::NODE;
use crate::program::{logged, tail};

/// Its port.
const PORT: u16 = 5000;

/// A running registry. Dropping it kills it.
#[derive(Debug)]
pub struct Registry(#[expect(dead_code, reason = "held to run")] Child);

impl Registry {
    /// Starts it: `registry` among the programs, or else Debian's `docker-registry`. Returns its name, too.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn start(programs: &Path, state: &Path) -> anyhow::Result<(Self, String)> {
        let built = programs.join("registry");
        let program = if built.exists() { built } else { "docker-registry".into() };
        let config = state.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '{NODE}:{PORT}'}}\n",
            state.join("registry").display(),
        );
        std::fs::write(&config, text)?;
        let log = state.join("registry.log");
        let mut child = logged(&program, &log)?
            .arg("serve")
            .arg(&config)
            .spawn()
            .context("docker-registry (Debian, Ubuntu: apt-get install docker-registry)")?;
        while TcpStream::connect((NODE, PORT)).await.is_err() {
            if child.try_wait()?.is_some() {
                bail!("the registry ended: {}", tail(&log, 5));
            }
            sleep(Duration::from_millis(20)).await;
        }
        Ok((Self(child), format!("{NODE}:{PORT}")))
    }
}
