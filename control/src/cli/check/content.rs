//! Files that stand for themselves: what each is for, and whether pd-control would take it.

use std::collections::BTreeMap;
use std::path::Path;

use serde::de::IgnoredAny;

use crate::list::summary;
use crate::sources::file::endpoints;
use crate::sources::kubernetes::KubernetesConfig;
use crate::sources::yaml::{self, FileError};

/// What a file is for, as its keys tell.
pub(super) enum Kind {
    /// `--endpoints`.
    Endpoints,
    /// `--kubernetes-config`.
    Kubernetes,
    /// The filter's configuration, which is JSON.
    Plugin,
    /// Objects for a cluster.
    Manifests,
}

/// Keys that `--kubernetes-config` alone has.
const KUBERNETES_KEYS: &[&str] = &["allowed_cidrs", "inference_pools", "labels", "namespaces", "selectors"];

/// Checks what pd-control itself reads.
pub(super) fn check_own(kind: &Kind, path: &Path, bytes: &[u8]) -> Result<String, FileError> {
    if matches!(kind, Kind::Kubernetes) {
        let config = KubernetesConfig::parse(path, bytes)?;
        let (selectors, pools) = (config.selectors.len(), config.inference_pools.len());
        return Ok(format!("Kubernetes configuration with {selectors} selectors and {pools} InferencePools"));
    }
    Ok(summary(endpoints::parse(path, bytes)?.as_slice()))
}

/// Tells from its keys what a file is for.
pub(super) fn kind(path: &Path, bytes: &[u8]) -> Kind {
    type Keys = BTreeMap<String, IgnoredAny>;
    let is_manifest = |keys: &Keys| keys.contains_key("apiVersion") && keys.contains_key("kind");
    if let Ok(keys) = serde_json::from_slice::<Keys>(bytes) {
        let is_kubernetes = keys.keys().any(|key| KUBERNETES_KEYS.contains(&key.as_str()));
        let is_list = keys.len() == 1 && keys.contains_key("endpoints");
        return match (is_manifest(&keys), is_kubernetes, is_list) {
            (true, ..) => Kind::Manifests,
            (_, true, _) => Kind::Kubernetes,
            (_, _, true) => Kind::Endpoints,
            _ => Kind::Plugin,
        };
    }
    // Of several documents only the kind is looked at here.
    let text = String::from_utf8_lossy(bytes);
    if text.lines().any(|line| line.starts_with("apiVersion:")) && text.lines().any(|line| line.starts_with("kind:")) {
        return Kind::Manifests;
    }
    match yaml::parse::<Keys>(path, bytes) {
        Ok(keys) if keys.keys().any(|key| KUBERNETES_KEYS.contains(&key.as_str())) => Kind::Kubernetes,
        // What is wrong with it is told where it is read.
        _ => Kind::Endpoints,
    }
}
