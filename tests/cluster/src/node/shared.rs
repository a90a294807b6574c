//! What the pods of the node share, and how the node orders them to end.

use std::path::PathBuf;

use k8s_openapi::api::core::v1::Pod;
use kube::api::DeleteParams;
use kube::{Api, Client, ResourceExt as _};

use super::container::Images;

/// The node's name.
pub const NAME: &str = "node";
/// What the node orders a pod to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Live on.
    Run,
    /// End in peace, within the grace period.
    Stop,
    /// The pod is no more.
    Kill,
}

/// What all pods share.
pub struct Shared {
    /// The API server.
    pub client: Client,
    /// Programs of images.
    pub images: Images,
    /// Where files of pods and their logs go.
    pub state: PathBuf,
}

/// Removes a pod that has ended from the API server.
pub async fn delete(client: &Client, pod: &Pod) {
    let pods: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let params = DeleteParams::default()
        .grace_period(0)
        .preconditions(kube::api::Preconditions { uid: pod.uid(), resource_version: None });
    if let Err(error) = pods.delete(&pod.name_any(), &params).await {
        tracing::debug!("deleting {}: {error}", pod.name_any());
    }
}
