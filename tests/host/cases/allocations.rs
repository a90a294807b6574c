//! Allocations of pd-core for a request, against `tests/host/budgets.csv`. Natively, where an allocator can count them.

use core::time::Duration;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use pd_core::headers::Headers;
use pd_core::request::upstream::Answerer;
use pd_core::request::{PrefillAnswer, Request};
use pd_core::time::Monotonic;
use pd_core::workers::worker::Worker;
use pd_support::budgets;

/// The system's allocator, which counts.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const REQUESTS: u64 = 50;
const ANSWER: &[u8] = br#"{"id":"c","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"a"},"finish_reason":"length"}],"usage":{"prompt_tokens":9,"completion_tokens":1},"kv_transfer_params":{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":[[1,2,3]],"remote_engine_id":"e","remote_request_id":"r","remote_host":"10.0.0.1","remote_port":5600,"tp_size":1}}"#;

fn headers() -> Headers {
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
fn serve(worker: &mut Worker, headers: Headers, body: &[u8]) {
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

/// Mean allocations of a request, after as many others.
fn allocations(split: &str, bytes: usize) -> f64 {
    let mut worker = Worker::default();
    let endpoint = |port: u16, role: &str| format!(r#"{{"address":"10.0.0.1:{port}","role":"{role}"}}"#);
    let endpoints = [endpoint(1, "prefill"), endpoint(2, "prefill"), endpoint(3, "decode"), endpoint(4, "decode")];
    let pools = format!(r#"{{"default":{{"split":{{"mode":"{split}"}}}}}}"#);
    let config = format!(r#"{{"endpoints":[{}],"pools":{pools}}}"#, endpoints.join(","));
    worker.configure(config.as_bytes()).expect("the configuration is valid");
    let requests: Vec<_> = (0..2 * REQUESTS)
        .map(|id| {
            let prompt = format!("request {id} ").repeat(bytes / 10);
            let body = format!(
                r#"{{"model":"m","messages":[{{"role":"user","content":"{prompt}"}}],"stream":true,"max_tokens":64}}"#
            );
            (headers(), body)
        })
        .collect();
    let mut before = 0;
    for (id, (headers, body)) in requests.into_iter().enumerate() {
        if id as u64 == REQUESTS {
            before = ALLOCATIONS.load(Ordering::Relaxed);
        }
        serve(&mut worker, headers, body.as_bytes());
    }
    (ALLOCATIONS.load(Ordering::Relaxed) - before) as f64 / REQUESTS as f64
}

#[test]
fn a_request_allocates_no_more_than_its_budget() {
    for bytes in [200, 16_000] {
        for (request, split) in [("split", "always"), ("whole", "never")] {
            // Tables grow now and then.
            budgets::check(&format!("{request} {bytes} B"), "allocations", allocations(split, bytes), 1.02);
        }
    }
}
