//! Requests that a header sends to a pool or a pod.

use pd_support::body::CHAT;
use pd_support::client::BOTH;
use pd_tests::rig::{Rig, run};
use pd_tests::shared::shared;
use serde_json::json;

use crate::support::{assert_rejected, assert_right, logged_chat, long_chat, only, sum};

#[test]
fn a_phase_header_sends_one_leg_to_its_pool() {
    run(async {
        let rig = shared().await;
        for (phase, decision) in [("prefill", "prefill_only"), ("decode", "decode_only")] {
            for http in BOTH {
                rig.engines().for_each(|engine| engine.clear_requests());
                let mut client = rig.client(http).await;
                let body = long_chat();
                let (request, path) = logged_chat(&client, &body, &[("x-pd-phase", phase.as_bytes())]);
                assert_right(&client.send(request).await, &body);
                let pool = if phase == "prefill" { &rig.prefill } else { &rig.decode };
                let leg = only(pool);
                assert_eq!(leg.text(), body, "not a byte changes");
                assert!(!leg.headers.contains_key("x-pd-phase"));
                assert_eq!(rig.engines().map(|engine| engine.requests().len()).sum::<usize>(), 1);
                let entry = rig.access_log_of(&path).await;
                assert_eq!((&entry["decision"], &entry["reason"]), (&json!(decision), &json!("phase_header")));
            }
        }
    });
}

#[test]
fn an_unknown_phase_is_refused() {
    run(async {
        let rig = shared().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            for phase in ["", "PREFILL", "both"] {
                let request = client.json(CHAT, long_chat(), &[("x-pd-phase", phase.as_bytes())]);
                assert_rejected(&client.send(request).await, 400, "invalid_phase");
            }
        }
        assert_eq!(sum(rig.engines(), |stats| stats.requests), 0);
    });
}

#[test]
fn a_trusted_peer_names_the_prefill_pod_if_it_is_in_the_list() {
    run(async {
        let rig = Rig::builder().plugin(json!({"trusted_headers": ["x-prefiller-host-port"]})).start().await;
        let decode = rig.decode[0].addr();
        let hints = |named: String| [named.clone(), format!("10.255.255.1:1, {named}"), format!("junk,{named}")];
        for http in BOTH {
            let mut client = rig.client(http).await;
            for engine in &rig.prefill {
                for hint in hints(engine.addr().to_string()) {
                    let before = engine.stats().prefill_legs;
                    let body = long_chat();
                    let request = client.json(CHAT, body.clone(), &[("x-prefiller-host-port", hint.as_bytes())]);
                    assert_right(&client.send(request).await, &body);
                    assert_eq!(engine.stats().prefill_legs, before + 1, "{hint}");
                    assert!(!engine.requests().last().unwrap().headers.contains_key("x-prefiller-host-port"));
                }
            }
            // Not in the list, not a prefill pod, not an address: the filter chooses.
            let legs = sum(&rig.prefill, |stats| stats.prefill_legs);
            for hint in ["10.255.255.1:1".to_owned(), decode.to_string(), String::new(), "\u{e9}".to_owned()] {
                let body = long_chat();
                let request = client.json(CHAT, body.clone(), &[("x-prefiller-host-port", hint.as_bytes())]);
                assert_right(&client.send(request).await, &body);
            }
            assert_eq!(sum(&rig.prefill, |stats| stats.prefill_legs), legs + 4);
        }
        assert_eq!(rig.until_metric("pd_hints_ignored_total", |value| value >= 8.0).await, 8.0);
        assert_eq!(sum(&rig.decode, |stats| stats.prefill_legs), 0);
        // The phase header is not among the trusted ones here: it is stripped.
        let mut client = rig.client(BOTH[0]).await;
        let (body, legs) = (long_chat(), sum(&rig.prefill, |stats| stats.prefill_legs));
        let request = client.json(CHAT, body.clone(), &[("x-pd-phase", b"decode")]);
        assert_right(&client.send(request).await, &body);
        assert_eq!(sum(&rig.prefill, |stats| stats.prefill_legs), legs + 1);
    });
}
