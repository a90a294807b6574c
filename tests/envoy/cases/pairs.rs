//! Prefill and decode servers that can or cannot hand over to each other.

use pd_sim::FAULT_HEADER;
use pd_support::body::CHAT;
use pd_support::client::{BOTH, Http};
use pd_support::wait::until;
use pd_tests::rig::{Rig, entries, run};
use serde_json::{Value, json};

use crate::support::{ask, assert_rejected, assert_right, logged_chat, long_chat, sum};

#[test]
fn a_prefill_server_that_no_decode_server_can_take_over_from_gets_no_leg() {
    run(async {
        for (key, value) in [("engine", "sglang"), ("engine", "mooncake"), ("group", "odd")] {
            let rig = Rig::builder().engines(2, 2).list(move |list| list[0][key] = value.into()).start().await;
            for http in BOTH {
                for client in &mut rig.client_of_each_worker(http).await {
                    for _ in 0..10 {
                        ask(client, &long_chat()).await;
                    }
                }
            }
            assert_eq!(rig.prefill[0].stats().requests, 0, "{key}: {value}");
            assert_eq!(rig.prefill[1].stats().prefill_legs, 40);
            assert_eq!(sum(&rig.decode, |stats| stats.local_prefills), 0);
            rig.until_idle().await;
        }
    });
}

#[test]
fn a_partner_that_leaves_during_the_prefill_leg_leaves_it_to_the_pools_policy() {
    run(async {
        for policy in ["decode_only", "fail"] {
            let groups = |list: &mut [Value]| {
                list.iter_mut().zip(["a", "a", "b"]).for_each(|(entry, group)| entry["group"] = group.into());
            };
            let rig = Rig::builder().engines(1, 2).pool(json!({"on_prefill_failure": policy})).list(groups);
            let rig = rig.start().await;
            let mut client = rig.client(Http::One).await;
            let body = long_chat();
            let (request, path) = logged_chat(&client, &body, &[(FAULT_HEADER, b"prefill:delay=2000")]);
            let leave = async {
                rig.prefill[0].wait_for(|stats| stats.requests == 1).await;
                let mut list: Vec<Value> =
                    entries(&rig.prefill, "prefill").chain(entries(&rig.decode[1..], "decode")).collect();
                list.iter_mut().zip(["a", "b"]).for_each(|(entry, group)| entry["group"] = group.into());
                rig.relist(&list).await;
            };
            let (answer, ()) = futures::future::join(client.send(request), leave).await;
            if policy == "fail" {
                assert_rejected(&answer, 503, "prefill_failed");
            } else {
                assert_right(&answer, &body);
                let entry = rig.access_log_of(&path).await;
                assert_eq!((&entry["decision"], &entry["reason"]), (&json!("decode_only"), &json!("no_partner")));
            }
            rig.until_metric("pd_kv_stranded_total{reason=\"no_partner\"}", |value| value == 1.0).await;
            rig.until_idle().await;
        }
    });
}

/// A restarted prefill server with a fixed engine id: decode servers cannot fetch from it, and serve everything else.
#[test]
fn prompts_are_served_whole_while_kv_caches_cannot_be_fetched() {
    run(async {
        let rig = Rig::builder().engines(1, 2).start().await;
        rig.decode.iter().for_each(|engine| engine.set_faults("handover:500").unwrap());
        let mut clients = rig.client_of_each_worker(Http::One).await;
        let mut errors = 0;
        for turn in 0..60 {
            let body = long_chat();
            let answer = clients[turn % 2].post(CHAT, body.clone()).await;
            if answer.status == 200 { assert_right(&answer, &body) } else { errors += 1 }
        }
        assert!((3..=8).contains(&errors), "{errors} of 60 got an error");
        rig.until_metric("pd_outliers_total{reason=\"handover\"}", |value| value >= 1.0).await;
        let line = "KV caches cannot be fetched from it";
        assert!(rig.envoy.log().contains(line));
        until("the status shows it", async || {
            let status: Value = serde_json::from_str(&rig.ask_control("/v1/status").await?).ok()?;
            status["advice"].to_string().contains(line).then_some(())
        })
        .await;

        rig.decode.iter().for_each(|engine| engine.set_faults("").unwrap());
        let split = "pd_requests_total{decision=\"split\"}";
        let before = rig.metric(split).await;
        until("prompts are split again", async || {
            ask(&mut clients[0], &long_chat()).await;
            (rig.metric(split).await >= before + 5.0).then_some(())
        })
        .await;
        rig.until_idle().await;
    });
}
