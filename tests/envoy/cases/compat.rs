//! What users of other gateways rely on: subsets of endpoints, the list of models, limits.

use pd_support::body::CHAT;
use pd_support::client::Http;
use pd_tests::answer::is_done;
use pd_tests::rig::{Rig, run};
use serde_json::json;

use crate::support::*;

const SUBSET: &str = "test-epp-endpoint-selection";

#[test]
fn a_trusted_selection_is_followed_exactly_and_the_answer_says_so() {
    run(async {
        let rig = Rig::builder().plugin(json!({"trusted_headers": [SUBSET]})).start().await;
        for http in [Http::One, Http::Two] {
            let mut client = rig.client(http).await;
            for engine in &rig.decode {
                let address = engine.addr().to_string();
                for body in [short_chat(), short_chat()] {
                    let answer = client.send(client.json(CHAT, body.clone(), &[(SUBSET, address.as_bytes())])).await;
                    assert_right(&answer, &body);
                    assert_eq!(answer.header("x-gateway-destination-endpoint-served"), Some(address.as_str()));
                }
                // Paths without a prompt follow it too.
                let request = client.json("/tokenize", r#"{"a":1}"#, &[(SUBSET, address.as_bytes())]);
                let answer = client.send(request).await;
                assert_eq!(answer.header("x-gateway-destination-endpoint-served"), Some(address.as_str()));
            }
            let answer = client.send(client.json(CHAT, short_chat(), &[(SUBSET, b"192.0.2.1:1")])).await;
            assert_rejected(&answer, 503, "no_endpoint");
        }
        let mut seen = rig.decode.iter().map(|engine| engine.stats().by_path["other"]);
        assert!(seen.all(|count| count == 2));
        rig.until_idle().await;
    });
}

#[test]
fn the_models_of_all_endpoints_are_listed() {
    run(async {
        let rig = Rig::builder()
            .list(|list| {
                list.iter_mut().for_each(|entry| entry["models"] = json!(["sim"]));
                list[0]["models"] = json!(["sim", "sim-lora"]);
            })
            .start()
            .await;
        let mut client = rig.client(Http::Two).await;
        let answer = client.get("/v1/models").await;
        assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/json")));
        let names: Vec<_> = answer.json()["data"].as_array().unwrap().iter().map(|card| card["id"].clone()).collect();
        assert_eq!(names, ["sim", "sim-lora"]);
        assert_eq!(sum(rig.engines(), |stats| stats.requests), 0);
    });
}

#[test]
fn beyond_a_pools_limit_requests_get_429_and_go_through_later() {
    run(async {
        let rig = Rig::builder()
            .engines(1, 1)
            .decode_engines(|config, _| config.speed = 1.0)
            .pool(json!({"max_requests": 1}))
            .start()
            .await;
        let mut clients = rig.client_of_each_worker(Http::Two).await;
        let client = &mut clients[0];
        let slow = short_chat().replace("\"max_tokens\":8", "\"max_tokens\":100,\"ignore_eos\":true,\"stream\":true");
        let first = client.open(client.json(CHAT, slow, &[])).await;
        // The same connection, and so the same worker.
        let answer = client.post(CHAT, short_chat()).await;
        assert_rejected_now(&answer, "saturated");
        assert!(is_done(&first.rest().await.unwrap()));
        rig.until_idle().await;
        ask(client, &short_chat()).await;
        rig.until_metric("pd_requests_shed_total{reason=\"saturated\"}", |value| value == 1.0).await;
    });
}

#[track_caller]
fn assert_rejected_now(answer: &pd_support::client::Answer, reason: &str) {
    assert_eq!((answer.status, answer.reason()), (429, Some(reason)), "{}", answer.text());
    assert_eq!(answer.header("x-llm-d-request-dropped-reason"), Some(reason));
    assert!(answer.header("retry-after").is_some());
}
