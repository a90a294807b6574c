//! Plugin configurations, good and bad.

use pd_host::{Request, Worker};
use serde_json::Value;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::gateway::*;

/// Refused configurations and the key that the refusal names.
const REFUSED: &[(&str, &str)] = &[
    (r#"{"clutser":"engines"}"#, "clutser"),
    (r#"{"cluster":""}"#, "cluster"),
    (r#"{"cluster":1}"#, "plugin configuration"),
    (r#"{"control":{}}"#, "cluster"),
    (r#"{"control":{"cluster":"c","wait_ms":1}}"#, "control.wait_ms"),
    (r#"{"max_body_bytes":1}"#, "max_body_bytes"),
    (r#"{"prefix":{"block_bytes":1}}"#, "prefix.block_bytes"),
    (r#"{"destination_header":"X Y"}"#, "destination_header"),
    (r#"{"trusted_headers":["x-other"]}"#, "trusted_headers"),
    (r#"{"endpoints":[{"address":"10.0.0.1:1","role":"both","colour":"red"}]}"#, "colour"),
    (r#"{"endpoints":[{"address":"host:1","role":"both"}]}"#, "endpoints"),
    (r#"{"pools":{"default":{"prefill_attempts":0}}}"#, "pools.default.prefill_attempts"),
    ("[]", "plugin configuration"),
    ("{", "plugin configuration"),
    ("\u{0}", "plugin configuration"),
];

/// The message of the filter's answer to a request.
#[track_caller]
fn refusal(worker: &Worker) -> String {
    let stream = long_chat(1).send(worker);
    let client = stream.client();
    assert_eq!(client.status(), Some(503), "{client:?}");
    assert_eq!(client.header("x-pd-reason"), Some(&b"not_configured"[..]));
    let body: Value = serde_json::from_slice(&client.body).unwrap();
    assert_eq!(body["error"]["code"], "not_configured");
    body["error"]["message"].as_str().unwrap().to_owned()
}

#[track_caller]
fn assert_serves(worker: &Worker) {
    static PROMPTS: AtomicU64 = AtomicU64::new(0);
    // A prompt that no worker has seen: one that is known is not split.
    let stream = run_split(worker, &long_chat(PROMPTS.fetch_add(1, Relaxed)));
    assert_eq!(state(&stream, "decision"), "split");
}

#[test]
fn a_configuration_that_is_refused_at_the_start_is_answered_by_its_key() {
    for (text, key) in REFUSED {
        let gateway = Gateway::new(text);
        assert!(!gateway.is_failed(), "{text}");
        let message = refusal(&gateway);
        assert!(message.contains(key), "{text}: {message}");
        for request in [Request::get("/v1/models"), Request::post("/v1/embeddings", "{}")] {
            assert_eq!(request.send(&gateway).client().status(), Some(503));
        }
        assert_eq!(gateway.counter("pd_configs_total;result=refused"), 1);
        assert_eq!(gateway.counter("pd_configs_total;result=accepted"), 0);
        assert!(gateway.logs().iter().any(|(_, line)| line.contains("refused") && line.contains(key)));
        gateway.assert_idle();
    }
}

#[test]
fn a_good_configuration_ends_the_refusal() {
    let gateway = Gateway::new(REFUSED[0].0);
    refusal(&gateway);
    gateway.add_root(two_and_two().as_bytes());
    assert_serves(&gateway);
    gateway.assert_idle();
}

#[test]
fn a_refused_update_leaves_the_last_good_configuration_in_force_in_new_vms() {
    for count in [1, 4] {
        let mut fleet = fleet(count, &two_and_two());
        for (text, _) in REFUSED {
            fleet.reconfigure(text.as_bytes(), None).unwrap();
            for worker in fleet.workers() {
                assert_serves(worker);
            }
        }
        fleet.tick();
        let refused = REFUSED.len() * count;
        assert_eq!(fleet.shared().counter("pd_configs_total;result=refused"), refused as u64);
        assert_eq!(fleet.violations(), []);
    }
}

#[test]
fn a_refused_update_leaves_the_last_good_configuration_in_force_in_new_roots() {
    let mut fleet = fleet(2, &two_and_two());
    for (text, _) in REFUSED {
        fleet.add_roots(text.as_bytes());
        for worker in fleet.workers() {
            assert_serves(worker);
        }
    }
    assert_eq!(fleet.violations(), []);
}

#[test]
fn the_last_good_configuration_is_the_last_one_that_was_accepted() {
    let mut fleet = fleet(2, &two_and_two());
    for address in ["10.0.0.7:1", "10.0.0.8:1"] {
        fleet.reconfigure(config(&[], &[(address, "both")], "").as_bytes(), None).unwrap();
        fleet.reconfigure(REFUSED[0].0.as_bytes(), None).unwrap();
        for worker in fleet.workers() {
            assert_eq!(reached(worker), set(&[address]));
        }
    }
}

#[test]
fn a_refused_update_keeps_the_pushed_list() {
    let mut fleet = fleet(2, &controlled());
    fleet.tick();
    let poller = fleet.workers().iter().find(|worker| !polls(worker).is_empty()).unwrap();
    push(poller, &list("e", 1, TWO_AND_TWO));
    fleet.reconfigure(b"{", None).unwrap();
    for worker in fleet.workers() {
        assert_serves(worker);
    }
    // The poll outlives the generation that started it.
    fleet.retire();
    fleet.advance(std::time::Duration::from_millis(1_200));
    assert_eq!(fleet.workers().iter().flat_map(polls).count(), 1);
}

#[test]
fn a_configuration_is_tried_in_a_throw_away_vm_without_a_call_out() {
    let gateway = Gateway::new(&controlled());
    for text in [controlled().as_str(), "", "{", REFUSED[0].0] {
        let tried = gateway.start_throwaway(text.as_bytes()).unwrap();
        assert!(tried.accepted, "{text}");
        assert_eq!(tried.violations, []);
    }
}

#[test]
fn no_configuration_stands_for_every_default() {
    for text in ["", " \n", "{}"] {
        let gateway = Gateway::new(text);
        let stream = Request::get("/v1/models").send(&gateway);
        assert_eq!(stream.client().header("x-pd-reason"), Some(&b"no_endpoint"[..]), "{text:?}");
    }
}

#[test]
fn a_configuration_that_cannot_be_read_is_logged_and_ends_nothing() {
    let gateway = Gateway::new(&two_and_two());
    for status in [2, 6, 12] {
        gateway.fail_host_call("proxy_get_buffer_bytes", pd_host::Fault::Once(status));
        gateway.add_root(two_and_two().as_bytes());
        assert!(gateway.logs().iter().any(|(_, line)| line.contains(&format!("host status {status}"))));
        let stream = short_chat(1).send(&gateway);
        assert!(stream.forwarded().is_some() || stream.client().status() == Some(503));
        stream.reset();
    }
    gateway.add_root(two_and_two().as_bytes());
    assert_serves(&gateway);
    gateway.assert_idle();
}

#[test]
fn every_accepted_configuration_is_counted_per_worker() {
    let mut fleet = fleet(3, &two_and_two());
    fleet.add_roots(two_and_two().as_bytes());
    fleet.tick();
    assert_eq!(fleet.shared().counter("pd_configs_total;result=accepted"), 6);
    assert_eq!(fleet.shared().counter("pd_configs_total;result=refused"), 0);
}
