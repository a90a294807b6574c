//! `pd-control check`: says whether files would be taken, before anyone applies them.
//!
//! Each file by itself: endpoints, `--kubernetes-config`, plugin configuration. Kubernetes manifests of all files together:
//! what is ours in them, and the names that must agree.

mod agree;
mod control;

mod filter;
mod manifests;
mod release;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use serde_json::Value;

use crate::list::summary;
use crate::sources::file::parse::{self as file, FileError};
use crate::sources::kubernetes::KubernetesConfig;
use manifests::Manifests;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// One line for each file that is good, and what could not be checked.
    pub said: Vec<String>,
    /// One line for each thing that would be refused or would not work.
    pub faults: Vec<String>,
}

/// What a file is for, as its keys tell.
enum Kind {
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

impl Report {
    fn note(&mut self, what: String) {
        if !self.said.contains(&what) {
            self.said.push(what);
        }
    }

    fn fault(&mut self, what: String) {
        if !self.faults.contains(&what) {
            self.faults.push(what);
        }
    }
}

/// Checks files; `-` is standard input. `applied` has the manifests that are in force, which new ones must follow on.
#[must_use]
pub fn check(files: &[PathBuf], applied: Option<&Path>) -> Report {
    let mut report = Report::default();
    let (mut new, mut old) = (Manifests::default(), Manifests::default());
    let mut read = Vec::new();
    for path in files {
        match check_file(path, &mut new) {
            Ok(Some(what)) => report.said.push(format!("{}: ok, {what}", path.display())),
            Ok(None) => read.push(path),
            Err(error) => report.faults.push(error.to_string()),
        }
    }
    if let Some(path) = applied
        && let Err(error) = file::read(path).and_then(|bytes| old.read(path, &bytes))
    {
        report.faults.push(error.to_string());
    }
    if !new.is_empty() {
        let found = [filter::check(&new, &old, &mut report), control::check(&new, &mut report)].concat();
        let is_good = |path: &Path| !report.faults.iter().any(|fault| fault.starts_with(&path.display().to_string()));
        let good: Vec<_> = read.into_iter().filter(|path| is_good(path)).collect();
        for path in good {
            let ours: Vec<_> = found.iter().filter(|object| object.file == *path).map(|it| it.title()).collect();
            let ours = if ours.is_empty() { "nothing of ours".to_owned() } else { ours.join(", ") };
            report.said.push(format!("{}: ok, {} objects: {ours}", path.display(), new.count(path)));
        }
    }
    report
}

/// Checks a file that stands for itself and says what it is; `None` for manifests, which are taken over.
fn check_file(path: &Path, manifests: &mut Manifests) -> Result<Option<String>, FileError> {
    let bytes = file::read(path)?;
    Ok(Some(match kind(path, &bytes) {
        Kind::Manifests => {
            manifests.read(path, &bytes)?;
            return Ok(None);
        }
        Kind::Plugin => {
            let config = pd_core::config::Config::parse(&bytes).map_err(|error| FileError {
                path: path.to_owned(),
                position: None,
                message: error.to_string(),
            })?;
            format!("plugin configuration with {}", summary(&config.static_snapshot().endpoints))
        }
        kind => check_own(&kind, path, &bytes)?,
    }))
}

/// Checks what pd-control itself reads.
fn check_own(kind: &Kind, path: &Path, bytes: &[u8]) -> Result<String, FileError> {
    if matches!(kind, Kind::Kubernetes) {
        let config = KubernetesConfig::parse(path, bytes)?;
        let (selectors, pools) = (config.selectors.len(), config.inference_pools.len());
        return Ok(format!("Kubernetes configuration with {selectors} selectors and {pools} InferencePools"));
    }
    Ok(summary(file::parse(path, bytes)?.as_slice()))
}

fn kind(path: &Path, bytes: &[u8]) -> Kind {
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
    match file::parse_yaml::<Keys>(path, bytes) {
        Ok(keys) if keys.keys().any(|key| KUBERNETES_KEYS.contains(&key.as_str())) => Kind::Kubernetes,
        // What is wrong with it is told where it is read.
        _ => Kind::Endpoints,
    }
}

/// The text of a member, or nothing.
fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// The items of a list, or none.
fn items<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}
