//! Our manifests beside the real Envoy AI Gateway: `make test-cluster`. The tests share the cluster, so they run one after
//! another.

#[allow(dead_code, reason = "shared with the tests of Envoy Gateway alone")]
#[path = "../gateway/cluster.rs"]
mod cluster;
mod install;

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use pd_sim::Stats;
use pd_support::body::words;
use pd_support::client::{Answer, Body, Client, Http};
use pd_tests::answer::{is_done, text};
use serde_json::{Value, json};

use cluster::{Cluster, GATEWAY, OURS, until};

/// The hostname of overlay `ai-gateway-hostname`.
const HOST: &str = "models.example";
/// The header that AI Gateway sets from the body, and that its guides have clients send.
const MODEL: &str = "x-ai-eg-model";
const REQUESTS: u64 = 10;

/// A client of one of the set-ups.
struct Caller {
    client: Client,
    host: Option<&'static str>,
}

impl Caller {
    async fn new(cluster: &Cluster, gateway: &str, host: Option<&'static str>) -> Self {
        let client = Client::connect(cluster.gateway_address(gateway).await, Http::One).await;
        let client = client.with_patience(Duration::from_secs(60));
        Self { client, host }
    }

    fn request(&self, path: &str, body: impl Into<Bytes>, headers: &[(&str, &[u8])]) -> Request<Body> {
        let mut request = self.client.json(path, body, headers);
        if let Some(host) = self.host {
            request.headers_mut().insert("host", HeaderValue::from_static(host));
        }
        request
    }

    async fn post(&mut self, path: &str, body: impl Into<Bytes>, headers: &[(&str, &[u8])]) -> Answer {
        self.client.send(self.request(path, body, headers)).await
    }

    /// Waits until requests are served and split by Envoys that have AI Gateway's processor beside them: it adds that to new
    /// pods.
    async fn until_split(cluster: &Cluster, gateway: &str, host: Option<&'static str>) -> Self {
        let label = format!("gateway.envoyproxy.io/owning-gateway-name={gateway}");
        until(format!("Envoys of {gateway} have the processor"), async || {
            let pods = cluster.pods(GATEWAY, &label).await;
            let has_it = |pod: &Pod| {
                let mut sidecars = pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten());
                sidecars.any(|container| container.name == "ai-gateway-extproc")
            };
            let mut are_ready = !pods.is_empty() && pods.iter().all(has_it);
            for pod in &pods {
                are_ready &= cluster.is_ready(GATEWAY, &pod.name_any()).await;
            }
            are_ready.then_some(())
        })
        .await;
        until("a request is split", async || {
            let before = cluster.sum("app=prefill", |stats| stats.prefill_legs).await;
            let mut caller = Self::new(cluster, gateway, host).await;
            let request = caller.request("/v1/completions", completion("first", ""), &[]);
            let answer = caller.client.try_send(request).await.ok()?;
            let after = cluster.sum("app=prefill", |stats| stats.prefill_legs).await;
            (answer.status == 200 && after > before).then_some(caller)
        })
        .await
    }
}

fn new_prompt(seed: &str) -> String {
    words(&format!("{seed} {:?}", std::time::SystemTime::now()), 4_000)
}

