//! An installation of the Gateway API Inference Extension that `pd-control migrate` carries over: its pool, objectives and rewrites
//! are followed on the cluster.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use pd_support::client::{Client, Http};
use pd_support::places;
use tempfile::TempDir;
use tokio::process::Command;

use crate::cluster::{Cluster, OURS, kubectl, until};
use crate::engine_pods::Engines;

/// Label of all pods of this file.
const OWN: &str = "app=vllm-pd";
const MODEL: &str = "qwen2-7b";
/// The two target ports of the pool: a data-parallel rank each.
const PORTS: [u16; 2] = [8_000, 8_001];
/// Requests in flight from which on sheddable requests are refused: 80 % of the limit.
const MANY: usize = 4;
/// Their tokens. The simulators take 0.8 ms for each.
const LONG_TOKENS: u32 = 9_000;

/// A pool with an endpoint picker, objectives, a rewrite, and the route that cannot be kept.
const THEIRS: &str = "apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata: {name: qwen, namespace: llm}
spec:
  selector: {matchLabels: {app: vllm-pd}}
  targetPorts: [{number: 8000}, {number: 8001}]
  endpointPickerRef: {name: qwen-epp, port: {number: 9002}}
---
apiVersion: inference.networking.x-k8s.io/v1alpha2
kind: InferenceObjective
metadata: {name: batch, namespace: llm}
spec: {priority: -1, poolRef: {name: qwen}}
---
apiVersion: inference.networking.x-k8s.io/v1alpha2
kind: InferenceModelRewrite
metadata: {name: public, namespace: llm}
spec:
  poolRef: {name: qwen}
  rules:
  - matches: [{model: {type: Exact, value: public-name}}]
    targets: [{modelRewrite: qwen2-7b}]
";
const THEIR_ROUTE_AND_PICKER: &str = "---
apiVersion: v1
kind: ConfigMap
metadata: {name: qwen-epp, namespace: llm}
data:
  pd-config.yaml: |
    apiVersion: inference.networking.x-k8s.io/v1alpha1
    kind: EndpointPickerConfig
    plugins:
    - {type: prefix-cache-scorer}
    - {type: prefix-based-pd-decider, parameters: {nonCachedTokens: 256}}
    - {type: disagg-profile-handler, parameters: {deciders: {prefill: prefix-based-pd-decider}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: qwen, namespace: llm}
spec:
  parentRefs: [{name: inference-gateway}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /}}]
    backendRefs: [{group: inference.networking.k8s.io, kind: InferencePool, name: qwen}]
";

/// A server for each port.
fn pods(role: &str) -> String {
    let container = |port: u16| {
        format!(
            "      - name: rank-{port}
        image: registry.example/pd-sim:0.1.0
        args: [--listen, '$(POD_IP):{port}', --role, {role}, --model, {MODEL}, --speed, '0.1']
        env: [{{name: POD_IP, valueFrom: {{fieldRef: {{fieldPath: status.podIP}}}}}}]
        ports: [{{containerPort: {port}}}]
"
        )
    };
    format!(
        "---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: vllm-pd-{role}, namespace: llm, labels: {{app: vllm-pd}}}}
spec:
  replicas: 1
  selector: {{matchLabels: {{app: vllm-pd, llm-d.ai/role: {role}}}}}
  template:
    metadata: {{labels: {{app: vllm-pd, llm-d.ai/role: {role}}}}}
    spec:
      containers:
{}",
        PORTS.map(container).concat()
    )
}

/// Files of the test.
struct Files(TempDir);

impl Files {
    fn put(&self, name: &str, text: &str) -> String {
        let path = self.0.path().join(name);
        fs::write(&path, text).expect(name);
        path.display().to_string()
    }
}

async fn run(program: &Path, arguments: &[&str]) -> (bool, String, String) {
    let mut command = Command::new(program);
    let done = command.args(arguments).stdin(Stdio::null()).output().await.expect("a program");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (done.status.success(), text(&done.stdout), text(&done.stderr))
}

/// `helm template` of our chart with the values of `pd-control migrate`, for simulators and small Envoys.
async fn rendered(files: &Files, values: &str, image: &str) -> String {
    let chart = places::root().join("charts/envoy-pd").display().to_string();
    let (values, filter) = (files.put("values.yaml", values), format!("images.filter={image}"));
    let mut arguments =
        vec!["template", "pd", &chart, "--namespace", OURS, "--kube-version", "1.34.0", "--values", &values];
    for set in [
        filter.as_str(),
        "gateway.replicas=1",
        "gateway.concurrency=2",
        "gateway.pdb=null",
        "gateway.shutdown.drainTimeout=30s",
        "filter.config.pools.default.max_requests=5",
    ] {
        arguments.extend(["--set", set]);
    }
    let (is_good, text, error) = run(Path::new("helm"), &arguments).await;
    assert!(is_good, "{error}");
    text
}

