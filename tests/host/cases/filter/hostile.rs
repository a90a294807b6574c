//! A host whose functions fail, and workers that write shared data in each other's way.

use std::collections::BTreeMap;
use std::time::Duration;

use pd_core::envoys::message::ExchangeRequest;
use pd_host::{Fault, Request, SharedStore, Status, Stream, Violation};

use crate::exchange::response;
use crate::gateway::*;

/// Within this time every worker does all that it does now and then.
const TICK: Duration = Duration::from_millis(200);

/// Statuses of the ABI, and one that it does not know.
const STATUSES: &[u32] = &[1, 2, 3, 4, 6, 7, 8, 10, 12, 255];

/// Statuses that a function is made to answer. Three go through the SDK, which panics on what the ABI does not foresee
/// for them: a log line and the effective context never fail in Envoy, a call-out fails in the two ways that stay here.
fn statuses(function: &str) -> &'static [u32] {
    match function {
        "proxy_log" | "proxy_set_effective_context" => &[],
        "proxy_http_call" => &[Status::BadArgument as u32, Status::InternalFailure as u32],
        _ => STATUSES,
    }
}

/// Everything the filter does, from a new root to the answers of engines. Returns the streams.
fn everything(gateway: &Gateway) -> Vec<Stream> {
    let top = [r#""control":{"cluster":"pd-control"}"#, TRUSTS_PHASE];
    gateway.add_root(config(&top, TWO_AND_TWO, r#""on_prefill_failure":"fail""#).as_bytes());
    gateway.add_root(config(&top, TWO_AND_TWO, "").as_bytes());
    let answer_polls = |status: &str, list: &str| {
        gateway.advance(TICK);
        for poll in polls(gateway) {
            gateway.answer(poll.token, [(":status", status)], list).unwrap();
        }
        for call in exchanges(gateway) {
            let response =
                ExchangeRequest::from_bytes(&call.body).map(|request| response(&request).to_bytes()).unwrap();
            gateway.answer(call.token, [(":status", status)], response).unwrap();
        }
    };
    answer_polls("200", &list("e", 1, TWO_AND_TWO));
    let mut streams = Vec::new();
    let mut run = |request: &Request, answers: &[&str]| {
        let stream = request.send(gateway);
        for status in answers {
            for call in legs(gateway) {
                gateway.answer(call.token, [(":status", *status)], prefilled()).unwrap();
            }
        }
        if stream.forwarded().is_some() {
            stream.set_property("upstream.address", D1);
            stream.response_headers([(":status", "200")], false);
            stream.response_body("a", false);
            stream.response_body("b", true);
        }
        streams.push(stream);
    };
    run(&long_chat(1).header("x-pd-destination", "203.0.113.1:1"), &["200"]);
    run(&long_chat(2), &["503", "200"]);
    run(&long_chat(3), &["500", "500"]);
    run(&long_chat(4), &["400", "400"]);
    answer_polls("200", &list("e", 2, TWO_AND_TWO));
    run(&short_chat(5), &[]);
    run(&Request::get("/v1/models"), &[]);
    run(&Request::post("/v1/embeddings", "{}"), &[]);
    run(&Request::post(CHAT, "{"), &[]);
    run(&long_chat(6).header("x-pd-phase", "nonsense"), &[]);
    answer_polls("304", "");
    let stream = long_chat(7).send(gateway);
    stream.reset();
    for call in legs(gateway) {
        gateway.answer(call.token, [(":status", "200")], prefilled()).unwrap();
    }
    streams.push(stream);
    gateway.advance(TICK);
    streams
}

/// Whether a stream waits for nothing.
fn is_stuck(gateway: &Gateway, stream: &Stream) -> bool {
    stream.is_paused() && !legs(gateway).iter().any(|call| call.context == stream.context())
}

/// What cannot be helped when a function fails.
fn is_excused(function: &str, violation: &Violation) -> bool {
    match (function, violation) {
        // An answer that cannot be given: better a client that waits than a request that no rule allows.
        ("proxy_send_local_response", Violation::PausedOnHeaders { .. }) => true,
        // The length cannot be taken away, and the body must change.
        ("proxy_remove_header_map_value", Violation::ContentLengthMismatch { .. }) => true,
        // A rise that was lost, and the fall that followed.
        ("proxy_increment_metric", Violation::GaugeUnderflow { .. }) => true,
        // A call-out that did not start is none.
        ("proxy_http_call", Violation::DispatchAndReply { .. }) => true,
        _ => false,
    }
}

fn may_stick(function: &str) -> bool {
    matches!(function, "proxy_continue_stream" | "proxy_send_local_response")
}

/// Runs everything with one fault, then once more without.
fn survives(function: &'static str, fault: Fault) {
    let gateway = Gateway::new(&controlled());
    gateway.fail_host_call(function, fault);
    let streams = everything(&gateway);
    let trapped: Vec<_> = gateway.violations().into_iter().filter(|v| !is_excused(function, v)).collect();
    assert!(trapped.is_empty(), "{function} {fault:?}: {trapped:?}");
    for (i, stream) in streams.iter().enumerate() {
        assert!(!is_stuck(&gateway, stream) || may_stick(function), "{function} {fault:?}: stream {i} is stuck");
    }
    gateway.clear_faults();
    for stream in &streams {
        stream.reset();
    }
    drop(streams);
    everything(&gateway);
    gateway.advance(TICK);
    assert_eq!(gateway.open_streams(), 0, "{function} {fault:?}");
    if !function.ends_with("_metric") {
        assert_gauges_are_zero(&gateway.shared);
    }
    let stream = run_split(&gateway, &long_chat(99));
    assert_eq!(decision(&stream), ("split".into(), "prefilled".into()), "{function} {fault:?}");
}

/// Host functions that the filter calls, and how often.
fn called() -> BTreeMap<&'static str, u64> {
    let gateway = Gateway::new(&controlled());
    gateway.reset_counts();
    for stream in everything(&gateway) {
        assert!(!is_stuck(&gateway, &stream));
    }
    gateway.assert_clean();
    gateway.host_calls().into_iter().filter(|(name, _)| name.starts_with("proxy_")).collect()
}

#[test]
fn no_status_of_any_host_function_ends_the_worker_or_leaves_a_request_behind() {
    let called = called();
    assert_eq!(called.len(), 19, "{called:?}");
    for function in called.keys() {
        for status in statuses(function) {
            for fault in [Fault::Once(*status), Fault::Always(*status), Fault::After(3, *status)] {
                survives(function, fault);
            }
        }
    }
}

#[test]
fn no_call_of_any_host_function_is_one_that_must_not_fail() {
    for (function, calls) in called() {
        let Some(status) = statuses(function).last() else { continue };
        for before in 0..calls.min(60) {
            survives(function, Fault::After(u32::try_from(before).unwrap(), *status));
        }
    }
}

/// Words of a lease: owner, end in milliseconds, terms.
fn lease(shared: &SharedStore) -> [u64; 3] {
    let (bytes, _) = shared.get("pd", b"pd/lease").unwrap();
    let words: Vec<u64> = bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
    words.try_into().unwrap()
}

fn lease_bytes(words: [u64; 3]) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// A worker that has not been configured yet: its configuration was refused.
fn unconfigured() -> Gateway {
    Gateway::new("refused")
}

/// The number that a worker gives itself, as its poll says.
fn worker_number(gateway: &Gateway) -> String {
    let poll = polls(gateway).remove(0);
    let says = String::from_utf8(poll.header("x-pd-filter").unwrap().to_vec()).unwrap();
    says.rsplit("worker=").next().unwrap().to_owned()
}

#[test]
fn a_lease_that_another_worker_takes_in_between_is_not_taken() {
    let gateway = Gateway::new(&controlled());
    gateway.tick();
    let [owner, until, terms] = lease(&gateway.shared);
    let poll = polls(&gateway).remove(0);
    gateway.answer(poll.token, [(":status", "503")], "").unwrap();
    let others = lease_bytes([owner + 1, until + 10_000, terms]);
    let written = others.clone();
    gateway.before_set_shared_data(move |shared, key| {
        if key == b"pd/lease" {
            shared.set("pd", key, &written, 0);
        }
    });
    gateway.advance(Duration::from_secs(5));
    assert_eq!(polls(&gateway), []);
    assert_eq!(gateway.shared.get("pd", b"pd/lease").unwrap().0, others);
    gateway.assert_clean();
}

#[test]
fn the_first_lease_of_all_is_taken_once() {
    let gateway = Gateway::new(&controlled());
    let others = lease_bytes([77, u64::MAX, 0]);
    let written = others.clone();
    gateway.before_set_shared_data(move |shared, key| {
        if key == b"pd/lease" && shared.get("pd", key).is_none() {
            shared.set("pd", key, &written, 0);
        }
    });
    gateway.tick();
    assert_eq!(polls(&gateway), []);
    assert_eq!(gateway.shared.get("pd", b"pd/lease").unwrap().0, others);
}

#[test]
fn workers_that_start_at_the_same_time_have_different_numbers() {
    let gateway = unconfigured();
    gateway.before_set_shared_data(|shared, key| {
        if key == b"pd/workers" && shared.get("pd", key).is_none() {
            shared.set("pd", key, &1_u64.to_le_bytes(), 0);
        }
    });
    gateway.add_root(controlled().as_bytes());
    gateway.tick();
    assert_eq!(worker_number(&gateway), "2");
}

#[test]
fn a_worker_that_always_loses_the_race_for_a_number_starts_all_the_same() {
    let gateway = Gateway::new(&controlled());
    gateway.before_set_shared_data(|shared, key| {
        if key == b"pd/workers" {
            let (bytes, _) = shared.get("pd", key).unwrap();
            let count = u64::from_le_bytes(bytes.try_into().unwrap());
            shared.set("pd", key, &(count + 1).to_le_bytes(), 0);
        }
    });
    gateway.add_root(controlled().as_bytes());
    gateway.tick();
    // Both roots of this worker go by number 1: the poll runs twice.
    assert_eq!(polls(&gateway).len(), 2);
    gateway.assert_clean();
}

#[test]
fn nonsense_in_shared_data_is_nobodys_lease_list_or_configuration() {
    for nonsense in [&b""[..], b"x", &[0xff; 7], &[0xff; 24], b"{}", &[0; 4_096]] {
        let shared = SharedStore::new();
        for key in ["pd/lease", "pd/list", "pd/workers", "pd/config", "pd/voice"] {
            shared.set("pd", key.as_bytes(), nonsense, 0);
        }
        let worker = pd_host::Worker::new(module(), shared.clone(), envoy(&two_and_two())).unwrap();
        worker.add_root(config(&[r#""control":{"cluster":"pd-control"}"#], TWO_AND_TWO, "").as_bytes());
        worker.tick();
        // The filter respects a lease that never ends.
        assert_eq!(polls(&worker).len(), usize::from(nonsense != [0xff; 24]), "{nonsense:?}");
        run_split(&worker, &long_chat(1));
        worker.add_root(b"refused");
        let stream = short_chat(1).send(&worker);
        assert!(stream.forwarded().is_some() || stream.client().status() == Some(503));
        worker.assert_clean();
    }
}
