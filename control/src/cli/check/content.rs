//! Checks files that are no manifests: endpoints files, files of `--kubernetes-config`, plugin configurations.

use std::collections::BTreeMap;
use std::path::Path;

use pd_core::config::Config;
use pd_core::wire::Endpoint;
use serde::de::IgnoredAny;
use serde_json::Value;
use serde_saphyr::Spanned;

use super::faults::{self, Fault, MAX_FAULTS};
use super::serving;
use crate::list::summary;
use crate::sources::file::endpoints;
use crate::sources::kubernetes::KubernetesConfig;
use crate::sources::yaml::{self, FileError, Node};

/// The kind of a file.
pub(super) enum FileKind {
    /// A file of `--endpoints`.
    Endpoints,
    /// A file of `--kubernetes-config`.
    Kubernetes,
    /// The filter's configuration, as JSON.
    Plugin,
    /// Kubernetes objects.
    Manifests,
}

/// Keys that only a file of `--kubernetes-config` has.
const KUBERNETES_KEYS: &[&str] =
    &["allowed_cidrs", "inference_objects", "inference_pools", "labels", "namespaces", "selectors"];

/// The findings on a valid file.
pub(super) struct Good {
    /// Kind and size of its content, for people.
    pub(super) what: String,
    /// Why its endpoints cannot serve.
    pub(super) warnings: Vec<String>,
}

/// Checks a file that is no manifest.
///
/// # Errors
/// All faults, at least one, in the order of the file.
pub(super) fn check(kind: &FileKind, path: &Path, bytes: &[u8]) -> Result<Good, Vec<FileError>> {
    read(kind, path, bytes).map_err(|mut errors| {
        errors.sort_by_key(|error| error.position);
        errors
    })
}

fn read(kind: &FileKind, path: &Path, bytes: &[u8]) -> Result<Good, Vec<FileError>> {
    match kind {
        FileKind::Endpoints | FileKind::Manifests => {
            let list = endpoints::parse_all(path, bytes, MAX_FAULTS + 1)?;
            let warnings = serving::warnings(list.as_slice(), |endpoint| endpoint.engine);
            Ok(Good { what: summary(list.as_slice()), warnings })
        }
        FileKind::Kubernetes => {
            let config = KubernetesConfig::parse(path, bytes).map_err(|first| kubernetes_faults(path, bytes, first))?;
            let (selectors, pools) = (config.selectors.len(), config.inference_pools.len());
            let what = format!("Kubernetes configuration with {selectors} selectors and {pools} InferencePools");
            Ok(Good { what, warnings: Vec::new() })
        }
        FileKind::Plugin => {
            let config = Config::parse(bytes).map_err(|error| plugin_faults(path, bytes, &error.to_string()))?;
            let endpoints = config.static_snapshot().endpoints;
            let what = format!("plugin configuration with {}", summary(&endpoints));
            // Without endpoints in the configuration, pd-control sends them.
            let is_own = !endpoints.is_empty() || config.control.is_none();
            let engine_of = |endpoint: &Endpoint| Some(endpoint.engine.unwrap_or(config.pool(&endpoint.pool).engine));
            let warnings = if is_own { serving::warnings(&endpoints, engine_of) } else { Vec::new() };
            Ok(Good { what, warnings })
        }
    }
}

/// All faults of a file of `--kubernetes-config`; its parser returns `first`.
fn kubernetes_faults(path: &Path, bytes: &[u8], first: FileError) -> Vec<FileError> {
    let Ok(root) = yaml::parse::<Spanned<Node>>(path, bytes) else { return vec![first] };
    let read = |text: &str| {
        let FileError { position, message, .. } = KubernetesConfig::parse(path, text.as_bytes()).err()?;
        Some(faults::Error { line: position.and_then(|(line, _)| usize::try_from(line).ok()), message })
    };
    let error = |fault: &Fault| FileError {
        path: path.to_owned(),
        position: Some(fault.position(&root)),
        message: match fault.what.contains(" field `") || fault.steps.is_empty() {
            true => fault.what.clone(),
            false => format!("{}: {}", fault.key(), fault.what),
        },
    };
    let found: Vec<_> = faults::all(&root.value.to_value(), read).iter().map(error).collect();
    if found.is_empty() { vec![first] } else { found }
}

/// All faults of a plugin configuration; its parser returns `first`.
fn plugin_faults(path: &Path, bytes: &[u8], first: &str) -> Vec<FileError> {
    let error = |position, message| FileError { path: path.to_owned(), position, message };
    let Ok(value) = serde_json::from_slice::<Value>(bytes) else { return vec![error(None, first.to_owned())] };
    // The YAML parser has positions, but refuses some JSON.
    let root = yaml::parse::<Spanned<Node>>(path, bytes).ok();
    let named = |fault: &Fault| {
        let position = root.as_ref().map(|root| fault.position(root));
        let key = fault.key();
        error(position, if key.is_empty() { fault.what.clone() } else { format!("{key}: {}", fault.what) })
    };
    let found: Vec<_> = config_faults(&value).iter().map(named).collect();
    if found.is_empty() { vec![error(None, first.to_owned())] } else { found }
}

/// All faults of a plugin configuration.
pub(super) fn config_faults(config: &Value) -> Vec<Fault> {
    faults::all(config, |text| Some(config_error(&Config::parse(text.as_bytes()).err()?.to_string())))
}

/// Takes the line from the end of serde's messages: "… at line 3 column 7".
fn config_error(error: &str) -> faults::Error {
    let Some((what, place)) = error.rsplit_once(" at line ") else {
        return faults::Error { line: None, message: error.to_owned() };
    };
    let line = place.split(' ').next().and_then(|line| line.parse().ok());
    let what = what.strip_prefix("plugin configuration: ").unwrap_or(what);
    faults::Error { line, message: what.to_owned() }
}

/// Tells the kind of a file from its keys.
pub(super) fn kind(path: &Path, bytes: &[u8]) -> FileKind {
    type Keys = BTreeMap<String, IgnoredAny>;
    let is_manifest = |keys: &Keys| keys.contains_key("apiVersion") && keys.contains_key("kind");
    if let Ok(keys) = serde_json::from_slice::<Keys>(bytes) {
        let is_kubernetes = keys.keys().any(|key| KUBERNETES_KEYS.contains(&key.as_str()));
        let is_list = keys.len() == 1 && keys.contains_key("endpoints");
        return match (is_manifest(&keys), is_kubernetes, is_list) {
            (true, ..) => FileKind::Manifests,
            (_, true, _) => FileKind::Kubernetes,
            (_, _, true) => FileKind::Endpoints,
            _ => FileKind::Plugin,
        };
    }
    // Files of several documents are manifests.
    let text = String::from_utf8_lossy(bytes);
    if text.lines().any(|line| line.starts_with("apiVersion:")) && text.lines().any(|line| line.starts_with("kind:")) {
        return FileKind::Manifests;
    }
    match yaml::parse::<Keys>(path, bytes) {
        Ok(keys) if keys.keys().any(|key| KUBERNETES_KEYS.contains(&key.as_str())) => FileKind::Kubernetes,
        // Its parser names the fault.
        _ => FileKind::Endpoints,
    }
}
