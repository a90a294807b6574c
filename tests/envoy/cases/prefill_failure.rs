//! Prefill legs that fail.

use pd_sim::{Handle, Stats};
use pd_support::body::CHAT;
use pd_support::client::{BOTH, Client, Http};
use pd_support::wait::{PATIENCE, until};
use pd_tests::rig::{Rig, run};
use serde_json::json;
use tokio::time::timeout;

use crate::support::{ask, assert_rejected, assert_right, logged_chat, long_chat, sum};

const FAULTS: [&str; 6] = ["reset", "500", "503", "429", "hang", "exit"];
const RETRIES: &str = "pd_prefill_retries_total";
const GIVEN_UP: &str = "pd_prefill_given_up_total";
const MISSING: &str = "pd_kv_missing_total";

async fn rig(policy: &str) -> Rig {
    // The time-out is what a hang costs each of these tests.
    Rig::builder().pool(json!({"prefill_timeout_ms": 200, "on_prefill_failure": policy})).start().await
}

/// Sends chats until an engine's statistics meet a condition; all are answered right.
async fn ask_until(client: &mut Client, engine: &Handle, condition: impl Fn(&Stats) -> bool) {
    let asked = async {
        while !condition(&engine.stats()) {
            ask(client, &long_chat()).await;
        }
    };
    timeout(PATIENCE, asked).await.unwrap_or_else(|_| panic!("{:#?}", engine.stats()));
}

/// Waits until prefill legs are answered by an engine that failed before.
async fn comes_back(client: &mut Client, engine: &Handle) {
    let legs = engine.stats().prefill_legs;
    ask_until(client, engine, |stats| stats.prefill_legs > legs).await;
}

fn faults(stats: &Stats) -> u64 {
    stats.faults_injected.values().sum()
}

#[test]
fn another_prefill_pod_computes_the_prompt_at_once() {
    run(async {
        let rig = rig("fail").await;
        let [bad, good] = &rig.prefill[..] else { panic!("two") };
        for (i, fault) in FAULTS.into_iter().enumerate() {
            let mut client = rig.client(BOTH[i % 2]).await;
            comes_back(&mut client, bad).await;
            let (hits, legs) = (faults(&bad.stats()), good.stats().prefill_legs);
            bad.set_faults(fault).unwrap();
            ask_until(&mut client, bad, |stats| faults(stats) > hits).await;
            assert!(good.stats().prefill_legs > legs, "{fault}");
            bad.set_faults("").unwrap();
        }
        rig.until_metric(RETRIES, |value| value >= FAULTS.len() as f64).await;
        assert_eq!(rig.final_metric(GIVEN_UP).await, 0.0);
        assert_eq!(sum(&rig.decode, |stats| stats.local_prefills), 0, "decode computed no prompt");
        rig.until_idle().await;
    });
}

#[test]
fn a_pod_that_refuses_connections_is_left_out_until_it_is_back() {
    run(async {
        let rig = rig("fail").await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            comes_back(&mut client, &rig.prefill[1]).await;
            let retries = rig.metric(RETRIES).await;
            rig.refuse(&rig.prefill[1]).await;
            until("a leg is refused and run again", async || {
                ask(&mut rig.client(http).await, &long_chat()).await;
                (rig.metric(RETRIES).await > retries).then_some(())
            })
            .await;
            rig.accept(&rig.prefill[1]).await;
            comes_back(&mut client, &rig.prefill[1]).await;
        }
        assert_eq!(rig.final_metric(GIVEN_UP).await, 0.0);
        rig.until_idle().await;
    });
}

#[test]
fn the_decode_pod_computes_the_prompt_when_no_prefill_pod_can() {
    run(async {
        let rig = rig("decode_only").await;
        let mut given_up = 0.0;
        for (i, fault) in FAULTS[..5].iter().enumerate() {
            let mut client = rig.client(BOTH[i % 2]).await;
            rig.prefill.iter().for_each(|engine| engine.set_faults(fault).unwrap());
            let whole = sum(&rig.decode, |stats| stats.local_prefills);
            let body = long_chat();
            let (request, path) = logged_chat(&client, &body, &[]);
            assert_right(&client.send(request).await, &body);
            assert_eq!(sum(&rig.decode, |stats| stats.local_prefills), whole + 1, "{fault}");
            given_up += 1.0;
            assert_eq!(rig.until_metric(GIVEN_UP, |value| value >= given_up).await, given_up);
            let entry = rig.access_log_of(&path).await;
            assert_eq!((&entry["decision"], &entry["reason"]), (&json!("decode_only"), &json!("prefill_failed")));
        }
        rig.until_idle().await;
    });
}

#[test]
fn the_client_gets_an_error_when_no_prefill_pod_can_and_the_policy_is_to_fail() {
    run(async {
        let rig = rig("fail").await;
        for (i, fault) in FAULTS[..5].iter().enumerate() {
            rig.prefill.iter().for_each(|engine| engine.set_faults(fault).unwrap());
            let mut client = rig.client(BOTH[i % 2]).await;
            assert_rejected(&client.post(CHAT, long_chat()).await, 503, "prefill_failed");
        }
        assert_eq!(sum(&rig.decode, |stats| stats.requests), 0);
        // The connection goes on, and so do the pods.
        rig.prefill.iter().for_each(|engine| engine.set_faults("").unwrap());
        for http in BOTH {
            for client in &mut rig.client_of_each_worker(http).await {
                ask(client, &long_chat()).await;
            }
        }
        rig.until_idle().await;
    });
}

