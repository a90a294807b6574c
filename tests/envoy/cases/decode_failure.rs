//! Decode pods that fail.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use futures::future::join_all;
use pd_sim::Stats;
use pd_support::body::CHAT;
use pd_support::client::{BOTH, Http};
use pd_support::wait::until;
use pd_tests::answer::is_done;
use pd_tests::rig::{Rig, run};
use serde_json::Value;

use crate::support::{ask, assert_right, long_chat, short_chat, sum};

const MOVED: &str = "pd_decode_moved_total";
const UNANSWERED: &str = "pd_decode_unanswered_total";

#[test]
fn a_refusing_decode_pod_is_an_error_to_nobody_and_comes_back() {
    run(async {
        let rig = Rig::start().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            let moved = rig.metric(MOVED).await;
            rig.refuse(&rig.decode[0]).await;
            until("a request is moved", async || {
                let mut connection = rig.client(http).await;
                ask(&mut connection, &long_chat()).await;
                ask(&mut connection, &short_chat()).await;
                (rig.metric(MOVED).await > moved).then_some(())
            })
            .await;
            for _ in 0..20 {
                ask(&mut client, &long_chat()).await;
                ask(&mut client, &short_chat()).await;
            }
            assert_eq!(sum(&rig.decode, |stats| stats.wrong_text), 0);
            rig.accept(&rig.decode[0]).await;
            let served = rig.decode[0].stats().requests;
            until("the pod is back", async || {
                ask(&mut rig.client(http).await, &long_chat()).await;
                (rig.decode[0].stats().requests > served).then_some(())
            })
            .await;
        }
        rig.until_idle().await;
        assert_eq!(rig.final_metric(UNANSWERED).await, 0.0);
        assert_eq!(
            sum(&rig.decode, |stats| stats.local_prefills),
            rig.metric("pd_requests_total{decision=\"decode_only\"}").await as u64
        );
    });
}

#[test]
fn the_next_requests_avoid_a_pod_that_refused() {
    run(async {
        let rig = Rig::start().await;
        let mut clients = rig.client_of_each_worker(Http::One).await;
        let pod = &rig.decode[1];
        // Within the pause after a failure, half a second at first, one request finds out and every worker knows. A
        // machine that is too busy for so many requests in that time is asked again.
        until("thirty requests within the pause", async || {
            rig.accept(pod).await;
            let served = pod.stats().requests;
            until("the pod is back", async || {
                ask(&mut rig.client(Http::One).await, &short_chat()).await;
                (pod.stats().requests > served).then_some(())
            })
            .await;
            rig.refuse(pod).await;
            let (before, start) = (rig.failed_connects(pod).await, Instant::now());
            for i in 0..30 {
                let client = i % clients.len();
                ask(&mut clients[client], &short_chat()).await;
            }
            let is_in_time = start.elapsed() < Duration::from_millis(500);
            let found_out = rig.failed_connects(pod).await - before;
            is_in_time.then(|| assert_eq!(found_out, 1))
        })
        .await;
    });
}

#[test]
fn with_every_decode_pod_dead_there_is_an_error_and_nothing_stays_counted() {
    run(async {
        let rig = Rig::start().await;
        for engine in &rig.decode {
            rig.refuse(engine).await;
        }
        for http in BOTH {
            for client in &mut rig.client_of_each_worker(http).await {
                for body in [long_chat(), short_chat()] {
                    let answer = client.post(CHAT, body).await;
                    assert_eq!(answer.status, 503, "{}", answer.text());
                    assert!(!answer.body.is_empty());
                }
            }
        }
        rig.until_idle().await;
        rig.until_metric(UNANSWERED, |value| value == 8.0).await;
        for engine in &rig.decode {
            rig.accept(engine).await;
        }
        for http in BOTH {
            for client in &mut rig.client_of_each_worker(http).await {
                until("pods come back", async || {
                    let request = client.json(CHAT, short_chat(), &[]);
                    client.try_send(request).await.is_ok_and(|answer| answer.status == 200).then_some(())
                })
                .await;
            }
        }
        rig.until_idle().await;
    });
}

