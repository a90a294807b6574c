//! The node: takes every pod and runs it as processes, with the kubelet's part of its life.

pub mod container;
mod downward;
mod environment;
pub mod pod;
mod pod_container;
pub mod probe;
pub mod shared;
pub mod volumes;

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{Binding, Node, ObjectReference, Pod};
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use tokio::sync::watch;

use crate::network::NODE;
use shared::{NAME, Order, Shared, delete};

/// Pods that it takes at a time.
const MAX_PODS: usize = 200;

/// Registers the node and runs pods until it is dropped.
///
/// # Errors
/// When the API server refuses the node.
pub async fn run(shared: Arc<Shared>) -> anyhow::Result<()> {
    register(&shared.client).await?;
    let pods: Api<Pod> = Api::all(shared.client.clone());
    let mut known: HashMap<String, watch::Sender<Order>> = HashMap::new();
    let mut number = 0_u16;
    let mut events = pin!(watcher::watcher(pods, watcher::Config::default()));
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Apply(pod) | Event::InitApply(pod)) => {
                let uid = pod.uid().unwrap_or_default();
                if pod.metadata.deletion_timestamp.is_some() {
                    match known.get(&uid) {
                        Some(order) => drop(order.send_if_modified(|order| {
                            let is_new = *order == Order::Run;
                            *order = if is_new { Order::Stop } else { *order };
                            is_new
                        })),
                        None => delete(&shared.client, &pod).await,
                    }
                } else if pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_none()) {
                    bind(&shared.client, &pod).await;
                } else if !known.contains_key(&uid) && !pod::is_over(&pod) {
                    known.retain(|_, order| !order.is_closed());
                    if known.len() >= MAX_PODS {
                        tracing::warn!("no room for {}", pod.name_any());
                        continue;
                    }
                    number = number.wrapping_add(1);
                    let (sender, orders) = watch::channel(Order::Run);
                    known.insert(uid, sender);
                    tokio::spawn(pod::live(Arc::clone(&shared), pod, number, orders));
                }
            }
            Ok(Event::Delete(pod)) => {
                if let Some(order) = known.get(&pod.uid().unwrap_or_default()) {
                    order.send_replace(Order::Kill);
                }
            }
            Ok(Event::Init | Event::InitDone) => {}
            Err(error) => tracing::warn!("pods: {error}"),
        }
    }
    Ok(())
}

async fn register(client: &Client) -> anyhow::Result<()> {
    let nodes: Api<Node> = Api::all(client.clone());
    let labels = [("kubernetes.io/hostname", NAME), ("kubernetes.io/os", "linux")];
    let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let metadata = ObjectMeta { name: Some(NAME.to_owned()), labels: Some(labels), ..ObjectMeta::default() };
    nodes.create(&PostParams::default(), &Node { metadata, ..Node::default() }).await?;
    let room = json!({"cpu": "64", "memory": "256Gi", "pods": MAX_PODS.to_string()});
    let status = json!({"status": {
        "capacity": room, "allocatable": room,
        "addresses": [{"type": "InternalIP", "address": NODE.to_string()}],
        "conditions": [{"type": "Ready", "status": "True", "reason": "Runs", "message": "pods are processes"}],
    }});
    nodes.patch_status(NAME, &PatchParams::default(), &Patch::Merge(status)).await?;
    Ok(())
}

/// The scheduler's part.
async fn bind(client: &Client, pod: &Pod) {
    let pods: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let target =
        ObjectReference { kind: Some("Node".to_owned()), name: Some(NAME.to_owned()), ..ObjectReference::default() };
    let metadata = ObjectMeta { name: Some(pod.name_any()), ..ObjectMeta::default() };
    let binding = Binding { metadata, target };
    let bound: kube::Result<serde_json::Value> =
        pods.create_subresource("binding", &pod.name_any(), &PostParams::default(), &binding).await;
    if let Err(error) = bound {
        // Another event of the same pod may have been first.
        tracing::debug!("binding {}: {error}", pod.name_any());
    }
}