/// A completion that is long enough to be split.
fn completion(seed: &str, more: &str) -> String {
    format!(r#"{{"model":"sim","max_tokens":4{more},"prompt":"{}"}}"#, new_prompt(seed))
}

/// Prefill legs, other work at prefill servers, decode legs, other work at decode servers.
async fn counts(cluster: &Cluster) -> [u64; 4] {
    let sum = async |label: &str, of: fn(&Stats) -> u64| cluster.sum(label, of).await;
    [
        sum("app=prefill", |stats| stats.prefill_legs).await,
        sum("app=prefill", |stats| stats.decode_legs + stats.local_prefills).await,
        sum("app=decode", |stats| stats.decode_legs).await,
        sum("app=decode", |stats| stats.prefill_legs + stats.local_prefills).await,
    ]
}

/// Every request is split, whether the model stands in the body alone or, as the guides' curl lines have it, in a header, too.
async fn every_request_is_split(cluster: &Cluster, caller: &mut Caller) {
    for headers in [&[][..], &[(MODEL, &b"sim"[..])]] {
        for is_stream in [false, true] {
            let before = counts(cluster).await;
            for number in 0..REQUESTS {
                let stream = format!(r#","stream":{is_stream}"#);
                let body = completion(&number.to_string(), &stream);
                let answer = caller.post("/v1/completions", body, headers).await;
                assert_eq!(answer.status, 200, "{headers:?}: {}", answer.text());
                assert!(!text(&answer.body).is_empty() && is_done(&answer.body) == is_stream, "{}", answer.text());
            }
            let after = counts(cluster).await;
            let done: Vec<_> = after.iter().zip(before).map(|(after, before)| after - before).collect();
            assert_eq!(done, [REQUESTS, 0, REQUESTS, 0], "{headers:?}, stream: {is_stream}");
        }
    }
}

/// What a client says of KV caches reaches no engine, and a header names no other model than the body.
async fn clients_steer_nothing(cluster: &Cluster, caller: &mut Caller) {
    let body = completion("forged", r#","kv_transfer_params":{"do_remote_prefill":true,"remote_engine_id":"x"}"#);
    let answer = caller.post("/v1/completions", body, &[]).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    for label in ["app=prefill", "app=decode"] {
        let faults = cluster.sum(label, |stats| stats.wrong_text + stats.failed_pulls + u64::from(stats.crashed)).await;
        assert_eq!(faults, 0, "{label}");
    }
    let unknown = r#"{"model":"unknown","max_tokens":1,"prompt":"a"}"#;
    assert_eq!(caller.post("/v1/completions", unknown, &[]).await.status, 404);
}

async fn large_bodies_pass(caller: &mut Caller) {
    let large = format!(r#"{{"model":"sim","max_tokens":1,"prompt":"{}"}}"#, words("large", 400_000));
    let answer = caller.post("/v1/completions", large, &[]).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
}

/// A request of Anthropic's API, which AI Gateway translates.
fn message() -> String {
    let messages = json!([{"role": "user", "content": new_prompt("anthropic")}]);
    json!({"model": "sim", "max_tokens": 4, "messages": messages}).to_string()
}

async fn anthropics_api_is_split(cluster: &Cluster, caller: &mut Caller) {
    let session = format!("session-{:?}", std::time::SystemTime::now());
    let headers: &[(&str, &[u8])] = &[("x-session-id", session.as_bytes()), ("anthropic-version", b"2023-06-01")];
    let before = counts(cluster).await;
    let answer = caller.post("/anthropic/v1/messages", message(), headers).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.json()["type"], "message", "{}", answer.text());
    assert_eq!(counts(cluster).await[2], before[2] + 1, "it is split, too");
    let mut seen = Vec::new();
    for pod in cluster.pod_names(OURS, "app=decode").await {
        seen.extend(recorded(cluster, &pod).await);
    }
    let has_session = |request: &&Value| request["headers"].to_string().contains(&session);
    assert!(seen.iter().any(|request| has_session(&request)), "the session's header reaches the engine");
}

/// More than a buffer of Envoy holds by default, as one answer and as a stream.
async fn long_answers_pass(caller: &mut Caller) {
    for is_stream in [false, true] {
        let body = format!(r#","max_tokens":12000,"ignore_eos":true,"stream":{is_stream}"#);
        let body = format!(r#"{{"model":"sim"{body},"prompt":"{}"}}"#, new_prompt("long"));
        let answer = caller.post("/v1/completions", body, &[]).await;
        let bytes = answer.body.len();
        assert!(answer.status == 200 && bytes > 40_000, "{}: {bytes} bytes, stream: {is_stream}", answer.status);
        assert_eq!(is_done(&answer.body), is_stream);
    }
}

/// The last requests that an engine got.
async fn recorded(cluster: &Cluster, pod: &str) -> Vec<Value> {
    let path = format!("/api/v1/namespaces/{OURS}/pods/{pod}:8000/proxy/requests");
    let request = Request::get(path).body(Vec::new()).expect("a request");
    cluster.client.request::<Value>(request).await.expect("requests").as_array().cloned().unwrap_or_default()
}

#[tokio::test]
async fn one_envoy_with_a_hostname_of_its_own() {
    let mut cluster = Cluster::new("test").await;
    install::ready(&mut cluster, "ai-gateway-hostname").await;
    let mut caller = Caller::until_split(&cluster, "pd", Some(HOST)).await;
    every_request_is_split(&cluster, &mut caller).await;
    clients_steer_nothing(&cluster, &mut caller).await;
    large_bodies_pass(&mut caller).await;
    long_answers_pass(&mut caller).await;
    // The filter stands before AI Gateway's processor and sees the untranslated path.
    let answer = caller.post("/anthropic/v1/messages", message(), &[]).await;
    assert_eq!((answer.status, answer.header("x-pd-reason")), (404, Some("unknown_path")), "{}", answer.text());
    // Without the hostname there is nothing; our own route is for legs.
    caller.host = None;
    assert_eq!(caller.post("/v1/completions", completion("none", ""), &[]).await.status, 404);
    assert_eq!(caller.post("/.pd-engines", completion("none", ""), &[]).await.status, 403);
}

#[tokio::test]
async fn two_tiers() {
    let mut cluster = Cluster::new("test").await;
    install::ready(&mut cluster, "ai-gateway-tiers").await;
    let mut caller = Caller::until_split(&cluster, "ai", None).await;
    every_request_is_split(&cluster, &mut caller).await;
    clients_steer_nothing(&cluster, &mut caller).await;
    large_bodies_pass(&mut caller).await;
    anthropics_api_is_split(&cluster, &mut caller).await;
    long_answers_pass(&mut caller).await;
    install::metered(&cluster).await;
}
