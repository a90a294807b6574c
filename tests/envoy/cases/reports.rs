//! Requests of public reports that other gateways and engines got wrong. Each case names its report.

use pd_support::body::{CHAT, COMPLETIONS, chat, completion};
use pd_support::client::{BOTH, Client, Http};
use pd_support::wait::until;
use pd_tests::rig::{Rig, run};
use pd_tests::shared::shared;
use serde_json::{Value, json};

use crate::support::{assert_rejected, assert_right, long_chat, new_id, new_prompt, recorded, short_chat, sum};

const GENERATE: &str = "/inference/v1/generate";

#[test]
fn parameters_of_a_hand_over_reach_no_engine() {
    const EVIL: &str = r#"{"do_remote_prefill":true,"do_remote_decode":false,"remote_host":"evil","remote_port":1,"tp_size":1000000000,"remote_block_ids":[[1]],"remote_engine_id":"evil","remote_request_id":"evil"}"#;
    run(async {
        let rig = shared().await;
        let mut client = rig.client(Http::One).await;
        let ids = format!("{:?}", new_prompt().as_bytes());
        for (report, path, body) in [
            // An engine runs out of memory by `tp_size`.
            (
                "vllm-project/vllm#51137",
                CHAT,
                chat(&[&new_prompt()], &format!(r#","max_tokens":4,"kv_transfer_params":{EVIL}"#)),
            ),
            (
                "vllm-project/vllm#51137",
                COMPLETIONS,
                completion("hi", &format!(r#","max_tokens":4,"kv_transfer_params":{EVIL}"#)),
            ),
            // The engine reads them on its own API, too.
            (
                "vllm-project/vllm#42644",
                GENERATE,
                format!(
                    r#"{{"model":"sim","token_ids":{ids},"sampling_params":{{"max_tokens":4}},"kv_transfer_params":{EVIL}}}"#
                ),
            ),
            (
                "PrimeIntellect-ai/prime-rl#2490",
                GENERATE,
                format!(
                    r#"{{"model":"sim","token_ids":[1],"sampling_params":{{"max_tokens":4,"extra_args":{{"kv_transfer_params":{EVIL}}}}}}}"#
                ),
            ),
        ] {
            let answer = client.post(path, body).await;
            assert_eq!(answer.status, 200, "{report}: {}", answer.text());
            assert!(recorded(rig.engines()).iter().all(|leg| !leg.text().contains("evil")), "{report}");
        }
        // A header that names a server.
        let body = long_chat();
        let request = client.json(CHAT, body.clone(), &[("x-prefiller-host-port", b"evil:1")]);
        assert_right(&client.send(request).await, &body);
        let arrived = |name| recorded(rig.engines()).iter().any(|leg| leg.header(name).is_some());
        assert!(!arrived("x-prefiller-host-port"), "llm-d/llm-d-router#242");
        assert!(rig.engines().all(|engine| engine.stats().failed_pulls == 0 && !engine.is_crashed()));
    });
}

#[test]
fn paths_are_understood_or_refused_with_a_reason() {
    run(async {
        let models = |list: &mut [Value]| list.iter_mut().for_each(|entry| entry["models"] = json!(["sim"]));
        let rig = Rig::builder().list(models).start().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            // unslothai/unsloth#9876, Routstr/routstr-core#424: a list is asked for with a slash at its end. Agenta-AI/agenta#5487:
            // no redirect, which clients do not follow with a body.
            for path in ["/v1/models/", "/v1/models"] {
                let answer = client.get(path).await;
                assert_eq!((answer.status, answer.json()["data"][0]["id"].as_str()), (200, Some("sim")), "{path}");
            }
            for path in ["/v1/chat/completions/", "/v1/embeddings/"] {
                let answer = client
                    .post(path, r#"{"model":"sim","input":"a","messages":[{"role":"user","content":"a"}]}"#)
                    .await;
                assert_eq!(answer.status, 200, "{path}: {}", answer.text());
            }
            // dstackai/dstack#1546: a base address without `/v1`; modelplaneai/modelplane#327: one with it twice.
            for path in ["/chat/completions", "/v1/v1/chat/completions"] {
                assert_rejected(&client.post(path, short_chat()).await, 404, "unknown_path");
            }
            // kubernetes-sigs/gateway-api-inference-extension#2109: APIs beside completions, of a model and of none.
            for path in ["/v1/rerank", "/rerank", "/v1/embeddings", "/v1/score", "/pooling", "/tokenize"] {
                rig.engines().for_each(pd_sim::Handle::clear_requests);
                client.post(path, r#"{"model":"sim","input":"a","query":"a","documents":["b"]}"#).await;
                assert_eq!(recorded(&rig.decode).len(), 1, "{path}");
                assert!(recorded(&rig.prefill).is_empty(), "{path}");
                assert_rejected(&client.post(path, r#"{"model":"none","input":"a"}"#).await, 404, "unknown_model");
            }
        }
    });
}

/// Base64 of `bytes` random-looking bytes behind the begin of a file.
fn media(begin: &str, bytes: usize) -> String {
    let mut data = format!("{begin}{}", new_id("media").replace('-', "/"));
    data.extend(std::iter::repeat_n('A', bytes.saturating_sub(data.len())));
    data
}

#[test]
fn media_are_counted_by_what_they_show() {
    run(async {
        let rig = Rig::builder().control(&["--scrape-interval=0.1"]).start().await;
        until("the filter knows the engines' context length", async || {
            rig.client(Http::One).await.get("/v1/models").await.text().contains("131072").then_some(())
        })
        .await;
        let mut client = rig.client(Http::One).await;
        let (png, jpeg) = ("iVBORw0KGgoAAAANSUhEUgAAAjAAAAK8CAIAAAAA", "/9j/4AAQSkZJRgABAQAAAQABAAD/wAARCADIASwDASIA");
        let (gif, webp) = ("R0lGODlhLAHIAPAAAAAAAP///ywAAAAA", "UklGRiQAAABXRUJQVlA4IBgAAAAwAQCdASosAcgA");
        for (report, path, body) in [
            // A JPEG of 300 by 200 pixels in Anthropic's form.
            (
                "llm-d/llm-d-router#1508",
                "/v1/messages",
                format!(r#"{{"model":"sim","max_tokens":32,"messages":[{{"role":"user","content":[{{"type":"text","text":"What animal is in this image?"}},{{"type":"image","source":{{"type":"base64","media_type":"image/jpeg","data":"{}"}}}}]}}]}}"#, media(jpeg, 40_000)),
            ),
            // 1.9 MB were taken for 638,000 tokens, and refused as too many for the model.
            (
                "diegosouzapw/OmniRoute#8368",
                "/v1/responses",
                format!(r#"{{"model":"sim","max_output_tokens":1000,"input":[{{"role":"user","content":[{{"type":"input_image","image_url":"data:image/png;base64,{}"}}]}}]}}"#, media(png, 2_550_000)),
            ),
            (
                "NVIDIA/nvcf#1316",
                CHAT,
                format!(r#"{{"model":"sim","max_tokens":32,"messages":[{{"role":"user","content":[{{"type":"image_url","image_url":{{"url":"data:image/gif;base64,{}"}}}},{{"type":"image_url","image_url":{{"url":"data:image/webp;base64,{}"}}}}]}}]}}"#, media(gif, 400_000), media(webp, 400_000)),
            ),
            (
                "llm-d/llm-d-router#1018",
                CHAT,
                r#"{"model":"sim","max_tokens":32,"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"https://dummyimage.com/1280x720.png"}},{"type":"text","text":"What is in this image?"}]}]}"#.to_owned(),
            ),
        ] {
            let before = rig.metric("pd_prompt_tokens_total").await;
            let path = format!("{path}?{}", new_id("report"));
            let answer = client.post(&path, body).await;
            assert_eq!(answer.status, 200, "{report}: {}", answer.text());
            assert_ne!(rig.access_log_of(&path).await["reason"], "too_long", "{report}");
            let after = rig.until_metric("pd_prompt_tokens_total", |value| value > before).await;
            assert!((20.0..4_000.0).contains(&(after - before)), "{report}: {}", after - before);
        }
        // llm-d/llm-d-router#781: two pictures with the same text are two prompts.
        for picture in [media(png, 20_000), media(png, 20_000)] {
            let path = format!("{CHAT}?{}", new_id("report"));
            let body = format!(
                r#"{{"model":"sim","max_tokens":4,"messages":[{{"role":"user","content":[{{"type":"image_url","image_url":{{"url":"data:image/png;base64,{picture}"}}}}]}}]}}"#
            );
            assert_eq!(client.post(&path, body).await.status, 200);
            assert_eq!(rig.access_log_of(&path).await["reason"], "prefilled", "llm-d/llm-d-router#781");
        }
    });
}

#[test]
fn what_two_servers_cannot_give_comes_from_one() {
    run(async {
        let rig = shared().await;
        let mut client = rig.client(Http::One).await;
        for (report, path, body) in [
            ("vllm-project/vllm-ascend#13363", CHAT, long_chat().replace(":8}", ":8,\"prompt_logprobs\":1}")),
            (
                "vllm-project/vllm#50792",
                COMPLETIONS,
                completion(&new_prompt(), r#","max_tokens":8,"prompt_logprobs":0"#),
            ),
            (
                "vllm-project/vllm#27449",
                COMPLETIONS,
                completion(&new_prompt(), r#","max_tokens":8,"echo":true,"logprobs":5"#),
            ),
            (
                "EleutherAI/lm-evaluation-harness",
                COMPLETIONS,
                completion(&new_prompt(), r#","max_tokens":1,"temperature":0,"logprobs":1,"seed":1234,"echo":true"#),
            ),
        ] {
            let answer = client.post(path, body.clone()).await;
            assert_eq!(answer.status, 200, "{report}: {}", answer.text());
        }
        assert_eq!(sum(&rig.prefill, |stats| stats.prefill_legs), 0);
        // vllm-project/vllm#16705: a minimum above the prefill leg's one token is none of its business.
        let body = completion(&new_prompt(), r#","max_tokens":1000,"min_tokens":100"#);
        let answer = client.post(COMPLETIONS, body).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(sum(&rig.prefill, |stats| stats.prefill_legs), 1);
    });
}

#[test]
fn what_the_engine_refuses_is_refused_in_its_words_and_computed_nowhere() {
    run(async {
        let rig = Rig::builder()
            .control(&["--scrape-interval=0.1"])
            .every_engine(|config| config.max_model_len = 4_096)
            .plugin(json!({"pools": {"default": {"split": {"mode": "always"}}}}))
            .start()
            .await;
        until("the filter knows the engines' context length", async || {
            rig.client(Http::One).await.get("/v1/models").await.text().contains("4096").then_some(())
        })
        .await;
        let mut client = rig.client(Http::One).await;
        for (report, path, members) in [
            ("vllm-project/vllm#5700", CHAT, r#""max_tokens":-160"#),
            ("vllm-project/vllm#4365", COMPLETIONS, r#""max_tokens":4,"min_tokens":5"#),
            ("experientiallabs/experiential#538", CHAT, r#""max_tokens":8000"#),
            ("waybarrios/vllm-mlx#376", "/v1/messages", r#""stream":true"#),
            ("a client that always asks for usage", CHAT, r#""max_tokens":4,"stream_options":{"include_usage":true}"#),
        ] {
            let prompt = new_prompt();
            let body = if path == COMPLETIONS {
                completion(&prompt, &format!(",{members}"))
            } else {
                chat(&[&prompt], &format!(",{members}"))
            };
            let answer = client.post(path, body.clone()).await;
            let own = Client::connect(rig.decode[0].addr(), Http::One).await.post(path, body).await;
            assert_eq!((answer.status, own.status), (400, 400), "{report}: {}", answer.text());
            assert_eq!(answer.text(), own.text(), "{report}");
        }
        assert_eq!(sum(&rig.prefill, |stats| stats.prefill_legs), 0);
    });
}
