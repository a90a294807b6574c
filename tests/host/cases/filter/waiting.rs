//! Requests that wait until a prefill endpoint has room, over several VMs.

use std::collections::BTreeSet;
use std::time::Duration;

use pd_host::{Fault, Fleet, Status, Stream, Worker};

use crate::gateway::*;

const QUEUE: &str = r#""fit":false,"split":{"mode":"always"},"queue":{"enabled":true}"#;
/// A queue whose ledger thinks that each prompt takes ten seconds: only the end of a leg says that there is room.
const UNPREDICTABLE: &str = r#""fit":false,"cost":{"a_ms":10000},"split":{"mode":"always"},"queue":{"enabled":true}"#;

fn waits(worker: &Worker, stream: &Stream) -> bool {
    stream.is_paused() && !legs(worker).iter().any(|call| call.context == stream.context())
}

/// Ends one prefill leg of any worker, and lets the woken ones go on. Returns whether there was a leg.
fn end_a_leg(fleet: &Fleet) -> bool {
    let leg = fleet.workers().iter().find_map(|worker| Some((worker, legs(worker).into_iter().next()?)));
    let Some((worker, leg)) = leg else { return false };
    worker.answer(leg.token, [(":status", "200")], prefilled()).unwrap();
    for _ in 0..8 {
        fleet.run_posted();
    }
    true
}

fn in_flight(fleet: &Fleet) -> usize {
    fleet.workers().iter().map(|worker| legs(worker).len()).sum()
}

#[test]
fn each_endpoint_has_one_leg_and_every_request_is_served_once() {
    for count in [1, 3, 4, 16] {
        let fleet = fleet(count, &config(&[], TWO_AND_TWO, UNPREDICTABLE));
        let workers = fleet.workers();
        let streams: Vec<_> = (0..48).map(|id| (id % count, long_chat(id as u64).send(&workers[id % count]))).collect();
        assert_eq!(in_flight(&fleet), 2, "{count} workers");
        for _ in 0..48 {
            assert!((1..=2).contains(&in_flight(&fleet)), "{count} workers");
            assert!(end_a_leg(&fleet));
        }
        assert_eq!(in_flight(&fleet), 0);
        for (_, stream) in &streams {
            assert!(forwarded(stream).complete);
            respond(stream);
        }
        fleet.advance(Duration::from_millis(400));
        assert_gauges_are_zero(fleet.shared());
        assert_eq!(fleet.shared().gauge("pd_waiting_requests;pool=default"), 0);
        assert_eq!(fleet.violations(), [], "{count} workers");
    }
}

#[test]
fn a_leg_goes_a_lead_before_the_one_ahead_ends_without_any_event() {
    let fleet = fleet(3, &config(&[], &[(P1, "prefill"), (D1, "decode")], QUEUE));
    let [first, second] = [0, 1].map(|index| long_chat(index as u64).send(&fleet.workers()[index]));
    assert!(!waits(&fleet.workers()[0], &first) && waits(&fleet.workers()[1], &second));
    let mut passed = Duration::ZERO;
    while waits(&fleet.workers()[1], &second) {
        fleet.advance(Duration::from_millis(1));
        fleet.run_posted();
        passed += Duration::from_millis(1);
        assert!(passed < Duration::from_millis(100), "at a tick of 200 ms");
    }
    // 750 tokens take 34 ms.
    assert!((10..=20).contains(&passed.as_millis()), "{passed:?}");
    fleet.advance(Duration::from_millis(200));
    assert_eq!(fleet.shared().histogram("pd_wait_ms;pool=default"), [passed.as_millis() as u64]);
    [first, second].iter().for_each(Stream::reset);
}

