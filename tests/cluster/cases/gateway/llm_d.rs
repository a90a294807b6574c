//! Overlays `llm-d` and `sidecar` over pods of the shape that llm-d's chart `llm-d-modelservice` 0.4.12 gives them: no probes, no
//! label for engine or model, ports without names, a routing sidecar as an init container that stays, a LeaderWorkerSet for
//! several nodes. `PD_CLUSTER_LLM_D_CHART` names a folder with the chart itself; its pods are then taken in place of these.

use std::process::Stdio;

use tokio::process::Command;

use crate::cluster::{Cluster, OURS};
use crate::engine_pods::Engines;

/// Label of all pods of this file.
const OWN: &str = "test-pods=llm-d";
/// llm-d's models have names of this form.
const MODEL: &str = "facebook/opt-125m";

/// The engine's container. Prefill pods, and decode pods without a sidecar, listen on the service's port.
fn engine(role: &str, port: u16, more: &str) -> String {
    format!(
        "      - name: vllm
        image: registry.example/pd-sim:0.1.0
        args: [--listen, '0.0.0.0:{port}', --side-channel, '$(POD_IP):5600', --role, {role}, --model, {MODEL}, --speed, '0.1'{more}]
        env:
        - {{name: POD_IP, valueFrom: {{fieldRef: {{fieldPath: status.podIP}}}}}}
        - {{name: VLLM_NIXL_SIDE_CHANNEL_PORT, value: '5600'}}
        - {{name: DP_SIZE, value: '1'}}
        - {{name: DP_SIZE_LOCAL, value: '1'}}
        ports: [{{containerPort: {port}, protocol: TCP}}, {{containerPort: 5600, protocol: TCP}}]
        volumeMounts: [{{name: model-storage, mountPath: /model-cache}}]
"
    )
}

/// What the routing sidecar has in front of a decode server on port 8200.
const SIDECAR: &str = "      initContainers:
      - name: routing-proxy
        image: registry.example/llm-d-routing-sidecar:latest
        args: [--port=8000, --vllm-port=8200, --kv-connector=nixlv2, --secure-proxy=false]
        ports: [{containerPort: 8000}]
        restartPolicy: Always
        securityContext: {allowPrivilegeEscalation: false, runAsNonRoot: true}
";

fn labels(role: &str, more: &str) -> String {
    format!(
        "{{llm-d.ai/inference-serving: 'true', llm-d.ai/model: opt, llm-d.ai/role: {role}, test-pods: llm-d{more}}}"
    )
}

fn deployment(role: &str, annotations: &str, init: &str, container: &str) -> String {
    format!(
        "---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: ms-llm-d-modelservice-{role}, namespace: llm, labels: {{test-pods: llm-d}}}}
spec:
  replicas: 2
  selector: {{matchLabels: {{llm-d.ai/inference-serving: 'true', llm-d.ai/model: opt, llm-d.ai/role: {role}}}}}
  template:
    metadata:
      labels: {}
      annotations: {{{annotations}}}
    spec:
{init}      containers:
{container}      volumes: [{{name: metrics-volume, emptyDir: {{}}}}, {{name: model-storage, emptyDir: {{sizeLimit: 5Mi}}}}]
",
        labels(role, "")
    )
}

const DEPLOYMENTS: [&str; 2] = ["ms-llm-d-modelservice-prefill", "ms-llm-d-modelservice-decode"];
const PREFILL: Engines = Engines { label: "test-pods=llm-d,llm-d.ai/role=prefill", port: 8_000 };
const DECODE: Engines = Engines { label: "test-pods=llm-d,llm-d.ai/role=decode", port: 8_000 };

/// The two Deployments: those of the chart if there is one, else of its shape. `more` are arguments of the simulators.
async fn deployments(has_sidecar: bool, more: &str) -> String {
    let decode_port = if has_sidecar { 8_200 } else { 8_000 };
    let Some(chart) = std::env::var_os("PD_CLUSTER_LLM_D_CHART") else {
        let init = if has_sidecar { SIDECAR } else { "" };
        return deployment("prefill", "", "", &engine("prefill", 8_000, more))
            + &deployment("decode", "", init, &engine("decode", decode_port, more));
    };
    let of_role = |role: &str, port: u16| {
        let container = engine(role, port, more)
            .replace("        volumeMounts: [{name: model-storage, mountPath: /model-cache}]\n", "");
        format!(
            "{role}:\n    create: true\n    replicas: 2\n    containers:\n{container}        modelCommand: custom\n        command: [pd-sim]\n        \
             mountModelVolume: true\n"
        )
    };
    let values = format!(
        "modelArtifacts:
  name: {MODEL}
  uri: 'hf://{MODEL}'
  labels: {{llm-d.ai/inference-serving: 'true', llm-d.ai/model: opt, test-pods: llm-d}}
routing:
  servicePort: 8000
  proxy: {{enabled: {has_sidecar}, secure: false, image: 'registry.example/llm-d-routing-sidecar:latest'}}
{}{}",
        of_role("prefill", 8_000),
        of_role("decode", decode_port)
    );
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), values).expect("written");
    let mut helm = Command::new("helm");
    helm.args(["template", "ms"])
        .arg(chart)
        .args(["--namespace", OURS, "--values"])
        .arg(file.path())
        .stdin(Stdio::null());
    let done = helm.output().await.expect("helm");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    // The newest sidecar has another name for this flag.
    let text = String::from_utf8_lossy(&done.stdout).replace("--connector=nixlv2", "--kv-connector=nixlv2");
    let text = text.replace(
        "metadata:\n  name: ms-llm-d-modelservice",
        "metadata:\n  namespace: llm\n  name: ms-llm-d-modelservice",
    );
    text.replace("  labels:\n    helm.sh/chart", "  labels:\n    test-pods: llm-d\n    helm.sh/chart")
}

