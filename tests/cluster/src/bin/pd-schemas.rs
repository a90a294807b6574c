//! Stores the schemas of custom resources that our manifests use, from a folder with their definitions (of Envoy Gateway's
//! and Envoy AI Gateway's charts; of KEDA 2.17.2, of Prometheus' operator 0.85.0, of AIBrix 0.7):
//! `pd-schemas CRDS tests/cluster/schemas`.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use pd_cluster::schema::reduced;
use serde_json::Value;

/// Kinds that are stored, with their versions.
const KINDS: [(&str, &str); 18] = [
    ("AIGatewayRoute", "v1beta1"),
    ("AIServiceBackend", "v1beta1"),
    ("Backend", "v1alpha1"),
    ("BackendTrafficPolicy", "v1alpha1"),
    ("ClientTrafficPolicy", "v1alpha1"),
    ("EnvoyExtensionPolicy", "v1alpha1"),
    ("EnvoyPatchPolicy", "v1alpha1"),
    ("EnvoyProxy", "v1alpha1"),
    ("Gateway", "v1"),
    ("GatewayClass", "v1"),
    ("HTTPRoute", "v1"),
    ("PodAutoscaler", "v1alpha1"),
    ("PodMonitor", "v1"),
    ("PrometheusRule", "v1"),
    ("ReferenceGrant", "v1"),
    ("ScaledObject", "v1alpha1"),
    ("SecurityPolicy", "v1alpha1"),
    ("ServiceMonitor", "v1"),
];

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (from, to) = arguments.next().zip(arguments.next()).context("pd-schemas CRDS SCHEMAS")?;
    let mut files = Vec::new();
    find(&from, &mut files)?;
    for file in files {
        let text = std::fs::read_to_string(&file)?;
        for document in text.split("\n---\n") {
            let Ok(crd) = serde_saphyr::from_str::<Value>(document) else { continue };
            store(&crd, &to).with_context(|| file.display().to_string())?;
        }
    }
    Ok(())
}

fn find(folder: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            find(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "yaml") {
            files.push(path);
        }
    }
    Ok(())
}

fn store(crd: &Value, to: &Path) -> anyhow::Result<()> {
    let kind = crd["spec"]["names"]["kind"].as_str().unwrap_or_default();
    for version in crd["spec"]["versions"].as_array().into_iter().flatten() {
        let name = version["name"].as_str().unwrap_or_default();
        if KINDS.contains(&(kind, name)) {
            let mut text = reduced(&version["schema"]["openAPIV3Schema"]).to_string();
            text.push('\n');
            std::fs::write(to.join(format!("{kind}.{name}.json")), text)?;
        }
    }
    Ok(())
}
