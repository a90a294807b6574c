//! Paths as gateways make them: a prefix that the route takes away, a slash at the end; and the model on every path.

use pd_support::body::CHAT;
use pd_support::client::BOTH;
use pd_tests::rig::{Rig, run};
use pd_tests::shared::shared;
use serde_json::json;

use crate::support::{assert_right, long_chat, recorded, short_chat, sum};

#[test]
fn a_prefix_and_a_slash_at_the_end_reach_engines_as_they_know_them() {
    run(async {
        let rewrites = |config: &mut pd_support::config::Config| {
            let routes = config.routes();
            let mut team = routes.last().unwrap().clone();
            team["match"]["prefix"] = json!("/team/");
            team["route"]["prefix_rewrite"] = json!("/");
            routes.insert(0, team);
        };
        let rig = Rig::builder().plugin(json!({"path_prefixes": ["/team"]})).envoy(rewrites).start().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            for path in ["/team/v1/chat/completions", "/team/v1/chat/completions/", "/v1/chat/completions/"] {
                for body in [long_chat(), short_chat()] {
                    assert_right(&client.post(path, body.clone()).await, &body);
                }
            }
        }
        assert!(recorded(rig.engines()).iter().all(|request| request.path == CHAT));
        assert_eq!(sum(&rig.prefill, |stats| stats.prefill_legs), 2 * 3);
        rig.until_idle().await;
    });
}

#[test]
fn a_request_without_a_prompt_goes_where_its_model_is_served() {
    run(async {
        let rig = shared().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            for path in ["/v1/embeddings", "/tokenize", "/rerank", "/v1/messages/count_tokens"] {
                for _ in 0..6 {
                    client.post(path, r#"{"model":"sim","input":"a"}"#).await;
                }
            }
        }
        assert_eq!(sum(&rig.prefill, |stats| stats.requests), 0, "prefill servers only prefill");
        assert!(sum(&rig.decode, |stats| stats.requests) >= 2 * 4 * 6);
    });
}

#[test]
fn errors_on_the_messages_api_are_anthropics() {
    run(async {
        let rig = shared().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            for path in ["/v1/messages", "/v1/messages/count_tokens"] {
                let answer = client.post(path, "{").await;
                assert_eq!((answer.status, answer.json()["type"].clone()), (400, json!("error")), "{}", answer.text());
                assert_eq!(answer.json()["error"]["type"], "invalid_request_error");
            }
        }
    });
}
