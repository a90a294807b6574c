//! All that core does for one request. The benches and the test of allocations share this file.

use core::time::Duration;

use pd_core::headers::Headers;
use pd_core::request::upstream::Answerer;
use pd_core::request::{PrefillAnswer, Request};
use pd_core::time::Monotonic;
use pd_core::workers::worker::Worker;

const ANSWER: &[u8] = br#"{"id":"c","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"a"},"finish_reason":"length"}],"usage":{"prompt_tokens":9,"completion_tokens":1},"kv_transfer_params":{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":[[1,2,3]],"remote_engine_id":"e","remote_request_id":"r","remote_host":"10.0.0.1","remote_port":5600,"tp_size":1}}"#;

/// Headers as the OpenAI package for Python sends them, with those that Envoy adds.
pub fn headers() -> Headers {
    Headers::from_pairs([
        (":method", "POST"),
        (":path", "/v1/chat/completions"),
        (":authority", "gateway"),
        (":scheme", "http"),
        ("user-agent", "OpenAI/Python 1.99.0"),
        ("content-type", "application/json"),
        ("accept", "application/json"),
        ("authorization", "Bearer sk-none"),
        ("content-length", "200"),
        ("x-forwarded-for", "10.1.2.3"),
        ("x-forwarded-proto", "http"),
        ("x-request-id", "5f0c7e86-2d7a-4a53-9a55-0c6a8d1f3b21"),
    ])
}

/// One request to its end, through both legs where the worker splits it.
pub fn serve(worker: &mut Worker, headers: Headers, body: &[u8]) {
    let mut request = Request::default();
    let mut now = Monotonic::from_secs(1_000);
    request.headers(worker, headers, false, now);
    request.body(worker, body, now);
    if request.is_prefilling() {
        now += Duration::from_millis(50);
        let answer = PrefillAnswer::Answered { status: 200, content_type: Some(b"application/json"), body: ANSWER };
        request.prefill_answer(worker, answer, || None::<Vec<u8>>, now);
    }
    assert!(request.is_forwarded());
    request.response_headers(worker, Answerer::Host(b"10.0.0.2:8000"), Some(200), now);
    request.first_byte(worker, now);
    request.done(worker, now);
}