#[test]
fn a_vm_that_is_gone_takes_its_waiting_requests_with_it() {
    let mut fleet = fleet(3, &config(&[], TWO_AND_TWO, UNPREDICTABLE));
    let busy: Vec<_> = (0..2).map(|id| long_chat(id).send(&fleet.workers()[0])).collect();
    let lost: Vec<_> = (10..20).map(|id| long_chat(id).send(&fleet.workers()[1])).collect();
    let stays: Vec<_> = (20..24).map(|id| long_chat(id).send(&fleet.workers()[2])).collect();
    fleet.replace(1).unwrap();
    drop(lost);
    for _ in 0..6 {
        fleet.advance(Duration::from_millis(200));
        fleet.run_posted();
    }
    assert_eq!(fleet.shared().gauge("pd_waiting_requests;pool=default"), 4);
    while end_a_leg(&fleet) {}
    for stream in busy.iter().chain(&stays) {
        forwarded(stream);
        respond(stream);
    }
    fleet.advance(Duration::from_millis(400));
    assert_eq!(fleet.violations(), []);
}

#[test]
fn waiting_requests_of_two_generations_stand_in_one_queue() {
    let mut fleet = fleet(3, &config(&[], TWO_AND_TWO, UNPREDICTABLE));
    let old: Vec<_> = (0..6).map(|id| long_chat(id).send(&fleet.workers()[id as usize % 2])).collect();
    fleet.add_roots(config(&[r#""revision":"2""#], TWO_AND_TWO, UNPREDICTABLE).as_bytes());
    fleet.advance(Duration::from_millis(200));
    let new: Vec<_> = (10..14).map(|id| long_chat(id).send(&fleet.workers()[id as usize % 2])).collect();
    assert_eq!(in_flight(&fleet), 2);
    for _ in 0..10 {
        assert!((1..=2).contains(&in_flight(&fleet)));
        assert!(end_a_leg(&fleet));
    }
    for stream in old.iter().chain(&new) {
        forwarded(stream);
        respond(stream);
    }
    assert_eq!(fleet.violations(), []);
}

/// Two requests with legs, two that wait, of which one leaves; all legs end.
fn scenario(gateway: &Gateway) -> Vec<Stream> {
    let streams: Vec<_> = (0..4).map(|id| long_chat(id).send(gateway)).collect();
    streams[3].reset();
    for _ in 0..6 {
        for leg in legs(gateway) {
            let _ = gateway.answer(leg.token, [(":status", "200")], prefilled());
        }
        gateway.run_posted();
        gateway.advance(Duration::from_millis(200));
        gateway.run_posted();
    }
    streams
}

#[test]
fn no_status_of_a_host_function_ends_the_worker_or_loses_a_waiting_request() {
    let functions = [
        "proxy_register_shared_queue",
        "proxy_resolve_shared_queue",
        "proxy_enqueue_shared_queue",
        "proxy_dequeue_shared_queue",
        "proxy_set_tick_period_milliseconds",
        "proxy_get_buffer_bytes",
        "proxy_get_property",
        "proxy_get_shared_data",
        "proxy_set_shared_data",
        "proxy_get_metric",
    ];
    let called: BTreeSet<_> = {
        let gateway = Gateway::new(&config(&[], TWO_AND_TWO, UNPREDICTABLE));
        let streams = scenario(&gateway);
        assert!(streams[..3].iter().all(|stream| stream.forwarded().is_some()));
        gateway.host_calls().into_keys().collect()
    };
    for function in ["proxy_enqueue_shared_queue", "proxy_dequeue_shared_queue", "proxy_register_shared_queue"] {
        assert!(called.contains(function), "{called:?}");
    }
    for function in functions {
        let status = if function.contains("queue") { Status::NotFound } else { Status::InternalFailure };
        for fault in [Fault::Once(status as u32), Fault::Always(status as u32), Fault::After(3, status as u32)] {
            let gateway = Gateway::new(&config(&[], TWO_AND_TWO, UNPREDICTABLE));
            gateway.fail_host_call(function, fault);
            let streams = scenario(&gateway);
            gateway.clear_faults();
            gateway.advance(Duration::from_millis(1_000));
            gateway.run_posted();
            for _ in 0..4 {
                answer_legs(&gateway);
                gateway.advance(Duration::from_millis(200));
                gateway.run_posted();
            }
            let traps: Vec<_> = gateway.violations();
            assert!(traps.is_empty(), "{function} {fault:?}: {traps:?}");
            for (i, stream) in streams[..3].iter().enumerate() {
                assert!(!waits(&gateway, stream), "{function} {fault:?}: stream {i} waits for ever");
            }
            streams.iter().for_each(Stream::reset);
        }
    }
}
