//! Answers are vLLM's.

use bytes::Bytes;
use http::{HeaderValue, Request};
use pd_sim::{Config, expected_text, expected_texts, start};
use pd_support::client::Http;
use serde_json::{Value, json};

use crate::client::{CHAT, COMPLETIONS, ask, chat, exchange, get, post, send};

#[tokio::test]
async fn an_api_key_is_asked_for_where_vllm_asks_for_it() {
    let sim = start(Config { api_key: Some("s3cret".into()), ..Config::default() }).await.unwrap();
    let body = chat("Tell me.", "");
    let status = async |mut request: Request<Bytes>, key: Option<&str>| {
        if let Some(key) = key {
            request.headers_mut().insert("authorization", HeaderValue::from_str(key).unwrap());
        }
        send(request).await.unwrap().status
    };
    for (key, expected) in
        [(None, 401), (Some("Bearer other"), 401), (Some("s3cret"), 401), (Some("bearer s3cret"), 200)]
    {
        assert_eq!(status(post(&sim, CHAT, &body), key).await, expected, "{key:?}");
        assert_eq!(status(get(&sim, "/v1/models"), key).await, expected, "{key:?}");
    }
    assert_eq!((status(get(&sim, "/metrics"), None).await, status(get(&sim, "/health"), None).await), (200, 200));
}

