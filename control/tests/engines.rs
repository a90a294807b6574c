//! What is learnt from the engines themselves.

use std::net::SocketAddr;
use std::time::Duration;

use axum::body::Body;
use axum::routing::get;
use futures::stream;
use pd_control::Config;
use pd_core::endpoints::elsewhere::Totals;
use pd_core::envoys::message::{ExchangeRequest, ExchangeResponse, Record};
use pd_core::wire::{Endpoint, EndpointId, State};
use pd_sim::Role;

use crate::support::*;

fn often(config: &mut Config) {
    config.scrape = Some(Duration::from_millis(100));
}

fn list(addresses: &[SocketAddr]) -> String {
    let line = |address: &SocketAddr| format!("- {{address: '{address}', role: both}}\n");
    format!("endpoints:\n{}", addresses.iter().map(line).collect::<String>())
}

async fn endpoint(rig: &Rig, address: SocketAddr) -> Endpoint {
    let mut view: serde_json::Value = serde_json::from_str(&rig.client.get("/v1/endpoints").await.body).unwrap();
    let endpoints: Vec<Endpoint> = serde_json::from_value(view["endpoints"].take()).unwrap();
    endpoints.into_iter().find(|endpoint| endpoint.address == address).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn models_and_cache_of_engines_come_into_the_list_and_silent_ones_are_down() {
    let mut engines = Vec::new();
    for _ in 0..3 {
        let config =
            pd_sim::Config { models: vec!["m".into()], loras: vec!["a".into()], ..pd_sim::Config::of(Role::Both) };
        engines.push(pd_sim::start(config).await.unwrap());
    }
    let addresses: Vec<_> = engines.iter().map(pd_sim::Handle::addr).collect();
    let rig = Rig::start_with(&list(&addresses), |config, _| often(config)).await;
    for address in &addresses {
        until_true("models and cache are known", || async {
            let endpoint = endpoint(&rig, *address).await;
            endpoint.models == ["a", "m"] && endpoint.cache_tokens.is_some_and(|tokens| tokens > 0)
        })
        .await;
        let up = format!("pd_control_engine_up{{address=\"{address}\"}}");
        assert_eq!(rig.client.metric(&up).await, 1.0);
    }
    engines[0].set_refuse(true);
    until_true("it is down", || async { endpoint(&rig, addresses[0]).await.state == State::Down }).await;
    assert_eq!(endpoint(&rig, addresses[1]).await.state, State::Ready);
    engines[0].set_refuse(false);
    until_true("it is back", || async { endpoint(&rig, addresses[0]).await.state == State::Ready }).await;

    for engine in &engines[..2] {
        engine.set_refuse(true);
    }
    let failed = format!("pd_control_engine_up{{address=\"{}\"}}", addresses[1]);
    until_true("the second fails", || async { rig.client.metric(&failed).await == 0.0 }).await;
    let scrapes = "pd_control_scrapes_total{result=\"failed\"}";
    let before = rig.client.metric(scrapes).await;
    until_true("they fail for long", || async { rig.client.metric(scrapes).await > before + 10.0 }).await;
    for address in &addresses {
        let state = endpoint(&rig, *address).await.state;
        assert_eq!(state, State::Ready, "most of them cannot be gone at once");
    }

    replace(&rig.file(), &list(&addresses[..1])).unwrap();
    let is_gone = || async { !rig.client.get("/metrics").await.body.contains(&addresses[2].to_string()) };
    until_true("its series leave with it", is_gone).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tensorrt_llms_metrics_are_found_where_it_has_them() {
    let iterations = || async { "[]" };
    let metrics = || async { "trtllm_num_requests_waiting{model_name=\"m\"} 7\ntrtllm_kv_cache_utilization 0.5\n" };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = axum::Router::new().route("/metrics", get(iterations)).route("/prometheus/metrics", get(metrics));
    let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    let rig = Rig::start_with(&list(&[address]), |config, _| often(config)).await;
    let waiting = format!("pd_control_engine_waiting{{address=\"{address}\"}}");
    until_true("its queue is known", || async { rig.client.metric(&waiting).await == 7.0 }).await;
    server.abort();
}

/// An engine that reports so many requests.
async fn engine_with(requests: u32) -> SocketAddr {
    let metrics = move || async move { format!("vllm:num_requests_waiting {requests}\nvllm:num_requests_running 0\n") };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = axum::Router::new().route("/metrics", get(metrics));
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_no_envoy_sent_reach_the_envoys() {
    let addresses = [engine_with(20).await, engine_with(0).await];
    let rig = Rig::start_with(&list(&addresses), |config, _| often(config)).await;
    let envoy = ExchangeRequest {
        from: 1,
        wants: true,
        records: vec![Record { gateway: 1, turn: 1, ..Record::default() }],
        ..ExchangeRequest::default()
    };
    let loads = || async {
        let answer = rig.client.send("POST", "/v1/exchange", envoy.to_bytes()).await.unwrap();
        ExchangeResponse::from_bytes(answer.body()).unwrap().loads.unwrap()
    };
    until_true("the Envoy knows", || async { !loads().await.is_empty() }).await;
    let key = EndpointId { address: addresses[0], rank: None }.key();
    assert_eq!(loads().await, [(key, Totals { requests: 5, ..Totals::default() })], "a quarter of 20");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_without_end_is_cut_off() {
    let endless = || async {
        let line = bytes::Bytes::from("vllm:num_requests_waiting 1\n".repeat(4_000));
        Body::from_stream(stream::repeat_with(move || Ok::<_, std::convert::Infallible>(line.clone())))
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = axum::Router::new().route("/metrics", get(endless));
    let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    let rig = Rig::start_with(&list(&[address]), |config, _| often(config)).await;
    let failed = "pd_control_scrapes_total{result=\"failed\"}";
    until_true("it is cut off", || async { rig.client.metric(failed).await >= 2.0 }).await;
    assert_eq!(rig.client.metric("pd_control_scrapes_total{result=\"ok\"}").await, 0.0);
    server.abort();
}