#[test]
fn an_engines_own_refusal_is_passed_on() {
    run(async {
        let rig = Rig::start().await;
        rig.prefill.iter().for_each(|engine| engine.set_faults("400").unwrap());
        for http in BOTH {
            let mut client = rig.client(http).await;
            let answer = client.post(CHAT, long_chat()).await;
            assert_eq!((answer.status, answer.header("content-type")), (400, Some("application/json")));
            assert_eq!(answer.json()["error"]["message"], "fault: 400");
        }
        // The other endpoint was asked once for each request, and refused it too.
        assert_eq!(rig.final_metric(RETRIES).await, BOTH.len() as f64);
        // A prompt that no engine takes: the same answer as from one engine.
        rig.prefill.iter().for_each(|engine| engine.set_faults("").unwrap());
        for http in BOTH {
            let mut client = rig.client(http).await;
            let body = long_chat().replace("\"role\":\"user\"", "\"role\":5");
            let direct = Client::connect(rig.decode[0].addr(), Http::One).await.post(CHAT, body.clone()).await;
            let answer = client.post(CHAT, body).await;
            assert_eq!((answer.status, answer.text()), (400, direct.text()));
        }
        rig.until_idle().await;
    });
}

#[test]
fn unusable_parameters_cost_a_second_prefill_and_never_the_right_text() {
    run(async {
        let rig = Rig::start().await;
        let mut missing = 0.0;
        for how in ["missing", "null", "string", "no_request_id", "null_blocks", "truncated"] {
            rig.prefill.iter().for_each(|engine| engine.set_faults(&format!("malformed_params={how}")).unwrap());
            for http in BOTH {
                let mut client = rig.client(http).await;
                let body = long_chat();
                let (request, path) = logged_chat(&client, &body, &[]);
                let answer = client.send(request).await;
                assert_right(&answer, &body);
                assert_eq!(answer.header("x-pd-kv"), Some("missing"), "{how}");
                assert_eq!(rig.access_log_of(&path).await["reason"], "kv_missing", "{how}");
                missing += 1.0;
            }
        }
        assert_eq!(rig.until_metric(MISSING, |value| value >= missing).await, missing);
        assert_eq!(sum(&rig.decode, |stats| stats.local_prefills), missing as u64);
        // Each worker says so once for each of the two endpoints.
        let warnings = rig.envoy.log().matches("gives no usable KV parameters").count();
        assert!((1..=4).contains(&warnings), "{warnings}");
        assert!(rig.decode.iter().all(|engine| !engine.is_crashed() && engine.stats().hung == 0));
        rig.until_idle().await;
    });
}

/// A prompt that takes longer than its limit, at a server that answers others.
#[test]
fn a_slow_prompt_puts_no_server_out_and_is_computed_twice_at_most() {
    run(async {
        // With a constant weight the server of the slow prompt gets others, too.
        let pool = json!({"prefill_timeout_ms": 500, "prefill_timeout_factor": 1, "on_prefill_failure": "decode_only",
            "affinity_weight": 3});
        let rig = Rig::builder().pool(pool).start().await;
        let mut slow = rig.client(Http::One).await;
        let body = long_chat();
        let (request, path) = logged_chat(&slow, &body, &[(pd_sim::FAULT_HEADER, b"prefill:delay=2000")]);
        let others = async {
            let mut client = rig.client(Http::Two).await;
            for _ in 0..30 {
                ask(&mut client, &long_chat()).await;
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        let (answer, ()) = futures::future::join(slow.send(request), others).await;
        assert_right(&answer, &body);
        let entry = rig.access_log_of(&path).await;
        assert_eq!((&entry["decision"], &entry["reason"]), (&json!("decode_only"), &json!("prefill_timeout")));
        rig.until_metric("pd_prefill_legs_total{result=\"timeout\"}", |value| value == 1.0).await;
        for zero in [RETRIES, "pd_prefill_legs_total{result=\"unreachable\"}"] {
            assert_eq!(rig.final_metric(zero).await, 0.0, "{zero}");
        }
        assert_eq!(sum(&rig.decode, |stats| stats.local_prefills), 1);
        rig.until_idle().await;
    });
}

#[test]
fn the_limit_of_a_leg_follows_what_the_ledger_expects() {
    run(async {
        // The filter expects a second for each prompt, so the leg may take four; the floor alone would end it.
        let cost = json!({"a_ms": 1000, "b_us": 0, "c_ns": 0});
        let rig = Rig::builder().pool(json!({"prefill_timeout_ms": 100, "cost": cost, "fit": false})).start().await;
        rig.prefill.iter().for_each(|engine| engine.set_faults("delay=500").unwrap());
        let mut client = rig.client(Http::One).await;
        ask(&mut client, &long_chat()).await;
        assert_eq!(rig.until_metric("pd_prefill_legs_total{result=\"ok\"}", |value| value >= 1.0).await, 1.0);
        assert_eq!(rig.final_metric("pd_prefill_legs_total{result=\"timeout\"}").await, 0.0);
        rig.until_idle().await;
    });
}
