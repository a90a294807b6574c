//! Many requests at once with random faults at every engine: each is answered right or with an error, and nothing is left.
//! `PD_SOAK_REQUESTS` says how many; `PD_SOAK_ENGINE` names one engine.

mod director;
mod fleet;
mod mixed;
mod tally;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use pd_sim::{Engine, expected_text};
use pd_support::body::{CHAT, COMPLETIONS, request, words};
use pd_support::client::Http;
use pd_tests::answer::{is_done, text};
use pd_tests::rig::run;

use crate::engines::adapted;
use crate::support::*;

const CONCURRENT: u64 = 64;
/// A request's longest time: prefill legs by the pool's limit twice, then the decode engine's faults.
const LIMIT: Duration = Duration::from_secs(20);
/// Requests below which Envoy's own buffers and pools are still being made.
const GROWS_UNTIL: u64 = 20_000;
const FAULTS: &str = "prefill:500:0.02,prefill:reset:0.02,prefill:hang:0.002,prefill:429:0.02,prefill:400:0.01,\
    prefill:delay=30:0.05,prefill:malformed_params=null:0.02,decode:503:0.02,decode:reset:0.02,decode:die=2:0.02,\
    decode:error_event=2:0.02,decode:refuse=50:0.001";

#[derive(Default)]
struct Tally {
    right: AtomicU64,
    refused: AtomicU64,
    broken: AtomicU64,
    wrong: AtomicU64,
}

#[test]
fn random_faults_at_64_concurrent_leave_no_wrong_answer_and_nothing_in_flight() {
    let total: u64 = std::env::var("PD_SOAK_REQUESTS").ok().and_then(|text| text.parse().ok()).unwrap_or(2_000);
    let only = std::env::var("PD_SOAK_ENGINE").ok();
    let engines = [Engine::VllmNixl, Engine::Sglang, Engine::Mooncake, Engine::Trtllm];
    let engines: Vec<_> =
        engines.into_iter().filter(|engine| only.as_ref().is_none_or(|o| o == engine.name())).collect();
    run(async {
        for engine in &engines {
            let rig = adapted(*engine, |builder| {
                builder
                    .every_engine(|config| {
                        config.faults = pd_sim::parse_faults(FAULTS).unwrap();
                        config.record = 0;
                        config.lease = Duration::from_secs(2);
                    })
                    .plugin(serde_json::json!({"prefix": {"index_bytes": 65_536}}))
                    .pool(serde_json::json!({"engine": engine.name(), "prefill_timeout_ms": 3_000}))
                    .envoy(|config| config.http()["stream_idle_timeout"] = "4s".into())
            })
            .await;
            let tally = Tally::default();
            let each = total / engines.len() as u64 / CONCURRENT;
            // Resident memory once a third of the requests are through, and what caches there are full.
            let (third, through) = (AtomicU64::new(0), AtomicU64::new(0));
            let one = async |worker: u64| {
                let http = if worker.is_multiple_of(2) { Http::One } else { Http::Two };
                let mut client = rig.client(http).await;
                for i in 0..each {
                    let path = if i.is_multiple_of(3) { COMPLETIONS } else { CHAT };
                    let stream = i % 2 == 1;
                    let bytes = if i.is_multiple_of(5) { 200 } else { 3_000 };
                    let prompt = words(&format!("{worker}-{i}"), bytes);
                    let body = request(path, &prompt, &format!(r#","max_tokens":9,"stream":{stream}"#));
                    let sent = client.try_send(client.json(path, body.clone(), &[]));
                    let answer = tokio::time::timeout(LIMIT, sent).await.expect("an answer in time");
                    let count = match answer {
                        Ok(answer) if answer.status == 200 && (!stream || is_done(&answer.body)) => {
                            let is_right = text(&answer.body) == expected_text("sim", &body);
                            // A stream that says it failed, in the engine's own words.
                            let says = String::from_utf8_lossy(&answer.body).contains("\"error\":");
                            if is_right {
                                &tally.right
                            } else if says {
                                &tally.broken
                            } else {
                                &tally.wrong
                            }
                        }
                        Ok(answer) if answer.status != 200 => &tally.refused,
                        _ => {
                            client = rig.client(http).await;
                            &tally.broken
                        }
                    };
                    count.fetch_add(1, Relaxed);
                    if through.fetch_add(1, Relaxed) + 1 == each * CONCURRENT / 3 {
                        third.store(rig.envoy.resident_bytes(), Relaxed);
                    }
                }
            };
            futures::future::join_all((0..CONCURRENT).map(one)).await;
            rig.until_idle().await;
            let [right, refused, broken, wrong] =
                [&tally.right, &tally.refused, &tally.broken, &tally.wrong].map(|count| count.load(Relaxed));
            println!("{engine:?}: {right} right, {refused} refused, {broken} broken off, {wrong} wrong");
            let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            let (before, after) = (mib(third.load(Relaxed)), mib(rig.envoy.resident_bytes()));
            println!("{engine:?}: {before:.1} MiB resident after a third, {after:.1} MiB at the end");
            assert!(total < GROWS_UNTIL || after < before * 1.05 + 4.0, "{engine:?}: {before:.1} MiB, then {after:.1}");
            assert_eq!(wrong, 0, "{engine:?}");
            assert_eq!(sum(rig.engines(), |stats| stats.wrong_text), 0, "{engine:?}");
            assert!(right * 2 > each * CONCURRENT, "{engine:?}: {right} right");
            // Every worker is alive and does its work.
            rig.engines().for_each(|engine| engine.set_faults("").unwrap());
            for client in &mut rig.client_of_each_worker(Http::One).await {
                let body = short_chat();
                pd_support::wait::until("every pod is back", async || {
                    let answer = client.try_send(client.json(CHAT, body.clone(), &[])).await.ok()?;
                    (answer.status == 200).then_some(())
                })
                .await;
            }
        }
    });
}
