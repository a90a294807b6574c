//! The APIs beside chat and completions: OpenAI's responses, Anthropic's messages, vLLM's token ids.

use pd_sim::{Api, expected_texts_of};
use pd_support::body::words;
use pd_support::client::{BOTH, Client, Http};
use pd_tests::answer::text;
use pd_tests::rig::run;
use pd_tests::shared::shared;
use serde_json::{Value, json};

use crate::support::{new_id, only, sum};

const PATHS: [&str; 3] = ["/v1/responses", "/v1/messages", "/inference/v1/generate"];

/// A request with a new prompt of 4 kB, and that which limits its answer.
fn request(path: &str, stream: bool) -> Value {
    let prompt = words(&new_id("prompt"), 4_000);
    let body = match path {
        "/v1/responses" => json!({"instructions": "Be brief.", "input": prompt, "max_output_tokens": 20}),
        "/v1/messages" => json!({
            "system": [{"type": "text", "text": "Be brief."}],
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 20,
            "stop_sequences": ["zz zz"],
        }),
        _ => {
            let ids: Vec<u32> = prompt.bytes().map(u32::from).collect();
            json!({"token_ids": ids, "sampling_params": {"max_tokens": 20, "seed": 9_007_199_254_740_993_i64}})
        }
    };
    let (mut whole, more) = (json!({"model": "sim", "stream": stream}), body);
    whole.as_object_mut().unwrap().append(&mut more.as_object().unwrap().clone());
    whole
}

#[test]
fn the_answer_is_that_of_one_server_whatever_the_api() {
    run(async {
        let rig = shared().await;
        for (path, stream, http) in PATHS
            .iter()
            .flat_map(|path| [false, true].into_iter().flat_map(move |stream| BOTH.map(|http| (*path, stream, http))))
        {
            rig.engines().for_each(|engine| engine.clear_requests());
            let body = request(path, stream).to_string();
            let answer = rig.client(http).await.post(path, body.clone()).await;
            assert_eq!(answer.status, 200, "{path}: {}", answer.text());
            let api = Api::of_path(path).unwrap();
            let said = text(&answer.body);
            assert_eq!(vec![said.clone()], expected_texts_of(api, "sim", &body), "{path}: {}", answer.text());
            let alone = Client::connect(rig.decode[0].addr(), Http::One).await.post(path, body.clone()).await;
            assert_eq!(said, text(&alone.body), "{path}");
            // One leg that computes the prompt, and says as little as can be.
            let leg: Value = serde_json::from_slice(&only(&rig.prefill).body).unwrap();
            let limits = match path {
                "/v1/responses" => &leg["max_output_tokens"],
                "/v1/messages" => &leg["max_tokens"],
                _ => &leg["sampling_params"]["max_tokens"],
            };
            assert_eq!((limits, &leg["stream"]), (&json!(1), &json!(false)), "{path}");
            assert_eq!(leg["sampling_params"].get("seed").is_some(), path == "/inference/v1/generate");
        }
        let requests = (PATHS.len() * 4) as u64;
        assert_eq!(sum(&rig.prefill, |stats| stats.prefill_legs), requests);
        assert_eq!(sum(&rig.decode, |stats| stats.decode_legs), requests);
        assert_eq!(sum(rig.engines(), |stats| stats.wrong_text), 0);
    });
}

#[test]
fn a_second_turn_goes_where_the_first_went() {
    run(async {
        let rig = shared().await;
        let mut client = rig.client(Http::One).await;
        for path in ["/v1/responses", "/v1/messages"] {
            for _ in 0..4 {
                let before: Vec<_> = rig.prefill.iter().map(|engine| engine.stats().prefill_legs).collect();
                let (first, second) = (words(&new_id("turn"), 6_000), words(&new_id("turn"), 6_000));
                let turns = |texts: &[&str]| {
                    let message = |(i, text): (usize, &&str)| json!({"role": if i % 2 == 0 { "user" } else { "assistant" }, "content": text});
                    let messages: Vec<Value> = texts.iter().enumerate().map(message).collect();
                    let key = if path == "/v1/responses" { "input" } else { "messages" };
                    json!({"model": "sim", key: messages, "max_tokens": 4, "max_output_tokens": 4}).to_string()
                };
                for texts in [&[first.as_str()][..], &[&first, "yes", &second]] {
                    assert_eq!(client.post(path, turns(texts)).await.status, 200);
                }
                let legs: Vec<_> = rig
                    .prefill
                    .iter()
                    .zip(before)
                    .map(|(engine, before)| engine.stats().prefill_legs - before)
                    .collect();
                assert!(legs.contains(&2), "{path}: {legs:?}");
            }
        }
    });
}