/// Status of a short request.
async fn status(cluster: &Cluster, model: &str, headers: &[(&str, &[u8])]) -> u16 {
    let mut client = Client::connect(cluster.address, Http::One).await;
    let body = format!(r#"{{"model":"{model}","max_tokens":1,"prompt":"a"}}"#);
    let request = client.json("/v1/completions", body, headers);
    client.send(request).await.status
}

#[tokio::test]
async fn what_migrate_carries_over_serves_and_its_objects_are_followed() {
    let Some(crds) = std::env::var_os("PD_CLUSTER_INFERENCE_CRDS").map(PathBuf::from) else {
        eprintln!("NOT TESTED: PD_CLUSTER_INFERENCE_CRDS names no CRDs of the Gateway API Inference Extension");
        return;
    };
    kubectl(&["apply", "--server-side", "-f", &crds.join("crds").display().to_string()]).await.expect("the CRDs");
    let mut cluster = Cluster::ready().await;
    let files = Files(tempfile::tempdir().expect("a folder"));
    let theirs = files.put("theirs.yaml", &format!("{THEIRS}{}{}", pods("prefill"), pods("decode")));
    until("their objects are taken", async || kubectl(&["apply", "-f", &theirs]).await.ok()).await;
    for role in ["prefill", "decode"] {
        cluster.settled(OURS, &format!("vllm-pd-{role}")).await;
    }

    let all = files.put("all.yaml", &format!("{THEIRS}{THEIR_ROUTE_AND_PICKER}"));
    let (is_good, values, report) = run(&places::control(), &["migrate", &all]).await;
    assert!(is_good, "{report}");
    let image = cluster.pin(&fs::read(places::wasm()).expect("the module")).await;
    let text = rendered(&files, &values, &image).await;
    let ours = files.put("ours.yaml", &text);
    let (is_good, _, faults) = run(&places::control(), &["check", &ours, &theirs]).await;
    assert!(is_good, "{report}{values}{faults}");
    // Twice: the policies of new images wait for each other.
    until("the chart's objects are taken", async || {
        kubectl(&["apply", "--server-side", "--force-conflicts", "-f", &ours]).await.ok()
    })
    .await;
    cluster.settled(OURS, "pd-control").await;
    cluster.envoys_settled().await;
    cluster.address = cluster.gateway_address("pd").await;

    for port in PORTS {
        let [prefill, decode] = ["prefill", "decode"].map(|role| {
            let label = if role == "prefill" {
                "app=vllm-pd,llm-d.ai/role=prefill"
            } else {
                "app=vllm-pd,llm-d.ai/role=decode"
            };
            Engines { label, port }
        });
        until(format!("port {port} serves"), async || {
            cluster.ask_for(MODEL).await?;
            let counts = cluster.counts(prefill, decode).await;
            assert_eq!(counts.wrong, 0, "{counts:?}");
            (counts.prefill > 0 && counts.decode > 0).then_some(())
        })
        .await;
    }

    until("the alias is known", async || (status(&cluster, "public-name", &[]).await == 200).then_some(())).await;
    assert_eq!(status(&cluster, "other-name", &[]).await, 404);

    let batch: &[(&str, &[u8])] = &[("x-llm-d-inference-objective", b"batch")];
    until("requests of the objective are shed under load", async || {
        let mut long = Vec::new();
        for _ in 0..MANY {
            let mut client = Client::connect(cluster.address, Http::One).await.with_patience(Duration::from_secs(60));
            let body = format!(
                r#"{{"model":"{MODEL}","max_tokens":{LONG_TOKENS},"ignore_eos":true,"stream":true,"prompt":"a"}}"#
            );
            let request = client.json("/v1/completions", body, &[]);
            let streaming = client.open(request).await;
            long.push((client, streaming));
        }
        let (shed, plain) = (status(&cluster, MODEL, batch).await, status(&cluster, MODEL, &[]).await);
        assert_eq!(plain, 200, "a request without the objective");
        (shed == 429).then_some(())
    })
    .await;

    kubectl(&["delete", "inferencemodelrewrites.inference.networking.x-k8s.io", "public", "--namespace", OURS])
        .await
        .expect("deleted");
    until("the alias is gone", async || (status(&cluster, "public-name", &[]).await == 404).then_some(())).await;

    for kind in ["inferenceobjectives.inference.networking.x-k8s.io", "inferencepools.inference.networking.k8s.io"] {
        kubectl(&["delete", kind, "--namespace", OURS, "--all"]).await.expect("deleted");
    }
    // What the chart has and overlay `sim` has not.
    kubectl(&["delete", "service", "engines", "--namespace", OURS]).await.expect("deleted");
    kubectl(&["delete", "deployment", "pd-control", "--namespace", OURS]).await.expect("deleted");
    Cluster::without("deployments", OWN).await;
}
