//! Which requests are split, and where the legs go.

use super::*;

#[test]
fn a_long_prompt_runs_both_legs() {
    let mut t = fixture();
    let outcome = t.headers(&[("x-keep", "1"), ("x-pd-destination", "evil:1")]);
    assert_eq!(outcome.flow, Flow::Continue);
    let removed = |name: &str| outcome.effects.contains(&Effect::RemoveHeader(name.into()));
    assert!(removed("content-length") && removed("x-pd-destination"));
    assert_eq!(t.request.body_part(&mut t.worker, 100).flow, Flow::Pause);

    let outcome = t.body(&long_body());
    assert_eq!(outcome.flow, Flow::Pause);
    let leg = call(&outcome);
    assert_eq!(leg.cluster, "engines");
    assert_eq!(leg.headers.get("x-keep"), Some(&b"1"[..]));
    let body = String::from_utf8(leg.body.clone()).unwrap();
    assert!(body.contains(r#""do_remote_decode":true"#) && body.contains(r#""max_tokens":1,"stream":false"#));
    assert!(!body.contains(r#""stream":true"#));
    let chosen = leg_destination(&outcome).split(',').next().unwrap().to_owned();
    assert!(chosen.starts_with("10.0.0.1:"));

    t.now += Duration::from_millis(40);
    let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
    assert_eq!(outcome.flow, Flow::Continue);
    assert_eq!(edited(&outcome, &long_body()), format!(r#"{{"kv_transfer_params":{PARAMS},{}"#, &long_body()[1..]));
    assert!(state(&outcome, DESTINATION).starts_with("10.0.0.2:"));
    assert_eq!(state(&outcome, DESTINATION).split(',').count(), TRIES, "both, and the first once more");
    assert_eq!((state(&outcome, DECISION), state(&outcome, REASON)), ("split", "prefilled"));
    assert_eq!((state(&outcome, PREFILL), state(&outcome, PREFILL_MS)), (chosen.as_str(), "40"));
    assert!(!t.is_idle());
    assert!(t.request.awaits_first_byte());
    t.request.first_byte(&mut t.worker, t.now);
    t.done();
    assert!(t.is_idle());
}

#[test]
fn a_short_prompt_is_served_whole_and_untouched() {
    let mut t = fixture();
    t.headers(&[]);
    let body = r#" {"model":"m","messages":[]} "#;
    let outcome = t.body(body);
    assert_eq!(
        (outcome.flow, state(&outcome, DECISION), state(&outcome, REASON)),
        (Flow::Continue, "decode_only", "short")
    );
    assert_eq!(edited(&outcome, body), body);
    t.done();
    assert!(t.is_idle());
}

#[test]
fn the_second_turn_stays_where_the_first_one_was() {
    let mut t = fixture();
    t.headers(&[]);
    t.body(&long_body());
    let first = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
    t.done();
    t.request = Request::default();
    t.headers(&[]);
    let second = t.body(&long_body().replace("\"}]", "\"},{\"role\":\"user\",\"content\":\"and then?\"}]"));
    assert_eq!((state(&second, DECISION), state(&second, REASON)), ("decode_only", "cached"));
    assert_eq!(state(&second, DECODE), state(&first, DECODE));
    assert_ne!(state(&second, MATCHED_TOKENS), "0");
}

#[test]
fn rooms_differ_and_a_short_prompt_is_split_where_decode_cannot_serve_alone() {
    let mut rooms = std::collections::BTreeSet::new();
    for _ in 0..100 {
        let mut t = of_engine("sglang");
        for _ in 0..2 {
            t.request = Request::default();
            t.now += Duration::from_nanos(1);
            t.headers(&[("x-request-id", "the same")]);
            let body = r#"{"model":"m","messages":[],"n":2}"#;
            let outcome = t.body(body);
            assert_eq!(state(&outcome, DECISION), "split");
            let decode = edited(&outcome, body);
            assert_eq!(crate::body::json::elements(member(&decode, "bootstrap_room").as_bytes()).count(), 2);
            rooms.insert(member(&decode, "bootstrap_room").to_owned());
        }
    }
    assert_eq!(rooms.len(), 2, "the same request at the same time has the same room, another one has another");
}

#[test]
fn each_leg_says_the_rank_behind_its_address() {
    let mut t = configured(
        r#"{"endpoints":[
        {"address":"10.0.0.1:1","role":"prefill","rank":4},
        {"address":"10.0.0.2:1","role":"decode","rank":0},{"address":"10.0.0.2:1","role":"decode","rank":1},
        {"address":"10.0.0.2:2","role":"decode","rank":0},{"address":"10.0.0.2:2","role":"decode","rank":1}]}"#,
    );
    t.headers(&[("x-data-parallel-rank", "9")]);
    let outcome = t.body(&long_body());
    assert_eq!(call(&outcome).headers.get("x-data-parallel-rank"), Some(&b"4"[..]));
    let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
    assert!(["0", "1"].contains(&state(&outcome, RANK)));
    let addresses: std::collections::BTreeSet<_> = state(&outcome, DESTINATION).split(',').collect();
    assert_eq!(addresses.len(), 2, "the alternate is another address with that rank");
    t.done();
    assert!(t.is_idle());
}

#[test]
fn several_sequences_are_not_split_where_one_is_handed_over() {
    for (engine, decision) in [
        ("vllm-nixl", ("decode_only", "several_sequences")),
        ("trtllm", ("decode_only", "several_sequences")),
        ("vllm-shared", ("split", "prefilled")),
    ] {
        let mut t = of_engine(engine);
        t.headers(&[]);
        let mut outcome = t.body(&long_body().replacen('{', r#"{"n":2,"#, 1));
        if decision.0 == "split" {
            outcome = t.answer(200, "{}");
        }
        assert_eq!((state(&outcome, DECISION), state(&outcome, REASON)), decision, "{engine}");
    }
}

/// A long body with more members.
fn long_body_with(members: &str) -> String {
    long_body().replacen('{', &format!("{{{members},"), 1)
}

#[test]
fn what_the_decode_endpoint_may_refuse_runs_no_prefill_leg() {
    for engine in ["vllm-nixl", "vllm-shared", "mooncake", "neuron", "trtllm"] {
        for members in [r#""max_tokens":"x""#, r#""min_tokens":5,"max_tokens":4"#, r#""stop":5"#] {
            let mut t = of_engine(engine);
            t.headers(&[]);
            let body = long_body_with(members);
            let outcome = t.body(&body);
            assert_eq!((state(&outcome, DECISION), state(&outcome, REASON)), ("decode_only", "refusable"), "{members}");
            assert_eq!(edited(&outcome, &body), body);
        }
    }
}

#[test]
fn an_engine_that_cannot_decode_alone_gets_both_legs_as_they_are() {
    for members in [r#""max_tokens":"x""#, r#""stream":"x""#, r#""stream_options":5"#] {
        let mut t = of_engine("sglang");
        t.headers(&[]);
        let body = long_body().replace(r#","stream":true"#, "").replacen('{', &format!("{{{members},"), 1);
        let outcome = t.body(&body);
        assert_eq!(state(&outcome, DECISION), "split");
        for leg in [text(&call(&outcome).body).to_owned(), edited(&outcome, &body)] {
            assert!(leg.contains(members), "{leg}");
        }
    }
}

#[test]
fn an_answer_that_describes_the_prompt_is_computed_by_one_endpoint() {
    for engine in ["vllm-nixl", "vllm-shared", "mooncake"] {
        let mut t = of_engine(engine);
        t.headers(&[]);
        let outcome = t.body(&long_body_with(r#""prompt_logprobs":1"#));
        assert_eq!(
            (state(&outcome, DECISION), state(&outcome, REASON)),
            ("decode_only", "prompt_in_answer"),
            "{engine}"
        );
    }
    let mut t = of_engine("sglang");
    t.headers(&[]);
    assert_eq!(state(&t.body(&long_body_with(r#""return_hidden_states":true"#)), DECISION), "split", "nobody else can");
}

#[test]
fn probabilities_are_asked_of_the_endpoint_that_samples() {
    let asks = r#""logprobs":true,"top_logprobs":2"#;
    for (engine, is_asked) in [("vllm-nixl", false), ("vllm-shared", false), ("trtllm", true), ("sglang", true)] {
        let mut t = of_engine(engine);
        t.headers(&[]);
        let outcome = t.body(&long_body_with(asks));
        assert_eq!(text(&call(&outcome).body).contains(asks), is_asked, "{engine}");
    }
}

#[test]
fn a_thinking_budget_is_split_where_the_prefill_leg_may_have_one() {
    for (engine, decision) in [("vllm-nixl", ""), ("mooncake", ""), ("vllm-shared", "decode_only")] {
        let mut t = of_engine(engine);
        let pseudo = [(":method", "POST"), (":path", "/v1/messages"), (":authority", "a")];
        t.request.headers(&mut t.worker, Headers::from_pairs(pseudo), false, t.now);
        let budget = r#""max_tokens":4096,"thinking":{"type":"enabled","budget_tokens":2048}"#;
        let outcome = t.body(&long_body_with(budget));
        assert_eq!(state(&outcome, DECISION), decision, "{engine}");
    }
}

#[test]
fn a_decode_endpoint_of_another_engine_is_no_partner() {
    let config = CONFIG.replace(r#""10.0.0.2:2", "role""#, r#""10.0.0.2:2", "engine": "sglang", "role""#);
    for id in 0..20 {
        let mut t = configured(&config);
        t.headers(&[]);
        t.body(&long_body().replace("word", &format!("word{id}")));
        let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
        assert_eq!(state(&outcome, DECODE), "10.0.0.2:1");
    }
}

#[test]
fn aggregated_endpoints_serve_whole_requests_beside_the_others() {
    let aggregated = r#"{"address": "10.0.0.3:1", "role": "both", "models": ["m"]}"#;
    let mut t = configured(&CONFIG.replacen("\"endpoints\": [", &format!("\"endpoints\": [{aggregated},"), 1));
    let mut decisions = std::collections::BTreeSet::new();
    for id in 0..30 {
        t.request = Request::default();
        t.headers(&[]);
        let body = long_body().replace("word", &format!("w{id}"));
        let mut outcome = t.body(&body);
        if t.request.is_prefilling() {
            outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
            assert!(!state(&outcome, DESTINATION).contains("10.0.0.3"), "it takes no decode legs");
        } else {
            assert_eq!((state(&outcome, DECODE), edited(&outcome, &body)), ("10.0.0.3:1", body));
        }
        decisions.insert(state(&outcome, REASON).to_owned());
    }
    assert_eq!(decisions.into_iter().collect::<Vec<_>>(), ["aggregated", "prefilled"]);
}

#[test]
fn prompts_go_to_pods_whose_bounds_have_room() {
    let config = CONFIG
        .replace(r#""10.0.0.1:1", "role""#, r#""10.0.0.1:1", "max_prompt_tokens": 500, "role""#)
        .replace(r#""10.0.0.1:2", "role""#, r#""10.0.0.1:2", "min_prompt_tokens": 501, "role""#)
        .replace(r#""10.0.0.2:1", "role""#, r#""10.0.0.2:1", "max_prompt_tokens": 500, "role""#);
    for _ in 0..8 {
        let mut fixture = configured(&config);
        fixture.headers(&[]);
        let outcome = fixture.body(&long_body());
        assert_eq!(leg_destination(&outcome), "10.0.0.1:2");
        let outcome = fixture.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
        assert!(state(&outcome, DESTINATION).split(',').all(|name| name == "10.0.0.2:2"), "{outcome:?}");
    }
    // Where nobody has room, everybody is asked.
    let mut fixture = configured(
        &config.replace(r#""10.0.0.1:2", "min_prompt_tokens": 501"#, r#""10.0.0.1:2", "min_prompt_tokens": 99999"#),
    );
    fixture.headers(&[]);
    assert!(leg_destination(&fixture.body(&long_body())).contains("10.0.0.1:1"));
}

#[test]
fn a_mark_of_the_providers_cache_that_moves_does_not_hide_what_an_endpoint_holds() {
    let text = "word ".repeat(600);
    for (path, key, kind, mark) in [
        ("/v1/messages", "messages", "text", r#""cache_control":{"type":"ephemeral"}"#),
        ("/v1/chat/completions", "messages", "text", r#""cache_control":{"type":"ephemeral"}"#),
        ("/v1/chat/completions", "messages", "text", r#""prompt_cache_breakpoint":{"mode":"explicit"}"#),
        ("/v1/responses", "input", "input_text", r#""cache_control":{"type":"ephemeral"}"#),
        ("/v1/responses", "input", "input_text", r#""prompt_cache_breakpoint":{"mode":"explicit"}"#),
    ] {
        let part = |text: &str| format!(r#"{{"role":"user","content":[{{"type":"{kind}","text":"{text}",{mark}}}]}}"#);
        let first = format!("[{}]", part(&text));
        let second =
            format!(r#"[{{"role":"user","content":"{text}"}},{{"role":"assistant","content":"ok"}},{}]"#, part("on"));
        let mut t = fixture();
        let mut matched = Vec::new();
        for messages in [&first, &second] {
            t.request = Request::default();
            let headers = Headers::from_pairs([(":method", "POST"), (":path", path)]);
            t.request.headers(&mut t.worker, headers, false, t.now);
            let line = format!(r#"[{{"type":"text","text":"x-anthropic-billing-header: {}"}}]"#, matched.len());
            let outcome = t.body(&format!(r#"{{"model":"m","max_tokens":4,"system":{line},"{key}":{messages}}}"#));
            let outcome = if outcome.effects.iter().any(|effect| matches!(effect, Effect::Call(_))) {
                t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#))
            } else {
                outcome
            };
            matched.push(state(&outcome, MATCHED_TOKENS).parse::<u64>().unwrap());
            t.done();
        }
        assert_eq!(matched[0], 0, "{path}");
        assert!(matched[1] > 500, "{path}: {matched:?}");
    }
}

/// A gateway that knows the context length of `m`, 1,000 tokens, and not that of its adapter.
fn with_length() -> Fixture {
    let mut t = fixture();
    let endpoints = ["prefill", "decode"].map(|role| {
        let port = role.len();
        format!(r#"{{"address":"10.0.0.1:{port}","role":"{role}","models":["m","lora"]}}"#)
    });
    let list = format!(
        r#"{{"wire":1,"epoch":"e","version":1,"endpoints":[{}],
            "models":[{{"id":"m","max_model_len":1000}},{{"id":"lora","parent":"m"}}]}}"#,
        endpoints.join(",")
    );
    t.worker.apply(list.as_bytes()).unwrap();
    t
}

#[test]
fn a_prompt_that_leaves_no_room_for_its_answer_runs_no_prefill_leg() {
    // Some 770 tokens.
    for (members, is_split) in [
        (r#""max_tokens":100"#, true),
        (r#""max_tokens":900"#, false),
        (r#""max_tokens":900,"max_completion_tokens":100"#, true),
        (r#""max_tokens":2000"#, false),
        (r#""x":1"#, true),
    ] {
        for model in ["m", "lora"] {
            let mut t = with_length();
            t.headers(&[]);
            let body = long_body_with(members).replace(r#""model":"m""#, &format!(r#""model":"{model}""#));
            let outcome = t.body(&body);
            assert_eq!(t.request.is_prefilling(), is_split, "{model} {members}");
            let expected = if is_split { ("", "") } else { ("decode_only", "too_long") };
            assert_eq!((state(&outcome, DECISION), state(&outcome, REASON)), expected, "{model} {members}");
        }
    }
    let mut t = fixture();
    t.headers(&[]);
    t.body(&long_body_with(r#""max_tokens":2000"#));
    assert!(t.request.is_prefilling(), "the length is unknown");
}

#[test]
fn a_prompt_that_the_engine_may_cut_is_split_only_where_it_surely_fits() {
    for (words, is_known, is_split) in [(300, true, true), (600, true, false), (300, false, false)] {
        let mut t = if is_known { with_length() } else { fixture() };
        let headers = Headers::from_pairs([(":method", "POST"), (":path", "/v1/responses")]);
        t.request.headers(&mut t.worker, headers, false, t.now);
        let input = "word ".repeat(words);
        let outcome = t.body(&format!(r#"{{"model":"m","input":"{input}","truncation":"auto"}}"#));
        assert_eq!(t.request.is_prefilling(), is_split, "{words} {is_known}");
        assert_eq!(state(&outcome, REASON), if is_split { "" } else { "refusable" });
    }
}

#[test]
fn a_batch_of_prompts_is_not_measured_as_one() {
    let mut t = with_length();
    let headers = Headers::from_pairs([(":method", "POST"), (":path", "/v1/completions")]);
    t.request.headers(&mut t.worker, headers, false, t.now);
    let prompt = "word ".repeat(400);
    let outcome = t.body(&format!(r#"{{"model":"m","prompt":["{prompt}","{prompt}"],"max_tokens":100}}"#));
    assert_eq!(state(&outcome, REASON), "several_sequences");
}
