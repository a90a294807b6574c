//! `pd-control migrate`: reads the manifests of an llm-d, Inference Extension or AIBrix installation and writes values for
//! this project's Helm chart.
//!
//! Each setting has a line in the report, which names the value that it became, or the reason why it became none.

mod aibrix;
mod objects;
mod picker;
mod report;
mod sidecar;
mod values;

use std::path::PathBuf;

pub use report::Report;

use crate::cli::manifests::Manifests;
use crate::sources::yaml::{self, FileError};
use values::Values;

/// Values for the chart, and what became of each setting.
#[derive(Debug)]
pub struct Migration {
    /// The values, as YAML.
    pub values: String,
    /// What was carried over, and what was not.
    pub report: Report,
}

/// Reads manifests; `-` is standard input.
///
/// # Errors
/// The first file that cannot be read, or one line when no file has anything to migrate.
pub fn migrate(files: &[PathBuf]) -> anyhow::Result<Migration> {
    let mut manifests = Manifests::default();
    for path in files {
        yaml::read(path).and_then(|bytes| manifests.read(path, &bytes)).map_err(|error: FileError| {
            // The path stands in the error.
            anyhow::anyhow!("{error}")
        })?;
    }
    let (mut values, mut report) = (Values::default(), Report::default());
    objects::read(&manifests, &mut values, &mut report);
    picker::read(&manifests, &mut values, &mut report);
    sidecar::read(&manifests, &mut values, &mut report);
    aibrix::read(&manifests, &mut values, &mut report);
    if report.is_empty() {
        anyhow::bail!(
            "no InferencePool, InferenceObjective, InferenceModel, InferenceModelRewrite, EndpointPickerConfig, routing \
             sidecar or AIBrix gateway is in these files"
        );
    }
    Ok(Migration { values: values.to_yaml()?, report })
}
