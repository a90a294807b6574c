//! What a client gets.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use pd_support::body::words;
use pd_support::client::{Client, Http};
use pd_support::wait::PATIENCE;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::cluster::Cluster;

/// Deployments of simulators by model: prefill, decode.
const FAMILIES: [(&str, &str, &str); 2] =
    [("sim", "app=prefill", "app=decode"), ("sim-aibrix", "app=aibrix-prefill", "app=aibrix-decode")];

#[tokio::test]
async fn both_label_families_are_split_over_their_own_pods() {
    const REQUESTS: u64 = 20;
    let cluster = Cluster::ready().await;
    for (model, prefill, decode) in FAMILIES {
        let counts = async || {
            (
                cluster.sum(prefill, |stats| stats.prefill_legs).await,
                cluster.sum(prefill, |stats| stats.decode_legs + stats.local_prefills).await,
                cluster.sum(decode, |stats| stats.decode_legs).await,
                cluster.sum(decode, |stats| stats.prefill_legs + stats.local_prefills).await,
            )
        };
        let before = counts().await;
        let mut client = Client::connect(cluster.address, Http::One).await;
        for number in 0..REQUESTS {
            let prompt = words(&format!("{model} {number} {before:?}"), 4_000);
            let body = format!(r#"{{"model":"{model}","max_tokens":4,"prompt":"{prompt}"}}"#);
            let answer = client.post("/v1/completions", body).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
            assert_eq!(answer.header("x-pd-kv"), None);
        }
        let after = counts().await;
        let done = (after.0 - before.0, after.1 - before.1, after.2 - before.2, after.3 - before.3);
        assert_eq!(done, (REQUESTS, 0, REQUESTS, 0), "{model}: prefill legs, others there, decode legs, others there");
    }
}

#[tokio::test]
async fn clients_name_no_endpoint_and_reach_nothing_internal() {
    let cluster = Cluster::ready().await;
    let mut client = Client::connect(cluster.address, Http::One).await;
    for path in ["/.pd-control", "/.pd-control?epoch=&since=0", "/.pd-preflight"] {
        assert_eq!(client.get(path).await.status, 403, "{path}");
    }
    for path in ["/.pd-control/v1/watch", "/.pd-preflight/v1/models", "/.pd-ready/stats", "/metrics", "/stats", "/"] {
        assert_eq!(client.get(path).await.status, 404, "{path}");
    }

    let prefill = &cluster.pods(crate::cluster::OURS, "app=prefill").await[0];
    let ip = prefill.status.as_ref().and_then(|status| status.pod_ip.clone()).expect("an address");
    let forged = format!("{ip}:8000");
    // Not those of pd-control, which asks for their metrics.
    let prompts = |stats: &pd_sim::Stats| stats.prefill_legs + stats.local_prefills;
    let before = cluster.sum("app=prefill", prompts).await;
    for name in ["x-pd-destination", "x-prefiller-host-port", "x-gateway-destination-endpoint", "x-data-parallel-rank"]
    {
        let request = client.json(
            "/v1/completions",
            r#"{"model":"sim","prompt":"a","max_tokens":1}"#,
            &[(name, forged.as_bytes())],
        );
        assert_eq!(client.send(request).await.status, 200, "{name}");
    }
    assert_eq!(cluster.sum("app=prefill", prompts).await, before);
}

/// Envoy Gateway's own limit is 15 s.
#[tokio::test]
async fn an_answer_takes_as_long_as_it_takes() {
    let cluster = Cluster::ready().await;
    let mut client = Client::connect(cluster.address, Http::One).await;
    let begin = Instant::now();
    // 0.8 ms each.
    let answer =
        client.post("/v1/completions", r#"{"model":"sim","max_tokens":22000,"ignore_eos":true,"prompt":"a"}"#).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(begin.elapsed() > Duration::from_secs(16), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn a_large_body_passes_and_one_above_the_limit_gets_413() {
    let cluster = Cluster::ready().await;
    let mut client = Client::connect(cluster.address, Http::One).await;
    let body = |bytes| format!(r#"{{"model":"sim","max_tokens":1,"prompt":"{}"}}"#, words("large", bytes));
    let answer = client.post("/v1/completions", body(400_000)).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let mut client = Client::connect(cluster.address, Http::One).await;
    assert_eq!(client.post("/v1/completions", body(17 << 20)).await.status, 413);
}

/// The head of the answer to a request that is written as it stands.
async fn head_of(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    let read = async {
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
    };
    tokio::time::timeout(PATIENCE, read).await.expect("an answer, at once");
    String::from_utf8(head).unwrap()
}

/// The filter's configuration has no `upgrades`, so it refuses them. Other offers than WebSocket are passed over.
#[tokio::test]
async fn an_upgrade_is_refused_by_the_filter_and_an_offer_of_tls_is_ignored() {
    let cluster = Cluster::ready().await;
    let socket = "GET /v1/realtime?model=sim HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
                  sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    let head = head_of(cluster.address, socket).await;
    assert!(head.starts_with("HTTP/1.1 501") && head.contains("x-pd-reason: upgrade"), "{head}");
    let tls = "GET /v1/models HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: TLS/1.2\r\n\r\n";
    let head = head_of(cluster.address, tls).await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
}

/// As nodes do: pulled from the registry by digest, and run with nothing but its one file.
#[tokio::test]
async fn pd_control_runs_from_its_image() {
    let Ok(image) = pd_image::layout::read(&pd_support::places::root().join("target/image-control")) else {
        eprintln!("skipped: there is no target/image-control (make image-control)");
        return;
    };
    let cluster = Cluster::ready().await;
    let pods = cluster.pods(crate::cluster::OURS, "app.kubernetes.io/name=pd-control").await;
    assert_eq!(pods.len(), 1);
    let status = pods[0].status.as_ref().and_then(|status| status.container_statuses.as_ref()).expect("a status");
    assert!(status[0].ready && status[0].restart_count == 0, "{status:?}");
    assert!(status[0].image.ends_with(&format!("/pd-control@{}", image.manifest.digest)), "{}", status[0].image);
}
