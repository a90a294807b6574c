//! Requests that wait in the gateway until a prefill endpoint has room.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use futures::future::join_all;
use pd_sim::Handle;
use pd_support::body::{CHAT, chat, words};
use pd_support::client::{Client, Http};
use pd_support::wait::{until, until_true};
use pd_tests::builder::Builder;
use pd_tests::rig::{Rig, entries, run};
use serde_json::{Value, json};

use crate::support::*;

const WAITING: &str = "pd_waiting_requests{pool=\"default\"}";
const PREFILL: &str = "pd_prefill_in_flight";

/// Engines whose prefill takes real time, behind a gateway with a queue.
fn queued(prefill: usize, queue: Value) -> Builder {
    let mut policy = json!({"split": {"mode": "always"}, "fit": false, "queue": {"enabled": true}});
    policy["queue"].as_object_mut().unwrap().extend(queue.as_object().unwrap().clone());
    Rig::builder().engines(prefill, 2).prefill_engines(|config, _| config.speed = 1.0).pool(policy)
}

/// Milliseconds of a leg during which all that is to wait begins to wait, on a busy machine too.
const LONG: f64 = 2_000.0;

/// Prefill endpoints of which the ledger thinks that a prompt takes ten seconds, and which take `ms`: nothing but the
/// end of a leg says that there is room.
fn unpredictable(prefill: usize, ms: f64, queue: Value) -> Builder {
    queued(prefill, queue).pool(json!({"cost": {"a_ms": 10_000.0}})).prefill_engines(move |config, _| {
        config.speed = 1.0;
        (config.a_ms, config.b_us, config.c_ns) = (ms, 0.0, 0.0);
    })
}

/// Prompts in the order in which a prefill endpoint got them, by the name that each begins with.
fn order(engine: &Handle) -> Vec<String> {
    let name = |text: String| text.split('#').nth(1).unwrap_or_default().to_owned();
    engine.requests().iter().map(|request| name(request.text())).collect()
}

