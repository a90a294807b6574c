//! Stored responses: a request for one, or one that continues one, goes to the server that keeps it.

use pd_support::body::words;
use pd_support::client::{BOTH, Client, Http};
use pd_tests::rig::{Rig, run};
use pd_tests::shared::shared;
use serde_json::Value;

use crate::support::{assert_rejected, new_id, recorded};

const PATH: &str = "/v1/responses";

fn response(prompt: &str, rest: &str) -> String {
    format!(r#"{{"model":"sim","input":"{prompt}","max_output_tokens":4{rest}}}"#)
}

/// Asks for a response, and returns its id.
async fn ask(client: &mut Client, body: String) -> String {
    let stream = body.contains(r#""stream":true"#);
    let answer = client.post(PATH, body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let text = answer.text();
    let id = if stream {
        let event = text.lines().find_map(|line| line.strip_prefix("data: ")).unwrap();
        serde_json::from_str::<Value>(event).unwrap()["response"]["id"].clone()
    } else {
        answer.json()["id"].clone()
    };
    id.as_str().unwrap().to_owned()
}

#[test]
fn a_response_is_found_by_any_worker_whichever_server_has_it() {
    run(async {
        let rig = shared().await;
        let mut ids = Vec::new();
        // Short and long prompts, streamed and not: some are split.
        for (bytes, rest) in [(10, ""), (4_000, ""), (10, r#","stream":true"#), (4_000, r#","stream":true"#)] {
            for _ in 0..4 {
                let mut client = rig.client(Http::One).await;
                let prompt = words(&new_id("kept"), bytes);
                ids.push(ask(&mut client, response(&prompt, rest)).await);
            }
        }
        rig.engines().for_each(|engine| engine.clear_requests());
        for http in BOTH {
            for mut client in rig.client_of_each_worker(http).await {
                for id in &ids {
                    let answer = client.get(&format!("{PATH}/{id}")).await;
                    assert_eq!(answer.status, 200, "{}", answer.text());
                    assert_eq!(answer.json()["id"], id.as_str());
                    let cancelled = client.post(&format!("{PATH}/{id}/cancel"), "").await;
                    assert!(cancelled.text().contains("Cannot cancel"), "{}", cancelled.text());
                }
            }
        }
        let asked = recorded(&rig.decode).len() + recorded(&rig.prefill).len();
        let workers = rig.client_of_each_worker(Http::One).await.len();
        assert!(asked >= ids.len() * workers * 4, "{asked}");
        assert!(recorded(&rig.prefill).iter().all(|request| !request.path.starts_with("/v1/responses/")));
    });
}

#[test]
fn a_conversation_goes_on_where_its_responses_are() {
    run(async {
        let rig = shared().await;
        let mut client = rig.client(Http::One).await;
        for stream in ["", r#","stream":true"#] {
            let mut id = ask(&mut client, response(&words(&new_id("kept"), 4_000), stream)).await;
            let legs = recorded(&rig.prefill).len();
            for _ in 0..6 {
                let next = format!(r#"{stream},"previous_response_id":"{id}""#);
                id = ask(&mut client, response(&words(&new_id("kept"), 4_000), &next)).await;
            }
            assert_eq!(recorded(&rig.prefill).len(), legs, "a prefill server has none of the responses");
        }
    });
}

#[test]
fn an_unknown_response_is_a_clear_error() {
    run(async {
        let rig = shared().await;
        let mut client = rig.client(Http::One).await;
        let body = response("hello", r#","previous_response_id":"resp_nobody""#);
        for answer in [client.post(PATH, body.clone()).await, client.get("/v1/responses/resp_nobody").await] {
            assert_rejected(&answer, 404, "unknown_response");
            assert!(answer.text().contains("resp_nobody"));
        }
        assert!(recorded(rig.engines()).is_empty());
        // The only server has it, or nobody.
        let rig = Rig::builder().engines(1, 1).start().await;
        let answer = rig.client(Http::One).await.post(PATH, body).await;
        assert_eq!(answer.json()["error"]["message"], "Response with id 'resp_nobody' not found.");
    });
}
