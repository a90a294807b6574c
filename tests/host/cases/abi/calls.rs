//! Call-outs, breaches of the rules, and host calls that fail.

use std::time::Duration;

use pd_host::{ClientGone, ClusterState, Fault, Request, Violation};

use crate::{PAUSE_UNTIL_END, SPLIT, answered, lines, worker};

#[test]
fn call_outs_need_a_cluster_and_the_three_pseudo_headers() {
    let worker = worker(&[PAUSE_UNTIL_END, SPLIT]);
    worker.set_cluster("engines", None);
    let stream = Request::post("/", "a").send(&worker);
    assert_eq!(lines(&worker), ["00", "02"]);
    worker.set_cluster("engines", Some(ClusterState::FailsAtOnce));
    stream.reset();
    let stream = Request::post("/", "a").send(&worker);
    assert_eq!(lines(&worker), ["00", "10"]);
    assert!(worker.callouts().is_empty() && stream.is_paused());
    worker.assert_clean();
}

#[test]
fn answers_reach_the_root_after_the_client_has_left() {
    let worker = worker(&[PAUSE_UNTIL_END, SPLIT]);
    for gone in ClientGone::ALL {
        let stream = Request::post("/", "ab").send_then_leave(&worker, gone);
        assert!(stream.is_ended());
        lines(&worker);
        for call in worker.callouts() {
            worker.answer(call.token, [(":status", "200")], "late").unwrap();
            // The stream's context is unknown; the answer can be read all the same; there is no body to edit.
            assert_eq!(lines(&worker), ["02", "00", "late", "02", "01", "00"]);
        }
        assert_eq!(stream.forwarded(), None);
    }
    assert!(worker.answer(4, [(":status", "200")], "").is_err(), "no call-out is answered twice");
    worker.assert_clean();
}

#[test]
fn failed_and_expired_call_outs_differ() {
    let worker = worker(&[r#"
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (drop (call $dispatch)) (i32.const 0))
      (func (export "proxy_on_http_call_response") (param i32 i32) (param $headers i32) (param i32 i32)
        (call $note (local.get $headers))
        (call $note (call $get_header (i32.const 6) (i32.const 340) (i32.const 7) (i32.const 1024) (i32.const 1028)))
        (call $say_result))
      (data (i32.const 340) ":status")"#]);
    let stream = worker.stream();
    stream.request_headers([(":path", "/")], true);
    worker.fail(worker.callouts()[0].token).unwrap();
    assert_eq!(lines(&worker)[..2], ["00", "02"]);
    let stream2 = worker.stream();
    stream2.request_headers([(":path", "/")], true);
    worker.advance(Duration::from_millis(999));
    assert_eq!(worker.callouts().len(), 1);
    worker.advance(Duration::from_millis(1));
    assert_eq!(lines(&worker), ["03", "00", "504"]);
    assert!(worker.callouts().is_empty());
}

#[test]
fn breaches_of_the_rules_are_collected() {
    let reply = r#"(drop (call $reply (i32.const 500) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
      (i32.const 0) (i32.const 0) (i32.const -1)))"#;
    let worker = worker(&[&format!(
        r#"(func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
             (drop (call $dispatch)) {reply} (i32.const 1))
           (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
             (drop (call $continue (i32.const 0))) (i32.const 0))
           (func (export "proxy_on_configure") (param i32 i32) (result i32) (drop (call $dispatch)) (i32.const 1))"#
    )]);
    assert_eq!(worker.violations(), [Violation::DispatchInConfigure { callback: "proxy_on_configure" }]);
    let stream = Request::post("/", "x").send(&worker);
    let context = stream.context();
    assert_eq!(worker.violations()[1..], [Violation::DispatchAndReply { callback: "proxy_on_request_body" }]);
    drop(stream);

    let early = self::worker(&[r#"
      (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
        (drop (call $continue (i32.const 0))) (i32.const 1))
      (func (export "proxy_on_log") (param i32) (drop (call $continue (i32.const 0))))"#]);
    let stream = early.stream();
    stream.request_headers([(":path", "/")], false);
    stream.request_body("a", false);
    stream.request_body("b", false);
    assert_eq!(
        early.violations(),
        [Violation::ResumeWithoutPause { context }, Violation::ResumeBeforeEndOfStream { context }]
    );
    stream.reset();
    assert_eq!(early.violations()[2..], [Violation::ActionAfterEnd { context, action: "resume" }]);
}

#[test]
fn a_trap_kills_the_worker_and_its_streams_get_503() {
    let worker = worker(&[r#"
      (func (export "proxy_on_request_body") (param i32 i32) (param $end i32) (result i32)
        (if (local.get $end) (then (unreachable))) (i32.const 1))
      (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32) (unreachable))"#]);
    let waiting = worker.stream();
    waiting.request_headers([(":path", "/")], false);
    waiting.request_body("x", false);
    let stream = Request::post("/", "x").send(&worker);
    assert!(worker.is_failed());
    assert!(matches!(&worker.violations()[0], Violation::Trap { callback: "proxy_on_request_body", .. }));
    let reply = stream.client().local_reply.unwrap();
    assert_eq!((reply.code, reply.details.as_str()), (503, "wasm_fail_stream"));
    assert!(waiting.is_paused(), "a paused stream of a dead VM hangs until something else happens to it");
    waiting.request_body("", true);
    assert_eq!(waiting.client().status(), Some(503));
    assert_eq!(Request::get("/").send(&worker).client().status(), Some(503));
    assert!(!worker.tick());
}

#[test]
fn host_calls_fail_on_demand() {
    let worker = worker(&[PAUSE_UNTIL_END, SPLIT]);
    worker.fail_host_call("proxy_set_property", Fault::Once(2));
    worker.fail_host_call("proxy_http_call", Fault::After(1, 10));
    let stream = Request::post("/", "a").send(&worker);
    assert_eq!(answered(&worker, &stream).state("wasm.pd.destination"), None);
    assert_eq!(lines(&worker), ["00", "00", "00", "00", "params", "00", "02", "00"]);
    Request::post("/", "a").send(&worker);
    assert_eq!(lines(&worker), ["00", "10"]);
    assert_eq!(worker.host_calls()["proxy_http_call"], 2);
    worker.reset_counts();
    assert_eq!(worker.host_call_count(), 0);
}
