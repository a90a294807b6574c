//! `pd-control check`: says whether a file would be taken, before anyone applies it.

use std::collections::BTreeMap;
use std::path::Path;

use pd_core::wire::{Endpoint, Role};
use serde::de::IgnoredAny;

use crate::file::{self, FileError};
use crate::kubernetes::KubernetesConfig;

/// What a file is for, as its keys tell.
enum Kind {
    /// `--endpoints`.
    Endpoints,
    /// `--kubernetes-config`.
    Kubernetes,
    /// The filter's configuration, which is JSON.
    Plugin,
}

/// Keys that `--kubernetes-config` alone has.
const KUBERNETES_KEYS: &[&str] = &["allowed_cidrs", "inference_pools", "labels", "namespaces", "selectors"];

/// Checks one file, an endpoints file, a `--kubernetes-config` or a plugin configuration; returns the line that sums it
/// up.
///
/// # Errors
/// The [`FileError`] that `pd-control` or the filter would refuse it with.
pub fn check(path: &Path) -> Result<String, FileError> {
    let bytes = file::read(path)?;
    let what = match kind(path, &bytes) {
        Kind::Endpoints => summary(file::parse(path, &bytes)?.as_slice()),
        Kind::Kubernetes => {
            let config = KubernetesConfig::parse(path, &bytes)?;
            let (selectors, pools) = (config.selectors.len(), config.inference_pools.len());
            format!("Kubernetes configuration with {selectors} selectors and {pools} InferencePools")
        }
        Kind::Plugin => {
            let config = pd_core::config::Config::parse(&bytes).map_err(|error| FileError {
                path: path.to_owned(),
                position: None,
                message: error.to_string(),
            })?;
            format!("plugin configuration with {}", summary(&config.static_snapshot().endpoints))
        }
    };
    Ok(format!("{}: ok, {what}", path.display()))
}

fn kind(path: &Path, bytes: &[u8]) -> Kind {
    type Keys = BTreeMap<String, IgnoredAny>;
    if let Ok(keys) = serde_json::from_slice::<Keys>(bytes) {
        let is_kubernetes = keys.keys().any(|key| KUBERNETES_KEYS.contains(&key.as_str()));
        let is_list = keys.len() == 1 && keys.contains_key("endpoints");
        return match (is_kubernetes, is_list) {
            (true, _) => Kind::Kubernetes,
            (false, true) => Kind::Endpoints,
            (false, false) => Kind::Plugin,
        };
    }
    match file::parse_yaml::<Keys>(path, bytes) {
        Ok(keys) if keys.keys().any(|key| KUBERNETES_KEYS.contains(&key.as_str())) => Kind::Kubernetes,
        // What is wrong with it is told where it is read.
        _ => Kind::Endpoints,
    }
}

/// `4 endpoints (2 prefill, 2 decode)`.
#[must_use]
pub fn summary(endpoints: &[Endpoint]) -> String {
    let counts = [(Role::Prefill, "prefill"), (Role::Decode, "decode"), (Role::Both, "both")]
        .map(|(role, name)| (endpoints.iter().filter(|endpoint| endpoint.role == role).count(), name));
    let roles: Vec<_> = counts.iter().filter(|(count, _)| *count > 0).map(|(n, name)| format!("{n} {name}")).collect();
    let plural = if endpoints.len() == 1 { "" } else { "s" };
    let roles = if roles.is_empty() { String::new() } else { format!(" ({})", roles.join(", ")) };
    format!("{} endpoint{plural}{roles}", endpoints.len())
}
