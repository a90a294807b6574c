//! The API server's client.

use std::path::Path;

use anyhow::Context as _;
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};

/// A client by a kubeconfig.
///
/// # Errors
/// When it is broken.
pub async fn client(kubeconfig: &Path) -> anyhow::Result<Client> {
    let config = Kubeconfig::read_from(kubeconfig).with_context(|| kubeconfig.display().to_string())?;
    let mut config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
    // Watches are idle for long.
    config.read_timeout = None;
    Ok(Client::try_from(config)?)
}
