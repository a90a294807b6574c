//! Bodies, headers and answers of one stream.

use std::time::Duration;

use pd_host::{Request, Seen, SharedStore, Violation, Worker, WorkerConfig, random_chunks, split_at_each_byte};

use crate::{PAUSE_UNTIL_END, SPLIT, answered, config, lines, module, worker};

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
