//! Bodies in any chunks, with trailers, and up to the limit of a body.

use pd_host::{Pairs, Request, Stream, pairs, random_chunks, split_at_each_byte};

use crate::gateway::*;

/// Both legs as engines see them: headers and body of the call-out, headers and body of the forwarded request.
fn legs_of(gateway: &Gateway, request: &Request) -> (Pairs, Vec<u8>, Pairs, Vec<u8>) {
    let stream = request.send(gateway);
    let call = leg(gateway);
    answer_leg(gateway);
    let sent = forwarded(&stream);
    respond(&stream);
    (call.headers, call.body, sent.headers, sent.body)
}

/// One endpoint for each leg, and a prefill leg for every request.
fn always_split() -> Gateway {
    Gateway::new(&config(&[], &[(P1, "prefill"), (D1, "decode")], r#""split":{"mode":"always"}"#))
}

/// A body of 3 kB in which everything that an edit must find stands in the middle or at the end.
fn awkward_body() -> String {
    let text = r#"é\u00e9\"\\ 漢字 {[}] ,: "#.repeat(100);
    format!(
        r#"{{"x":{{"model":"no"}},"messages":[{{"role":"user","content":"{text}"}}],"kv_transfer_params":{{"a":[1]}}, "stream" :true ,"stop":["\"}}"],"model":"m","n":1, "kv_transfer_p\u0061rams":null}}"#
    )
}

#[test]
fn the_legs_are_the_same_wherever_the_body_is_split() {
    let gateway = always_split();
    let body = awkward_body();
    assert!((2_500..3_500).contains(&body.len()), "{}", body.len());
    let request = Request::post(CHAT, &body);
    let whole = legs_of(&gateway, &request);
    assert!(!String::from_utf8(whole.3.clone()).unwrap().contains(r#""a":[1]"#));
    for chunks in split_at_each_byte(body.as_bytes()) {
        let first_bytes = chunks[0].len();
        assert!(legs_of(&gateway, &request.clone().chunks(chunks)) == whole, "split at {first_bytes}");
    }
    gateway.assert_idle();
}

#[test]
fn the_legs_are_the_same_for_any_chunks_and_any_end() {
    let gateway = always_split();
    let body = awkward_body();
    let request = Request::post(CHAT, &body);
    let whole = legs_of(&gateway, &request);
    for seed in 0..150 {
        let chunked = request.clone().chunks(random_chunks(body.as_bytes(), 1 + seed as usize * 3, seed));
        let request = match seed % 3 {
            0 => chunked,
            1 => chunked.empty_final_chunk(),
            _ => chunked.empty_final_chunk().trailers(pairs([("x-trailer", "1")])),
        };
        assert!(legs_of(&gateway, &request) == whole, "seed {seed}");
    }
    gateway.assert_idle();
}

#[test]
fn trailers_end_a_request_as_well_as_its_last_chunk_does() {
    let gateway = Gateway::new(&two_and_two());
    let trailers = pairs([("x-checksum", "1")]);
    let spliced = chat(1, 3_000).replacen('{', &format!(r#"{{"kv_transfer_params":{PARAMS},"#), 1);
    for (request, body) in [
        (long_chat(1), spliced.as_str()),
        (short_chat(1), &chat(1, 100)),
        (Request::post("/v1/embeddings", r#"{"kv_transfer_params":1,"a":2}"#), r#"{"a":2}"#),
    ] {
        let stream = request.trailers(trailers.clone()).send(&gateway);
        for _ in legs(&gateway) {
            answer_leg(&gateway);
        }
        let sent = forwarded(&stream);
        assert_eq!(sent.trailers, Some(trailers.clone()));
        assert_eq!(String::from_utf8(sent.body).unwrap(), body);
        respond(&stream);
    }
    gateway.assert_idle();
}

#[test]
fn trailers_without_a_body_are_a_request_without_a_body() {
    let gateway = Gateway::new(&two_and_two());
    for (path, forwards) in [(CHAT, false), ("/v1/embeddings", true)] {
        let mut request = Request::post(path, "").chunks(Vec::new()).trailers(pairs([("x", "1")]));
        request.headers.retain(|(name, _)| name != b"content-length");
        let stream = request.send(&gateway);
        assert_eq!(stream.forwarded().is_some(), forwards, "{path}");
        if forwards {
            respond(&stream);
        } else {
            assert_eq!(stream.client().status(), Some(400));
        }
    }
    gateway.assert_idle();
}

/// A gateway whose two limits are the same, and a body that is that many bytes below them.
fn within_limit(slack_bytes: usize) -> (Gateway, String) {
    let body = chat(1, 3_000);
    let limit = body.len() + slack_bytes;
    let mut envoy = envoy(&config(&[&format!(r#""max_body_bytes":{limit}"#)], TWO_AND_TWO, ""));
    envoy.request_limit_bytes = Some(limit);
    (Gateway::within(envoy), body)
}

fn split_within(gateway: &Gateway, body: &str) -> Stream {
    let stream = Request::post(CHAT, body).send(gateway);
    answer_leg(gateway);
    stream
}

#[test]
fn parameters_that_would_take_the_body_over_the_limit_are_left_out() {
    let splice = r#""kv_transfer_params":,"#.len() + PARAMS.len();
    for slack_bytes in [0, 1, splice - 1] {
        let (gateway, body) = within_limit(slack_bytes);
        let stream = split_within(&gateway, &body);
        assert_eq!(forwarded(&stream).body, body.as_bytes());
        assert_eq!(decision(&stream), ("split".into(), "kv_missing".into()));
        assert_eq!(gateway.counter("pd_kv_missing_total"), 1);
        respond(&stream);
        gateway.assert_idle();
    }
    let (gateway, body) = within_limit(splice);
    let stream = split_within(&gateway, &body);
    assert_eq!(forwarded(&stream).body.len(), body.len() + splice);
    assert_eq!(decision(&stream), ("split".into(), "prefilled".into()));
    respond(&stream);
    gateway.assert_idle();
}
