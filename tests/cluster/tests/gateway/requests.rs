//! What a client gets.

use pd_tests::body::words;
use pd_tests::client::{Client, Http};

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
    for path in ["/.pd-control", "/.pd-control?epoch=&since=0"] {
        assert_eq!(client.get(path).await.status, 403, "{path}");
    }
    for path in ["/.pd-control/v1/watch", "/metrics", "/stats", "/"] {
        assert_eq!(client.get(path).await.status, 404, "{path}");
    }

    let prefill = &cluster.pods(crate::cluster::OURS, "app=prefill").await[0];
    let ip = prefill.status.as_ref().and_then(|status| status.pod_ip.clone()).expect("an address");
    let forged = format!("{ip}:8000");
    let before = cluster.sum("app=prefill", |stats| stats.requests).await;
    for name in ["x-pd-destination", "x-prefiller-host-port", "x-gateway-destination-endpoint", "x-data-parallel-rank"]
    {
        let request = client.json(
            "/v1/completions",
            r#"{"model":"sim","prompt":"a","max_tokens":1}"#,
            &[(name, forged.as_bytes())],
        );
        assert_eq!(client.send(request).await.status, 200, "{name}");
    }
    assert_eq!(cluster.sum("app=prefill", |stats| stats.requests).await, before);
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
