//! `pd-control check`: checks files before they are applied.
//!
//! Endpoints files, files of `--kubernetes-config` and plugin configurations are checked one by one. Kubernetes
//! manifests of all files are checked together: the objects that pd-control and the filter use, and the names that must
//! agree.

mod agree;
mod attached;
mod containers;
mod content;
mod engines;
mod faults;
mod filters;
mod images;
mod order;
mod others;
mod policies;
mod ports;
mod readiness;
mod release;
mod repeats;
mod report;
mod rewrites;
mod rollout;
mod security;
mod serving;
mod traffic;
mod units;
mod upstream_tls;
mod workloads;

use std::path::{Path, PathBuf};

pub use report::Report;

use crate::cli::manifests::Manifests;
use crate::sources::yaml::{self, FileError};
use content::{FileKind, Good, kind};
use faults::MAX_FAULTS;

/// Checks files; `-` is standard input. `applied` has the manifests in force, to check the rollout from them.
#[must_use]
pub fn check(files: &[PathBuf], applied: Option<&Path>) -> Report {
    let mut report = Report::default();
    let (mut new, mut old) = (Manifests::default(), Manifests::default());
    let mut read = Vec::new();
    for path in files {
        match check_file(path, &mut new) {
            Ok(Some(Good { what, warnings })) => {
                report.said.push(format!("{}: ok, {what}", path.display()));
                warnings.into_iter().for_each(|warning| report.warn(format!("{}: {warning}", path.display())));
            }
            Ok(None) => read.push(path),
            Err(errors) => {
                report.faults.extend(errors.iter().take(MAX_FAULTS).map(ToString::to_string));
                if errors.len() > MAX_FAULTS {
                    report.fault(format!("{}: there are more faults than these {MAX_FAULTS}", path.display()));
                }
            }
        }
    }
    if let Some(path) = applied
        && let Err(error) = yaml::read(path).and_then(|bytes| old.read(path, &bytes))
    {
        report.faults.push(error.to_string());
    }
    if !new.is_empty() {
        let found = [policies::check(&new, &old, &mut report), workloads::check(&new, &mut report)].concat();
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

/// Checks a file that is no manifest. Adds manifests to `manifests` and returns `None`.
fn check_file(path: &Path, manifests: &mut Manifests) -> Result<Option<Good>, Vec<FileError>> {
    let bytes = yaml::read(path).map_err(|error| vec![error])?;
    match kind(path, &bytes) {
        FileKind::Manifests => {
            manifests.read(path, &bytes).map_err(|error| vec![error])?;
            Ok(None)
        }
        kind => content::check(&kind, path, &bytes).map(Some),
    }
}
