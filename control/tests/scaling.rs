//! What scales each role: in `/metrics`, and as KEDA asks for it by gRPC.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use axum::http::{Request, uri::PathAndQuery};
use bytes::Bytes;
use http_body_util::Full;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use pd_control::Config;
use pd_control::scaling::messages::{
    GetMetricSpecResponse, GetMetricsRequest, GetMetricsResponse, IsActiveResponse, SERVICE, ScaledObjectRef,
};
use pd_core::endpoints::elsewhere::Totals;
use pd_core::envoys::message::{ExchangeRequest, Record};
use pd_support::places;
use prost::Message;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::interval;
use tonic::{Code, Status};
use tonic_prost::ProstCodec;
use xxhash_rust::xxh3::xxh3_64;

use crate::support::*;

/// One prefill endpoint, one decode endpoint that holds 1,000 tokens, and one of another pool.
const LIST: &str = "endpoints:
- {address: 127.0.0.1:1, role: prefill}
- {address: 127.0.0.1:2, role: decode, cache_tokens: 1000}
- {address: 127.0.0.1:3, role: both, pool: other}
";

fn with_scaler(config: &mut Config, _: &Path) {
    config.scaler = Some(([127, 0, 0, 1], 0).into());
}

/// An Envoy that sends what it has in flight, often enough to count as present.
struct Envoy {
    loads: watch::Sender<Vec<(u64, Totals)>>,
    task: JoinHandle<()>,
}

impl Envoy {
    fn start(control: SocketAddr) -> Self {
        Self::reporting(control, "")
    }

    /// With a report in JSON.
    fn reporting(control: SocketAddr, report: &'static str) -> Self {
        let loads = watch::Sender::new(Vec::new());
        let mut news = loads.subscribe();
        let client: Client<HttpConnector, Full<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
        let task = tokio::spawn(async move {
            let mut ticks = interval(Duration::from_millis(500));
            for turn in 1.. {
                tokio::select! {
                    _ = ticks.tick() => {}
                    _ = news.changed() => {}
                }
                let (loads, report) = (news.borrow_and_update().clone(), report.as_bytes().to_vec());
                let record = Record { gateway: 1, turn, loads, report, ..Record::default() };
                let request = ExchangeRequest { from: 1, records: vec![record], ..ExchangeRequest::default() };
                let request =
                    Request::post(format!("http://{control}/v1/exchange")).body(Full::from(request.to_bytes()));
                client.request(request.unwrap()).await.unwrap();
            }
        });
        Self { loads, task }
    }