#[test]
fn an_error_of_the_decode_pod_is_the_clients() {
    run(async {
        let rig = Rig::start().await;
        for (http, fault) in BOTH.into_iter().zip(["500", "429"]) {
            rig.decode.iter().for_each(|engine| engine.set_faults(fault).unwrap());
            let mut client = rig.client(http).await;
            for body in [long_chat(), short_chat()] {
                let answer = client.post(CHAT, body).await;
                assert_eq!(answer.status.to_string(), fault);
                assert_eq!(answer.json()["error"]["message"], format!("fault: {fault}"));
            }
        }
        assert_eq!(rig.final_metric(MOVED).await, 0.0, "parameters are good once: nothing is sent twice");
        let seen = |stats: &Stats| stats.requests;
        assert_eq!(sum(&rig.decode, seen), 4);
        rig.until_idle().await;
    });
}

#[test]
fn a_decode_pod_that_dies_in_mid_stream_breaks_the_stream_off() {
    run(async {
        let rig = Rig::start().await;
        rig.decode.iter().for_each(|engine| engine.set_faults("die=3").unwrap());
        for http in BOTH {
            let mut client = rig.client(http).await;
            let body = long_chat().replace("\"max_tokens\":8", "\"max_tokens\":30,\"stream\":true");
            let stream = client.open(client.json(CHAT, body, &[])).await;
            assert_eq!(stream.status, 200);
            // What has come, if it all has: never with the end that a whole stream has.
            assert!(!stream.rest().await.is_ok_and(|body| is_done(&body)));
        }
        rig.decode.iter().for_each(|engine| engine.set_faults("").unwrap());
        let mut client = rig.client(Http::Two).await;
        let body = long_chat();
        assert_right(&client.post(CHAT, body.clone()).await, &body);
        rig.until_idle().await;
    });
}

/// Envoy's limit for a stream that stalls is also the one for its first byte.
#[test]
fn a_decode_pod_without_a_first_byte_ends_at_envoys_limit() {
    run(async {
        let rig = Rig::builder().envoy(|config| config.http()["stream_idle_timeout"] = "1s".into()).start().await;
        rig.decode.iter().for_each(|engine| engine.set_faults("hang").unwrap());
        for http in BOTH {
            let mut client = rig.client(http).await;
            for body in [long_chat(), long_chat().replace("\"max_tokens\":8", "\"max_tokens\":8,\"stream\":true")] {
                let sent = std::time::Instant::now();
                let answer = client.post(CHAT, body).await;
                assert_eq!(answer.status, 504, "{}", answer.text());
                assert!(sent.elapsed().as_secs() < 5, "{:?}", sent.elapsed());
            }
        }
        rig.decode.iter().for_each(|engine| engine.set_faults("").unwrap());
        rig.until_idle().await;
    });
}

/// No connection fails and no error comes. The only evidence is that other endpoints answer.
#[test]
fn a_decode_pod_that_is_silent_while_another_one_answers_is_avoided() {
    run(async {
        let rig = Rig::builder().pool(serde_json::json!({"prefill_timeout_ms": 1_000}));
        let rig = rig.envoy(|config| config.http()["stream_idle_timeout"] = "3s".into()).start().await;
        let dead = &rig.decode[0];
        dead.set_faults("hang").unwrap();
        let is_over = AtomicBool::new(false);
        let flow = async |number: usize| {
            let mut client = rig.client(BOTH[number % 2]).await;
            while !is_over.load(Relaxed) {
                let request = client.json(CHAT, short_chat(), &[]);
                drop(client.try_send(request).await);
            }
        };
        let found_out = async {
            rig.until_metric(UNANSWERED, |value| value >= 1.0).await;
            let address = dead.addr().to_string();
            until("the status shows it", async || {
                let status: Value = serde_json::from_str(&rig.ask_control("/v1/status").await?).ok()?;
                let mut ejected =
                    status["gateways"].as_array()?.iter().flat_map(|it| it["failing"].as_array()).flatten();
                ejected.any(|it| *it == *address).then_some(())
            })
            .await;
            is_over.store(true, Relaxed);
        };
        futures::future::join(found_out, join_all((0..4).map(flow))).await;
        rig.decode.iter().for_each(|engine| engine.set_faults("").unwrap());
        rig.until_idle().await;
    });
}

#[test]
fn an_error_event_in_a_stream_reaches_the_client() {
    run(async {
        let rig = Rig::start().await;
        rig.decode.iter().for_each(|engine| engine.set_faults("error_event=2").unwrap());
        let mut client = rig.client(Http::One).await;
        let body = long_chat().replace("\"max_tokens\":8", "\"max_tokens\":30,\"stream\":true");
        let answer = client.post(CHAT, body).await;
        assert!(answer.status == 200 && answer.text().contains("\"error\":"), "{}", answer.text());
        rig.until_idle().await;
    });
}
