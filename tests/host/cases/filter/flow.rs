//! What becomes of a request when nothing goes wrong.

use pd_host::{Callout, Forwarded, Pairs, Request};
use pd_support::headers;
use serde_json::Value;

use crate::gateway::*;

/// Fields and body as text, long runs of one letter shortened.
fn render(fields: &Pairs, body: &[u8]) -> String {
    let mut text = String::new();
    for (name, value) in fields {
        text += &format!("{}: {}\n", name.escape_ascii(), value.escape_ascii());
    }
    text + &String::from_utf8_lossy(body).replace(&"a".repeat(1_100), "a*1100")
}

fn render_leg(call: &Callout) -> String {
    format!("{} {:?}\n{}", call.cluster, call.timeout, render(&call.headers, &call.body))
}

fn render_forwarded(forwarded: &Forwarded) -> String {
    let mut states = String::new();
    for (name, value) in &forwarded.filter_state {
        states += &format!("{name}={}\n", value.escape_ascii());
    }
    states + &render(&forwarded.headers, &forwarded.body)
}

#[test]
fn both_legs_of_a_split_request_are_exactly_these() {
    let gateway = Gateway::new(&two_and_two());
    let body = format!(
        r#"{{ "stream" : true,"model":"m", "messages":[{{"role":"user","content":"{}","x":1}}], "stream_options":{{"include_usage":true}},"max_tokens":50,"stop":["b"],"n":1,"min_tokens":3,"kv_transfer_params":{{"do_remote_prefill":true}},"seed":9007199254740993, "vendor":{{"y":[1.0e5]}} }}"#,
        "a".repeat(1_100)
    );
    let stream = Request::post(CHAT, &body)
        .header("authorization", "Bearer t")
        .header("x-request-id", "42")
        .header("x-vendor", "kept")
        .header("x-pd-destination", "203.0.113.1:1")
        .send(&gateway);
    assert!(stream.is_paused() && stream.forwarded().is_none());
    let call = leg(&gateway);
    let destination = String::from_utf8(call.header("x-pd-destination").unwrap().to_vec()).unwrap();
    assert_eq!(
        render_leg(&call),
        format!(
            r#"engines 60s
:method: POST
:path: /v1/chat/completions
:authority: gateway
:scheme: http
content-type: application/json
authorization: Bearer t
x-request-id: 42
x-vendor: kept
x-pd-destination: {destination}
content-length: 1400
{{"kv_transfer_params":{{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}},"max_tokens":1,"stream":false,"model":"m", "messages":[{{"role":"user","content":"a*1100","x":1}}],"seed":9007199254740993, "vendor":{{"y":[1.0e5]}} }}"#
        )
    );
    gateway.advance(std::time::Duration::from_millis(37));
    answer_leg(&gateway);
    let decode = forwarded(&stream);
    assert_eq!(
        render_forwarded(&decode),
        format!(
            r#"wasm.pd.decision=split
wasm.pd.decode={decode_first}
wasm.pd.destination={decode_all}
wasm.pd.matched_tokens=0
wasm.pd.prefill={prefill}
wasm.pd.prefill_ms=37
wasm.pd.reason=prefilled
:method: POST
:path: /v1/chat/completions
:authority: gateway
:scheme: http
content-type: application/json
authorization: Bearer t
x-request-id: 42
x-vendor: kept
content-length: {length}
x-pd-destination: {decode_all}
{{"kv_transfer_params":{PARAMS}, "stream" : true,"model":"m", "messages":[{{"role":"user","content":"a*1100","x":1}}], "stream_options":{{"include_usage":true}},"max_tokens":50,"stop":["b"],"n":1,"min_tokens":3,"seed":9007199254740993, "vendor":{{"y":[1.0e5]}} }}"#,
            decode_first = destinations(&decode)[0],
            // The first once more, for the third try of Envoy's.
            decode_all = [destinations(&decode), vec![destinations(&decode)[0].clone()]].concat().join(","),
            prefill = addresses(call.header("x-pd-destination"))[0],
            length = decode.body.len(),
        )
    );
    respond(&stream);
    assert_eq!(stream.client().body, b"data: {}\n\ndata: [DONE]\n\n");
    gateway.assert_idle();
}