    /// Seconds of prefill work at the prefill endpoint, KV tokens and requests at the decode endpoint.
    fn has(&self, seconds: f64, tokens: u64, requests: u64) {
        let key = |id: &str| xxh3_64(id.as_bytes());
        let prefill = Totals { work: (seconds * 1e6) as u64, ..Totals::default() };
        let decode = Totals { tokens, requests, ..Totals::default() };
        self.loads.send_replace(vec![(key("127.0.0.1:1"), prefill), (key("127.0.0.1:2"), decode)]);
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A gRPC client.
#[derive(Clone)]
struct Keda(tonic::client::Grpc<Client<HttpConnector, tonic::body::Body>>);

impl Keda {
    fn new(address: SocketAddr) -> Self {
        let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
        Self(tonic::client::Grpc::with_origin(client, format!("http://{address}").parse().unwrap()))
    }

    async fn ask<Q: Message + Default + 'static, A: Message + Default + 'static>(
        &self,
        method: &str,
        question: Q,
    ) -> Result<A, Status> {
        let mut grpc = self.0.clone();
        grpc.ready().await.unwrap();
        let path: PathAndQuery = format!("{SERVICE}/{method}").parse().unwrap();
        let answer = grpc.unary(tonic::Request::new(question), path, ProstCodec::<Q, A>::default()).await?;
        Ok(answer.into_inner())
    }

    async fn value(&self, role: &str, metric: &str) -> Result<f64, Status> {
        let question =
            GetMetricsRequest { scaled_object_ref: Some(object(&[("role", role)])), metric_name: metric.into() };
        let answer: GetMetricsResponse = self.ask("GetMetrics", question).await?;
        assert_eq!(answer.metric_values.len(), 1);
        assert_eq!(answer.metric_values[0].metric_name, metric);
        Ok(answer.metric_values[0].metric_value_float)
    }

    async fn is_active(&self, metadata: &[(&str, &str)]) -> Result<bool, Status> {
        self.ask("IsActive", object(metadata)).await.map(|answer: IsActiveResponse| answer.result)
    }
}

/// What KEDA sends of a trigger, its own keys included; the shortest window.
fn object(metadata: &[(&str, &str)]) -> ScaledObjectRef {
    let all = [("scalerAddress", "pd-control:9001"), ("windowSeconds", "1")];
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    let scaler_metadata: HashMap<_, _> = all.iter().chain(metadata).map(owned).collect();
    ScaledObjectRef { name: "decode".into(), namespace: "llm".into(), scaler_metadata }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_role_has_its_demand_in_metrics() {
    let rig = Rig::start(LIST).await;
    let metric = |name: &'static str, role: &'static str| {
        let name = format!("pd_control_role_{name}{{pool=\"default\",role=\"{role}\"}}");
        let client = rig.client.clone();
        async move { client.metric(&name).await }
    };
    assert_eq!(metric("endpoints_ready", "decode").await, 1.0);
    let text = rig.client.get("/metrics").await.body;
    assert!(!text.contains("pd_control_role_prefill_work_seconds{"), "unknown is not zero: {text}");
    let envoy = Envoy::start(rig.client.address);
    envoy.has(2.5, 300, 2);
    until_true("the hub has the Envoy's record", || async { metric("prefill_work_seconds", "prefill").await == 2.5 })
        .await;
    assert_eq!(metric("prefill_work_seconds_per_endpoint", "prefill").await, 2.5);
    assert_eq!(metric("kv_tokens_assigned", "decode").await, 300.0);
    assert_eq!(metric("kv_tokens_capacity", "decode").await, 1_000.0);
    assert_eq!(metric("kv_load_ratio", "decode").await, 0.3);
    assert_eq!(metric("requests_in_flight", "decode").await, 2.0);
    assert_eq!(metric("prefill_work_seconds", "decode").await, 0.0, "each by itself");
    drop(envoy);
    until_true("it is forgotten", || async { !rig.client.get("/metrics").await.body.contains("work_seconds{") }).await;
}

/// Two requests wait for room, and one for an endpoint of a pool that has none.
const WAITS: &str = r#"{"waits":[{"pool":"default","waiting":2,"work_ms":4000,"parked":1,"oldest_ms":9000}]}"#;

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_envoys_keep_count() {
    let rig = Rig::start(LIST).await;
    let _envoy = Envoy::reporting(rig.client.address, WAITS);
    for (role, expected) in [("prefill", [4.0, 3.0, 9.0]), ("decode", [0.0, 1.0, 9.0])] {
        until_true(role, || async {
            let names = ["prefill_work_seconds", "requests_unbound", "oldest_unbound_seconds"];
            let mut values = Vec::new();
            for name in names {
                let series = format!("pd_control_role_{name}{{pool=\"default\",role=\"{role}\"}}");
                let text = rig.client.get("/metrics").await.body;
                let line = text.lines().find_map(|line| line.strip_prefix(&series)?.trim().parse::<f64>().ok());
                values.extend(line);
            }
            values == expected
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_without_endpoints_is_active_while_requests_are_parked() {
    let rig = Rig::start_with("endpoints: []\n", with_scaler).await;
    let keda = Keda::new(rig.control.scaler_address().unwrap());
    let envoy = Envoy::start(rig.client.address);
    until_true("nothing is known of it", || async {
        keda.is_active(&[("role", "decode")]).await.is_err_and(|status| status.code() == Code::NotFound)
    })
    .await;
    drop(envoy);
    let _envoy = Envoy::reporting(rig.client.address, WAITS);
    until_true("it is active", || async { keda.is_active(&[("role", "decode")]).await.is_ok_and(|is| is) }).await;
    assert_eq!(keda.value("decode", "kv_load").await.unwrap(), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn keda_gets_the_mean_of_a_window_and_nothing_before() {
    let rig = Rig::start_with(LIST, with_scaler).await;
    let keda = Keda::new(rig.control.scaler_address().unwrap());
    let specs: GetMetricSpecResponse = keda.ask("GetMetricSpec", object(&[("role", "decode")])).await.unwrap();
    let [spec] = &specs.metric_specs[..] else { panic!("{specs:?}") };
    assert_eq!((spec.metric_name.as_str(), spec.target_size_float), ("kv_load", 0.85));

    assert_eq!(keda.value("prefill", "prefill_work_seconds").await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(keda.is_active(&[("role", "decode")]).await.unwrap_err().code(), Code::Unavailable);
    let envoy = Envoy::start(rig.client.address);
    until_true("an idle pool is inactive", || async {
        keda.is_active(&[("role", "decode")]).await.is_ok_and(|is| !is)
    })
    .await;
    assert_eq!(keda.value("prefill", "prefill_work_seconds").await.unwrap(), 0.0);
    envoy.has(3.0, 500, 2);
    until_true("the mean is all of it", || async {
        keda.value("prefill", "prefill_work_seconds").await.unwrap() == 3.0
    })
    .await;
    assert_eq!(keda.value("decode", "kv_load").await.unwrap(), 0.5);
    assert!(keda.is_active(&[("role", "prefill")]).await.unwrap());
    assert!(!keda.is_active(&[("role", "both"), ("pool", "other")]).await.unwrap());

    for (code, outcome) in [
        (Code::NotFound, keda.value("prefill", "kv_load").await),
        (Code::NotFound, keda.value("both", "kv_load").await),
        (Code::InvalidArgument, keda.value("decoder", "kv_load").await),
    ] {
        assert_eq!(outcome.unwrap_err().code(), code);
    }
    let unknown: Result<IsActiveResponse, _> = keda.ask("IsAwake", object(&[])).await;
    assert_eq!(unknown.unwrap_err().code(), Code::Unimplemented);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_says_when_a_pool_wakes_and_falls_asleep_and_ends_with_pd_control() {
    let rig = Rig::start_with(LIST, with_scaler).await;
    let mut grpc = Keda::new(rig.control.scaler_address().unwrap()).0;
    grpc.ready().await.unwrap();
    let path: PathAndQuery = format!("{SERVICE}/StreamIsActive").parse().unwrap();
    let codec = ProstCodec::<ScaledObjectRef, IsActiveResponse>::default();
    let question = tonic::Request::new(object(&[("role", "decode")]));
    let mut stream = grpc.server_streaming(question, path, codec).await.unwrap().into_inner();
    let envoy = Envoy::start(rig.client.address);
    for (seconds, is_active) in [(0.0, false), (1.0, true), (0.0, false)] {
        envoy.has(seconds, 0, 0);
        let next = tokio::time::timeout(PATIENCE, stream.message()).await.unwrap().unwrap();
        assert_eq!(next, Some(IsActiveResponse { result: is_active }));
    }
    rig.control.stop().await;
    assert_eq!(tokio::time::timeout(PATIENCE, stream.message()).await.unwrap().unwrap(), None);
}

/// With KEDA's own .proto file and the client that Go's gRPC is, as KEDA is.
#[tokio::test(flavor = "multi_thread")]
async fn grpcurl_understands_it_with_and_without_tls() {
    let Some(grpcurl) = places::program("grpcurl", "the external scaler with grpcurl") else { return };
    for has_tls in [false, true] {
        let rig = Rig::start_with(LIST, |config, directory| {
            with_scaler(config, directory);
            if has_tls {
                config.tls = Some(crate::tls::made(directory, "IP:127.0.0.1"));
            }
        })
        .await;
        let certificate = rig.directory.path().join("cert.pem");
        let address = rig.control.scaler_address().unwrap().to_string();
        let ask = |method: &'static str| {
            let mut command = Command::new(&grpcurl);
            match has_tls {
                true => command.arg("-cacert").arg(&certificate),
                false => command.arg("-plaintext"),
            };
            command
                .args(["-max-time", "20", "-import-path", concat!(env!("CARGO_MANIFEST_DIR"), "/tests")])
                .args(["-proto", "externalscaler.proto", "-d"])
                .arg(r#"{"name": "decode", "namespace": "llm", "scalerMetadata": {"role": "decode", "kvLoad": "0.5"}}"#)
                .arg(&address)
                .arg(format!("externalscaler.ExternalScaler/{method}"));
            async move { tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap() }
        };
        let specs = ask("GetMetricSpec").await;
        assert!(specs.status.success(), "{}", String::from_utf8_lossy(&specs.stderr));
        let specs: serde_json::Value = serde_json::from_slice(&specs.stdout).unwrap();
        let spec = &specs["metricSpecs"][0];
        assert_eq!((&spec["metricName"], &spec["targetSizeFloat"]), (&"kv_load".into(), &0.5.into()));
        let refused = ask("IsActive").await;
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && said.contains("Unavailable") && said.contains("for 60 s"), "{said}");
    }
}
