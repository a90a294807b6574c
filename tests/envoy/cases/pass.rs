//! Requests without a prompt.

use pd_support::client::{BOTH, Client, Http};
use pd_tests::rig::{Rig, run};
use pd_tests::shared::shared;
use serde_json::json;

use crate::support::{assert_rejected, recorded};

#[test]
fn requests_without_body_reach_a_pod_unchanged() {
    run(async {
        let rig = shared().await;
        let direct = Client::connect(rig.decode[0].addr(), Http::One).await.get("/v1/models").await;
        rig.decode[0].clear_requests();
        for http in BOTH {
            let mut client = rig.client(http).await;
            for path in ["/v1/models", "/v1/models?a=%20b", "/version", "/v1/models/no/such"] {
                let mut request = client.request("GET", path);
                request.headers_mut().insert("authorization", "Bearer t".parse().unwrap());
                let answer = client.send(request).await;
                assert_eq!(answer.status, if path == "/v1/models/no/such" { 404 } else { 200 });
                if path == "/v1/models" {
                    assert_eq!(answer.body, direct.body);
                }
            }
        }
        let got = recorded(rig.engines());
        assert_eq!(got.len(), 8);
        assert_eq!(got.iter().filter(|request| request.path == "/v1/models?a=%20b").count(), 2);
        for request in got {
            assert_eq!((request.header("authorization"), request.body.len()), (Some("Bearer t"), 0));
        }
    });
}

#[test]
fn paths_of_no_inference_api_are_refused() {
    run(async {
        let rig = shared().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            let administration = [
                "/reset_prefix_cache",
                "/server_info",
                "/scale_elastic_ep",
                "/sleep",
                "/collective_rpc",
                "/v1/load_lora_adapter",
                "/start_profile",
                "/flush_cache",
                "/v1/audio/../load_lora_adapter",
                "/v1/audio/%2e%2e/load_lora_adapter",
                "/%73leep",
                "//sleep",
                "/metrics",
                "/",
            ];
            for path in administration {
                assert_rejected(&client.post(path, "{}").await, 404, "unknown_path");
                assert_rejected(&client.get(path).await, 404, "unknown_path");
            }
        }
        assert_eq!(recorded(rig.engines()).len(), 0);
    });
}

#[test]
fn bodies_on_paths_that_the_operator_allows_pass_unchanged() {
    run(async {
        let rig = Rig::builder().engines(1, 1).plugin(json!({"allowed_paths": ["/own/*"]})).start().await;
        let bodies: [&[u8]; 6] =
            [b"{ \"a\" : 1.0e5 , \"b\":[ ] }", b"no JSON \xff\x00", b"[1,2]", b"{\"a\":", &[0x80; 100_000], b" "];
        for http in BOTH {
            let mut client = rig.client(http).await;
            for body in bodies {
                rig.engines().for_each(|engine| engine.clear_requests());
                let content_type: &[u8] =
                    if body.starts_with(b"{ ") { b"application/json" } else { b"application/octet-stream" };
                let mut request = client.json("/own/api", body, &[]);
                request.headers_mut().insert("content-type", http::HeaderValue::from_bytes(content_type).unwrap());
                assert_eq!(client.send(request).await.status, 404, "the engine's own answer");
                let got = recorded(rig.engines());
                assert_eq!(got.len(), 1);
                assert_eq!(got[0].body, body);
            }
            assert_rejected(&client.post("/owner", "{}").await, 404, "unknown_path");
        }
    });
}

#[test]
fn they_go_to_healthy_pods_only() {
    run(async {
        let rig = Rig::start().await;
        rig.refuse(&rig.prefill[0]).await;
        rig.refuse(&rig.decode[1]).await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            for _ in 0..20 {
                let answer = client.get("/v1/models").await;
                assert_eq!(answer.status, 200, "{}", answer.text());
            }
        }
        assert_eq!(rig.prefill[1].stats().requests + rig.decode[0].stats().requests, 40);
    });
}