#[test]
fn each_leg_names_its_own_pool_and_alternates_of_it() {
    let gateway = Gateway::new(&two_and_two());
    for id in 0..8 {
        let stream = long_chat(id).send(&gateway);
        let prefill = addresses(leg(&gateway).header("x-pd-destination"));
        answer_leg(&gateway);
        let decode = destinations(&forwarded(&stream));
        assert_eq!((prefill.len(), decode.len()), (2, 2));
        assert_eq!(prefill.into_iter().collect::<std::collections::BTreeSet<_>>(), set(&[P1, P2]));
        assert_eq!(decode.into_iter().collect::<std::collections::BTreeSet<_>>(), set(&[D1, D2]));
        respond(&stream);
    }
    gateway.assert_idle();
    assert_eq!(gateway.shared.counter("pd_requests_total;decision=split"), 8);
    assert_eq!(gateway.shared.counter("pd_prefill_legs_total;result=ok"), 8);
    assert_eq!(gateway.shared.histogram("pd_prefill_ms").len(), 8);
}

#[test]
fn every_api_is_split_and_limited_in_its_own_words() {
    let prompt = "a b c ".repeat(500);
    let ids = (1_000..1_600).map(|id| id.to_string()).collect::<Vec<_>>().join(",");
    for (path, body, limits) in [
        (CHAT, format!(r#"{{"model":"m","messages":[{{"content":"{prompt}"}}]}}"#), &["max_tokens"][..]),
        (
            CHAT,
            format!(r#"{{"model":"m","messages":[{{"content":"{prompt}"}}],"max_completion_tokens":9}}"#),
            &["max_tokens", "max_completion_tokens"],
        ),
        ("/v1/completions", format!(r#"{{"model":"m","prompt":"{prompt}"}}"#), &["max_tokens"]),
        ("/v1/responses", format!(r#"{{"model":"m","input":"{prompt}"}}"#), &["max_output_tokens"]),
        (
            "/v1/messages",
            format!(r#"{{"model":"m","max_tokens":9,"messages":[{{"content":"{prompt}"}}]}}"#),
            &["max_tokens"],
        ),
        (
            "/inference/v1/generate",
            format!(r#"{{"model":"m","token_ids":[{ids}],"sampling_params":{{}}}}"#),
            &["sampling_params/max_tokens"],
        ),
    ] {
        let gateway = Gateway::new(&two_and_two());
        let stream = Request::post(path, &body).send(&gateway);
        let call = leg(&gateway);
        assert_eq!(call.header(":path"), Some(path.as_bytes()));
        let sent: Value = serde_json::from_slice(&call.body).unwrap();
        for limit in limits {
            assert_eq!(sent.pointer(&format!("/{limit}")), Some(&Value::from(1)), "{path}");
        }
        assert_eq!(sent["stream"], false, "{path}");
        assert_eq!(sent["kv_transfer_params"]["do_remote_decode"], true, "{path}");
        answer_leg(&gateway);
        let spliced = body.replacen('{', &format!(r#"{{"kv_transfer_params":{PARAMS},"#), 1);
        assert_eq!(String::from_utf8(forwarded(&stream).body).unwrap(), spliced);
        respond(&stream);
        gateway.assert_idle();
    }
}

#[test]
fn a_short_prompt_goes_to_decode_byte_for_byte() {
    let gateway = Gateway::new(&two_and_two());
    let body = " {\"messages\" :[ ],\"model\":\"m\", \"x\":1e300}\n";
    let stream = Request::post(CHAT, body).send(&gateway);
    assert_eq!(gateway.callouts(), []);
    let decode = forwarded(&stream);
    assert_eq!(String::from_utf8(decode.body.clone()).unwrap(), body);
    assert_eq!(decode.header("content-length"), Some(body.len().to_string().as_bytes()));
    assert!(set(&[D1, D2]).contains(&destinations(&decode)[0]));
    assert_eq!(decision(&stream), ("decode_only".into(), "short".into()));
    assert_eq!(state(&stream, "prefill"), "");
    respond(&stream);
    gateway.assert_idle();
}

#[test]
fn a_prompt_that_decode_holds_already_skips_prefill() {
    let gateway = Gateway::new(&two_and_two());
    let first = run_split(&gateway, &long_chat(1));
    let again = long_chat(1).send(&gateway);
    assert_eq!(decision(&again), ("decode_only".into(), "cached".into()));
    assert_eq!(destinations(&forwarded(&again))[0], state(&first, "decode"));
    assert!(state(&again, "matched_tokens").parse::<u64>().unwrap() > 600);
    respond(&again);
    gateway.assert_idle();
}

#[test]
fn without_a_prompt_any_endpoint_serves() {
    let gateway = Gateway::new(&two_and_two());
    for request in [
        Request::get("/v1/models"),
        Request::post("/v1/embeddings", r#"{"input":"a"}"#),
        Request::post("/v1/rerank", r#"["a"]"#),
        Request::post("/tokenize", ""),
        Request::get(CHAT),
    ] {
        let stream = request.clone().header("x-pd-destination", "203.0.113.1:1").send(&gateway);
        let passed = forwarded(&stream);
        assert_eq!(passed.body, request_body(&request));
        assert!(set(&[P1, P2, D1, D2]).contains(&destinations(&passed)[0]));
        assert_eq!(state(&stream, "decision"), "passed");
        respond(&stream);
    }
    assert_eq!(gateway.counter("pd_requests_total;decision=passed"), 5);
    gateway.assert_idle();
}

fn request_body(request: &Request) -> Vec<u8> {
    request.chunks.concat()
}

#[test]
fn a_clients_parameters_are_removed_on_paths_the_filter_does_not_know_too() {
    let gateway = Gateway::new(&two_and_two());
    let body = r#"{"kv_transfer_params":{"do_remote_prefill":true},"input":"a","kv_transfer_p\u0061rams":1}"#;
    let stream = Request::post("/v1/rerank", body).send(&gateway);
    assert_eq!(forwarded(&stream).body, br#"{"input":"a"}"#);
    respond(&stream);
    gateway.assert_idle();
}

#[test]
fn a_multipart_body_passes_without_what_no_client_may_send() {
    let gateway = Gateway::new(&two_and_two());
    let part = "--b\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n1\r\n";
    let forbidden = part.replace("\"a\"", "kv_transfer_params");
    for body in [format!("{part}--b--"), format!("{forbidden}{part}--b--")] {
        let mut request = Request::post("/v1/audio/transcriptions", &body);
        request.headers.retain(|(name, _)| name != b"content-type");
        let request = request.header("content-type", "multipart/form-data; boundary=b");
        let stream = request.send(&gateway);
        assert_eq!(forwarded(&stream).body, format!("{part}--b--").as_bytes());
        respond(&stream);
    }
    gateway.assert_idle();
}

#[test]
fn a_phase_header_sends_one_leg_to_that_pool() {
    for (phase, pool, name) in [("prefill", [P1, P2], "prefill_only"), ("decode", [D1, D2], "decode_only")] {
        let gateway = Gateway::new(&config(&[TRUSTS_PHASE], TWO_AND_TWO, ""));
        let body = chat(1, 3_000);
        let stream = Request::post(CHAT, &body).header("x-pd-phase", phase).send(&gateway);
        assert_eq!(gateway.callouts(), []);
        let sent = forwarded(&stream);
        assert_eq!(sent.body, body.as_bytes());
        assert_eq!(sent.header("x-pd-phase"), None);
        assert!(pool.contains(&destinations(&sent)[0].as_str()));
        assert_eq!(decision(&stream), (name.into(), "phase_header".into()));
        respond(&stream);
        gateway.assert_idle();
    }
}

#[test]
fn an_untrusted_phase_header_means_nothing() {
    let gateway = Gateway::new(&config(&[r#""trusted_headers":[]"#], TWO_AND_TWO, ""));
    for (id, phase) in (1..).zip(["prefill", "decode", "nonsense"]) {
        let stream = long_chat(id).header("x-pd-phase", phase).send(&gateway);
        assert_eq!(leg(&gateway).header("x-pd-phase"), None);
        answer_leg(&gateway);
        assert_eq!(forwarded(&stream).header("x-pd-phase"), None);
        stream.reset();
        gateway.add_root(config(&[r#""trusted_headers":[]"#], TWO_AND_TWO, "").as_bytes());
    }
    gateway.assert_idle();
}

#[test]
fn a_named_prefill_endpoint_counts_if_it_is_trusted_and_listed() {
    let trusted = config(&[r#""trusted_headers":["x-prefiller-host-port"]"#], TWO_AND_TWO, "");
    for endpoint in [P1, P2] {
        let gateway = Gateway::new(&trusted);
        let stream = long_chat(1).header("x-prefiller-host-port", endpoint).send(&gateway);
        let call = leg(&gateway);
        assert_eq!(addresses(call.header("x-pd-destination"))[0], endpoint);
        assert_eq!(call.header("x-prefiller-host-port"), None);
        stream.reset();
    }
    for named in [D1, "203.0.113.1:1", "", "\u{7f}", "10.0.0.1"] {
        let gateway = Gateway::new(&trusted);
        let stream = long_chat(1).header("x-prefiller-host-port", named).send(&gateway);
        assert!([P1, P2].contains(&addresses(leg(&gateway).header("x-pd-destination"))[0].as_str()));
        assert_eq!(gateway.counter("pd_hints_ignored_total"), 1);
        stream.reset();
    }
    // From an untrusted client the header changes nothing: the same prompt goes where it goes without it.
    let chosen = |request: Request| {
        let gateway = Gateway::new(&two_and_two());
        let stream = request.send(&gateway);
        let call = leg(&gateway);
        assert_eq!(call.header("x-prefiller-host-port"), None);
        stream.reset();
        addresses(call.header("x-pd-destination"))
    };
    for endpoint in [P1, P2] {
        assert_eq!(chosen(long_chat(1).header("x-prefiller-host-port", endpoint)), chosen(long_chat(1)));
    }
}

#[test]
fn no_header_of_ours_reaches_an_engine() {
    let hostile = |request: Request| {
        headers::all()
            .fold(request, |request, name| request.header(name, "203.0.113.1:1").header(name, "203.0.113.2:2"))
    };
    let gateway = Gateway::new(&two_and_two());
    for request in [long_chat(1), short_chat(1), Request::get("/v1/models"), Request::post("/v1/embeddings", "{}")] {
        let stream = hostile(request).send(&gateway);
        for call in legs(&gateway) {
            assert!(!format!("{call:?}").contains("203.0.113"), "{call:?}");
            answer_leg(&gateway);
        }
        let sent = forwarded(&stream);
        assert!(!format!("{sent:?}").contains("203.0.113"), "{sent:?}");
        respond(&stream);
    }
    gateway.assert_idle();
}

#[test]
fn an_engine_that_needs_no_parameters_gets_the_body_as_it_came() {
    let gateway = Gateway::new(&config(&[], TWO_AND_TWO, r#""engine":"vllm-shared""#));
    let body = chat(1, 3_000);
    let stream = Request::post(CHAT, &body).send(&gateway);
    assert!(!leg(&gateway).body.windows(2).any(|pair| pair == b"kv"));
    let token = leg(&gateway).token;
    gateway.answer(token, [(":status", "200")], r#"{"kv_transfer_params":null}"#).unwrap();
    assert_eq!(forwarded(&stream).body, body.as_bytes());
    assert_eq!(decision(&stream), ("split".into(), "prefilled".into()));
    respond(&stream);
    gateway.assert_idle();
}

#[test]
fn envoys_move_to_an_alternate_is_counted() {
    let gateway = Gateway::new(&two_and_two());
    let stream = short_chat(1).send(&gateway);
    let alternate = destinations(&forwarded(&stream)).remove(1);
    stream.set_property("upstream.address", alternate.as_str());
    stream.response_headers([(":status", "200")], false);
    stream.response_body("{}", true);
    assert_eq!(gateway.counter("pd_decode_moved_total"), 1);
    gateway.assert_idle();
    // The first choice could not be reached: others go first for a while.
    let next = short_chat(1).send(&gateway);
    assert_eq!(destinations(&forwarded(&next))[0], alternate);
    respond(&next);
}

#[test]
fn a_request_that_no_endpoint_answers_is_counted() {
    let gateway = Gateway::new(&two_and_two());
    for (details, unanswered, by_envoy) in
        [("upstream_reset_before_response_started{connection_failure}", 1, 0), ("request_rate_limited", 1, 1)]
    {
        let stream = short_chat(1).send(&gateway);
        stream.set_property("response.code_details", details);
        stream.response_headers([(":status", "503")], false);
        stream.response_body("an error", true);
        let counts = ["pd_decode_unanswered_total", "pd_answered_by_envoy_total"].map(|name| gateway.counter(name));
        assert_eq!(counts, [unanswered, by_envoy], "{details}");
        gateway.assert_idle();
    }
}

#[test]
fn the_running_version_is_a_log_line_and_a_metric() {
    let gateway = Gateway::new(&two_and_two());
    gateway.tick();
    let (_, first) = gateway.logs().remove(0);
    assert!(first.starts_with("pd-filter 0.1.0 build "), "{first}");
    let seen = gateway.shared.metrics().into_iter().find(|(_, name, _)| name.starts_with("pd_build_seen_seconds;"));
    let (_, name, value) = seen.unwrap();
    assert!(name.contains(";version=0.1.0;build=") && name.ends_with(";wire=1"), "{name}");
    assert_eq!(value, gateway.clock().now_ns() / 1_000_000_000);
}
