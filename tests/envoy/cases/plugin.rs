//! The plugin configuration, good and bad, at the start and as an update.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use pd_support::body::CHAT;
use pd_support::client::{BOTH, Http};
use pd_support::config::merge;
use pd_support::wait::until;
use pd_tests::rig::{Rig, WORKERS, entries, run};
use serde_json::{Value, json};

use crate::support::{ask, assert_rejected, long_chat, short_chat, sum};

const REFUSED: &str = "pd_configs_total{result=\"refused\"}";
const ACCEPTED: &str = "pd_configs_total{result=\"accepted\"}";

#[test]
fn a_refused_configuration_is_named_in_every_answer() {
    run(async {
        for (text, key) in [(r#"{"pools":{"default":{"splt":{}}}}"#, "splt"), ("[", "plugin configuration")] {
            let rig = Rig::builder().plugin_text(text).start().await;
            for http in BOTH {
                for client in &mut rig.client_of_each_worker(http).await {
                    for body in [long_chat(), short_chat(), "{".to_owned()] {
                        let answer = client.post(CHAT, body).await;
                        assert_rejected(&answer, 503, "not_configured");
                        let message = answer.json()["error"]["message"].to_string();
                        assert!(message.contains(key), "{message}");
                    }
                    assert_rejected(&client.get("/v1/models").await, 503, "not_configured");
                }
            }
            rig.until_metric(REFUSED, |value| value >= WORKERS as f64).await;
            assert!(rig.admin.get("/ready").await.is_some(), "Envoy is well");
            assert_eq!(sum(rig.engines(), |stats| stats.requests), 0);
        }
    });
}

/// A rig whose listener can be replaced.
async fn updatable() -> Rig {
    Rig::builder().with_listener_file().pool(json!({"split": {"mode": "always"}})).start().await
}

fn with_plugin(rig: &Rig, patch: &Value) -> pd_support::config::Config {
    let mut config = rig.config.clone();
    let mut plugin = config.plugin_configuration();
    merge(&mut plugin, patch);
    config.set_plugin_configuration(&plugin.to_string());
    config
}

/// Fewest requests that a client sends while a listener is replaced, however fast that is.
const LEAST: u64 = 40;

/// Sends one request after the other, now and then on a new connection.
async fn traffic(rig: &Rig, http: Http, stop: &AtomicBool) {
    let mut sent = 0;
    let mut client = rig.client(http).await;
    while !stop.load(Relaxed) || sent < LEAST {
        if sent % 20 == 19 {
            client = rig.client(http).await;
        }
        ask(&mut client, &short_chat()).await;
        sent += 1;
    }
}

/// Replaces the listener under traffic, waits until `follows` holds, and checks that no request was lost.
async fn update(rig: &Rig, patch: &Value, follows: impl AsyncFnOnce()) {
    let stop = Arc::new(AtomicBool::new(false));
    let change = async {
        rig.replace_listener(with_plugin(rig, patch));
        follows().await;
        stop.store(true, Relaxed);
    };
    futures::join!(traffic(rig, Http::One, &stop), traffic(rig, Http::Two, &stop), change);
}

async fn legs_of(rig: &Rig, bodies: usize) -> u64 {
    let before = sum(&rig.prefill, |stats| stats.prefill_legs);
    for http in BOTH {
        for client in &mut rig.client_of_each_worker(http).await {
            for _ in 0..bodies {
                ask(client, &short_chat()).await;
            }
        }
    }
    sum(&rig.prefill, |stats| stats.prefill_legs) - before
}

#[test]
fn a_refused_update_leaves_the_last_good_one_in_force() {
    run(async {
        let rig = updatable().await;
        assert_eq!(legs_of(&rig, 2).await, 8);
        let refused = rig.metric(REFUSED).await;
        let bad = json!({"pools": {"default": {"prefill_attempts": 0}}, "revision": "bad"});
        update(&rig, &bad, async || {
            rig.until_metric(REFUSED, |value| value >= refused + WORKERS as f64).await;
        })
        .await;
        // Every request of the new listener is still split.
        assert_eq!(legs_of(&rig, 2).await, 8);
        until("the log names the key", async || {
            rig.envoy.log().contains("pools.default.prefill_attempts").then_some(())
        })
        .await;
        rig.until_idle().await;
    });
}

#[test]
fn a_good_update_takes_effect_and_loses_no_request() {
    run(async {
        let rig = updatable().await;
        assert_eq!(legs_of(&rig, 2).await, 8);
        let accepted = rig.metric(ACCEPTED).await;
        let never = json!({"pools": {"default": {"split": {"mode": "never"}}}});
        update(&rig, &never, async || {
            rig.until_metric(ACCEPTED, |value| value >= accepted + WORKERS as f64).await;
        })
        .await;
        assert_eq!(legs_of(&rig, 2).await, 0);
        assert_eq!(rig.metric("pd_endpoints").await, 4.0);
        // The new generation of workers follows the list, while the old one is still there.
        let list: Vec<Value> = entries([&rig.decode[1]], "decode").collect();
        rig.relist(&list).await;
        let old = rig.decode[0].stats().requests;
        assert_eq!(legs_of(&rig, 5).await, 0);
        assert_eq!(rig.decode[0].stats().requests, old);
        rig.until_idle().await;
    });
}
