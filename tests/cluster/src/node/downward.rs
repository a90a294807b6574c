//! Fields of a pod that the downward API gives to its containers.

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;

use super::shared::NAME;
use crate::network::NODE;

/// A field that the downward API knows; empty for others.
#[must_use]
pub fn field(pod: &Pod, ip: &str, path: &str) -> String {
    let quoted = |path: &str| path.split('\'').nth(1).unwrap_or_default().to_owned();
    match path {
        "metadata.name" => pod.name_any(),
        "metadata.namespace" => pod.namespace().unwrap_or_default(),
        "metadata.uid" => pod.uid().unwrap_or_default(),
        "spec.nodeName" => NAME.to_owned(),
        "spec.serviceAccountName" => {
            pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone()).unwrap_or_default()
        }
        "status.podIP" | "status.podIPs" => ip.to_owned(),
        "status.hostIP" | "status.hostIPs" => NODE.to_string(),
        _ if path.starts_with("metadata.labels[") => pod.labels().get(&quoted(path)).cloned().unwrap_or_default(),
        _ if path.starts_with("metadata.annotations[") => {
            pod.annotations().get(&quoted(path)).cloned().unwrap_or_default()
        }
        _ => String::new(),
    }
}