#[tokio::test]
async fn a_chat_answer_has_vllms_fields() {
    let sim = start(Config::default()).await.unwrap();
    let body = chat("Tell me.", r#","max_tokens":5"#);
    let mut request = post(&sim, CHAT, &body);
    request.headers_mut().insert("x-request-id", HeaderValue::from_static("abc"));
    let answer = send(request).await.unwrap();
    assert_eq!(answer.headers["content-type"], "application/json");
    assert_eq!(answer.headers["x-request-id"], "abc");
    let mut value = answer.json();
    value["created"] = 0.into();
    let text = expected_text("sim", &body);
    assert_eq!(text.len(), 20);
    let expected = json!({
        "id": "chatcmpl-abc", "object": "chat.completion", "created": 0, "model": "sim",
        "choices": [{
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": null, "annotations": null, "audio": null,
                "function_call": null, "tool_calls": [], "reasoning": null},
            "logprobs": null, "finish_reason": "length", "stop_reason": null, "token_ids": null,
        }],
        "service_tier": null, "system_fingerprint": null,
        "usage": {"prompt_tokens": 8, "total_tokens": 13, "completion_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 0, "created_cache_tokens": 0}},
        "prompt_logprobs": null, "prompt_token_ids": null, "kv_transfer_params": null,
    });
    assert_eq!(value, expected);
}

#[tokio::test]
async fn a_stream_is_one_token_per_event_and_the_same_text() {
    let sim = start(Config::default()).await.unwrap();
    let body = chat("Tell me.", r#","stream":true,"stream_options":{"include_usage":true}"#);
    let answer = ask(&sim, CHAT, &body).await;
    assert_eq!(answer.choice(0), expected_text("sim", &body));
    let events = answer.events();
    let chunks: Vec<Value> =
        events[..events.len() - 1].iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let tokens = expected_text("sim", &body).len() / 4;
    assert_eq!(chunks.len(), 1 + tokens + 1);
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let usage = chunks.last().unwrap();
    assert_eq!((&usage["choices"], &usage["usage"]["completion_tokens"]), (&json!([]), &json!(tokens)));
    let last = &chunks[chunks.len() - 2]["choices"][0];
    assert_eq!((&last["finish_reason"], &last["stop_reason"]), (&json!("stop"), &Value::Null));
    assert!(chunks[..chunks.len() - 2].iter().all(|chunk| chunk["choices"][0]["finish_reason"].is_null()));
    let stats = sim.wait_for(|stats| stats.in_flight == 0).await;
    assert_eq!((stats.streams, stats.client_disconnects, stats.generated_tokens), (1, 0, tokens as u64));
}

#[tokio::test]
async fn choices_batches_echo_and_stop_work_whole_and_streamed() {
    let sim = start(Config::default()).await.unwrap();
    let plain = expected_text("sim", r#"{"prompt":"abc"}"#);
    for fields in [
        r#""prompt":"abc""#.to_owned(),
        r#""prompt":["abc","defg"],"n":2,"max_tokens":30"#.to_owned(),
        r#""prompt":[[1,2,3],[4]]"#.to_owned(),
        r#""prompt":[1,2,3],"seed":9007199254740993"#.to_owned(),
        r#""prompt":"abc","echo":true,"n":2"#.to_owned(),
        format!(r#""prompt":"abc","stop":["{}"]"#, &plain[9..12]),
        r#""prompt":"abc","ignore_eos":true,"max_tokens":200,"min_tokens":3"#.to_owned(),
    ] {
        for stream in [false, true] {
            let body = format!(r#"{{"model":"sim","stream":{stream},{fields}}}"#);
            let answer = ask(&sim, COMPLETIONS, &body).await;
            let expected = expected_texts("sim", &body);
            let texts: Vec<_> = (0..expected.len()).map(|index| answer.choice(index as u64)).collect();
            assert_eq!(texts, expected, "{body}");
        }
    }
    let body = format!(r#"{{"model":"sim","prompt":"abc","stop":"{}"}}"#, &plain[9..12]);
    let choice = &ask(&sim, COMPLETIONS, &body).await.json()["choices"][0];
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!(plain[9..12])));
}

#[tokio::test]
async fn bad_requests_get_openai_errors() {
    let sim = start(Config { max_model_len: 100, max_body_bytes: 5_000, ..Config::default() }).await.unwrap();
    for (path, body, status, kind) in [
        (CHAT, "{", 400, "BadRequestError"),
        (CHAT, r#"{"messages":[{"role":"user","content":"x"}]}"#, 400, "BadRequestError"),
        (CHAT, r#"{"model":"other","messages":[{"role":"user","content":"x"}]}"#, 404, "NotFoundError"),
        (CHAT, &chat(&"long ".repeat(100), ""), 400, "BadRequestError"),
        (CHAT, &chat("x", r#","stream_options":{"include_usage":true}"#), 400, "BadRequestError"),
        (COMPLETIONS, r#"{"model":"sim"}"#, 400, "BadRequestError"),
        (CHAT, &"x".repeat(5_001), 413, "BadRequestError"),
    ] {
        let answer = ask(&sim, path, body).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status, &error["code"], &error["type"]), (status, &json!(status), &json!(kind)));
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{body}");
        assert!(error.get("param").is_some());
    }
    let mut request = post(&sim, CHAT, &chat("x", ""));
    request.headers_mut().remove("content-type");
    assert_eq!(send(request).await.unwrap().status, 400);
    assert_eq!(sim.wait_for(|stats| stats.in_flight == 0).await.client_disconnects, 0);
}

#[tokio::test]
async fn the_other_endpoints_answer() {
    let config = Config { models: vec!["a".into(), "b".into()], loras: vec!["l".into()], ..Config::default() };
    let sim = start(config).await.unwrap();
    let models = send(get(&sim, "/v1/models")).await.unwrap().json();
    let ids: Vec<_> = models["data"].as_array().unwrap().iter().map(|model| &model["id"]).collect();
    assert_eq!(ids, ["a", "b", "l"]);
    assert_eq!(models["data"][2]["parent"], "a");
    assert_eq!(send(get(&sim, "/health")).await.unwrap().text, "");
    assert!(send(get(&sim, "/version")).await.unwrap().json()["version"].is_string());
    let missing = send(get(&sim, "/nope")).await.unwrap();
    assert_eq!((missing.status, missing.text.as_str()), (404, r#"{"detail":"Not Found"}"#));
    assert_eq!(send(get(&sim, CHAT)).await.unwrap().status, 405);
    let body = r#"{"model":"l","prompt":"a prompt of at least sixteen tokens, which is 64 bytes of text here"}"#;
    assert_eq!(ask(&sim, COMPLETIONS, body).await.choice(0), expected_text("l", body));
    let metrics = send(get(&sim, "/metrics")).await.unwrap().text;
    for line in [
        "vllm:num_requests_running{engine=\"0\",model_name=\"a\"} 0.0",
        "vllm:num_requests_waiting{engine=\"0\",model_name=\"a\"} 0.0",
        "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"a\"} 0.0",
        "vllm:prefix_cache_queries_total{engine=\"0\",model_name=\"a\"} 17.0",
        "vllm:prefix_cache_hits_total{engine=\"0\",model_name=\"a\"} 0.0",
        "vllm:prompt_tokens_total{engine=\"0\",model_name=\"a\"} 17.0",
        "vllm:generation_tokens_total{engine=\"0\",model_name=\"a\"} 16.0",
        "vllm:prompt_tokens_by_source_total{engine=\"0\",model_name=\"a\",source=\"local_compute\"} 17.0",
        "vllm:time_to_first_token_seconds_count{engine=\"0\",model_name=\"a\"} 1.0",
        "num_gpu_blocks=\"125000\"} 1.0",
        "vllm:lora_requests_info{max_lora=\"1\",running_lora_adapters=\"\",waiting_lora_adapters=\"\"}",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    let stats = send(get(&sim, "/stats")).await.unwrap().json();
    assert_eq!(stats["by_path"]["/v1/completions"], 1);
    assert_eq!(stats["by_path"]["other"], 1);
}

#[tokio::test]
async fn a_load_report_comes_when_asked_for_and_not_on_streams() {
    let sim = start(Config::default()).await.unwrap();
    for (format, stream, report) in [
        ("TEXT", false, Some("TEXT named_metrics.kv_cache_usage_perc=0.0, named_metrics.num_requests_waiting=0.0")),
        ("json", false, Some(r#"JSON {"named_metrics": {"kv_cache_usage_perc": 0.0, "num_requests_waiting": 0.0}}"#)),
        ("BIN", false, None),
        ("TEXT", true, None),
    ] {
        let mut request = post(&sim, CHAT, &chat("x", &format!(r#","stream":{stream}"#)));
        request.headers_mut().insert("endpoint-load-metrics-format", HeaderValue::from_static(format));
        let answer = send(request).await.unwrap();
        assert_eq!(answer.headers.get("endpoint-load-metrics").map(|value| value.to_str().unwrap()), report);
    }
}

#[tokio::test]
async fn requests_are_recorded_byte_for_byte() {
    let sim = start(Config { record: 2, ..Config::default() }).await.unwrap();
    let odd = HeaderValue::from_bytes(b"caf\xe9").unwrap();
    for path in ["/health", "/first", "/odd?a=b%20c", CHAT] {
        let body = Bytes::from_static(b"\xff\x00 {\"a\" : 1}");
        let request = Request::post(format!("{}{path}", sim.url())).header("x-odd", &odd).body(body);
        send(request.unwrap()).await.unwrap();
    }
    let requests = sim.requests();
    assert_eq!(requests.iter().map(|request| request.path.as_str()).collect::<Vec<_>>(), ["/odd?a=b%20c", CHAT]);
    assert_eq!(&requests[0].body[..], b"\xff\x00 {\"a\" : 1}");
    assert_eq!(requests[0].headers["x-odd"], odd);
    let shown = send(get(&sim, "/requests")).await.unwrap().json();
    let header = shown[0]["headers"].as_array().unwrap().iter().find(|header| header["name"] == "x-odd").unwrap();
    assert_eq!((&header["value"], &header["value_base64"]), (&json!("caf\u{fffd}"), &json!("Y2Fm6Q==")));
    assert_eq!(shown[0]["body_base64"], "/wAgeyJhIiA6IDF9");
}

#[tokio::test]
async fn speaks_http2_with_prior_knowledge() {
    let sim = start(Config::default()).await.unwrap();
    for stream in [false, true] {
        let body = chat("x", &format!(r#","stream":{stream}"#));
        let answer = exchange(post(&sim, CHAT, &body), Http::Two).await.0.unwrap();
        assert_eq!(answer.choice(0), expected_text("sim", &body));
    }
    assert_eq!(sim.requests()[0].version, http::Version::HTTP_2);
}

#[tokio::test]
async fn time_passes_as_configured() {
    let config = Config { speed: 1.0, a_ms: 30.0, tpot_ms: 10.0, max_num_seqs: 1, ..Config::default() };
    let sim = start(config).await.unwrap();
    let since = std::time::Instant::now();
    let body = chat("x", r#","max_tokens":3"#);
    let (first, second) = tokio::join!(ask(&sim, CHAT, &body), ask(&sim, CHAT, &body));
    assert_eq!(first.choice(0), second.choice(0));
    // Two after each other, each 30 ms and two more tokens.
    assert!(since.elapsed().as_millis() >= 100, "{:?}", since.elapsed());
}

#[tokio::test]
async fn requests_that_queue_show_as_waiting() {
    let config = Config { speed: 1.0, a_ms: 3_000_000.0, loras: vec!["l".into()], ..Config::default() };
    let sim = start(config).await.unwrap();
    let leave = tokio::spawn({
        let requests = [post(&sim, CHAT, &chat("x", "")), post(&sim, CHAT, &chat("y", "").replace("sim", "l"))];
        async move { futures::future::join_all(requests.map(send)).await.len() }
    });
    loop {
        let metrics = send(get(&sim, "/metrics")).await.unwrap().text;
        let shows = |name: &str| metrics.contains(&format!("vllm:{name}{{engine=\"0\",model_name=\"sim\"}} 1.0"));
        let adapter = metrics.contains("_lora_adapters=\"l\"");
        if shows("num_requests_running") && shows("num_requests_waiting") && adapter {
            break;
        }
    }
    assert_eq!(sim.stats().in_flight, 2);
    leave.abort();
    let stats = sim.wait_for(|stats| stats.in_flight == 0).await;
    assert_eq!((stats.client_disconnects, stats.local_prefills), (2, 0));
}
