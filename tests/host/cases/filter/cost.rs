//! What a request costs: host calls, and memory that does not grow.

use std::collections::BTreeMap;

use pd_host::{Request, Worker};

use crate::gateway::*;

/// Host calls of one request by name, and their sum.
fn calls(gateway: &Gateway, mut request: impl FnMut(&Worker, u64)) -> (BTreeMap<&'static str, f64>, f64) {
    const REQUESTS: u64 = 50;
    gateway.tick();
    gateway.reset_counts();
    for id in 0..REQUESTS {
        request(gateway, id);
    }
    let each = |(name, calls): (&'static str, u64)| (name, calls as f64 / REQUESTS as f64);
    let by_name: BTreeMap<_, _> = gateway.host_calls().into_iter().map(each).collect();
    let sum = by_name.values().sum();
    (by_name, sum)
}

#[test]
fn the_answer_to_a_prompt_too_short_to_be_judged_is_not_read() {
    let gateway = Gateway::new(&config(&[], TWO_AND_TWO, r#""split":{"mode":"always"}"#));
    let reads = |prompt_bytes| {
        let whole = |id| Request::post(CHAT, chat(id, prompt_bytes).replace(r#""stream":true"#, r#""stream":false"#));
        calls(&gateway, |worker, id| drop(run_split(worker, &whole(id)))).0["proxy_get_buffer_bytes"]
    };
    assert_eq!((reads(3_000), reads(100)), (4.0, 2.0), "the request, the prefill answer, and the answer in two parts");
}

#[test]
fn a_tick_with_nothing_to_tell_is_cheap() {
    let gateway = Gateway::new(&two_and_two());
    gateway.tick();
    gateway.reset_counts();
    gateway.tick();
    let calls = gateway.host_calls();
    println!("{calls:#?}");
    assert!(gateway.host_call_count() <= 10, "{calls:#?}");
}

#[test]
fn the_calls_of_a_stream_do_not_depend_on_its_length() {
    let gateway = Gateway::new(&two_and_two());
    let stream = short_chat(1).send(&gateway);
    stream.set_property("upstream.address", destinations(&forwarded(&stream))[0].as_str());
    stream.response_headers([(":status", "200")], false);
    stream.response_body("data: 1\n\n", false);
    gateway.reset_counts();
    for _ in 0..1_000 {
        stream.response_body("data: 1\n\n", false);
    }
    assert_eq!(gateway.host_calls(), BTreeMap::new());
    stream.response_body("", true);
    gateway.assert_idle();
}

/// A gateway whose prefix index is full soon.
fn small_index() -> Gateway {
    Gateway::new(&config(&[r#""prefix":{"index_bytes":262144}"#], TWO_AND_TWO, ""))
}

/// A request that is split, the same again (for decode alone, while the index holds it), one that fails and one that is refused, of that size each.
fn mix(gateway: &Gateway, id: u64, bytes: usize) {
    let request = Request::post(CHAT, chat(id, bytes));
    for _ in 0..2 {
        let stream = request.send(gateway);
        for _ in legs(gateway) {
            answer_leg(gateway);
        }
        respond(&stream);
    }
    if id.is_multiple_of(16) {
        let stream = Request::post(CHAT, chat(!id, bytes)).send(gateway);
        for _ in 0..2 {
            gateway.refuse(leg(gateway).token).unwrap();
        }
        respond(&stream);
        Request::post(CHAT, &chat(id, bytes)[..bytes]).send(gateway);
        // The endpoints that refused are back.
        gateway.clock().advance(std::time::Duration::from_secs(6));
    }
    if id.is_multiple_of(64) {
        gateway.tick();
        gateway.take_logs();
    }
}

#[test]
fn memory_is_constant_over_twenty_thousand_requests() {
    let gateway = small_index();
    // The heap takes its last page some thousands of requests in; after that it is a leak.
    (0..7_000).for_each(|id| mix(&gateway, id, 4_000));
    let before = gateway.memory_bytes();
    (7_000..17_000).for_each(|id| mix(&gateway, id, 4_000));
    assert_eq!(gateway.memory_bytes(), before);
    let splits = gateway.counter("pd_requests_total;decision=split");
    let whole = gateway.shared.counter("pd_requests_total;decision=decode_only");
    assert!(splits + whole > 24_000, "{splits} {whole}");
    gateway.assert_idle();
}

#[test]
fn memory_is_constant_after_large_bodies() {
    let gateway = small_index();
    let round = |round: u64| {
        (0..100).for_each(|id| mix(&gateway, round * 1_000 + id, 200_000));
        (0..200).for_each(|id| mix(&gateway, round * 10_000 + id, 4_000));
    };
    // The heap takes its last page after some thousands of requests; after that it is a leak.
    (1..32).for_each(round);
    let before = gateway.memory_bytes();
    (32..64).for_each(round);
    assert_eq!(gateway.memory_bytes(), before);
    println!("{} kB of linear memory with 200 kB bodies", before / 1_024);
    gateway.assert_idle();
}

/// Linear memory that one split request of that size adds to a worker which has served small ones, relative to the body.
fn copies_of_the_body(engine: &str, bytes: usize) -> f64 {
    let gateway =
        Gateway::new(&config(&[], TWO_AND_TWO, &format!(r#""engine":"{engine}","split":{{"mode":"always"}}"#)));
    (0..50).for_each(|id| drop(run_split(&gateway, &Request::post(CHAT, chat(id, 4_000)))));
    let before = gateway.memory_bytes();
    let body = chat(99, bytes);
    let length = body.len();
    // The first endpoint fails, so the body of the prefill leg is written twice, one after the other.
    let stream = Request::post(CHAT, body).send(&gateway);
    gateway.refuse(leg(&gateway).token).unwrap();
    answer_leg(&gateway);
    respond(&stream);
    (gateway.memory_bytes() - before) as f64 / length as f64
}

#[test]
fn a_long_body_is_in_memory_twice_at_most() {
    for engine in ["vllm-nixl", "vllm-shared"] {
        for bytes in [4_000_000, 16_000_000] {
            let copies = copies_of_the_body(engine, bytes);
            println!("{engine}, {bytes} B: {copies:.2} bodies of linear memory");
            // Hashes of the prompt and the rest of the heap's last block are the tenth.
            assert!((0.5..2.1).contains(&copies), "{engine}, {bytes} B: {copies:.2} copies");
        }
    }
}
