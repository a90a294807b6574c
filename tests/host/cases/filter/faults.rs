//! Prefill legs that fail, clients that leave, upstreams that reset.

use pd_host::{ClientGone, ClusterState, Request, Worker, random_chunks};

use crate::gateway::*;

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
