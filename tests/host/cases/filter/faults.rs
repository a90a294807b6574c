//! Requests in pieces, answers that fail, clients that leave, headers that are not text.

use pd_host::{ClientGone, ClusterState, Pairs, Request, Stream, Worker, pairs, random_chunks, split_at_each_byte};

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

#[test]
fn a_leg_that_is_never_answered_ends_by_its_time_limit() {
    let gateway = Gateway::new(&two_and_two());
    let stream = long_chat(1).send(&gateway);
    let first = leg(&gateway);
    assert_eq!(first.timeout, LONGEST_LEG);
    gateway.advance(LONGEST_LEG);
    let second = leg(&gateway);
    assert_ne!(
        addresses(first.header("x-pd-destination"))[0],
        addresses(second.header("x-pd-destination"))[0],
        "another endpoint"
    );
    assert_eq!(second.body, first.body);
    gateway.advance(LONGEST_LEG);
    assert_eq!(legs(&gateway), []);
    assert_eq!(forwarded(&stream).body, chat(1, 3_000).as_bytes());
    assert_eq!(decision(&stream), ("decode_only".into(), "prefill_failed".into()));
    respond(&stream);
    gateway.assert_idle();
}

/// Ends the call-out of that token.
type Fail = fn(&Worker, u32);