/// A long chat with a name in it.
fn named(name: &str) -> String {
    chat(&[&format!("#{name}# {}", words(name, 4_000))], r#","max_tokens":2"#)
}

/// Sends a chat from a connection of its own.
async fn send(rig: &Rig, body: String, headers: &[(&str, &[u8])]) -> Duration {
    let mut client = rig.client(Http::One).await;
    send_by(&mut client, body, headers).await
}

async fn send_by(client: &mut Client, body: String, headers: &[(&str, &[u8])]) -> Duration {
    let started = Instant::now();
    let answer = client.send(client.json(CHAT, body.clone(), headers)).await;
    assert_right(&answer, &body);
    started.elapsed()
}

async fn nobody_waits(rig: &Rig) {
    rig.until_idle().await;
    until_true("nobody waits", async || rig.metric(WAITING).await == 0.0).await;
}

#[test]
fn a_burst_is_served_whole_with_one_leg_at_a_time_at_each_endpoint() {
    run(async {
        let rig = queued(2, json!({})).prefill_engines(|config, _| config.speed = 0.5).start().await;
        let bodies = (0..200).map(|i| named(&format!("burst-{i}")));
        let started = Instant::now();
        let waits = join_all(bodies.map(|body| send(&rig, body, &[]))).await;
        let took = started.elapsed();
        assert_eq!(waits.len(), 200);
        let legs: Vec<_> = rig.prefill.iter().map(|engine| engine.stats().prefill_legs).collect();
        assert_eq!(legs.iter().sum::<u64>(), 200, "each prompt once");
        assert!(legs.iter().all(|legs| (80..=120).contains(legs)), "{legs:?}");
        println!("200 requests in {took:?}, {legs:?}");
        rig.until_metric("pd_bound_total{result=\"waited\"}", |value| (150.0..=200.0).contains(&value)).await;
        nobody_waits(&rig).await;
    });
}

#[test]
fn a_request_that_one_worker_holds_goes_when_a_leg_of_another_worker_ends() {
    run(async {
        let rig = unpredictable(1, 300.0, json!({})).start().await;
        let mut clients = rig.client_of_each_worker(Http::One).await;
        let [first, second] = clients.as_mut_slice() else { panic!() };
        let mut pauses = Vec::new();
        for round in 0..5 {
            let busy = send_by(first, named(&format!("first-{round}")), &[]);
            let waits = async {
                rig.prefill[0].wait_for(|stats| stats.prefill_legs > 2 * round).await;
                send_by(second, named(&format!("second-{round}")), &[]).await
            };
            let started = Instant::now();
            futures::join!(busy, waits);
            pauses.push(started.elapsed().saturating_sub(Duration::from_millis(600)));
        }
        println!("two legs of 300 ms, one after the other at two workers, take longer by {pauses:?}");
        let least = pauses.iter().min().unwrap();
        assert!(*least < Duration::from_millis(60), "a worker is woken, not found at a tick: {pauses:?}");
        nobody_waits(&rig).await;
    });
}

#[test]
fn a_prefix_holder_gets_its_conversation_and_a_higher_priority_goes_first() {
    run(async {
        let rig = unpredictable(1, 1_500.0, json!({})).start().await;
        let busy = send(&rig, named("busy"), &[]);
        let wait = async |count: f64| rig.until_metric(WAITING, |value| value >= count).await;
        let low = async {
            rig.until_metric(PREFILL, |value| value == 1.0).await;
            send(&rig, named("low"), &[("x-llm-d-inference-objective", b"-1")]).await
        };
        let plain = async {
            wait(1.0).await;
            send(&rig, named("plain"), &[]).await
        };
        let follow_up = async {
            wait(2.0).await;
            let text = format!("#busy# {}", words("busy", 4_000));
            let body = chat(&[&text, "and", "so on"], r#","max_tokens":2"#);
            send(&rig, body, &[]).await
        };
        let high = async {
            wait(3.0).await;
            send(&rig, named("high"), &[("x-llm-d-inference-objective", b"5")]).await
        };
        futures::join!(busy, low, plain, follow_up, high);
        assert_eq!(order(&rig.prefill[0]), ["busy", "high", "busy", "plain", "low"]);
        nobody_waits(&rig).await;
    });
}

#[test]
fn a_client_that_leaves_while_it_waits_reaches_no_endpoint() {
    run(async {
        let rig = unpredictable(1, LONG, json!({})).start().await;
        for http in [Http::One, Http::Two] {
            for mut client in rig.client_of_each_worker(http).await {
                let before = rig.prefill[0].stats().prefill_legs;
                let left = rig.metric("pd_waits_left_total").await;
                let busy = send(&rig, named(&new_id("busy")), &[]);
                let leaves = async {
                    rig.prefill[0].wait_for(|stats| stats.prefill_legs > before).await;
                    let sending = client.try_send(client.json(CHAT, named(&new_id("leaves")), &[]));
                    tokio::select! {
                        answer = sending => panic!("{answer:?}"),
                        _ = rig.until_metric(WAITING, |value| value == 1.0) => {}
                    }
                    drop(client);
                    rig.until_metric("pd_waits_left_total", |value| value > left).await;
                };
                futures::join!(busy, leaves);
                nobody_waits(&rig).await;
                assert_eq!(rig.prefill[0].stats().prefill_legs, before + 1);
            }
        }
    });
}

#[test]
fn an_endpoint_that_leaves_leaves_its_requests_to_the_others() {
    run(async {
        let rig = unpredictable(2, LONG, json!({})).start().await;
        let first = send(&rig, named("busy-0"), &[]);
        // Workers that get requests in one moment do not know of each other's yet.
        let second = async {
            rig.until_metric(PREFILL, |value| value == 1.0).await;
            send(&rig, named("busy-1"), &[]).await
        };
        let waits = async {
            rig.until_metric(PREFILL, |value| value == 2.0).await;
            join_all((0..3).map(|i| send(&rig, named(&format!("waits-{i}")), &[]))).await
        };
        let leaves = async {
            rig.until_metric(WAITING, |value| value == 3.0).await;
            let stay = entries([&rig.prefill[0]], "prefill").chain(entries(&rig.decode, "decode"));
            rig.relist(&stay.collect::<Vec<_>>()).await;
        };
        futures::join!(first, second, waits, leaves);
        assert_eq!(rig.prefill[1].stats().prefill_legs, 1);
        assert_eq!(rig.prefill[0].stats().prefill_legs, 4);
        nobody_waits(&rig).await;
    });
}

#[test]
fn requests_go_on_without_a_prefill_leg_when_all_prefill_endpoints_leave() {
    run(async {
        let rig = unpredictable(1, LONG, json!({})).pool(json!({"split": {"mode": "threshold"}})).start().await;
        let busy = send(&rig, named("busy"), &[]);
        let waits = async {
            rig.until_metric(PREFILL, |value| value == 1.0).await;
            join_all((0..4).map(|i| send(&rig, named(&format!("waits-{i}")), &[]))).await
        };
        let leaves = async {
            rig.until_metric(WAITING, |value| value == 4.0).await;
            rig.relist(&entries(&rig.decode, "decode").collect::<Vec<_>>()).await;
        };
        futures::join!(busy, waits, leaves);
        assert_eq!(rig.prefill[0].stats().prefill_legs, 1);
        nobody_waits(&rig).await;
    });
}

#[test]
fn waiting_requests_outlive_a_new_configuration() {
    run(async {
        let rig = unpredictable(1, LONG, json!({})).with_listener_file().start().await;
        let busy = send(&rig, named("busy"), &[]);
        let waits = async {
            rig.until_metric(PREFILL, |value| value == 1.0).await;
            join_all((0..2).map(|i| send(&rig, named(&format!("waits-{i}")), &[]))).await
        };
        let change = async {
            rig.until_metric(WAITING, |value| value == 2.0).await;
            let mut config = rig.config.clone();
            let mut plugin = config.plugin_configuration();
            plugin["revision"] = "2".into();
            config.set_plugin_configuration(&plugin.to_string());
            let accepted = "pd_configs_total{result=\"accepted\"}";
            let before = rig.metric(accepted).await;
            rig.replace_listener(config);
            rig.until_metric(accepted, |value| value > before).await;
            // The new workers' requests stand in the same queue.
            send(&rig, named("new"), &[]).await
        };
        futures::join!(busy, waits, change);
        assert_eq!(rig.prefill[0].stats().prefill_legs, 4);
        nobody_waits(&rig).await;
    });
}

#[test]
fn beyond_the_limits_clients_get_429_or_503_with_a_reason_and_a_time() {
    run(async {
        // They wait for long enough to be seen, at the next tick, and for another request to come, on a busy machine too.
        let rig = unpredictable(1, 2.0 * LONG, json!({"max_requests": 2, "max_wait_ms": LONG as u64})).start().await;
        let busy = send(&rig, named("busy"), &[]);
        let refused = async |status: u16, reason: &str, name: &str| {
            let mut client = rig.client(Http::Two).await;
            let answer = client.post(CHAT, named(name)).await;
            assert_eq!((answer.status, answer.reason()), (status, Some(reason)), "{}", answer.text());
            assert!(answer.header("retry-after").is_some_and(|value| value.parse::<u64>().is_ok_and(|s| s >= 1)));
        };
        let waits = async {
            rig.until_metric(PREFILL, |value| value == 1.0).await;
            futures::join!(refused(503, "queue_timeout", "w-1"), refused(503, "queue_timeout", "w-2"));
        };
        let full = async {
            rig.until_metric(WAITING, |value| value == 2.0).await;
            refused(429, "queue_requests", "full").await;
        };
        futures::join!(busy, waits, full);
        nobody_waits(&rig).await;
        assert_eq!(rig.final_metric("pd_queue_refused_total{reason=\"queue_timeout\"}").await, 2.0);
        assert_eq!(rig.final_metric("pd_queue_refused_total{reason=\"queue_requests\"}").await, 1.0);
    });
}

#[test]
fn requests_wait_for_the_first_endpoint_of_a_pool_that_was_scaled_to_zero() {
    run(async {
        let builder = Rig::builder().engines(1, 1).pool(json!({"queue": {"no_endpoint_ms": 15_000}}));
        let down = |list: &mut [Value]| list.iter_mut().for_each(|entry| entry["state"] = "down".into());
        let rig = builder.list(down).start().await;
        let all = entries(&rig.prefill, "prefill").chain(entries(&rig.decode, "decode")).collect::<Vec<_>>();
        let waits = join_all((0..8).map(|i| send(&rig, named(&format!("zero-{i}")), &[])));
        let comes = async {
            rig.until_metric("pd_waiting_for_endpoint", |value| value == 8.0).await;
            rig.relist(&all).await;
            Instant::now()
        };
        let (_, came) = futures::join!(waits, comes);
        println!("8 requests were served {:?} after their endpoints came", came.elapsed());
        assert_eq!(rig.prefill[0].stats().prefill_legs, 8);
        assert_eq!(rig.until_metric("pd_waiting_for_endpoint", |value| value == 0.0).await, 0.0);
        rig.until_idle().await;
    });
}

#[test]
fn requests_wait_for_room_at_the_decode_endpoint_without_a_kv_cache_pinned() {
    run(async {
        for percent in [100, 0] {
            // A cache of 3,000 tokens, by the engine's own metrics, for prompts of 1,000. A request decodes for 600 ms.
            let rig = queued(1, json!({"decode_kv_percent": percent}))
                .engines(1, 1)
                .decode_engines(|config, _| {
                    (config.cache_tokens, config.speed, config.tpot_ms) = (3_000, 1.0, 15.0);
                })
                .control(&["--scrape-interval=0.1"])
                .start()
                .await;
            let size = async || {
                let status: Value = serde_json::from_str(&rig.ask_control("/v1/status").await?).ok()?;
                let decode = rig.decode[0].addr().to_string();
                status["endpoints"].as_array()?.iter().find(|it| it["address"] == decode)?["cache_tokens"].as_u64()
            };
            until("pd-control knows the size", async || size().await.filter(|size| (2_900..=3_000).contains(size)))
                .await;
            // A list that is sent now has the size.
            let list = |state: &str| {
                let mut list: Vec<Value> =
                    entries(&rig.prefill, "prefill").chain(entries(&rig.decode, "decode")).collect();
                list[1]["state"] = state.into();
                list
            };
            rig.relist(&list("down")).await;
            rig.relist(&list("ready")).await;
            let body =
                |i: usize| chat(&[&format!("#{i}# {}", words(&format!("room-{i}"), 4_000))], r#","max_tokens":40"#);
            let is_through = AtomicBool::new(false);
            let burst = async {
                let waits = join_all((0..8).map(|i| send(&rig, body(i), &[]))).await;
                is_through.store(true, Relaxed);
                waits
            };
            let watch = async {
                // A simulator counts a request for a moment after the gateway has seen its answer end, so a number of requests
                // counts once it has lasted for ten looks. Each request decodes for more than a hundred.
                let (mut most, mut recent) = ((0, 0), [0; 10]);
                while !is_through.load(Relaxed) {
                    let (stats, running) = (rig.prefill[0].stats(), rig.decode[0].stats().in_flight);
                    recent.rotate_left(1);
                    recent[9] = running;
                    let lasting = recent.iter().copied().min().unwrap_or_default();
                    most = (most.0.max(stats.leases_open), most.1.max(lasting));
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                most
            };
            let (waits, (pinned, at_decode)) = futures::join!(burst, watch);
            println!("{percent} %: at most {pinned} KV caches pinned, {at_decode} requests at the decode endpoint");
            assert_eq!(waits.len(), 8);
            assert_eq!(rig.decode[0].stats().decode_legs, 8);
            match percent {
                0 => assert!(pinned > 3 && at_decode > 4, "the rule is off"),
                _ => assert!(pinned <= 2 && at_decode <= 2, "{pinned} {at_decode}"),
            }
            nobody_waits(&rig).await;
        }
    });
}

/// Clock ticks of CPU time that a process has taken, 10 ms each.
fn cpu_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("a process");
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    fields[11..13].iter().map(|ticks| ticks.parse::<u64>().expect("a number")).sum()
}

/// `PD_WAITING_REQUESTS` says how many.
#[test]
fn waiting_requests_take_bounded_memory_and_no_cpu() {
    const SECONDS: u64 = 4;
    let count: usize = std::env::var("PD_WAITING_REQUESTS").ok().and_then(|text| text.parse().ok()).unwrap_or(200);
    run(async {
        let rig = unpredictable(1, 600_000.0, json!({})).pool(json!({"prefill_timeout_ms": 600_000})).start().await;
        let mut clients: Vec<Client> = Vec::new();
        for _ in 0..=count {
            // The machine may be busy with other tests.
            clients.push(rig.client(Http::One).await.with_patience(Duration::from_secs(120)));
        }
        let before = rig.envoy.resident_bytes();
        let all = join_all(clients.iter_mut().enumerate().map(|(i, client)| {
            let request = client.json(CHAT, named(&format!("waits-{i}")), &[]);
            client.try_send(request)
        }));
        let measured = async {
            // Each worker may bind one before it knows of the other's.
            rig.until_metric(WAITING, |value| value >= (count - 1) as f64).await;
            let bytes = rig.envoy.resident_bytes().saturating_sub(before) / count as u64;
            let ticks = cpu_ticks(rig.envoy.pid());
            tokio::time::sleep(Duration::from_secs(SECONDS)).await;
            let ticks = cpu_ticks(rig.envoy.pid()) - ticks;
            (bytes, ticks as f64 / (SECONDS * 100) as f64)
        };
        let (bytes, share) = tokio::select! {
            _ = all => panic!("an answer"),
            measured = measured => measured,
        };
        println!("{count} waiting requests of 4 kB: {bytes} bytes each in Envoy, {:.2} % of a core", share * 100.0);
        assert!(bytes < 64 << 10, "{bytes} bytes each");
        assert!(share < 0.05, "{share} of a core");
    });
}