/// The chart with `routing.proxy.enabled: false`.
#[tokio::test]
async fn pods_of_the_chart_without_its_sidecar_are_split() {
    let pods = deployments(false, "").await;
    let mut cluster = Cluster::with_pods("llm-d", &pods, "").await;
    cluster.up_with(&DEPLOYMENTS).await;
    let (is_good, faults) = cluster.checked().await;
    assert!(is_good, "{faults}");
    cluster.splits_over(MODEL, PREFILL, DECODE).await;
    Cluster::without("deployments", OWN).await;
}

/// The sidecar is llm-d's own program, which has no Go module: `PD_CLUSTER_SIDECAR` names it.
#[tokio::test]
async fn pods_of_the_chart_with_its_sidecar_are_split_by_the_sidecar() {
    if std::env::var_os("PD_CLUSTER_SIDECAR").is_none() {
        eprintln!("NOT TESTED: PD_CLUSTER_SIDECAR names no llm-d routing sidecar");
        return;
    }
    let pods = deployments(true, ", --rebuilt-params").await;
    let mut cluster = Cluster::with_pods("sidecar", &pods, "").await;
    cluster.up_with(&DEPLOYMENTS).await;
    let (is_good, faults) = cluster.checked().await;
    assert!(is_good, "{faults}");
    cluster.splits_over(MODEL, PREFILL, Engines { port: 8_200, ..DECODE }).await;
    Cluster::without("deployments", OWN).await;
}

#[tokio::test]
async fn data_parallel_ranks_behind_one_address_get_a_header() {
    let annotations = "envoy-pd/ranks: '2'";
    let recorded = ", --record, '64'";
    let pods = deployment("prefill", annotations, "", &engine("prefill", 8_000, recorded))
        + &deployment("decode", annotations, "", &engine("decode", 8_000, recorded));
    let mut cluster = Cluster::with_pods("llm-d", &pods, "").await;
    cluster.up_with(&DEPLOYMENTS).await;
    cluster.splits_over(MODEL, PREFILL, DECODE).await;
    for (label, leg) in [(PREFILL.label, "do_remote_decode"), (DECODE.label, "do_remote_prefill")] {
        let recorded = cluster.recorded(label).await;
        let of_leg: Vec<_> = recorded.iter().map(ToString::to_string).filter(|request| request.contains(leg)).collect();
        for rank in ["0", "1"] {
            let has = |request: &&String| {
                request.to_ascii_lowercase().contains(&format!(r#""x-data-parallel-rank","value":"{rank}""#))
            };
            assert!(of_leg.iter().any(|request| has(&request)), "rank {rank} at {label}: {:?}", of_leg.last());
        }
    }
    Cluster::without("deployments", OWN).await;
}

/// Pods of a group of two, as the controller of LeaderWorkerSets makes them: the leader, and a worker that it names.
fn group(role: &str, worker: &str) -> String {
    let pod = |name: &str, index: u8, container: &str| {
        format!(
            "---
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: llm
  labels: {}
  annotations: {{leaderworkerset.sigs.k8s.io/size: '2'}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
{container}    env:
    - {{name: POD_IP, valueFrom: {{fieldRef: {{fieldPath: status.podIP}}}}}}
    - {{name: LWS_LEADER_ADDRESS, value: lws-{role}-0.lws-{role}.llm}}
    - {{name: LWS_GROUP_SIZE, value: '2'}}
    - {{name: LWS_WORKER_INDEX, value: '{index}'}}
",
            labels(
                role,
                &format!(
                    ", lws-worker: '{index}', leaderworkerset.sigs.k8s.io/name: lws-{role}, leaderworkerset.sigs.k8s.io/group-index: \
                     '0', leaderworkerset.sigs.k8s.io/worker-index: '{index}'"
                )
            )
        )
    };
    let serves = format!(
        "  - name: vllm
    image: registry.example/pd-sim:0.1.0
    args: [--listen, '$(POD_IP):8000', --role, {role}, --model, {MODEL}, --speed, '0.1']
    ports: [{{containerPort: 8000, protocol: TCP}}, {{containerPort: 5600, protocol: TCP}}]
"
    );
    pod(&format!("lws-{role}-0"), 0, &serves)
        + &pod(&format!("lws-{role}-0-1"), 1, if worker.is_empty() { &serves } else { worker })
}

/// Prefill: the leader alone serves, the worker computes for it. Decode: both serve.
#[tokio::test]
async fn groups_of_a_leader_worker_set_are_split() {
    let silent = "  - name: vllm
    image: registry.example/pd-sim:0.1.0
    args: [--listen, '$(POD_IP):5600', --role, prefill, --model, unused]
    ports: [{containerPort: 5600, protocol: TCP}]
";
    let pods = group("prefill", silent) + &group("decode", "");
    let mut cluster = Cluster::with_pods("llm-d", &pods, "").await;
    cluster.up_with(&[]).await;
    let leader = Engines { label: "test-pods=llm-d,llm-d.ai/role=prefill,lws-worker=0", port: 8_000 };
    cluster.splits_over(MODEL, leader, DECODE).await;
    for pod in cluster.pod_names(OURS, "test-pods=llm-d,llm-d.ai/role=prefill,lws-worker=1").await {
        let stats = cluster.stats_at(&pod, 5_600).await;
        assert_eq!(
            (stats.prefill_legs, stats.local_prefills, stats.decode_legs),
            (0, 0, 0),
            "the worker serves no requests"
        );
    }
    Cluster::without("pods", OWN).await;
}
