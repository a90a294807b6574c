//! Allocations of pd-core for a request, against `tests/host/budgets.csv`. Natively, where an allocator can count them.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use pd_core::workers::worker::Worker;
use pd_support::budgets;

#[path = "../../../filter/core/benches/one_request/mod.rs"]
mod one_request;

use one_request::{headers, serve};

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
