//! Requests that the filter answers itself.

use pd_host::{Request, Stream};
use serde_json::Value;

use crate::events::Random;
use crate::gateway::*;

/// Checks an answer of the filter: status, reason header, OpenAI-style error, access log; and that no engine saw it.
#[track_caller]
fn assert_rejected(stream: &Stream, status: u32, reason: &str) {
    let client = stream.client();
    assert_eq!(client.status(), Some(status), "{client:?}");
    assert_eq!(client.header("x-pd-reason"), Some(reason.as_bytes()), "{client:?}");
    assert_eq!(client.header("content-type"), Some(&b"application/json"[..]));
    let body: Value = serde_json::from_slice(&client.body).unwrap();
    assert_eq!(body["error"]["code"], reason);
    assert!(!body["error"]["message"].as_str().unwrap().is_empty());
    assert_eq!(client.local_reply.unwrap().details, reason);
    assert!(client.complete && stream.is_ended());
    assert_eq!(decision(stream), ("rejected".into(), reason.into()));
    assert!(stream.forwarded().is_none());
}

#[test]
fn bad_requests_say_why() {
    let gateway = Gateway::new(
        &config(&[TRUSTS_PHASE], &[], "")
            .replace(r#""endpoints":[]"#, r#""endpoints":[{"address":"10.0.0.1:8000","role":"both","models":["m"]}]"#),
    );
    let requests = [
        (Request::post(CHAT, "{"), 400, "invalid_json"),
        (Request::post(CHAT, ""), 400, "invalid_json"),
        (Request::post(CHAT, "[]"), 400, "invalid_json"),
        (Request::post(CHAT, b"{\"model\":\"\xff\"}"), 400, "invalid_json"),
        (Request::post(CHAT, "{}{"), 400, "invalid_json"),
        (Request::post(CHAT, "[".repeat(100_000)), 400, "invalid_json"),
        (Request::post(CHAT, format!("{{\"a\":{}", "[".repeat(100_000))), 400, "invalid_json"),
        (Request::post(CHAT, "{}").chunks(Vec::new()), 400, "invalid_json"),
        (Request::post(CHAT, r#"{"messages":[]}"#), 400, "missing_model"),
        (Request::post(CHAT, r#"{"model":null,"messages":[]}"#), 400, "missing_model"),
        (Request::post(CHAT, r#"{"model":"other","messages":[]}"#), 404, "unknown_model"),
        (Request::post(CHAT, r#"{"model":"m"}"#).header("content-encoding", "gzip"), 415, "content_encoding"),
        (Request::post("/sleep", "{}"), 404, "unknown_path"),
        (Request::post("/v1/embeddings", "{"), 400, "invalid_json"),
        (Request::post(CHAT, r#"{"model":"m"}"#).header("x-pd-phase", "both"), 400, "invalid_phase"),
        (Request::post(CHAT, r#"{"model":"m"}"#).header("x-pd-phase", b"\xff"), 400, "invalid_phase"),
        (Request::post(CHAT, r#"{"model":"m"}"#).header("x-pd-phase", "prefill"), 503, "no_endpoint"),
    ];
    let count = requests.len() as u64;
    for (request, status, reason) in requests {
        assert_rejected(&request.send(&gateway), status, reason);
    }
    assert_eq!(gateway.counter("pd_requests_total;decision=rejected"), count);
    gateway.assert_idle();
}

/// The module scans with vectors that the tests of pd-core, which are native, do not reach.
#[test]
fn what_is_json_is_what_serde_json_takes_for_json() {
    let gateway = Gateway::new(&two_and_two());
    let pieces: [&[u8]; 16] = [
        b"\"",
        b"\\",
        b"\\\"",
        b"\\\\",
        b"\\n\\n\\/",
        b"\\x",
        b"\\u00e9",
        b"\\u00g9",
        b"\\ud83d\\ude00",
        b"\\ud83d",
        b"\\ude00\\n",
        b"\x1f",
        b"\x20\x7f",
        b"\xc3\xa9",
        b"\xc3",
        b"\x80",
    ];
    let (mut good, mut bad) = (0, 0);
    for piece in pieces {
        for before in 0..150 {
            for behind in [0, 1, 15, 63, 64, 130] {
                let (before, behind) = ("x".repeat(before), "y".repeat(behind));
                let body = [b"{\"a\":\"", before.as_bytes(), piece, behind.as_bytes(), b"\"}"].concat();
                let reason = if serde_json::from_slice::<Value>(&body).is_ok() {
                    good += 1;
                    "missing_model"
                } else {
                    bad += 1;
                    "invalid_json"
                };
                assert_rejected(&Request::post(CHAT, &body).send(&gateway), 400, reason);
            }
        }
    }
    let good_pieces: [&[u8]; 12] = [
        b"x",
        b"xxxxxxxxxxxxxxxxxxxxxxxxx",
        b"\\n",
        b"\\t\\t",
        b"\\\"",
        b"\\\\",
        b"\\\\n",
        b"\\r\\n",
        b"\\/",
        b"\\u00e9",
        b"\\ud83d\\ude00",
        b"\xc3\xa9",
    ];
    let bad_pieces: [&[u8]; 4] = [b"\"", b"\\", b"\\u00e", b"\x1f"];
    let mut random = Random::new(1);
    for i in 0..4_000 {
        let mut body = b"{\"a\":\"".to_vec();
        let wrong = if i % 2 == 0 { usize::MAX } else { random.below(50) };
        for j in 0..50 {
            let pieces: &[&[u8]] = if j == wrong { &bad_pieces } else { &good_pieces };
            let piece = *random.pick(pieces);
            body.extend_from_slice(piece);
        }
        body.extend_from_slice(b"\"}");
        let is_good = serde_json::from_slice::<Value>(&body).is_ok();
        *(if is_good { &mut good } else { &mut bad }) += 1;
        let reason = if is_good { "missing_model" } else { "invalid_json" };
        assert_rejected(&Request::post(CHAT, &body).send(&gateway), 400, reason);
    }
    assert!(good > 7_000 && bad > 7_000, "{good} {bad}");
    gateway.assert_idle();
}

#[test]
fn the_error_for_an_unknown_model_names_the_known_ones() {
    let gateway = Gateway::new(r#"{"endpoints":[{"address":"10.0.0.1:8000","role":"both","models":["b","a"]}]}"#);
    let stream = Request::post(CHAT, r#"{"model":"c\u0022"}"#).send(&gateway);
    assert_rejected(&stream, 404, "unknown_model");
    let text = String::from_utf8(stream.client().body).unwrap();
    assert!(text.contains(r#"the model `c\"` does not exist; known models: a, b"#), "{text}");
}

#[test]
fn without_endpoints_the_answer_says_when_to_come_back() {
    let gateway = Gateway::new("");
    for request in [short_chat(1), Request::get("/v1/models"), Request::post("/v1/embeddings", "{}")] {
        let stream = request.send(&gateway);
        assert_rejected(&stream, 503, "no_endpoint");
        assert_eq!(stream.client().header("retry-after"), Some(&b"1"[..]));
    }
    gateway.assert_idle();
}

#[test]
fn a_body_over_the_filters_limit_is_refused_by_its_length_or_at_the_first_byte_too_many() {
    let config = config(&[r#""max_body_bytes":2000"#], TWO_AND_TWO, "");
    let gateway = Gateway::new(&config);
    let body = vec![b' '; 2_001];
    let declared = gateway.stream();
    declared.request_headers([(":method", "POST"), (":path", CHAT), ("content-length", "2001")], false);
    assert_rejected(&declared, 413, "too_large");
    let mut undeclared = Request::post(CHAT, &body);
    undeclared.headers.retain(|(name, _)| name != b"content-length");
    assert_rejected(&undeclared.send(&gateway), 413, "too_large");
    let chunked = gateway.stream();
    chunked.request_headers(undeclared.headers.iter().map(|(name, value)| (name, value)), false);
    chunked.request_body(&body[..2_000], false);
    assert!(!chunked.is_ended());
    chunked.request_body(b" ", false);
    assert_rejected(&chunked, 413, "too_large");
    gateway.assert_idle();
}

#[test]
fn a_body_over_envoys_limit_is_refused_by_envoy() {
    let mut envoy = envoy(&two_and_two());
    envoy.request_limit_bytes = Some(10_000);
    let gateway = Gateway::within(envoy);
    let stream = Request::post(CHAT, chat(1, 20_000)).chunks(vec![vec![b' '; 6_000], vec![b' '; 6_000]]).send(&gateway);
    let client = stream.client();
    assert_eq!(client.status(), Some(413));
    assert_eq!(client.local_reply.unwrap().details, "request_payload_too_large");
    gateway.assert_idle();
}

#[test]
fn what_two_engines_refuse_is_passed_on() {
    let gateway = Gateway::new(&two_and_two());
    let refusal = br#"{"error":{"message":"This model's maximum context length is 4096 tokens."}}"#;
    for (status, content_type) in [("400", "application/json; charset=utf-8"), ("404", "text/plain"), ("422", "")] {
        let stream = long_chat(1).send(&gateway);
        for _ in 0..2 {
            let call = leg(&gateway);
            gateway.answer(call.token, [(":status", status), ("content-type", content_type)], refusal).unwrap();
        }
        let client = stream.client();
        assert_eq!(client.status().unwrap().to_string(), status);
        assert_eq!(client.body, refusal);
        assert_eq!(client.header("content-type"), Some(content_type.as_bytes()));
        assert!(stream.forwarded().is_none() && stream.is_ended());
    }
    gateway.assert_idle();
    assert_eq!(gateway.shared.counter("pd_prefill_legs_total;result=client_error"), 6);
}