/// Ways in which a prefill leg fails so that another endpoint is worth a try.
const FAILURES: &[(&str, Fail)] = &[
    ("no answer", |worker, token| worker.fail(token).unwrap()),
    ("refused", |worker, token| worker.refuse(token).unwrap()),
    ("time limit", |worker, token| worker.time_out(token).unwrap()),
    ("500", |worker, token| worker.answer(token, [(":status", "500")], r#"{"error":1}"#).unwrap()),
    ("503 of the engine", |worker, token| worker.answer(token, [(":status", "503")], r#"{"error":1}"#).unwrap()),
    ("429", |worker, token| worker.answer(token, [(":status", "429")], "busy").unwrap()),
    ("no status", |worker, token| worker.answer(token, [("x", "1")], "").unwrap()),
    ("a status that is no number", |worker, token| worker.answer(token, [(":status", "2\u{e9}")], "").unwrap()),
    ("a status beyond all numbers", |worker, token| worker.answer(token, [(":status", "99999999")], "").unwrap()),
];

#[test]
fn a_failed_leg_is_run_again_on_another_endpoint() {
    for (name, fail) in FAILURES {
        let gateway = Gateway::new(&two_and_two());
        let stream = long_chat(1).send(&gateway);
        let first = leg(&gateway);
        fail(&gateway, first.token);
        let second = leg(&gateway);
        assert_ne!(addresses(second.header("x-pd-destination")), addresses(first.header("x-pd-destination")), "{name}");
        assert_eq!(second.body, first.body, "{name}");
        answer_leg(&gateway);
        assert_eq!(decision(&stream), ("split".into(), "prefilled".into()), "{name}");
        respond(&stream);
        gateway.assert_idle();
        assert_eq!(gateway.shared.counter("pd_prefill_retries_total"), 1, "{name}");
    }
}

#[test]
fn when_every_leg_fails_the_policy_decides() {
    for (name, fail) in FAILURES {
        for (policy, status) in [("decode_only", None), ("fail", Some(503))] {
            let gateway = Gateway::new(&config(&[], TWO_AND_TWO, &format!(r#""on_prefill_failure":"{policy}""#)));
            let stream = long_chat(1).send(&gateway);
            fail(&gateway, leg(&gateway).token);
            fail(&gateway, leg(&gateway).token);
            assert_eq!(legs(&gateway), [], "{name}");
            assert_eq!(stream.client().status(), status, "{name}");
            if status.is_none() {
                assert_eq!(forwarded(&stream).body, chat(1, 3_000).as_bytes());
                respond(&stream);
            }
            assert_eq!(state(&stream, "reason"), "prefill_failed");
            gateway.assert_idle();
            assert_eq!(gateway.shared.counter("pd_prefill_given_up_total"), 1);
        }
    }
}

#[test]
fn answers_without_usable_parameters_are_served_without_them() {
    for answer in [
        "",
        "{}",
        "null",
        "\u{0}",
        r#"{"kv_transfer_params":null}"#,
        r#"{"kv_transfer_params":{"do_remote_prefill":true,"remote_block_ids":null,"remote_request_id":"r"}}"#,
        r#"{"kv_transfer_params":{"do_remote_prefill":true,"remote_block_ids":[1],"remote_request_id":"r""#,
    ] {
        let gateway = Gateway::new(&two_and_two());
        let stream = long_chat(1).send(&gateway);
        let token = leg(&gateway).token;
        gateway.answer(token, [(":status", "200")], answer).unwrap();
        assert_eq!(forwarded(&stream).body, chat(1, 3_000).as_bytes(), "{answer}");
        assert_eq!(decision(&stream), ("split".into(), "kv_missing".into()));
        respond(&stream);
        assert_eq!(gateway.counter("pd_kv_missing_total"), 1);
        gateway.assert_idle();
    }
}

#[test]
fn a_leg_that_the_host_refuses_counts_as_failed() {
    for cluster in [None, Some(ClusterState::FailsAtOnce)] {
        for (policy, status) in [("decode_only", None), ("fail", Some(503))] {
            let gateway = Gateway::new(&config(&[], TWO_AND_TWO, &format!(r#""on_prefill_failure":"{policy}""#)));
            gateway.set_cluster(ENGINES, cluster);
            let stream = long_chat(1).send(&gateway);
            assert_eq!(stream.client().status(), status, "{cluster:?} {policy}");
            if status.is_none() {
                assert_eq!(forwarded(&stream).body, chat(1, 3_000).as_bytes());
                respond(&stream);
            }
            assert_eq!(state(&stream, "reason"), "prefill_failed");
            assert_eq!(gateway.counter("pd_prefill_retries_total"), 1);
            gateway.tick();
            assert_gauges_are_zero(&gateway.shared);
            // A failed call-out and a reply in one callback. For Envoy, only a call-out that started is a fault.
            let violations = gateway.violations();
            assert!(violations.iter().all(|v| format!("{v:?}").starts_with("DispatchAndReply")), "{violations:?}");
            assert!(!gateway.is_failed());
        }
    }
}

#[test]
fn a_leg_that_the_host_refuses_after_a_failed_one_counts_as_failed() {
    for cluster in [None, Some(ClusterState::FailsAtOnce)] {
        let gateway = Gateway::new(&two_and_two());
        let stream = long_chat(1).send(&gateway);
        gateway.set_cluster(ENGINES, cluster);
        gateway.refuse(leg(&gateway).token).unwrap();
        assert_eq!(forwarded(&stream).body, chat(1, 3_000).as_bytes());
        assert_eq!(stream.resumed(), 1);
        respond(&stream);
        gateway.assert_idle();
    }
}

#[test]
fn a_leg_that_the_host_refuses_once_goes_to_another_endpoint() {
    let gateway = Gateway::new(&two_and_two());
    gateway.fail_host_call("proxy_http_call", pd_host::Fault::Once(10));
    let stream = run_split(&gateway, &long_chat(1));
    assert_eq!(decision(&stream), ("split".into(), "prefilled".into()));
    gateway.assert_idle();
}

#[test]
fn a_client_may_leave_at_any_time() {
    for gone in ClientGone::ALL {
        for request in [
            long_chat(1).chunks(random_chunks(chat(1, 3_000).as_bytes(), 700, 1)),
            short_chat(1),
            Request::post("/v1/embeddings", "{}"),
            Request::get("/v1/models"),
        ] {
            let gateway = Gateway::new(&two_and_two());
            request.send_then_leave(&gateway, gone);
            // A leg that runs on is nobody's any more.
            for call in legs(&gateway) {
                gateway.answer(call.token, [(":status", "200")], prefilled()).unwrap();
            }
            gateway.assert_idle();
        }
    }
}

#[test]
fn a_client_that_leaves_between_the_legs_is_counted() {
    for late in ["never", "answered", "refused", "no answer"] {
        let gateway = Gateway::new(&two_and_two());
        let stream = long_chat(1).send(&gateway);
        gateway.tick();
        assert_eq!(gateway.shared.gauge("pd_prefill_in_flight"), 1);
        let token = leg(&gateway).token;
        stream.reset();
        drop(stream);
        gateway.tick();
        assert_gauges_are_zero(&gateway.shared);
        match late {
            "answered" => gateway.answer(token, [(":status", "200")], prefilled()).unwrap(),
            "refused" => gateway.refuse(token).unwrap(),
            "no answer" => gateway.fail(token).unwrap(),
            _ => gateway.advance(LONGEST_LEG),
        }
        assert_eq!(legs(&gateway), []);
        assert_eq!(gateway.counter("pd_kv_stranded_total;reason=client_left"), 1);
        assert_eq!(gateway.shared.counter("pd_prefill_legs_total;result=ok"), 0);
        gateway.assert_idle();
    }
}

#[test]
fn a_client_that_leaves_between_a_failed_leg_and_the_next_leaves_nothing_behind() {
    let gateway = Gateway::new(&two_and_two());
    let stream = long_chat(1).send(&gateway);
    gateway.refuse(leg(&gateway).token).unwrap();
    stream.reset();
    answer_leg(&gateway);
    gateway.assert_idle();
}

#[test]
fn an_upstream_that_resets_in_mid_stream_leaves_nothing_behind() {
    let gateway = Gateway::new(&two_and_two());
    let stream = long_chat(1).send(&gateway);
    answer_leg(&gateway);
    stream.set_property("upstream.address", destinations(&forwarded(&stream))[0].as_str());
    stream.response_headers([(":status", "200")], false);
    stream.response_body("data: 1\n\n", false);
    gateway.tick();
    assert_eq!(gateway.shared.gauge("pd_decode_in_flight"), 1);
    stream.reset();
    gateway.assert_idle();
}

#[test]
fn header_values_that_are_not_text_reach_both_legs_untouched() {
    let gateway = Gateway::new(&two_and_two());
    let any: Vec<u8> = (1..=255).filter(|byte| !matches!(byte, b'\r' | b'\n')).collect();
    let stream = long_chat(1).header("x-any", &any).header("x-any", b"\xc3\x28").header("x-empty", "").send(&gateway);
    let call = leg(&gateway);
    answer_leg(&gateway);
    let values = |fields: &Pairs| -> Vec<Vec<u8>> {
        fields
            .iter()
            .filter(|(name, _)| name == b"x-any" || name == b"x-empty")
            .map(|(_, value)| value.clone())
            .collect()
    };
    let sent = vec![any, b"\xc3\x28".to_vec(), Vec::new()];
    assert_eq!(values(&call.headers), sent);
    assert_eq!(values(&forwarded(&stream).headers), sent);
    respond(&stream);
    gateway.assert_idle();
}

#[test]
fn fields_the_filter_reads_may_be_any_bytes() {
    let gateway =
        Gateway::new(&config(&[r#""trusted_headers":["x-prefiller-host-port","x-pd-phase"]"#], TWO_AND_TWO, ""));
    let any = b"\xff\xfe\x80";
    for name in [
        "content-type",
        "content-length",
        "content-encoding",
        "x-pd-phase",
        "x-prefiller-host-port",
        "x-pd-destination",
        "x-pd-\u{e9}",
        ":path",
        ":method",
        ":authority",
        ":scheme",
    ] {
        for request in [long_chat(1), Request::get("/v1/models")] {
            let mut request = request;
            request.headers.retain(|(other, _)| other != name.as_bytes());
            let stream = request.header(name, any).send(&gateway);
            for call in legs(&gateway) {
                gateway.answer(call.token, [(":status", "200")], prefilled()).unwrap();
            }
            assert!(stream.forwarded().is_some() || stream.client().complete, "{name}");
            if !stream.is_ended() {
                stream.reset();
            }
        }
    }
    gateway.assert_idle();
}

#[test]
fn headers_that_are_missing_stop_nothing() {
    let gateway = Gateway::new(&two_and_two());
    for missing in [":method", ":authority", ":scheme", "content-type", "content-length"] {
        let mut request = long_chat(1);
        request.headers.retain(|(name, _)| name != missing.as_bytes());
        let stream = request.send(&gateway);
        for call in legs(&gateway) {
            gateway.answer(call.token, [(":status", "200")], prefilled()).unwrap();
        }
        assert_eq!(forwarded(&stream).header(missing).is_some(), missing == "content-length", "{missing}");
        respond(&stream);
    }
    // A path that is not known is not passed on.
    let stream = gateway.stream();
    stream.request_headers([("", ""); 0], true);
    assert_eq!(stream.client().status(), Some(404));
    gateway.assert_idle();
}

#[test]
fn many_headers_reach_both_legs() {
    let gateway = Gateway::new(&two_and_two());
    let request = (0..1_000).fold(long_chat(1), |request, i| request.header(&format!("x-{i}"), i.to_string()));
    let stream = request.send(&gateway);
    let call = leg(&gateway);
    assert_eq!(call.header("x-999"), Some(&b"999"[..]));
    answer_leg(&gateway);
    assert_eq!(forwarded(&stream).header("x-999"), Some(&b"999"[..]));
    respond(&stream);
    gateway.assert_idle();
}

#[test]
fn more_headers_than_a_call_out_can_carry_go_to_decode_alone() {
    // Envoy's ABI carries 1,024 pairs and 1 MiB of them; a listener lets 100 and 60 kB through by default.
    let many = (0..5_000).fold(long_chat(1), |request, i| request.header(&format!("x-{i}"), i.to_string()));
    let huge = long_chat(1).header("x-huge", "v".repeat(2 << 20));
    for request in [many, huge] {
        let gateway = Gateway::new(&two_and_two());
        let stream = request.send(&gateway);
        let sent = forwarded(&stream);
        assert_eq!(sent.headers.len(), request.headers.len() + 1);
        assert_eq!(sent.body, chat(1, 3_000).as_bytes());
        assert_eq!(decision(&stream), ("decode_only".into(), "prefill_failed".into()));
        respond(&stream);
        gateway.assert_idle();
    }
}

#[test]
fn huge_header_values_reach_both_legs() {
    let gateway = Gateway::new(&two_and_two());
    let huge = "v".repeat(512 << 10);
    let stream = long_chat(1).header("x-huge", &huge).header("x-pd-huge", &huge).send(&gateway);
    assert_eq!(leg(&gateway).header("x-huge"), Some(huge.as_bytes()));
    assert_eq!(leg(&gateway).header("x-pd-huge"), None);
    answer_leg(&gateway);
    assert_eq!(forwarded(&stream).header("x-huge"), Some(huge.as_bytes()));
    respond(&stream);
    gateway.assert_idle();
}

/// A gateway whose two limits are the same, and a body that is that many bytes below them.
fn tight(slack_bytes: usize) -> (Gateway, String) {
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
        let (gateway, body) = tight(slack_bytes);
        let stream = split_within(&gateway, &body);
        assert_eq!(forwarded(&stream).body, body.as_bytes());
        assert_eq!(decision(&stream), ("split".into(), "kv_missing".into()));
        assert_eq!(gateway.counter("pd_kv_missing_total"), 1);
        respond(&stream);
        gateway.assert_idle();
    }
    let (gateway, body) = tight(splice);
    let stream = split_within(&gateway, &body);
    assert_eq!(forwarded(&stream).body.len(), body.len() + splice);
    assert_eq!(decision(&stream), ("split".into(), "prefilled".into()));
    respond(&stream);
    gateway.assert_idle();
}
