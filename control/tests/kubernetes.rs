//! The Kubernetes source against an API server that does what the test says.

use std::time::{Duration, Instant};

use pd_control::Config;
use pd_control::control::Kubernetes;
use pd_control::sources::kubernetes::KubernetesConfig;
use pd_control::sources::kubernetes::follow::Limits;
use pd_core::wire::{Endpoint, Snapshot, State, Stated};
use serde_json::{Value, json};

use crate::api_server::{ApiServer, Fault, Listening};
use crate::support::*;

pub fn pod(role: &str, ip: &str) -> Value {
    json!({
        "metadata": {"labels": {"llm-d.ai/role": role}},
        "spec": {"containers": [{"name": "engine", "image": "engine", "ports": [{"containerPort": 8000}]}]},
        "status": {"phase": "Running", "podIP": ip, "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

fn follow(config: &mut Config, server: &ApiServer, kubernetes: KubernetesConfig) {
    let limits = Limits { request: Duration::from_millis(500), watch_seconds: 1, margin: Duration::from_millis(500) };
    config.kubernetes = Some(Kubernetes { config: kubernetes, cluster: Some(server.cluster()), limits });
}

fn namespaces(names: &[&str]) -> KubernetesConfig {
    let mut config = KubernetesConfig::default();
    config.namespaces = names.iter().map(|name| (*name).to_owned()).collect();
    config
}

/// A server with two pods, and a pd-control that follows it.
async fn two_pods() -> (ApiServer, Listening, Rig) {
    let (server, listening) = ApiServer::start().await;
    server.apply("n", "p", pod("prefill", "10.0.0.1"));
    server.apply("n", "d", pod("decode", "10.0.0.2"));
    let rig = Rig::start_without_file(|config| follow(config, &server, namespaces(&["n"]))).await;
    until_addresses(&rig, &["10.0.0.1:8000", "10.0.0.2:8000"]).await;
    (server, listening, rig)
}

async fn view(rig: &Rig) -> Value {
    serde_json::from_str(&rig.client.get("/v1/endpoints").await.body).unwrap()
}

async fn endpoints_in_force(rig: &Rig) -> Vec<Endpoint> {
    serde_json::from_value(view(rig).await["endpoints"].take()).unwrap()
}

async fn addresses(rig: &Rig) -> Vec<String> {
    endpoints_in_force(rig).await.iter().map(|endpoint| endpoint.address.to_string()).collect()
}

async fn until_addresses(rig: &Rig, expected: &[&str]) {
    until_true(&format!("{expected:?}"), || async { addresses(rig).await == expected }).await;
}

async fn until_degraded(rig: &Rig, part: &str) {
    let is_said = || async { view(rig).await["degraded"].as_str().is_some_and(|reason| reason.contains(part)) };
    until_true(&format!("degraded: {part}"), is_said).await;
}

async fn until_good(rig: &Rig) {
    until_true("all is well", || async { view(rig).await["degraded"].is_null() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_come_change_and_go() {
    let (server, _listening, rig) = two_pods().await;
    let mut filter = rig.filter().await;
    server.apply("n", "d2", pod("decode", "10.0.0.3"));
    assert_eq!(filter.poll(&rig.client, PATIENCE).await.unwrap().endpoints.len(), 1);

    let mut leaving = pod("decode", "10.0.0.3");
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    server.apply("n", "d2", leaving);
    let snapshot = filter.poll(&rig.client, PATIENCE).await.unwrap();
    assert_eq!(snapshot.endpoints[0].state, State::Draining);

    server.delete("n", "d2");
    assert_eq!(filter.poll(&rig.client, PATIENCE).await.unwrap().removed, ["10.0.0.3:8000"]);

    let mut unready = pod("prefill", "10.0.0.1");
    unready["status"]["conditions"][0]["status"] = "False".into();
    server.apply("n", "p", unready);
    assert_eq!(filter.poll(&rig.client, PATIENCE).await.unwrap().endpoints[0].state, State::Down);
    assert_eq!(server.lists(), 1);
}

/// Under load engines answer their readiness probes late.
/// llm-d/llm-d-benchmark#1734, modelplaneai/modelplane#206: the gateway was left without a server.
#[tokio::test(flavor = "multi_thread")]
async fn most_of_a_role_that_turn_unready_at_once_stay_in_the_list_and_it_is_said() {
    let (server, _listening, rig) = two_pods().await;
    server.apply("n", "d2", pod("decode", "10.0.0.3"));
    until_addresses(&rig, &["10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"]).await;
    let unready = |ip: &str, statuses: Value| {
        let mut pod = pod("decode", ip);
        pod["status"]["conditions"][0]["status"] = "False".into();
        pod["status"]["containerStatuses"] = statuses;
        pod
    };
    let until_ready = async |ready: [bool; 3]| {
        let is_so = || async {
            let states: Vec<_> = endpoints_in_force(&rig).await.iter().map(|it| it.state == State::Ready).collect();
            states == ready
        };
        until_true(&format!("{ready:?}"), is_so).await;
    };
    let running = json!([{"restartCount": 0, "state": {"running": {}}}]);
    server.apply("n", "d", unready("10.0.0.2", running.clone()));
    until_ready([true, false, true]).await;
    server.apply("n", "d2", unready("10.0.0.3", running));
    until_ready([true; 3]).await;
    let status: Value = serde_json::from_str(&rig.client.get("/v1/status").await.body).unwrap();
    let line = "2 of 2 decode endpoints of pool default are unready at once. They count as busy";
    assert!(status["advice"].to_string().contains(line), "{}", status["advice"]);

    // One whose container ended is dead.
    server.apply("n", "d2", unready("10.0.0.3", json!([{"restartCount": 0, "state": {"terminated": {}}}])));
    until_ready([true, false, false]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_published_before_every_namespace_is_listed() {
    let (server, _listening) = ApiServer::start().await;
    server.apply("n", "p", pod("prefill", "10.0.0.1"));
    server.set_fault(Fault::Forbidden);
    let rig = Rig::start_without_file(|config| follow(config, &server, namespaces(&["n", "m"]))).await;
    let not_ready = || async {
        let answer = rig.client.get("/readyz").await;
        answer.status == 503 && answer.body.contains("pods in m: Forbidden says the test (403); they were never listed")
    };
    until_true("the reason is said", not_ready).await;
    assert_eq!(rig.client.metric("pd_control_watch_up{watch=\"pods in n\"}").await, 0.0);
    server.set_fault(Fault::None);
    until_true("it is ready", || async { rig.client.get("/readyz").await.body == "ok\n" }).await;
    assert_eq!((view(&rig).await["version"].clone(), addresses(&rig).await), (1.into(), vec!["10.0.0.1:8000".into()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forgotten_version_is_listed_anew_and_nobody_is_lost_meanwhile() {
    for fault in [Fault::Gone, Fault::GoneEvent, Fault::Garbage] {
        let (server, _listening, rig) = two_pods().await;
        server.set_fault(fault);
        server.cut_watches();
        let lists = server.lists();
        until_true("it is listed again", || async { server.lists() > lists }).await;
        // Seen by the lists alone.
        server.apply("n", "d2", pod("decode", "10.0.0.3"));
        server.delete("n", "d");
        until_addresses(&rig, &["10.0.0.1:8000", "10.0.0.3:8000"]).await;
        server.set_fault(Fault::None);
        server.apply("n", "d3", pod("decode", "10.0.0.4"));
        until_addresses(&rig, &["10.0.0.1:8000", "10.0.0.3:8000", "10.0.0.4:8000"]).await;
        until_good(&rig).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_the_server_is_survived_and_a_long_one_is_said() {
    let (server, listening, rig) = two_pods().await;
    drop(listening);
    server.cut_watches();
    until_degraded(&rig, "pd-control keeps the last list of them").await;
    assert_eq!(addresses(&rig).await.len(), 2);
    let ready = rig.client.get("/readyz").await;
    assert!(ready.status == 200 && ready.body.starts_with("degraded: pods in n: "), "{}", ready.body);
    assert_eq!(rig.client.metric("pd_control_degraded").await, 1.0);
    assert_eq!(rig.client.metric("pd_control_watch_up{watch=\"pods in n\"}").await, 0.0);
    server.apply("n", "d2", pod("decode", "10.0.0.3"));
    let _listening = server.restart().await;
    until_addresses(&rig, &["10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"]).await;
    until_good(&rig).await;
    assert_eq!(rig.client.metric("pd_control_watch_up{watch=\"pods in n\"}").await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_falls_silent_is_noticed() {
    let (server, _listening, rig) = two_pods().await;
    server.set_fault(Fault::Hang);
    until_degraded(&rig, "silent for 1.5s").await;
    assert_eq!(addresses(&rig).await.len(), 2);
    server.apply("n", "d2", pod("decode", "10.0.0.3"));
    server.set_fault(Fault::None);
    until_addresses(&rig, &["10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"]).await;
    until_good(&rig).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_that_are_cut_at_once_are_paced() {
    let (server, _listening, rig) = two_pods().await;
    server.set_fault(Fault::Cut);
    server.cut_watches();
    let (before, start) = (server.watches() + server.lists(), Instant::now());
    until_true("the storm goes on", || async { server.watches() + server.lists() >= before + 8 }).await;
    // Doubled from 0.1 s, each at least half of it.
    assert!(start.elapsed() > Duration::from_secs(3), "eight attempts in {:?}", start.elapsed());
    assert_eq!(addresses(&rig).await.len(), 2);
    server.set_fault(Fault::None);
    server.apply("n", "d2", pod("decode", "10.0.0.3"));
    until_addresses(&rig, &["10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_that_end_in_time_are_no_problem() {
    let (server, _listening, rig) = two_pods().await;
    until_true("some watches have ended", || async { server.watches() > 3 }).await;
    assert_eq!((server.lists(), view(&rig).await["version"].clone()), (1, 1.into()));
    assert_eq!(view(&rig).await["degraded"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_bad_pod_is_named_and_loses_none_of_the_others() {
    let (server, _listening, rig) = two_pods().await;
    let mut heavy = pod("decode", "10.0.0.3");
    heavy["metadata"]["annotations"] = json!({"envoy-pd/weight": "heavy"});
    server.apply("n", "heavy", heavy);
    server.apply("n", "local", pod("decode", "127.0.0.1"));
    server.apply("n", "metadata", pod("decode", "169.254.169.254"));
    server.apply("n", "odd", json!({"metadata": {"labels": {"llm-d.ai/role": "decode"}}, "status": {"podIP": "x"}}));
    server.apply("n", "d2", pod("decode", "10.0.0.4"));
    until_addresses(&rig, &["10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.4:8000"]).await;
    let refused = |name: &str| format!("pd_control_pod_refused{{namespace=\"n\",pod=\"{name}\"}}");
    for name in ["heavy", "local", "metadata", "odd"] {
        assert_eq!(rig.client.metric(&refused(name)).await, 1.0, "{name}");
        server.delete("n", name);
    }
    let is_gone = || async { !rig.client.get("/metrics").await.body.contains("pd_control_pod_refused{") };
    until_true("the series leave with the pods", is_gone).await;
    assert_eq!(view(&rig).await["degraded"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_was_given_to_a_new_pod_is_the_new_ones() {
    let (server, _listening, rig) = two_pods().await;
    let mut leaving = pod("decode", "10.0.0.2");
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    server.apply("n", "d", leaving);
    server.apply("n", "z", pod("prefill", "10.0.0.2"));
    let is_prefill = || async {
        let list = endpoints_in_force(&rig).await;
        list.len() == 2 && list[1].role == pd_core::wire::Role::Prefill && list[1].state == State::Ready
    };
    until_true("the new pod has the address", is_prefill).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn long_lists_come_in_pages_and_an_expired_page_begins_them_anew() {
    let (server, _listening) = ApiServer::start().await;
    for n in 0..1_200 {
        server.apply("n", &format!("p{n:04}"), pod("both", &format!("10.1.{}.{}", n / 250, n % 250 + 1)));
    }
    server.set_fault(Fault::ExpiredPage);
    let rig = Rig::start_without_file(|config| follow(config, &server, namespaces(&["n"]))).await;
    until_true("all are listed", || async { addresses(&rig).await.len() == 1_200 }).await;
    // One page before it expired, three after.
    assert_eq!((server.lists(), view(&rig).await["version"].clone()), (5, 1.into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn inference_pools_select_pods_and_say_their_ports() {
    let (server, _listening) = ApiServer::start().await;
    let mut plain = pod("decode", "10.0.0.1");
    plain["metadata"]["labels"] = json!({"app": "llama"});
    server.apply("n", "a", plain);
    server.apply("n", "b", pod("prefill", "10.0.0.2"));
    let pools = "/apis/inference.networking.k8s.io/v1/namespaces/n/inferencepools";
    let spec = |label: &str| {
        json!({"spec": {"selector": {"matchLabels": {"app": label}},
                        "targetPorts": [{"number": 8000}, {"number": 8001}]}})
    };
    server.apply_in(pools, "llama", spec("llama"));
    server.apply_in(pools, "other", spec("llama"));
    let text = "namespaces: [n]\ninference_pools: [{name: llama}]\n";
    let config = KubernetesConfig::parse("k.yaml".as_ref(), text.as_bytes()).unwrap();
    let rig = Rig::start_without_file(|it| follow(it, &server, config)).await;
    until_addresses(&rig, &["10.0.0.1:8000", "10.0.0.1:8001", "10.0.0.2:8000"]).await;
    let pools_of: Vec<_> = endpoints_in_force(&rig).await.into_iter().map(|endpoint| endpoint.pool).collect();
    assert_eq!(pools_of, ["llama", "llama", "default"]);

    // kubernetes-sigs/gateway-api-inference-extension#2306: a port that the pool names no longer leaves the list.
    let ports = |ports: Value| json!({"spec": {"selector": {"matchLabels": {"app": "llama"}}, "targetPorts": ports}});
    server.apply_in(pools, "llama", ports(json!([{"number": 8001}])));
    until_addresses(&rig, &["10.0.0.1:8001", "10.0.0.2:8000"]).await;
    server.apply_in(pools, "llama", ports(json!([{"number": 8002}, {"number": 8000}])));
    until_addresses(&rig, &["10.0.0.1:8000", "10.0.0.1:8002", "10.0.0.2:8000"]).await;
    server.apply_in(pools, "llama", spec("nobody"));
    until_addresses(&rig, &["10.0.0.2:8000"]).await;
    server.apply_in(pools, "llama", json!({"spec": {}}));
    until_degraded(&rig, "InferencePool n/llama: ").await;
    server.apply_in(pools, "llama", spec("llama"));
    until_addresses(&rig, &["10.0.0.1:8000", "10.0.0.1:8001", "10.0.0.2:8000"]).await;
    until_good(&rig).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn objectives_and_rewrites_reach_filters_and_are_followed() {
    let (server, _listening) = ApiServer::start().await;
    server.apply("n", "p", pod("both", "10.0.0.1"));
    let collection = |plural: &str| format!("/apis/llm-d.ai/v1alpha2/namespaces/n/{plural}");
    let objective = |priority: i64| json!({"spec": {"priority": priority, "poolRef": {"name": "llama"}}});
    let rule = json!({"matches": [{"model": {"value": "chat"}}], "targets": [{"modelRewrite": "base"}]});
    let rewrite = json!({"spec": {"poolRef": {"name": "llama"}, "rules": [rule]}});
    server.apply_in(&collection("inferenceobjectives"), "batch", objective(-5));
    // The other group's API is not there. That keeps no endpoint back, and is said.
    let text = "namespaces: [n]\ninference_objects: [llm-d.ai, inference.networking.x-k8s.io]\n";
    let config = KubernetesConfig::parse("k.yaml".as_ref(), text.as_bytes()).unwrap();
    let rig = Rig::start_without_file(|it| follow(it, &server, config)).await;
    until_addresses(&rig, &["10.0.0.1:8000"]).await;
    until_degraded(&rig, "inferenceobjectives.inference.networking.x-k8s.io in n: ").await;
    let until = async |is_so: fn(&Stated) -> bool| {
        until_true("it is stated", || async {
            let body = rig.client.get("/v1/watch?epoch=&since=0&wait_ms=0").await.body;
            is_so(&Snapshot::parse(body.as_bytes()).unwrap().stated.unwrap_or_default())
        })
        .await;
    };
    until(|stated| stated.objectives["batch"] == -5).await;

    let mut filter = rig.filter().await;
    server.apply_in(&collection("inferencemodelrewrites"), "canary", rewrite);
    let change = filter.poll(&rig.client, PATIENCE).await.unwrap();
    assert_eq!((change.base.is_some(), change.endpoints.len()), (true, 0));
    assert_eq!(change.stated.unwrap().aliases["chat"][0].model, "base");
    server.apply_in(&collection("inferenceobjectives"), "batch", objective(7));
    until(|stated| stated.objectives["batch"] == 7 && stated.aliases.len() == 1).await;
    server.apply_in(&collection("inferenceobjectives"), "batch", json!({"spec": {}}));
    until_degraded(&rig, "InferenceObjective n/batch: ").await;
    until(|stated| stated.objectives.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn selectors_of_ones_own_read_labels_of_ones_own() {
    let (server, _listening) = ApiServer::start().await;
    let mut front = pod("decode", "10.0.0.1");
    front["metadata"]["labels"] = json!({"app": "engine", "tier": "front", "shard": "7", "pod-template-hash": "5f"});
    front["spec"]["containers"][0]["ports"] = json!([{"containerPort": 1}, {"containerPort": 9000, "name": "api"}]);
    server.apply("n", "a", front);
    server.apply("n", "b", pod("prefill", "10.0.0.2"));
    let text = "
namespaces: [n]
labels: false
selectors:
  - match: {matchLabels: {app: engine}, matchExpressions: [{key: tier, operator: In, values: [front, back]}]}
    role: {label: tier, values: {front: prefill, back: decode}}
    group: {label: shard}
    revision: {label: pod-template-hash}
    engine: sglang
    port: {name: api}
    pool: big
    weight: 2
";
    let config = KubernetesConfig::parse("k.yaml".as_ref(), text.as_bytes()).unwrap();
    let rig = Rig::start_without_file(|it| follow(it, &server, config)).await;
    until_true("there is a list", || async { view(&rig).await["version"] == 1 }).await;
    let expected = json!([{"address": "10.0.0.1:9000", "role": "prefill", "pool": "big", "engine": "sglang",
                           "group": "7", "revision": "5f", "weight": 2.0}]);
    assert_eq!(view(&rig).await["endpoints"], expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_beside_the_cluster_wins_where_both_name_an_endpoint() {
    let (server, _listening) = ApiServer::start().await;
    server.apply("n", "a", pod("decode", "10.0.0.1"));
    server.apply("n", "b", pod("decode", "10.0.0.2"));
    let file = "endpoints: [{address: '10.0.0.1:8000', role: prefill}]";
    let rig = Rig::start_with(file, |config, _| follow(config, &server, namespaces(&["n"]))).await;
    until_addresses(&rig, &["10.0.0.1:8000", "10.0.0.2:8000"]).await;
    assert_eq!(endpoints_in_force(&rig).await[0].role, pd_core::wire::Role::Prefill);
}

#[test]
fn a_wrong_configuration_is_refused_with_its_key() {
    for (text, why) in [
        ("namespace: [a]", "k.yaml:1:1: unknown field `namespace`"),
        ("namespaces: [a, a]", "k.yaml: namespaces: a is listed twice"),
        ("allowed_cidrs: [10.0.0.0/33]", "k.yaml:1:17: "),
        ("inference_pools: [{name: a, group: b}]", "k.yaml:1:36: unknown variant `b`"),
        ("revision: {label: a, annotation: b}", "k.yaml: revision: either label or annotation"),
        ("selectors: [{match: {}}]", "k.yaml: selectors[0].match: selects every pod"),
        ("selectors: [{match: {matchLabels: {a: b}}, role: boss}]", "k.yaml: selectors[0].role: \"boss\" is no role"),
        (
            "selectors: [{match: {matchLabels: {a: b}}, role: {label: x, values: {y: boss}}}]",
            "k.yaml: selectors[0].role: \"boss\" is no role",
        ),
        ("selectors: [{match: {matchLabels: {a: b}}, port: 0}]", "k.yaml: selectors[0].port: must be 1 to 64"),
        ("selectors: [{match: {matchLabels: {a: b}}, weight: .nan}]", "k.yaml: selectors[0].weight: must be"),
        (
            "selectors: [{match: {matchExpressions: [{key: a, operator: Near, values: [b]}]}}]",
            "k.yaml: selectors[0].match: ",
        ),
    ] {
        let error = KubernetesConfig::parse("k.yaml".as_ref(), text.as_bytes()).unwrap_err().to_string();
        assert!(error.starts_with(why), "{text}: {error}");
    }
}
