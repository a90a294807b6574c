//! The host against Envoy's behaviour, with guests written by hand.

use std::time::Duration;

use pd_host::{
    ClientGone, ClusterState, Fault, Fleet, Forwarded, LogLevel, Measure, Module, ModuleOptions, Request, Seen,
    SharedStore, Stream, Violation, Worker, WorkerConfig, random_chunks, split_at_each_byte,
};

/// Imports, memory and an allocator. `$note` logs a status as text; strings for the host calls lie below 1024, results
/// from 1024 on: pointer at 1024, size at 1028, a word at 1032.
const PRELUDE: &str = r#"
(import "env" "proxy_log" (func $log (param i32 i32 i32) (result i32)))
(import "env" "proxy_get_buffer_bytes" (func $get_buffer (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_set_buffer_bytes" (func $set_buffer (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_get_header_map_value" (func $get_header (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_get_header_map_pairs" (func $get_pairs (param i32 i32 i32) (result i32)))
(import "env" "proxy_get_header_map_size" (func $get_size (param i32 i32) (result i32)))
(import "env" "proxy_add_header_map_value" (func $add_header (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_replace_header_map_value" (func $replace_header (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_remove_header_map_value" (func $remove_header (param i32 i32 i32) (result i32)))
(import "env" "proxy_http_call" (func $call (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_continue_stream" (func $continue (param i32) (result i32)))
(import "env" "proxy_send_local_response" (func $reply (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_set_effective_context" (func $effective (param i32) (result i32)))
(import "env" "proxy_set_property" (func $set_property (param i32 i32 i32 i32) (result i32)))
(import "env" "proxy_get_property" (func $get_property (param i32 i32 i32 i32) (result i32)))
(import "env" "proxy_get_shared_data" (func $get_shared (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_set_shared_data" (func $set_shared (param i32 i32 i32 i32 i32) (result i32)))
(import "env" "proxy_define_metric" (func $define (param i32 i32 i32 i32) (result i32)))
(import "env" "proxy_increment_metric" (func $increment (param i32 i64) (result i32)))
(import "env" "proxy_record_metric" (func $record (param i32 i64) (result i32)))
(import "env" "proxy_get_metric" (func $get_metric (param i32 i32) (result i32)))
(import "env" "proxy_set_tick_period_milliseconds" (func $tick_period (param i32) (result i32)))
(import "env" "proxy_get_current_time_nanoseconds" (func $now (param i32) (result i32)))
(import "env" "proxy_register_shared_queue" (func $register (param i32 i32 i32) (result i32)))
(import "env" "proxy_enqueue_shared_queue" (func $enqueue (param i32 i32 i32) (result i32)))
(import "env" "proxy_dequeue_shared_queue" (func $dequeue (param i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
(memory (export "memory") 2)
(global $heap (mut i32) (i32.const 65536))
(global $stream (mut i32) (i32.const 0))
(global $root (mut i32) (i32.const 0))
(func (export "proxy_abi_version_0_2_1"))
(func (export "malloc") (param $len i32) (result i32)
  (local $at i32)
  (local.set $at (global.get $heap))
  (global.set $heap (i32.add (global.get $heap) (i32.and (i32.add (local.get $len) (i32.const 7)) (i32.const -8))))
  (if (i32.gt_u (global.get $heap) (i32.const 131072)) (then (return (i32.const 0))))
  (local.get $at))
(func $note (param $status i32)
  (i32.store8 (i32.const 1020) (i32.add (i32.const 48) (i32.div_u (local.get $status) (i32.const 10))))
  (i32.store8 (i32.const 1021) (i32.add (i32.const 48) (i32.rem_u (local.get $status) (i32.const 10))))
  (drop (call $log (i32.const 1) (i32.const 1020) (i32.const 2))))
(func $say_result
  (drop (call $log (i32.const 2) (i32.load (i32.const 1024)) (i32.load (i32.const 1028)))))
(func $say_body (param $buffer i32)
  (call $note (call $get_buffer (local.get $buffer) (i32.const 0) (i32.const -1) (i32.const 1024) (i32.const 1028)))
  (call $say_result))
(func $dispatch (result i32)
  (call $call (i32.const 0) (i32.const 7) (i32.const 100) (i32.const 64) (i32.const 16) (i32.const 4)
    (i32.const 0) (i32.const 0) (i32.const 1000) (i32.const 1032)))
(data (i32.const 0) "engines")
(data (i32.const 16) "body")
(data (i32.const 32) ":path")
(data (i32.const 40) "x-new")
(data (i32.const 48) "pd.destination")
(data (i32.const 64) "a\00b")
(data (i32.const 72) "shared")
(data (i32.const 80) "1.2.3.4:80")
(data (i32.const 100) "\03\00\00\00\05\00\00\00\02\00\00\00\07\00\00\00\04\00\00\00\0a\00\00\00\02\00\00\00:path\00/p\00:method\00POST\00:authority\00ab\00")
(data (i32.const 200) "request\00path")
"#;

const PAUSE_UNTIL_END: &str = r#"
(func (export "proxy_on_context_create") (param $id i32) (param $root i32)
  (if (local.get $root) (then (global.set $stream (local.get $id))) (else (global.set $root (local.get $id)))))
(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
  (call $note (call $remove_header (i32.const 0) (i32.const 300) (i32.const 14)))
  (i32.const 0))
(data (i32.const 300) "content-length")
"#;

/// The shape of a P/D request: pause the body, call out at its end, edit it and choose when the answer is there, resume.
const SPLIT: &str = r#"
(func (export "proxy_on_request_body") (param i32 i32) (param $end i32) (result i32)
  (if (local.get $end) (then (call $note (call $dispatch))))
  (i32.const 1))
(func (export "proxy_on_http_call_response") (param i32 i32) (param $headers i32) (param i32 i32)
  (call $note (call $effective (global.get $stream)))
  (call $say_body (i32.const 4))
  (call $note (call $set_buffer (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 80) (i32.const 2)))
  (call $note (call $set_property (i32.const 48) (i32.const 14) (i32.const 80) (i32.const 10)))
  (call $note (call $continue (i32.const 0))))
"#;

fn module(parts: &[&str]) -> Module {
    let text = format!("(module {PRELUDE} {})", parts.join("\n"));
    Module::from_bytes(&wat::parse_str(text).unwrap()).unwrap()
}

fn config() -> WorkerConfig {
    WorkerConfig {
        clusters: vec!["engines".into()],
        route_headers: vec![("x-destination".into(), "wasm.pd.destination".into())],
        ..WorkerConfig::default()
    }
}

fn worker(parts: &[&str]) -> Worker {
    Worker::new(&module(parts), SharedStore::new(), config()).unwrap()
}

fn lines(worker: &Worker) -> Vec<String> {
    worker.take_logs().into_iter().map(|(_, line)| line).collect()
}

fn answered(worker: &Worker, stream: &Stream) -> Forwarded {
    let call = worker.callouts().remove(0);
    worker.answer(call.token, [(":status", "200")], "params").unwrap();
    stream.forwarded().expect("resumed")
}

#[test]
fn a_paused_body_is_edited_after_the_call_out_and_forwarded_with_its_choice() {
    let worker = worker(&[PAUSE_UNTIL_END, SPLIT]);
    let stream = worker.stream();
    stream.request_headers(
        [
            (":method", "POST"),
            (":path", "/v1"),
            (":authority", "a"),
            ("x-destination", "evil"),
            ("content-length", "4"),
        ],
        false,
    );
    assert_eq!(stream.request_body("ab", false), Seen::Pause);
    assert_eq!(stream.forwarded(), None);
    assert_eq!(stream.request_body("cd", true), Seen::Pause);
    assert!(stream.is_paused());
    let call = worker.callouts().remove(0);
    assert_eq!((call.cluster.as_str(), call.body.as_slice()), ("engines", &b"body"[..]));
    assert_eq!((call.header(":path"), call.header("content-length")), (Some(&b"/p"[..]), Some(&b"4"[..])));
    assert_eq!((call.context, call.timeout), (stream.context(), Duration::from_secs(1)));

    let request = answered(&worker, &stream);
    assert_eq!(request.body, b"1.bcd");
    assert!(request.complete);
    assert_eq!(request.header("content-length"), Some(&b"5"[..]));
    assert_eq!(request.header("x-destination"), Some(&b"1.2.3.4:80"[..]));
    assert_eq!(request.state("wasm.pd.destination"), Some(&b"1.2.3.4:80"[..]));
    assert_eq!(lines(&worker), ["00", "00", "00", "00", "params", "00", "00", "00"]);

    stream.response_headers([(":status", "200")], false);
    stream.response_body("x", true);
    assert!(stream.is_ended());
    assert_eq!(stream.client().status(), Some(200));
    assert_eq!(worker.open_streams(), 0);
    worker.assert_clean();
}

#[test]
fn the_body_is_the_same_however_it_is_cut() {
    let worker = worker(&[PAUSE_UNTIL_END, SPLIT]);
    let body = b"abcdefghij";
    let cuts = split_at_each_byte(body).chain((0..20).map(|seed| random_chunks(body, 3, seed)));
    for chunks in cuts {
        let plain = Request::post("/v1", body).chunks(chunks);
        for request in [plain.clone(), plain.empty_final_chunk()] {
            let stream = request.send(&worker);
            let forwarded = answered(&worker, &stream);
            assert_eq!(forwarded.body, b"1.bcdefghij");
            assert_eq!(forwarded.header("content-length"), Some(&b"11"[..]));
            stream.done();
        }
    }
    worker.assert_clean();
}

#[test]
fn a_module_sees_the_chunk_first_and_the_whole_buffer_after_a_pause() {
    let worker = worker(&[r#"
      (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
        (call $say_body (i32.const 0)) (i32.const 1))"#]);
    let stream = worker.stream();
    stream.request_headers([(":path", "/")], false);
    stream.request_body("ab", false);
    stream.request_body("cd", false);
    assert_eq!(lines(&worker), ["00", "ab", "00", "abcd"]);
}

#[test]
fn headers_are_gone_after_the_headers_phase_but_read_as_no_pairs() {
    let worker = worker(&[r#"
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (call $note (call $get_header (i32.const 0) (i32.const 32) (i32.const 5) (i32.const 1024) (i32.const 1028)))
        (call $say_result)
        (call $note (call $get_header (i32.const 0) (i32.const 40) (i32.const 5) (i32.const 1024) (i32.const 1028)))
        (call $note (call $get_property (i32.const 200) (i32.const 12) (i32.const 1024) (i32.const 1028)))
        (i32.const 0))
      (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
        (call $note (call $get_header (i32.const 0) (i32.const 32) (i32.const 5) (i32.const 1024) (i32.const 1028)))
        (call $note (call $add_header (i32.const 0) (i32.const 40) (i32.const 5) (i32.const 40) (i32.const 5)))
        (call $note (call $get_pairs (i32.const 0) (i32.const 1024) (i32.const 1028)))
        (call $note (call $get_property (i32.const 200) (i32.const 12) (i32.const 1024) (i32.const 1028)))
        (i32.const 0))
      (func (export "proxy_on_log") (param i32)
        (call $note (call $get_header (i32.const 0) (i32.const 32) (i32.const 5) (i32.const 1024) (i32.const 1028)))
        (call $note (call $get_header (i32.const 2) (i32.const 32) (i32.const 5) (i32.const 1024) (i32.const 1028))))"#]);
    let stream = worker.stream();
    stream.request_headers([(":path", "/x")], false);
    assert_eq!(lines(&worker), ["00", "/x", "01", "00"]);
    stream.request_body("", true);
    assert_eq!(lines(&worker), ["02", "02", "00", "01"]);
    assert_eq!(worker.header_misses().len(), 3);
    stream.reset();
    assert_eq!(lines(&worker), ["00", "01"]);
    worker.assert_clean();
}

#[test]
fn header_edits_keep_other_fields() {
    let worker = worker(&[r#"
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (call $note (call $add_header (i32.const 0) (i32.const 40) (i32.const 5) (i32.const 80) (i32.const 1)))
        (call $note (call $replace_header (i32.const 0) (i32.const 32) (i32.const 5) (i32.const 40) (i32.const 5)))
        (call $note (call $remove_header (i32.const 0) (i32.const 72) (i32.const 6)))
        (call $note (call $get_size (i32.const 0) (i32.const 1032)))
        (call $note (call $get_size (i32.const 6) (i32.const 1032)))
        (i32.const 0))"#]);
    let stream = worker.stream();
    stream.request_headers([(&b":path"[..], &b"/"[..]), (b"x-new", b"\xff\xfe"), (b"shared", b"s")], true);
    let request = stream.forwarded().unwrap();
    let fields = [(&b":path"[..], &b"x-new"[..]), (b"x-new", b"\xff\xfe"), (b"x-new", b"1")];
    assert_eq!(request.headers, pd_host::pairs(fields));
    assert!(request.complete);
    assert_eq!(lines(&worker), ["00", "00", "00", "00", "02"]);
}

#[test]
fn buffers_are_replaced_at_the_front_and_appended_at_the_end_only() {
    let worker = worker(&[r#"
      (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
        (call $note (call $set_buffer (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 80) (i32.const 1)))
        (call $note (call $set_buffer (i32.const 0) (i32.const 99) (i32.const 0) (i32.const 81) (i32.const 1)))
        (call $note (call $set_buffer (i32.const 0) (i32.const 1) (i32.const 1) (i32.const 81) (i32.const 1)))
        (call $note (call $set_buffer (i32.const 0) (i32.const 0) (i32.const 2) (i32.const 16) (i32.const 4)))
        (call $note (call $set_buffer (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 16) (i32.const 4)))
        (call $note (call $set_buffer (i32.const 7) (i32.const 0) (i32.const 0) (i32.const 16) (i32.const 4)))
        (call $note (call $get_buffer (i32.const 9) (i32.const 0) (i32.const 9) (i32.const 1024) (i32.const 1028)))
        (i32.const 0))"#]);
    let stream = worker.stream();
    stream.request_headers([(":path", "/")], false);
    stream.request_body("xy", true);
    assert_eq!(stream.forwarded().unwrap().body, b"bodyy.");
    assert_eq!(lines(&worker), ["00", "00", "02", "00", "02", "01", "02"]);
}

#[test]
fn a_pause_on_headers_stops_the_body_until_resumed() {
    let worker = worker(&[
        PAUSE_UNTIL_END,
        r#"(func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32) (i32.const 1))
           (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32) (i32.const 0))"#,
    ]);
    let stream = worker.stream();
    stream.request_headers([(":path", "/")], true);
    assert_eq!(stream.response_headers([(":status", "200")], false), Seen::Pause);
    stream.response_body("held", true);
    assert_eq!(stream.client().headers, None);
    assert!(!stream.is_ended());

    let worker = self::worker(&[r#"
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 1))
      (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32) (unreachable))"#]);
    let stream = worker.stream();
    stream.request_headers([(":path", "/")], false);
    assert_eq!(stream.request_body("x", true), Seen::Nothing);
    assert_eq!(worker.violations(), [Violation::PausedOnHeaders { context: stream.context() }]);
}

#[test]
fn passing_a_chunk_and_pausing_the_next_breaks_the_content_length() {
    let worker = worker(&[
        PAUSE_UNTIL_END,
        r#"(func (export "proxy_on_request_body") (param i32 i32) (param $end i32) (result i32)
             (if (local.get $end) (then (call $note (call $dispatch))))
             (local.get $end))
           (func (export "proxy_on_http_call_response") (param i32 i32 i32 i32 i32)
             (call $note (call $effective (global.get $stream)))
             (call $say_body (i32.const 0))
             (call $note (call $continue (i32.const 0))))"#,
    ]);
    let stream = Request::post("/", "").chunks(vec![b"abc".to_vec(), b"de".to_vec()]).send(&worker);
    let request = answered(&worker, &stream);
    assert_eq!(request.body, b"abcde");
    assert!(lines(&worker).contains(&"abcde".to_owned()), "the shared buffer holds the passed chunk too");
    let context = stream.context();
    assert_eq!(worker.violations(), [Violation::ContentLengthMismatch { context, declared: 8, actual: 5 }]);
}

#[test]
fn trailers_end_the_request_and_resume_a_paused_body() {
    let worker = worker(&[r#"
      (func (export "proxy_on_request_body") (param i32 i32) (param $end i32) (result i32)
        (call $note (local.get $end)) (i32.const 1))
      (func (export "proxy_on_request_trailers") (param i32 i32) (result i32) (i32.const 0))"#]);
    let stream = Request::post("/", "ab").trailers(pd_host::pairs([("t", "1")])).send(&worker);
    assert_eq!(lines(&worker), ["00"]);
    let request = stream.forwarded().unwrap();
    assert_eq!((request.body.as_slice(), request.complete), (&b"ab"[..], true));
    assert_eq!(request.trailers, Some(pd_host::pairs([("t", "1")])));
}

#[test]
fn local_replies_pass_the_filters_own_response_callbacks_and_end_the_stream() {
    let worker = worker(&[r#"
      (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
        (call $note (call $reply (i32.const 429) (i32.const 72) (i32.const 6) (i32.const 16) (i32.const 4)
          (i32.const 0) (i32.const 0) (i32.const -1)))
        (i32.const 0))
      (func (export "proxy_on_response_headers") (param i32 i32) (param $end i32) (result i32)
        (call $note (i32.add (i32.const 20) (local.get $end)))
        (call $note (call $add_header (i32.const 2) (i32.const 40) (i32.const 5) (i32.const 80) (i32.const 1)))
        (i32.const 0))
      (func (export "proxy_on_response_body") (param i32 i32) (param $end i32) (result i32)
        (call $note (i32.add (i32.const 30) (local.get $end))) (i32.const 0))
      (func (export "proxy_on_log") (param i32) (call $note (i32.const 40)))
      (func (export "proxy_on_done") (param i32) (result i32) (call $note (i32.const 41)) (i32.const 1))
      (func (export "proxy_on_delete") (param i32) (call $note (i32.const 42)))"#]);
    let stream = worker.stream();
    stream.request_headers([(":path", "/")], false);
    stream.request_body("x", true);
    assert_eq!(lines(&worker), ["00", "20", "00", "31", "40", "41", "42"]);
    assert_eq!(stream.forwarded(), None);
    let client = stream.client();
    assert_eq!((client.status(), client.body.as_slice()), (Some(429), &b"body"[..]));
    assert_eq!(client.header("content-type"), Some(&b"text/plain"[..]));
    assert_eq!(client.header("x-new"), Some(&b"1"[..]));
    assert_eq!(client.local_reply.unwrap().details, "shared");
    assert!(client.complete && stream.is_ended());
    worker.assert_clean();
}

#[test]
fn a_body_over_the_limit_is_answered_with_413() {
    let config = WorkerConfig { request_limit_bytes: Some(4), ..config() };
    let worker = Worker::new(&module(&[PAUSE_UNTIL_END, SPLIT]), SharedStore::new(), config).unwrap();
    let stream = Request::post("/", "").chunks(vec![b"abc".to_vec(), b"de".to_vec(), b"f".to_vec()]).send(&worker);
    assert_eq!(stream.client().status(), Some(413));
    assert!(stream.is_ended());
    worker.assert_clean();

    // Within the limit as it came, over it as edited by the call-out's callback: Envoy enters the VM again.
    let stream = Request::post("/", "abcd").send(&worker);
    let context = stream.context();
    let call = worker.callouts().remove(0);
    worker.answer(call.token, [(":status", "200")], "p").unwrap();
    assert!(worker.violations().contains(&Violation::BodyOverLimitInCallback { context }));
    assert!(worker.is_failed());
}

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
fn failed_and_expired_call_outs_are_told_apart() {
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

#[test]
fn properties_are_filter_state_under_the_whole_path() {
    let worker = worker(&[r#"
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (call $note (call $set_property (i32.const 48) (i32.const 14) (i32.const 16) (i32.const 4)))
        (call $note (call $get_property (i32.const 48) (i32.const 14) (i32.const 1024) (i32.const 1028)))
        (call $say_result)
        (call $note (call $set_property (i32.const 64) (i32.const 3) (i32.const 16) (i32.const 4)))
        (call $note (call $get_property (i32.const 64) (i32.const 3) (i32.const 1024) (i32.const 1028)))
        (call $note (call $get_property (i32.const 360) (i32.const 14) (i32.const 1024) (i32.const 1028)))
        (call $say_result)
        (call $note (call $get_property (i32.const 380) (i32.const 14) (i32.const 1024) (i32.const 1028)))
        (call $say_result)
        (i32.const 0))
      (func (export "proxy_on_tick") (param i32)
        (call $note (call $set_property (i32.const 48) (i32.const 14) (i32.const 16) (i32.const 4))))
      (func (export "proxy_on_configure") (param i32 i32) (result i32)
        (drop (call $tick_period (i32.const 10))) (i32.const 1))
      (data (i32.const 360) "plugin_root_id")
      (data (i32.const 380) "source\00address")"#]);
    let stream = worker.stream();
    stream.set_property("source.address", "9.9.9.9:1");
    stream.request_headers([(":path", "/")], true);
    assert_eq!(lines(&worker), ["00", "00", "body", "00", "01", "00", "root", "00", "9.9.9.9:1"]);
    let names: Vec<String> = stream.filter_state().into_keys().collect();
    assert_eq!(names, ["wasm.a\0b", "wasm.pd.destination"]);
    worker.tick();
    assert_eq!(lines(&worker), ["01"]);
}

#[test]
fn shared_data_is_compared_and_swapped_across_workers() {
    let guest = module(&[r#"
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (call $note (call $get_shared (i32.const 72) (i32.const 6) (i32.const 1024) (i32.const 1028) (i32.const 1032)))
        (call $note (call $set_shared (i32.const 72) (i32.const 6) (i32.const 16) (i32.const 4) (i32.load (i32.const 1032))))
        (i32.const 0))"#]);
    let fleet = Fleet::new(&guest, 4, SharedStore::new(), config()).unwrap();
    for (i, worker) in fleet.workers().iter().enumerate() {
        Request::get("/").send(worker);
        assert_eq!(lines(worker), if i == 0 { ["01", "00"] } else { ["00", "00"] });
    }
    assert_eq!(fleet.shared().get("vm", b"shared").unwrap().0, b"body");
    fleet.workers()[1].before_set_shared_data(|shared, key| {
        shared.set("vm", key, b"raced", 0);
    });
    Request::get("/").send(&fleet.workers()[1]);
    assert_eq!(lines(&fleet.workers()[1]), ["00", "08"]);
    assert_eq!(fleet.shared().get("vm", b"shared").unwrap().0, b"raced");
}

#[test]
fn metrics_are_the_process_s_and_every_definition_has_its_own_id() {
    let guest = module(&[r#"
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (local $a i32) (local $b i32)
        (call $note (call $define (i32.const 0) (i32.const 72) (i32.const 6) (i32.const 1032)))
        (local.set $a (i32.load (i32.const 1032)))
        (call $note (call $define (i32.const 0) (i32.const 72) (i32.const 6) (i32.const 1032)))
        (local.set $b (i32.load (i32.const 1032)))
        (call $note (i32.ne (local.get $a) (local.get $b)))
        (call $note (call $increment (local.get $a) (i64.const 2)))
        (call $note (call $record (local.get $b) (i64.const 3)))
        (call $note (call $increment (local.get $a) (i64.const 0)))
        (call $note (call $get_metric (local.get $b) (i32.const 1032)))
        (call $note (i32.load (i32.const 1032)))
        (call $note (call $get_metric (i32.const 4000) (i32.const 1032)))
        (call $note (call $get_metric (i32.const 2) (i32.const 1032)))
        (call $note (call $define (i32.const 3) (i32.const 72) (i32.const 6) (i32.const 1032)))
        (call $note (call $define (i32.const 1) (i32.const 72) (i32.const 6) (i32.const 1032)))
        (call $note (call $increment (i32.load (i32.const 1032)) (i64.const -1)))
        (i32.const 0))"#]);
    let fleet = Fleet::new(&guest, 2, SharedStore::new(), config()).unwrap();
    let first = &fleet.workers()[0];
    Request::get("/").send(first);
    assert_eq!(lines(first), ["00", "00", "01", "00", "00", "02", "00", "05", "01", "02", "02", "00", "00"]);
    Request::get("/").send(&fleet.workers()[1]);
    assert_eq!(fleet.shared().counter("shared"), 10);
    assert_eq!(first.violations(), [Violation::GaugeUnderflow { name: "shared".into() }]);
}

#[test]
fn ticks_of_two_generations_run_in_the_order_of_time() {
    let guest = module(&[r#"
      (func (export "proxy_on_configure") (param i32) (param $bytes i32) (result i32)
        (drop (call $tick_period (local.get $bytes)))
        (call $note (call $get_buffer (i32.const 7) (i32.const 0) (i32.const 99) (i32.const 1024) (i32.const 1028)))
        (call $say_result)
        (i32.const 1))
      (func (export "proxy_on_tick") (param $root i32)
        (call $note (call $enqueue (i32.load (i32.const 1040)) (i32.const 16) (i32.const 4))))
      (func (export "proxy_on_vm_start") (param i32 i32) (result i32)
        (call $note (call $register (i32.const 72) (i32.const 6) (i32.const 1040))) (i32.const 1))
      (func (export "proxy_on_queue_ready") (param i32) (param $queue i32)
        (call $note (call $dequeue (local.get $queue) (i32.const 1024) (i32.const 1028)))
        (call $say_result))"#]);
    let config = WorkerConfig { plugin_configuration: b"abc".to_vec(), ..config() };
    let mut fleet = Fleet::new(&guest, 2, SharedStore::new(), config).unwrap();
    assert_eq!(lines(&fleet.workers()[0]), ["00", "00", "abc"]);
    assert_eq!(fleet.workers()[0].tick_period(), Some(Duration::from_millis(3)));
    fleet.reconfigure(b"abcde", None).unwrap();
    assert_eq!((fleet.workers().len(), fleet.draining().len()), (2, 2));
    for worker in fleet.workers() {
        worker.take_logs();
    }
    fleet.advance(Duration::from_millis(6));
    // The old ones at 3 and 6, the new ones at 5.
    assert_eq!(lines(&fleet.draining()[0]), ["00", "00", "abc", "00", "00"][3..]);
    assert_eq!(lines(&fleet.workers()[0]), ["00"]);
    fleet.run_posted();
    assert_eq!(lines(&fleet.workers()[1]).len(), 1 + 2 * 6, "the last to register is told of every item");
    fleet.retire();
    assert!(fleet.violations().is_empty());
}

#[test]
fn throwaway_vms_only_try_the_configuration() {
    let guest = module(&[r#"
      (func (export "proxy_on_configure") (param i32) (param $bytes i32) (result i32)
        (drop (call $dispatch)) (local.get $bytes))
      (func (export "proxy_on_done") (param i32) (result i32) (unreachable))"#]);
    let config = WorkerConfig { plugin_configuration: b"x".to_vec(), ..config() };
    let worker = Worker::new(&guest, SharedStore::new(), config).unwrap();
    let tried = worker.start_throwaway(b"").unwrap();
    assert!(!tried.accepted && !worker.is_failed());
    assert_eq!(tried.violations.len(), 1);
    assert!(worker.start_throwaway(b"y").unwrap().accepted);
    assert!(worker.reconfigure(b"").unwrap().is_failed());
}

#[test]
fn two_roots_can_share_a_vm() {
    let worker = worker(&[
        PAUSE_UNTIL_END,
        r#"
      (func (export "proxy_on_vm_start") (param i32 i32) (result i32) (call $note (global.get $root)) (i32.const 1))"#,
    ]);
    let old = worker.stream();
    let root = worker.add_root(b"new");
    assert_eq!(lines(&worker), ["01", "03"]);
    assert_eq!(root, 3);
    old.request_headers([(":path", "/")], true);
    Request::get("/").send(&worker);
    old.done();
    worker.retire_root(1);
    assert_eq!(worker.root(), root);
    worker.shutdown();
    worker.assert_clean();
}

#[test]
fn time_and_output_come_from_the_host() {
    let worker = worker(&[r#"
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (drop (call $now (i32.const 1040)))
        (drop (call $clock (i32.const 0) (i64.const 0) (i32.const 1048)))
        (call $note (i64.eq (i64.load (i32.const 1040)) (i64.load (i32.const 1048))))
        (call $note (i64.eq (i64.load (i32.const 1040)) (i64.const 7)))
        (i32.store (i32.const 1056) (i32.const 16))
        (i32.store (i32.const 1060) (i32.const 4))
        (call $note (call $fd_write (i32.const 2) (i32.const 1056) (i32.const 1) (i32.const 1064)))
        (call $note (call $fd_write (i32.const 5) (i32.const 1056) (i32.const 1) (i32.const 1064)))
        (i32.const 0))"#]);
    worker.clock().set_wall(7);
    Request::get("/").send(&worker);
    let logs = worker.take_logs();
    let text: Vec<&str> = logs.iter().map(|(_, line)| line.as_str()).collect();
    assert_eq!(text, ["01", "01", "body", "00", "08"]);
    assert_eq!(logs[2].0, LogLevel::Error);
    assert_eq!(worker.memory_bytes(), 2 * 65536);
}

#[test]
fn requests_are_measured_and_leave_nothing_behind() {
    let text = format!("(module {PRELUDE} {PAUSE_UNTIL_END} {})", SPLIT.replace("(call $say_body (i32.const 4))", ""));
    let guest = Module::with_options(&wat::parse_str(text).unwrap(), ModuleOptions { fuel: true }).unwrap();
    let worker = Worker::new(&guest, SharedStore::new(), config()).unwrap();
    let measured = Measure::run(&worker, 1000, |worker| {
        let stream = Request::post("/", "a").send(worker);
        answered(worker, &stream);
        stream.done();
    });
    assert_eq!(measured.host_calls["proxy_http_call"], 1000);
    assert_eq!(measured.callbacks["proxy_on_http_call_response"].calls, 1000);
    assert_eq!(measured.memory_growth_bytes, 0);
    assert!(measured.fuel.is_some_and(|fuel| fuel > 10_000));
    assert_eq!((worker.open_streams(), worker.callouts().len()), (0, 0));
    worker.assert_clean();
}

#[test]
fn workers_run_on_threads_of_their_own() {
    let fleet = Fleet::new(&module(&[PAUSE_UNTIL_END, SPLIT]), 4, SharedStore::new(), config()).unwrap();
    std::thread::scope(|scope| {
        for worker in fleet.workers() {
            scope.spawn(|| {
                let stream = Request::post("/", "abc").send(worker);
                assert_eq!(answered(worker, &stream).body, b"1.bc");
            });
        }
    });
    assert!(fleet.violations().is_empty());
}

#[test]
fn what_envoy_would_not_load_is_an_error() {
    let load = |text: &str| Module::from_bytes(&wat::parse_str(text).unwrap()).unwrap_err().to_string();
    assert!(load("(module)").contains("proxy_abi_version_0_2_1"));
    let foreign = r#"(module (import "env" "proxy_get_configuration" (func))
      (func (export "proxy_abi_version_0_2_1")))"#;
    assert!(load(foreign).contains("proxy_get_configuration"));
    let initialising = module(&[r#"(func (export "_initialize") (drop (call $tick_period (i32.const 1))))"#]);
    let worker = Worker::new(&initialising, SharedStore::new(), config()).unwrap();
    assert!(worker.is_failed());
    assert_eq!(worker.violations()[0], Violation::RestrictedCall { call: "proxy_set_tick_period_milliseconds" });
}
