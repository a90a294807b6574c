//! What people, probes and scrapers ask.

use std::time::Duration;

use axum::http::StatusCode;
use pd_control::Control;
use pd_control::access::token::Token;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::*;

#[tokio::test(flavor = "multi_thread")]
async fn the_list_is_shown_with_its_version_and_source() {
    let rig = Rig::start(&four(2.0)).await;
    let answer = rig.client.get("/v1/endpoints").await;
    assert_eq!(answer.headers["content-type"], "application/json");
    let view: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(view["version"], 1);
    assert_eq!(view["epoch"], rig.filter().await.epoch);
    assert_eq!(view["source"], rig.file().display().to_string());
    assert_eq!(view["degraded"], Value::Null);
    assert_eq!(view["endpoints"][0], serde_json::json!({"address": "127.0.0.1:1", "role": "both", "weight": 2.0}));
    assert!(view["age_ms"].as_u64().unwrap() < 60_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_and_metrics_need_no_token_and_the_rest_does() {
    let rig = Rig::start_with(&four(1.0), with_token).await;
    for path in ["/", "/healthz", "/readyz", "/metrics"] {
        assert_eq!(rig.client.get(path).await.status, StatusCode::OK, "{path}");
    }
    for path in ["/v1/endpoints", "/v1/watch", "/v1/status"] {
        for token in [None, Some("wrong")] {
            let answer = HttpClient { token, ..rig.client.clone() }.get(path).await;
            assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{path} {token:?}");
            assert_eq!(answer.headers["www-authenticate"], "Bearer");
            assert!(!answer.body.contains("127.0.0.1"));
        }
        let client = HttpClient { token: Some("secret"), ..rig.client.clone() };
        assert_eq!(client.get(path).await.status, StatusCode::OK, "{path}");
    }
    assert_eq!(rig.client.metric("pd_control_watch_requests_total{code=\"401\"}").await, 2.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_filters_token_does_not_change_the_log_level_where_operators_have_one() {
    let rig = Rig::start_with(&four(1.0), |config, directory| {
        with_token(config, directory);
        config.operator = Token::new("operator");
    })
    .await;
    let status = async |token: &'static str, method: &str, path: &str| {
        let client = HttpClient { token: Some(token), ..rig.client.clone() };
        client.request(method, path).await.unwrap().status
    };
    assert_eq!(status("secret", "PUT", "/v1/log-level").await, StatusCode::UNAUTHORIZED);
    assert_eq!(status("operator", "PUT", "/v1/log-level").await, StatusCode::NOT_FOUND, "its log is the test's");
    assert_eq!(status("operator", "POST", "/v1/exchange").await, StatusCode::UNAUTHORIZED);
    assert_eq!(status("secret", "POST", "/v1/exchange").await, StatusCode::BAD_REQUEST, "it has no message");
    for token in ["secret", "operator"] {
        for path in ["/v1/status", "/v1/endpoints", "/v1/watch"] {
            assert_eq!(status(token, "GET", path).await, StatusCode::OK, "{token} {path}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_paths_and_methods_are_refused() {
    let rig = Rig::start(&four(1.0)).await;
    assert_eq!(rig.client.get("/v1/nothing").await.status, StatusCode::NOT_FOUND);
    let answer = rig.client.request("POST", "/v1/endpoints").await.unwrap();
    assert_eq!(answer.status, StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_is_too_long_is_refused() {
    let rig = Rig::start(&four(1.0)).await;
    let mut stream = TcpStream::connect(rig.client.address).await.unwrap();
    let head = format!("GET /v1/watch?epoch={} HTTP/1.1\r\nhost: pd\r\n\r\n", "e".repeat(20_000));
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    assert_eq!(rig.client.get("/healthz").await.status, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_says_who_polls_and_what_they_have() {
    let rig = Rig::start(&four(1.0)).await;
    let status = async || serde_json::from_str::<Value>(&rig.client.get("/v1/status").await.body).unwrap();
    let mut filter = rig.filter().await;
    assert_eq!(status().await["filters"][0]["version"], 0, "it had none when it asked");
    assert!(filter.poll(&rig.client, Duration::from_millis(1)).await.is_none());
    let view = status().await;
    assert_eq!((&view["filters"][0]["version"], &view["filters"][0]["address"]), (&1.into(), &"127.0.0.1".into()));
    assert_eq!((view["version"].clone(), view["endpoints"][3]["address"].clone()), (1.into(), "127.0.0.1:4".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_page_needs_nothing_from_elsewhere() {
    let rig = Rig::start_with(&four(1.0), with_token).await;
    let page = rig.client.get("/").await;
    assert_eq!(page.headers["content-type"], "text/html; charset=utf-8");
    assert!(page.headers["content-security-policy"].to_str().unwrap().starts_with("default-src 'none'"));
    // The name of a kind of element, which no browser fetches.
    let body = page.body.replace("http://www.w3.org/2000/svg", "");
    for outside in ["http://", "https://", "src=", "@import", "innerHTML", "127.0.0.1"] {
        assert!(!body.contains(outside), "{outside}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_name_every_fact_once() {
    let rig = Rig::start(&four(1.0)).await;
    rig.filter().await;
    let answer = rig.client.get("/metrics").await;
    assert!(answer.headers["content-type"].to_str().unwrap().starts_with("application/openmetrics-text"));
    let mut names: Vec<_> =
        answer.body.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    names.sort_unstable();
    let expected = [
        "build",
        "connections",
        "connections_refused",
        "degraded",
        "eds_errors",
        "eds_writes",
        "endpoints",
        "gateways",
        "last_change_timestamp_seconds",
        "pollers",
        "refusals",
        "role_endpoints_ready",
        "role_kv_load_ratio",
        "role_kv_tokens_assigned",
        "role_kv_tokens_capacity",
        "role_kv_tokens_used",
        "role_oldest_unbound_seconds",
        "role_prefill_busy_ratio",
        "role_prefill_work_seconds",
        "role_prefill_work_seconds_per_endpoint",
        "role_requests_in_flight",
        "role_requests_unbound",
        "role_requests_waiting",
        "snapshot_version",
        "watch_requests",
    ];
    assert_eq!(names, expected.map(|name| format!("pd_control_{name}")));
    assert!(answer.body.ends_with("# EOF\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_hinders_the_start_is_one_line_and_touches_nothing() {
    let rig = Rig::start(&four(1.0)).await;
    let start = |adapt: fn(&mut pd_control::Config, &Rig)| {
        let mut config = rig.config.clone();
        adapt(&mut config, &rig);
        with_eds(&mut config, rig.directory.path());
        async { format!("{:#}", Control::start(config).await.unwrap_err()) }
    };
    let busy = start(|config, rig| config.listen = rig.client.address).await;
    assert!(busy.starts_with(&format!("cannot listen on {}: Address already in use", rig.client.address)), "{busy}");
    let missing = start(|config, _| config.endpoints = Some("no/such.yaml".into())).await;
    assert!(missing.starts_with("no/such.yaml: cannot be read: No such file"), "{missing}");
    let broken = start(|config, rig| {
        let broken = rig.directory.path().join("broken.yaml");
        config.endpoints = Some(broken.clone());
        std::fs::write(broken, "endpoints:\n- address: 127.0.0.1:1\n").unwrap();
    })
    .await;
    assert!(broken.ends_with("broken.yaml:2:3: endpoints[0]: missing field `role`"), "{broken}");
    assert!(!rig.directory.path().join("eds.json").exists());
}
