//! Overlay `aibrix` over pods of the shape that AIBrix' controller makes of a StormService, beside another route for the same
//! pods, as during a migration.

use std::fs;

use pd_support::client::{Client, Http};

use crate::cluster::{Cluster, OURS, kubectl, until};
use crate::engine_pods::Engines;
use crate::listener::{self, Listener};

/// Label of all pods of this file.
const OWN: &str = "storm-service-name=pool-xpyd";
const MODEL: &str = "qwen2.5-7B";
/// The port of AIBrix' samples for SGLang.
const PORT: u16 = 30_000;
const PREFILL: Engines = Engines { label: "storm-service-name=pool-xpyd,role-name=prefill", port: PORT };
const DECODE: Engines = Engines { label: "storm-service-name=pool-xpyd,role-name=decode", port: PORT };

/// Pods of one role set with two servers of each role, and a pod of a role that serves no requests.
fn pods() -> String {
    let pod = |role: &str, index: usize, labels: &str| {
        format!(
            "---
apiVersion: v1
kind: Pod
metadata:
  name: pool-xpyd-roleset-7xk2p-{role}-59d4b7f8c-{index}
  namespace: llm
  labels:
    app: pool-xpyd
    storm-service-name: pool-xpyd
    storm-service-revision: pool-xpyd-5f8d7c9b6
    roleset-name: pool-xpyd-roleset-7xk2p
    role-name: {role}
    role-template-hash: 59d4b7f8c
    stormservice.orchestration.aibrix.ai/role-replica-index: '{index}'
{labels}  annotations: {{stormservice.orchestration.aibrix.ai/roleset-index: '0'}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: {role}
    image: registry.example/pd-sim:0.1.0
    args: [--listen, '$(POD_IP):{PORT}', --role, {role}, --model, {MODEL}, --speed, '0.1']
    env:
    - {{name: POD_IP, valueFrom: {{fieldRef: {{fieldPath: status.podIP}}}}}}
    - {{name: STORM_SERVICE_NAME, value: pool-xpyd}}
    - {{name: ROLE_REPLICA_INDEX, value: '{index}'}}
"
        )
    };
    let labels = format!(
        "    model.aibrix.ai/name: {MODEL}\n    model.aibrix.ai/port: '{PORT}'\n    model.aibrix.ai/engine: vllm\n"
    );
    let engines = ["prefill", "decode"].into_iter().flat_map(|role| [0, 1].map(|index| pod(role, index, &labels)));
    engines.collect::<String>() + &pod("routing", 0, "").replace("--role, routing", "--role, both")
}

/// The StormService of which these pods are, for `pd-control check`: the cluster has no such kind.
fn storm_service() -> String {
    let role = |name: &str| {
        format!(
            "{{name: {name}, replicas: 2, template: {{metadata: {{labels: {{model.aibrix.ai/name: {MODEL}, model.aibrix.ai/port: \
             '{PORT}', model.aibrix.ai/engine: vllm}}}}, spec: {{containers: [{{name: {name}}}]}}}}}}"
        )
    };
    format!(
        "---
apiVersion: orchestration.aibrix.ai/v1alpha1
kind: StormService
metadata: {{name: pool-xpyd, namespace: llm}}
spec: {{template: {{spec: {{roles: [{}, {}]}}}}}}
",
        role("prefill"),
        role("decode")
    )
}

/// Another route with a header of AIBrix' plugin, to a server of the test in place of the plugin.
const THEIRS: &str = "---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: aibrix-reserved-router, namespace: llm, labels: {storm-service-name: pool-xpyd}}
spec:
  parentRefs: [{name: pd}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /v1}, headers: [{type: RegularExpression, name: routing-strategy, value: '.*'}]}]
    backendRefs: [{name: test-listener, port: 80}]
";

const SELECTOR: &str = "model.aibrix.ai/name: my-model";

#[tokio::test]
async fn a_port_that_the_service_does_not_lead_to_is_named_and_the_right_one_serves() {
    let mut cluster = Cluster::with_pods("aibrix", &pods(), "").await;
    cluster.edit("overlays/aibrix/kustomization.yaml", SELECTOR, &format!("model.aibrix.ai/name: {MODEL}"));
    let pods_file = cluster.overlay().join("pods.yaml");
    fs::write(&pods_file, pods() + &storm_service()).expect("written");
    let (is_good, faults) = cluster.checked().await;
    let fault = format!("pd-control lists port {PORT}, and Service llm/engines leads to [8000] only");
    assert!(!is_good && faults.contains(&fault), "{faults}");

    let listener = Listener::start().await;
    fs::write(&pods_file, pods() + THEIRS + &listener.manifest()).expect("written");
    cluster.up_with(&[]).await;
    let answer = until("the fault is named", async || {
        let answer = cluster.ask_for(MODEL).await?;
        (answer.status == 503 && answer.text().contains("wrong_endpoint")).then_some(answer)
    })
    .await;
    assert!(answer.text().contains("the Service behind its route"), "{}", answer.text());

    cluster.edit("base/engines.yaml", "targetPort: 8000", &format!("targetPort: {PORT}"));
    cluster.apply().await;
    cluster.splits_over(MODEL, PREFILL, DECODE).await;

    // The header decides between both while clients move.
    let before = cluster.counts(PREFILL, DECODE).await;
    let mut client = Client::connect(cluster.address, Http::One).await;
    let request = client.json("/v1/completions", r#"{"model":"theirs","prompt":"a"}"#, &[("routing-strategy", b"pd")]);
    assert_eq!(client.send(request).await.status, 200);
    assert!(listener.requests().iter().any(|request| request.contains("theirs")), "{:?}", listener.requests());
    assert_eq!(cluster.counts(PREFILL, DECODE).await, before, "it reached the other route");
    cluster.splits_over(MODEL, PREFILL, DECODE).await;

    kubectl(&["delete", "service,endpointslice", listener::NAME, "--namespace", OURS, "--ignore-not-found"])
        .await
        .expect("deleted");
    Cluster::without("pods,httproutes", OWN).await;
}
