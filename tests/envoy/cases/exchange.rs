//! Two Envoys and one pd-control: each knows what the other one does.

use std::time::Duration;

use pd_sim::Handle;
use pd_support::body::{CHAT, chat, words};
use pd_support::client::Http;
use pd_support::wait::until;
use pd_tests::answer::text;
use pd_tests::rig::{Rig, run};
use serde_json::Value;
use tokio::time::sleep;

use crate::support::{ask, assert_right, long_chat, new_id, short_chat, sum};

/// A few ticks of the exchange, on a machine that is busy.
const HEARD: Duration = Duration::from_millis(400);

async fn status(rig: &Rig) -> Value {
    rig.ask_control("/v1/status").await.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
}

/// Two Envoys that have found each other.
async fn two() -> (Rig, Rig) {
    let first = Rig::start().await;
    let second = first.beside().await;
    until_exchanged(&first, &second).await;
    (first, second)
}

async fn until_exchanged(first: &Rig, second: &Rig) {
    until("both exchange", async || {
        let status = status(first).await;
        (status["gateways"].as_array().map(Vec::len) == Some(2)).then_some(())
    })
    .await;
    // An Envoy that knows no other one sends one exchange request a second; with another one it sends twenty.
    for rig in [first, second] {
        let before = rig.metric(OK).await;
        rig.until_metric(OK, |value| value >= before + 4.0).await;
    }
}

const OK: &str = "pd_exchanges_total{result=\"ok\"}";

/// Conversations whose turns alternate between the Envoys; returns prompt tokens that a prefill pod could have had
/// cached, and those that it had.
async fn converse(first: &Rig, second: &Rig) -> (u64, u64) {
    let cached = || sum(&first.prefill, |stats| stats.cached_tokens);
    let mut clients = [first.client(Http::Two).await, second.client(Http::Two).await];
    let (mut held, mut hit) = (0, 0);
    for conversation in 0..6 {
        let mut turns = vec![words(&new_id("turn"), 6_000)];
        for turn in 0..4 {
            let texts: Vec<&str> = turns.iter().map(String::as_str).collect();
            let body = chat(&texts, r#","max_tokens":10"#);
            let had = cached();
            let answer = clients[(conversation + turn) % 2].post(CHAT, body.clone()).await;
            assert_right(&answer, &body);
            if turn > 0 {
                // Four bytes are a token; a block of each turn may be incomplete.
                let before: usize = turns.iter().take(turns.len() - 2).map(String::len).sum();
                held += (before as u64 / 4).saturating_sub(20 * turn as u64);
                hit += cached() - had;
            }
            turns.push(text(&answer.body));
            turns.push(words(&new_id("turn"), 3_000));
            sleep(HEARD).await;
        }
    }
    (held, hit)
}

#[test]
fn a_conversation_keeps_its_pods_whichever_envoy_it_comes_through() {
    run(async {
        let (first, mut second) = two().await;
        let (held, hit) = converse(&first, &second).await;
        assert!(hit >= held, "{hit} of {held} tokens");

        // An Envoy that is new has it all from pd-control.
        drop(second);
        second = first.beside().await;
        until_exchanged(&first, &second).await;
        let (held, hit) = converse(&first, &second).await;
        assert!(hit >= held, "{hit} of {held} tokens with a new Envoy");
    });
}

#[test]
fn a_pod_that_one_envoy_keeps_busy_is_busy_to_the_other() {
    run(async {
        let (first, second) = two().await;
        let of = |engine: &Handle| engine.stats().requests;
        first.decode.iter().for_each(|engine| engine.set_faults("delay=6000").unwrap());
        let before: Vec<u64> = first.decode.iter().map(of).collect();
        let mut client = first.client(Http::Two).await;
        // More than the load of a request that just ended and whose end the other worker has not read yet.
        let body = chat(&[&words(&new_id("prompt"), 40_000)], r#","max_tokens":8"#);
        let held = tokio::spawn(async move { ask(&mut client, &body).await });
        let busy =
            until("a decode pod has it", async || (0..2).find(|index| of(&first.decode[*index]) > before[*index]))
                .await;
        first.decode.iter().for_each(|engine| engine.set_faults("").unwrap());
        sleep(HEARD).await;
        let had = of(&first.decode[busy]);
        let mut clients = second.client_of_each_worker(Http::Two).await;
        for i in 0..16 {
            ask(&mut clients[i % 2], &long_chat()).await;
        }
        assert!(!held.is_finished(), "the machine is too slow for this test");
        assert_eq!(of(&first.decode[busy]), had, "every worker of the other Envoy spares it");
        held.await.unwrap();
        sleep(HEARD).await;
        for i in 0..32 {
            ask(&mut clients[i % 2], &long_chat()).await;
        }
        assert!(of(&first.decode[busy]) > had, "and uses it again");
    });
}

#[test]
fn without_pd_control_each_envoy_goes_on_by_itself_and_later_they_find_each_other_again() {
    run(async {
        let (mut first, second) = two().await;
        first.kill_control();
        let failed = "pd_exchanges_total{result=\"failed\"}";
        for rig in [&first, &second] {
            rig.until_metric(failed, |value| value > 0.0).await;
            let mut client = rig.client(Http::Two).await;
            for _ in 0..10 {
                ask(&mut client, &short_chat()).await;
            }
        }
        first.start_control().await;
        until_exchanged(&first, &second).await;
        let (held, hit) = converse(&first, &second).await;
        assert!(hit >= held, "{hit} of {held} tokens");
        // They report once a second.
        sleep(Duration::from_millis(1_500)).await;
        let status = status(&first).await;
        for gateway in status["gateways"].as_array().unwrap() {
            assert_eq!(gateway["endpoints"], 4, "{status:#}");
            let workers: u64 =
                gateway["generations"].as_array().unwrap().iter().filter_map(|of| of["workers"].as_u64()).sum();
            // The main thread has a filter too.
            assert!((2..=3).contains(&workers), "{status:#}");
            assert!(!gateway["decisions"].as_array().unwrap().is_empty(), "{status:#}");
        }
    });
}
