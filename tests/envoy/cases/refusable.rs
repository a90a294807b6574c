//! Requests that a decode server refuses, or that only the server that computes the prompt can answer: they run no prefill
//! leg, and no KV blocks stay behind.

use pd_support::body::{CHAT, COMPLETIONS, chat, completion};
use pd_support::client::{Client, Http};
use pd_support::wait::until;
use pd_tests::answer::text;
use pd_tests::rig::{Rig, run};
use pd_tests::shared::shared;

use crate::support::{assert_right, logged_chat, long_chat, new_prompt, sum};

/// Long prompts with members that a decode server refuses.
fn refused() -> Vec<(&'static str, String)> {
    let chats = [
        r#""max_tokens":"x""#,
        r#""max_tokens":1.5"#,
        r#""max_tokens":0"#,
        r#""max_tokens":-1"#,
        r#""max_tokens":4,"max_completion_tokens":"x""#,
        r#""max_tokens":4,"min_tokens":5"#,
        r#""min_tokens":"x""#,
        r#""stop":5"#,
        r#""stop":["a",""]"#,
        r#""stop":["a","b","c","d","e"]"#,
        r#""stop_token_ids":["a"]"#,
        r#""stream_options":{"include_usage":true}"#,
        r#""stream":true,"stream_options":5"#,
        r#""stream":"x""#,
        r#""n":"x""#,
        r#""top_logprobs":3"#,
        r#""logprobs":true,"top_logprobs":"x""#,
    ];
    let others = [
        (COMPLETIONS, r#","max_tokens":"x""#),
        (COMPLETIONS, r#","min_tokens":17"#),
        (COMPLETIONS, r#","logprobs":"x""#),
        ("/v1/responses", r#","max_output_tokens":0"#),
        ("/v1/messages", ""),
        ("/v1/messages", r#","max_tokens":5,"stop_sequences":[""]"#),
        ("/v1/messages", r#","max_tokens":1024,"thinking":{"type":"enabled","budget_tokens":1024}"#),
        ("/inference/v1/generate", ""),
        ("/inference/v1/generate", r#","sampling_params":{"max_tokens":0}"#),
    ];
    let chats = chats.into_iter().map(|members| (CHAT, chat(&[&new_prompt()], &format!(",{members}"))));
    let others = others.into_iter().map(|(path, members)| {
        let prompt = new_prompt();
        let of_path = match path {
            COMPLETIONS => format!(r#""prompt":"{prompt}""#),
            "/v1/responses" => format!(r#""input":"{prompt}""#),
            "/v1/messages" => format!(r#""messages":[{{"role":"user","content":"{prompt}"}}]"#),
            _ => format!(r#""token_ids":{:?}"#, prompt.as_bytes()),
        };
        (path, format!(r#"{{"model":"sim",{of_path}{members}}}"#))
    });
    chats.chain(others).collect()
}

fn assert_nothing_is_pinned(rig: &Rig) {
    assert_eq!(sum(&rig.prefill, |stats| stats.prefill_legs), 0);
    assert_eq!(sum(&rig.prefill, |stats| stats.leases_issued), 0);
}

#[test]
fn what_a_decode_server_refuses_is_refused_by_it_and_strands_no_blocks() {
    run(async {
        let rig = shared().await;
        let mut client = rig.client(Http::One).await;
        for (path, body) in refused() {
            let answer = client.post(path, body.clone()).await;
            let own = Client::connect(rig.decode[0].addr(), Http::One).await.post(path, body.clone()).await;
            assert_eq!((answer.status, own.status), (400, 400), "{path} {}: {}", &body[..60], answer.text());
            assert_eq!(answer.text(), own.text(), "the engine's words");
        }
        assert_nothing_is_pinned(&rig);
    });
}

/// More spellings of what an engine refuses; some engines take some of them.
const SPELLINGS: &[(&str, &str)] = &[
    (CHAT, r#""max_tokens":"5""#),
    (CHAT, r#""max_tokens":true"#),
    (CHAT, r#""max_tokens":[]"#),
    (CHAT, r#""max_tokens":{}"#),
    (CHAT, r#""max_tokens":1e3"#),
    (CHAT, r#""max_tokens":-0"#),
    (CHAT, r#""max_tokens":9223372036854775808"#),
    (CHAT, r#""max_tokens":4,"max_tokens":"x""#),
    (CHAT, r#""max_tokens":4,"max_t\u006fkens":0"#),
    (CHAT, r#""max_tokens":"x","max_tokens":4"#),
    (CHAT, r#""max_completion_tokens":0"#),
    (CHAT, r#""max_completion_tokens":-5,"max_tokens":4"#),
    (CHAT, r#""max_completion_tokens":4,"min_tokens":5"#),
    (CHAT, r#""max_tokens":4,"min_tokens":-1"#),
    (CHAT, r#""max_tokens":4,"min_tokens":1.5"#),
    (CHAT, r#""max_tokens":4,"min_tokens":null"#),
    (CHAT, r#""max_tokens":4,"stop":[5]"#),
    (CHAT, r#""max_tokens":4,"stop":{"a":1}"#),
    (CHAT, r#""max_tokens":4,"stop":true"#),
    (CHAT, r#""max_tokens":4,"stop_token_ids":"1""#),
    (CHAT, r#""max_tokens":4,"stop_token_ids":[1.5]"#),
    (CHAT, r#""max_tokens":4,"stream_options":{}"#),
    (CHAT, r#""max_tokens":4,"stream_options":[]"#),
    (CHAT, r#""max_tokens":4,"stream_options":"x""#),
    (CHAT, r#""max_tokens":4,"stream":false,"stream_options":{"include_usage":true}"#),
    (CHAT, r#""max_tokens":4,"stream":null,"stream_options":{"include_usage":false}"#),
    (CHAT, r#""max_tokens":4,"stream":true,"stream_options":{"include_usage":"x"}"#),
    (CHAT, r#""max_tokens":4,"stream":1"#),
    (CHAT, r#""max_tokens":4,"n":0"#),
    (CHAT, r#""max_tokens":4,"n":-1"#),
    (CHAT, r#""max_tokens":4,"n":1.5"#),
    (CHAT, r#""max_tokens":4,"logprobs":"x""#),
    (CHAT, r#""max_tokens":4,"logprobs":true,"top_logprobs":-1"#),
    (CHAT, r#""max_tokens":4,"logprobs":true,"top_logprobs":21"#),
    (COMPLETIONS, r#""max_tokens":0"#),
    (COMPLETIONS, r#""max_tokens":-1"#),
    (COMPLETIONS, r#""max_tokens":1.5"#),
    (COMPLETIONS, r#""max_tokens":4,"min_tokens":5"#),
    (COMPLETIONS, r#""max_tokens":4,"stop":5"#),
    (COMPLETIONS, r#""max_tokens":4,"stream_options":{"include_usage":true}"#),
    (COMPLETIONS, r#""max_tokens":4,"logprobs":-1"#),
    (COMPLETIONS, r#""max_tokens":4,"logprobs":21"#),
    (COMPLETIONS, r#""max_tokens":4,"n":0"#),
    (COMPLETIONS, r#""max_tokens":4,"echo":"x""#),
    ("/v1/responses", r#""max_output_tokens":-1"#),
    ("/v1/responses", r#""max_output_tokens":1.5"#),
    ("/v1/responses", r#""max_output_tokens":"x""#),
    ("/v1/responses", r#""max_output_tokens":4,"top_logprobs":21"#),
    ("/v1/responses", r#""max_output_tokens":4,"truncation":"x""#),
    ("/v1/messages", r#""max_tokens":null"#),
    ("/v1/messages", r#""max_tokens":0"#),
    ("/v1/messages", r#""max_tokens":-1"#),
    ("/v1/messages", r#""max_tokens":"x""#),
    ("/v1/messages", r#""max_tokens":1.5"#),
    ("/v1/messages", r#""max_tokens":5,"stop_sequences":"x""#),
    ("/v1/messages", r#""max_tokens":5,"stop_sequences":[5]"#),
    ("/v1/messages", r#""max_tokens":5,"thinking":{"type":"enabled","budget_tokens":5}"#),
    ("/inference/v1/generate", r#""sampling_params":5"#),
    ("/inference/v1/generate", r#""sampling_params":{"max_tokens":-1}"#),
    ("/inference/v1/generate", r#""sampling_params":{"max_tokens":"x"}"#),
    ("/inference/v1/generate", r#""sampling_params":{"max_tokens":4,"min_tokens":5}"#),
    ("/inference/v1/generate", r#""sampling_params":{"max_tokens":4,"stop":5}"#),
    ("/inference/v1/generate", r#""sampling_params":{"max_tokens":4,"n":0}"#),
];

fn with_members(path: &str, members: &str) -> String {
    let prompt = new_prompt();
    let of_path = match path {
        COMPLETIONS => format!(r#""prompt":"{prompt}""#),
        "/v1/responses" => format!(r#""input":"{prompt}""#),
        "/inference/v1/generate" => format!(r#""token_ids":{:?}"#, prompt.as_bytes()),
        _ => format!(r#""messages":[{{"role":"user","content":"{prompt}"}}]"#),
    };
    format!(r#"{{"model":"sim",{of_path},{members}}}"#)
}

#[test]
fn no_spelling_of_what_an_engine_refuses_strands_blocks() {
    run(async {
        let rig = Rig::start().await;
        let mut client = rig.client(Http::One).await;
        let mut refused = 0;
        for (path, members) in SPELLINGS {
            let body = with_members(path, members);
            let before = sum(&rig.prefill, |stats| stats.prefill_legs);
            let answer = client.post(path, body.clone()).await;
            let own = Client::connect(rig.decode[0].addr(), Http::One).await.post(path, body).await;
            assert_eq!(answer.status, own.status, "{path} {members}: {}", answer.text());
            if own.status >= 400 {
                refused += 1;
                assert_eq!(answer.text(), own.text(), "{path} {members}: the engine's words");
                assert_eq!(sum(&rig.prefill, |stats| stats.prefill_legs), before, "{path} {members}");
            }
        }
        assert!(refused > 50, "{refused}");
        assert_eq!(rig.final_metric("pd_kv_stranded_total{reason=\"refused\"}").await, 0.0);
    });
}

#[test]
fn a_refusal_that_nobody_foresees_is_counted_and_its_prompt_is_not_believed_to_be_held() {
    run(async {
        const STRANDED: &str = "pd_kv_stranded_total{reason=\"refused\"}";
        // Its leases stay open. Without pd-control the filter does not know the length of the model's context.
        let rig = Rig::builder().without_control().start().await;
        let before = rig.metric(STRANDED).await;
        let mut client = rig.client(Http::One).await;
        let prompt = new_prompt();
        let body = chat(&[&prompt], r#","max_tokens":100000000"#);
        for legs in 1..=2_u32 {
            assert_eq!(client.post(CHAT, body.clone()).await.status, 400);
            assert_eq!(
                rig.until_metric(STRANDED, |value| value >= before + f64::from(legs)).await,
                before + f64::from(legs)
            );
            assert_eq!(sum(&rig.prefill, |stats| stats.prefill_legs), u64::from(legs), "not taken as cached");
        }
        let body = chat(&[&prompt], r#","max_tokens":8"#);
        let (request, path) = logged_chat(&client, &body, &[]);
        assert_right(&client.send(request).await, &body);
        assert_eq!(rig.access_log_of(&path).await["reason"], "prefilled");
    });
}

/// Requests with a prompt of 1,000 tokens, and a limit that is too much for a context of 4,096.
fn too_long() -> Vec<(&'static str, String)> {
    let limit = r#""max_tokens":3500"#;
    vec![
        (CHAT, chat(&[&new_prompt()], &format!(",{limit}"))),
        (CHAT, chat(&[&new_prompt()], r#","max_tokens":1,"max_completion_tokens":3500"#)),
        (COMPLETIONS, completion(&new_prompt(), &format!(",{limit}"))),
        ("/v1/responses", format!(r#"{{"model":"sim","input":"{}","max_output_tokens":3500}}"#, new_prompt())),
        (
            "/v1/messages",
            format!(r#"{{"model":"sim","messages":[{{"role":"user","content":"{}"}}],{limit}}}"#, new_prompt()),
        ),
    ]
}

#[test]
fn a_prompt_that_leaves_no_room_for_its_answer_runs_no_prefill_leg() {
    run(async {
        let rig = Rig::builder()
            .control(&["--scrape-interval=0.1"])
            .every_engine(|config| {
                config.max_model_len = 4_096;
                config.loras = vec!["lora".to_owned()];
            })
            .start()
            .await;
        until("the filter knows the engines' context length", async || {
            rig.client(Http::One).await.get("/v1/models").await.text().contains("4096").then_some(())
        })
        .await;
        let mut client = rig.client(Http::One).await;
        for (path, body) in too_long() {
            for model in ["sim", "lora"] {
                let body = body.replace("\"sim\"", &format!("\"{model}\""));
                let answer = client.post(path, body.clone()).await;
                let own = Client::connect(rig.decode[0].addr(), Http::One).await.post(path, body.clone()).await;
                assert_eq!((answer.status, own.status), (400, 400), "{path} {}: {}", &body[..60], answer.text());
                assert_eq!(answer.text(), own.text(), "the engine's words");
            }
        }
        assert_nothing_is_pinned(&rig);
        let (request, path) = logged_chat(&client, &too_long()[0].1, &[]);
        assert_eq!(client.send(request).await.status, 400);
        assert_eq!(rig.access_log_of(&path).await["reason"], "too_long");
        // One that fits is split, and so is one without a limit.
        for members in [r#","max_tokens":2500"#, ""] {
            let body = chat(&[&new_prompt()], members);
            let (request, path) = logged_chat(&client, &body, &[]);
            assert_eq!(client.send(request).await.status, 200);
            assert_eq!(rig.access_log_of(&path).await["reason"], "prefilled");
        }
    });
}

#[test]
fn a_prompt_that_a_leg_would_cut_otherwise_is_computed_by_the_server_that_answers() {
    run(async {
        let rig = Rig::builder().without_control().every_engine(|config| config.max_model_len = 800).start().await;
        let mut client = rig.client(Http::One).await;
        let prompt = new_prompt();
        for (path, body) in [
            (COMPLETIONS, completion(&prompt, r#","max_tokens":100,"truncate_prompt_tokens":-1"#)),
            (CHAT, chat(&[&prompt], r#","max_tokens":100,"truncate_prompt_tokens":-1"#)),
            (
                "/v1/responses",
                format!(r#"{{"model":"sim","input":"{prompt}","max_output_tokens":100,"truncation":"auto"}}"#),
            ),
        ] {
            let answer = client.post(path, body.clone()).await;
            let own = Client::connect(rig.decode[0].addr(), Http::One).await.post(path, body).await;
            assert_eq!((answer.status, own.status), (200, 200), "{path}: {}", answer.text());
            assert_eq!(text(&answer.body), text(&own.body), "{path}");
        }
        assert_nothing_is_pinned(&rig);
    });
}

#[test]
fn a_prompt_that_prefill_servers_refuse_is_not_believed_to_be_held_there() {
    run(async {
        let rig =
            Rig::builder().without_control().prefill_engines(|config, _| config.max_model_len = 800).start().await;
        let mut client = rig.client(Http::One).await;
        let prompt = new_prompt();
        let answer = client.post(CHAT, chat(&[&prompt], r#","max_tokens":8"#)).await;
        assert_eq!(answer.status, 400, "{}", answer.text());
        let begin = chat(&[&prompt[..2_000]], r#","max_tokens":8"#);
        for matched in ["0", "held"] {
            let (request, path) = logged_chat(&client, &begin, &[]);
            assert_right(&client.send(request).await, &begin);
            let logged = rig.access_log_of(&path).await;
            if matched == "0" {
                assert_eq!((&logged["reason"], &logged["matched_tokens"]), (&"prefilled".into(), &"0".into()));
            } else {
                assert_eq!(logged["reason"], "cached");
            }
        }
    });
}

#[test]
fn an_answer_that_describes_the_prompt_is_computed_by_one_server() {
    run(async {
        let rig = shared().await;
        let mut client = rig.client(Http::One).await;
        for (path, body) in [
            (CHAT, long_chat().replace(":8}", ":8,\"prompt_logprobs\":1}")),
            (CHAT, long_chat().replace(":8}", ":8,\"echo\":true}")),
            (COMPLETIONS, completion(&new_prompt(), r#","max_tokens":8,"echo":true,"logprobs":1"#)),
            (COMPLETIONS, completion(&new_prompt(), r#","max_tokens":8,"prompt_logprobs":0"#)),
        ] {
            let answer = client.post(path, body).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
        }
        assert_nothing_is_pinned(&rig);
        let (request, path) = logged_chat(&client, &long_chat().replace(":8}", ":8,\"prompt_logprobs\":1}"), &[]);
        assert_eq!(client.send(request).await.status, 200);
        assert_eq!(rig.access_log_of(&path).await["reason"], "prompt_in_answer");
        // The decode server samples the answer's tokens, so the filter asks it for their log probabilities.
        let body = long_chat().replace(":8}", ":8,\"logprobs\":true,\"top_logprobs\":2}");
        assert_right(&client.post(CHAT, body.clone()).await, &body);
        let legs: Vec<_> = rig.prefill.iter().flat_map(pd_sim::Handle::requests).collect();
        assert_eq!(legs.len(), 1, "{legs:?}");
        assert!(!legs[0].text().contains("logprobs"));
    });
}
