//! Envoy AI Gateway by its own charts, and the overlays for it.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;

use k8s_openapi::api::apps::v1::Deployment;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use tokio::process::Command;

use crate::cluster::{Cluster, GATEWAY, OURS, kubectl, until};

const NAMESPACE: &str = "envoy-ai-gateway-system";
/// Kinds of which one set-up's would disturb the other's.
const KINDS: &str = "aigatewayroutes,aiservicebackends,backends.gateway.envoyproxy.io,envoypatchpolicies";

/// Folder of the programs and charts that `build-ai-gateway.sh` made.
fn programs() -> PathBuf {
    std::env::var_os("PD_AI_GATEWAY_BIN").expect("PD_AI_GATEWAY_BIN: run `make test-cluster`").into()
}

async fn helm(arguments: &[&str]) {
    let mut command = Command::new("helm");
    command.args(arguments).args(["--wait", "--timeout", "3m"]).stdin(Stdio::null());
    let done = command.output().await.expect("helm");
    assert!(done.status.success(), "helm {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Installs AI Gateway as its guide says, and applies `sim` with one of our components.
pub async fn ready(cluster: &mut Cluster, component: &str) {
    let programs = programs();
    let path = |name: &str| programs.join(name).display().to_string();
    let eg = PathBuf::from(std::env::var_os("PD_CLUSTER_BIN").expect("PD_CLUSTER_BIN")).join("eg-chart");
    let install = ["upgrade", "--install", "--create-namespace", "--namespace"];
    for (name, chart) in [("aieg-crd", "charts/ai-gateway-crds-helm"), ("aieg", "charts/ai-gateway-helm")] {
        helm(&[&install[..], &[NAMESPACE, name, &path(chart)]].concat()).await;
    }
    cluster.settled(NAMESPACE, "ai-gateway-controller").await;
    let (eg, values) = (eg.display().to_string(), path("envoy-gateway-values.yaml"));
    helm(&[&install[..], &[GATEWAY, "eg", &eg, "-f", &values, "--set", "topologyInjector.enabled=false"]].concat())
        .await;
    // It reads its configuration at its start.
    restart(cluster, GATEWAY, "envoy-gateway").await;

    kubectl(&["delete", KINDS, "--namespace", OURS, "--all"]).await.expect("deleted");
    let overlay = cluster.manifests().join("overlays/test");
    fs::create_dir_all(&overlay).expect("a folder");
    let text = format!(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [../sim]\n\
         components: [../../components/{component}]\n"
    );
    fs::write(overlay.join("kustomization.yaml"), text).expect("written");
    replace_all(cluster, &format!("components/{component}/models.yaml"), "my-model", "sim");
    replace_all(cluster, "overlays/sim/engines.yaml", "--speed, '0.1'", "--speed, '0.1', --record, '16'");
    cluster.up().await;
}

fn replace_all(cluster: &Cluster, file: &str, from: &str, to: &str) {
    let path = cluster.manifests().join(file);
    let text = fs::read_to_string(&path).expect(file);
    assert!(text.contains(from), "{from} in {file}");
    fs::write(path, text.replace(from, to)).expect(file);
}

/// As `kubectl rollout restart` does.
async fn restart(cluster: &Cluster, namespace: &str, name: &str) {
    let api: Api<Deployment> = Api::namespaced(cluster.client.clone(), namespace);
    let now = format!("{:?}", std::time::SystemTime::now());
    let patch = json!({"spec": {"template": {"metadata": {"annotations": {"restarted": now}}}}});
    api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.expect("restarted");
    cluster.settled(namespace, name).await;
}

/// Waits until AI Gateway's access log has the tokens of an answer.
pub async fn metered(cluster: &Cluster) {
    let state = PathBuf::from(std::env::var_os("PD_CLUSTER_STATE").expect("PD_CLUSTER_STATE"));
    until("tokens are metered", async || {
        let pods = cluster.pod_names(GATEWAY, "gateway.envoyproxy.io/owning-gateway-name=ai").await;
        let logs = pods.iter().filter_map(|pod| fs::read_to_string(state.join(format!("{pod}.envoy.log"))).ok());
        let entries: Vec<Value> = logs
            .flat_map(|log| log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect::<Vec<_>>())
            .collect();
        let tokens = |entry: &Value| {
            let total = &entry["total_tokens"];
            total.as_u64().or_else(|| total.as_str()?.parse().ok())
        };
        entries.iter().find_map(|entry| tokens(entry).filter(|tokens| *tokens > 500))
    })
    .await;
}
