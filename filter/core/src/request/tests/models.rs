//! Lists of models, aliases and their weights.

use super::*;

#[test]
fn the_models_of_all_endpoints_are_listed_and_a_header_may_name_one() {
    let mut t = configured(&CONFIG.replacen(r#"["m"]"#, r#"["m", "m-lora"]"#, 1));
    let headers = Headers::from_pairs([(":method", "GET"), (":path", "/v1/models?x")]);
    let outcome = t.request.headers(&mut t.worker, headers, true, t.now);
    assert_eq!(reply(&outcome), (200, "models"));
    let Some(Effect::Reply(answer)) = outcome.effects.last() else { panic!() };
    let list: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    let names: Vec<_> = list["data"].as_array().unwrap().iter().map(|card| card["id"].clone()).collect();
    assert_eq!(names, ["m", "m-lora"]);
    t.request = Request::default();
    let headers = Headers::from_pairs([(":method", "HEAD"), (":path", "/v1/models")]);
    assert_eq!(reply(&t.request.headers(&mut t.worker, headers, true, t.now)), (200, "models"));
    for (name, body, expected) in [
        ("m", r#"{"messages":[]}"#, None),
        ("x", r#"{"messages":[]}"#, Some((404, "unknown_model"))),
        ("x", r#"{"model":"m","messages":[]}"#, None),
        ("m", r#"{"model":7,"messages":[]}"#, Some((400, "missing_model"))),
    ] {
        for header in ["x-ai-eg-model", "x-gateway-model-name"] {
            t.request = Request::default();
            t.headers(&[(header, name)]);
            let outcome = t.body(body);
            match expected {
                Some(expected) => assert_eq!(reply(&outcome), expected),
                None => assert_eq!(outcome.flow, Flow::Continue),
            }
            t.done();
        }
    }
}

const ALIASES: &str = r#"{"models":{
    "gpt":{"targets":[{"model":"m"}],"answer":"asked"},
    "canary":{"targets":[{"model":"m","weight":3},{"model":"m-lora","weight":1}]},
    "nobody":{"targets":[{"model":"x"}]}
},"#;

fn aliased() -> Fixture {
    configured(&CONFIG.replacen('{', ALIASES, 1).replace(r#"["m"]"#, r#"["m", "m-lora"]"#))
}

#[test]
fn an_alias_is_rewritten_in_both_legs_and_put_back_in_the_answer() {
    let mut t = aliased();
    t.headers(&[]);
    let body = long_body().replace(r#""model":"m""#, r#""model" : "gp\u0074""#);
    let outcome = t.body(&body);
    assert!(text(&call(&outcome).body).contains(r#""model" : "m","messages""#));
    let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
    let served = long_body().replace(r#""model":"m""#, r#""model" : "m""#);
    assert_eq!(edited(&outcome, &body), served.replacen('{', &format!(r#"{{"kv_transfer_params":{PARAMS},"#), 1));
    let upstream = state(&outcome, DECODE).to_owned();
    let outcome = t.request.response_headers(&mut t.worker, Answerer::Host(upstream.as_bytes()), None, t.now);
    assert_eq!(outcome.effects, [Effect::RemoveResponseHeader("content-length")]);
    assert!(t.request.wants_response_body());
    let outcome = t.request.response_part(&mut t.worker, br#"data: {"model":"m"}"#, false, t.now);
    assert_eq!(
        outcome.effects,
        [Effect::EditResponse(HeadEdit { drain: 19, head: br#"data: {"model":"gpt"}"#.to_vec() })]
    );
    assert_eq!(t.request.response_part(&mut t.worker, b"", true, t.now).effects, []);
    assert!(!t.request.wants_response_body());
    t.done();
    assert!(t.is_idle());
}

#[test]
fn an_alias_named_by_a_header_is_put_into_a_body_without_a_model() {
    let mut t = aliased();
    t.headers(&[("x-gateway-model-name", "gpt")]);
    let body = long_body().replace(r#""model":"m","#, "");
    let prefill = t.body(&body);
    assert!(text(&call(&prefill).body).contains(r#""model":"m","#));
    let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
    assert_eq!(edited(&outcome, &body), format!(r#"{{"kv_transfer_params":{PARAMS},{}"#, &long_body()[1..]));
    t.request = Request::default();
    t.headers(&[("x-gateway-model-name", "gpt")]);
    assert_eq!(edited(&t.body(r#"{"messages":[]}"#), r#"{"messages":[]}"#), r#"{"model":"m","messages":[]}"#);
}

#[test]
fn weights_spread_requests_and_keep_a_session_together() {
    let mut t = aliased();
    let mut served = |session: &str, id: u32| {
        t.request = Request::default();
        let id = id.to_string();
        let named = [("x-request-id", id.as_str()), ("x-session-id", session)];
        t.headers(if session.is_empty() { &named[..1] } else { &named });
        let body = r#"{"model":"canary","messages":[]}"#;
        let outcome = t.body(body);
        assert!(!t.request.wants_response_body(), "the answer stays as it is");
        t.done();
        edited(&outcome, body)
    };
    let adapters = (0..400).filter(|id| served("", *id).contains("m-lora")).count();
    assert!((60..140).contains(&adapters), "{adapters} of 400, 100 expected");
    for session in ["a", "b", "c"] {
        let first = served(session, 0);
        assert!((1..20).all(|id| served(session, id) == first));
    }
}

/// The answer to a GET: status and JSON.
fn get(t: &mut Fixture, path: &str) -> (u16, serde_json::Value) {
    t.request = Request::default();
    let headers = Headers::from_pairs([(":method", "GET"), (":path", path)]);
    let outcome = t.request.headers(&mut t.worker, headers, true, t.now);
    t.done();
    let Some(Effect::Reply(answer)) = outcome.effects.last() else { panic!("{outcome:?}") };
    (answer.status, serde_json::from_slice(&answer.body).unwrap())
}

#[test]
fn a_model_whose_endpoints_are_gone_or_that_the_configuration_names_may_come_back() {
    let mut t = aliased();
    let list = |version: u32, models: &str| {
        let endpoint = format!(r#"{{"address":"10.0.0.1:1","role":"both","models":{models}}}"#);
        format!(r#"{{"wire":1,"epoch":"e","version":{version},"endpoints":[{endpoint}]}}"#)
    };
    t.worker.apply(list(1, r#"["later","kept"]"#).as_bytes()).unwrap();
    t.worker.apply(list(2, r#"["kept"]"#).as_bytes()).unwrap();
    for (model, expected) in [
        ("later", (503, "no_endpoint")),
        ("nobody", (503, "no_endpoint")),
        ("x", (503, "no_endpoint")),
        ("m-lora", (503, "no_endpoint")),
        ("gpt", (503, "no_endpoint")),
        ("never", (404, "unknown_model")),
    ] {
        t.request = Request::default();
        t.headers(&[]);
        let outcome = t.body(&format!(r#"{{"model":"{model}","messages":[]}}"#));
        assert_eq!(reply(&outcome), expected, "{model}");
        let Some(Effect::Reply(answer)) = outcome.effects.last() else { panic!() };
        assert_eq!(answer.headers.iter().any(|(name, _)| *name == "retry-after"), expected.0 == 503, "{model}");
        assert_eq!(get(&mut t, &format!("/v1/models/{model}")).0, expected.0, "{model}");
    }
    assert_eq!(get(&mut t, "/v1/models/kept").0, 200);
}

#[test]
fn lists_carry_the_engines_cards_and_those_of_aliases() {
    let mut t = aliased();
    let list = r#"{"wire":1,"epoch":"e","version":1,
        "endpoints":[{"address":"10.0.0.1:1","role":"both","models":["m","m-lora","org/plain"]}],
        "models":[{"id":"m","max_model_len":4096,"root":"/w/m","owned_by":"vllm"},
                  {"id":"m-lora","max_model_len":2048,"root":"/w/lora","parent":"m","owned_by":"vllm"}]}"#;
    t.worker.apply(list.as_bytes()).unwrap();
    let (status, all) = get(&mut t, "/v1/models");
    let cards = all["data"].as_array().unwrap();
    let names: Vec<_> = cards.iter().map(|card| card["id"].as_str().unwrap()).collect();
    assert_eq!((status, names), (200, vec!["canary", "gpt", "m", "m-lora", "org/plain"]));
    let card = |id: &str, root: &str, parent: Option<&str>, owner: &str, len: Option<u64>| {
        let mut card = serde_json::json!({"id": id, "object": "model", "created": 0, "owned_by": owner, "root": root, "parent": parent});
        if let Some(len) = len {
            card["max_model_len"] = len.into();
        }
        card
    };
    let expected = [
        card("canary", "canary", None, "vllm", Some(2_048)),
        card("gpt", "/w/m", None, "vllm", Some(4_096)),
        card("m", "/w/m", None, "vllm", Some(4_096)),
        card("m-lora", "/w/lora", Some("m"), "vllm", Some(2_048)),
        card("org/plain", "org/plain", None, "envoy-pd", None),
    ];
    assert_eq!(cards.as_slice(), expected);
    for (card, path) in expected.iter().zip(["canary", "gpt", "m/", "m-l%6fra?x=1", "org%2Fplain"]) {
        assert_eq!(get(&mut t, &format!("/v1/models/{path}")), (200, card.clone()), "{path}");
    }
    assert_eq!(get(&mut t, "/v1/models/org/plain").0, 200);
}

#[test]
fn aliases_are_listed_where_somebody_serves_them() {
    let mut t = aliased();
    t.headers(&[]);
    let outcome = t.body(r#"{"model":"never","messages":[]}"#);
    assert_eq!(reply(&outcome), (404, "unknown_model"));
    let Some(Effect::Reply(answer)) = outcome.effects.last() else { panic!() };
    let message = text(&answer.body);
    assert!(message.contains("`never`") && message.contains("canary, gpt, m, m-lora"), "{message}");
}

#[test]
fn a_rewrite_never_makes_a_body_larger_than_the_limit() {
    let long = "x".repeat(200);
    let top = format!(r#"{{"max_body_bytes":1024,"models":{{"a":{{"targets":[{{"model":"{long}"}}]}}}},"#);
    let mut t = configured(&CONFIG.replacen('{', &top, 1).replace(r#"["m"]"#, &format!(r#"["{long}"]"#)));
    for (bytes, is_refused) in [(600, false), (900, true)] {
        t.request = Request::default();
        t.headers(&[]);
        let outcome = t.body(&format!(r#"{{"model":"a","messages":[],"user":"{}"}}"#, "u".repeat(bytes)));
        assert_eq!(outcome.flow == Flow::Pause, is_refused);
        t.done();
    }
}

/// A request without a prompt, up to its end.
fn without_prompt(t: &mut Fixture, path: &str, content_type: &str, body: &str) -> Outcome {
    t.request = Request::default();
    let pairs = [(":method", "POST"), (":path", path), ("content-type", content_type)];
    let outcome = t.request.headers(&mut t.worker, Headers::from_pairs(pairs), false, t.now);
    let outcome = if t.request.wants_body() { t.body(body) } else { outcome };
    t.done();
    outcome
}

const OTHER_PATHS: [&str; 12] = [
    "/v1/embeddings",
    "/pooling",
    "/score",
    "/rerank",
    "/classify",
    "/tokenize",
    "/detokenize",
    "/v1/messages/count_tokens",
    "/v1/chat/completions/batch",
    "/v1/images/generations",
    "/generate",
    "/invocations",
];

#[test]
fn the_model_decides_on_every_path() {
    let of = |model: &str| format!(r#""10.0.0.2:1", "role": "decode", "models": ["{model}"]"#);
    let config = CONFIG.replace(&of("m"), &of("other"));
    let mut t = configured(&config);
    let form =
        |model: &str| format!("--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n{model}\r\n--b--\r\n");
    for path in OTHER_PATHS {
        let outcome = without_prompt(&mut t, path, "application/json", r#"{"model":"nobodys"}"#);
        assert_eq!(reply(&outcome), (404, "unknown_model"), "{path}");
        for i in 0..8 {
            let outcome = without_prompt(&mut t, path, "application/json", &format!(r#"{{"model":"m","i":{i}}}"#));
            assert_eq!(only_destination(&outcome), "10.0.0.2:2", "{path}: it serves the model and generates");
            let outcome = without_prompt(&mut t, path, "application/json", &format!(r#"{{"i":{i}}}"#));
            assert!(state(&outcome, DESTINATION).starts_with("10.0.0.2:"), "{path}: without a model neither");
        }
    }
    for path in ["/v1/audio/transcriptions", "/v1/images/edits"] {
        let outcome = without_prompt(&mut t, path, "multipart/form-data; boundary=b", &form("nobodys"));
        assert_eq!(reply(&outcome), (404, "unknown_model"), "{path}");
        let outcome = without_prompt(&mut t, path, "multipart/form-data; boundary=b", &form("m"));
        assert_eq!(only_destination(&outcome), "10.0.0.2:2", "{path}");
    }
    assert!(t.is_idle());
}

#[test]
fn an_alias_is_rewritten_on_every_path() {
    let mut t = aliased();
    for path in OTHER_PATHS {
        let body = r#"{"input":"a", "model" : "gpt"}"#;
        let outcome = without_prompt(&mut t, path, "application/json", body);
        assert_eq!(edited(&outcome, body), r#"{"input":"a", "model" : "m"}"#, "{path}");
    }
    let body = "--b\r\ncontent-disposition: form-data; name=model\r\n\r\ngpt\r\n--b--\r\n";
    let outcome = without_prompt(&mut t, "/v1/audio/translations", "multipart/form-data; boundary=b", body);
    assert_eq!(edited(&outcome, body), body.replace("gpt", "m"));
}

#[test]
fn requests_without_a_prompt_count_in_a_pools_limits() {
    let mut t = configured(&CONFIG.replacen('{', r#"{"pools":{"default":{"max_requests":1}},"#, 1));
    let headers = [(":method", "POST"), (":path", "/v1/embeddings")];
    t.request.headers(&mut t.worker, Headers::from_pairs(headers), false, t.now);
    assert_eq!(t.body(r#"{"model":"m","input":"a"}"#).flow, Flow::Continue);
    let mut second = Request::default();
    second.headers(&mut t.worker, Headers::from_pairs(headers), false, t.now);
    let outcome = second.body(&mut t.worker, br#"{"model":"m","input":"b"}"#, t.now);
    assert_eq!(reply(&outcome).0, 429);
    t.done();
    let mut third = Request::default();
    third.headers(&mut t.worker, Headers::from_pairs(headers), false, t.now);
    assert_eq!(third.body(&mut t.worker, br#"{"model":"m","input":"b"}"#, t.now).flow, Flow::Continue);
}
