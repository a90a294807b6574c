//! What an operator sees: access log, metrics, memory.

use futures::future::join_all;
use pd_support::body::{CHAT, words};
use pd_support::client::{BOTH, Http};
use pd_support::wait::until;
use pd_tests::rig::{Rig, run};
use pd_tests::shared::shared;
use serde_json::{Value, json};

use crate::support::{assert_right, logged_chat, long_chat, new_id, recorded, short_chat};

#[test]
fn the_access_log_explains_every_decision() {
    run(async {
        let rig = shared().await;
        for http in BOTH {
            rig.engines().for_each(|engine| engine.clear_requests());
            let mut client = rig.client(http).await;
            let body = long_chat();
            let (request, path) = logged_chat(&client, &body, &[]);
            assert_right(&client.send(request).await, &body);
            let address = |engines: &[pd_sim::Handle]| {
                let served = engines.iter().find(|engine| !engine.requests().is_empty()).unwrap();
                Value::from(served.addr().to_string())
            };
            let entry = rig.access_log_of(&path).await;
            assert_eq!(entry["prefill"], address(&rig.prefill));
            assert_eq!((&entry["decode"], &entry["upstream"]), (&address(&rig.decode), &address(&rig.decode)));
            assert_eq!((&entry["decision"], &entry["reason"]), (&json!("split"), &json!("prefilled")));
            assert_eq!(
                (&entry["status"], &entry["path"], &entry["method"]),
                (&json!(200), &json!(path), &json!("POST"))
            );
            for number in ["matched_tokens", "prefill_ms"] {
                assert!(entry[number].as_str().is_some_and(|text| text.parse::<u64>().is_ok()), "{number} {entry}");
            }

            let (request, path) = logged_chat(&client, &short_chat(), &[]);
            client.send(request).await;
            let entry = rig.access_log_of(&path).await;
            assert_eq!((&entry["decision"], &entry["reason"]), (&json!("decode_only"), &json!("short")));
            assert!(entry["prefill"].is_null() && entry["prefill_ms"].is_null(), "{entry}");

            let (request, path) = logged_chat(&client, "{}", &[]);
            client.send(request).await;
            let entry = rig.access_log_of(&path).await;
            assert_eq!((&entry["decision"], &entry["reason"]), (&json!("rejected"), &json!("missing_model")));
            assert_eq!((&entry["status"], &entry["upstream"]), (&json!(400), &Value::Null));

            let path = format!("/v1/models?{}", new_id("request"));
            client.get(&path).await;
            assert_eq!(rig.access_log_of(&path).await["decision"], "passed");
        }
    });
}

#[test]
fn metrics_count_what_happened() {
    run(async {
        let rig = Rig::start().await;
        for http in BOTH {
            for client in &mut rig.client_of_each_worker(http).await {
                for body in [long_chat(), short_chat(), "{}".to_owned()] {
                    client.post(CHAT, body).await;
                }
                client.get("/v1/models").await;
            }
        }
        for decision in ["split", "decode_only", "rejected", "passed"] {
            rig.until_metric(&format!("pd_requests_total{{decision=\"{decision}\"}}"), |value| value == 4.0).await;
        }
        let metrics = rig.metrics().await;
        assert_eq!(metrics["pd_prefill_legs_total{result=\"ok\"}"], 4.0);
        let prompts: usize = recorded(&rig.decode).iter().map(|request| request.body.len()).sum();
        let tokens = metrics["pd_prompt_tokens_total"];
        assert!((tokens * 4.0 - prompts as f64).abs() < 0.5 * prompts as f64, "{tokens} tokens of {prompts} bytes");
        for zero in ["pd_host_errors_total", "pd_kv_missing_total", "pd_decode_unanswered_total"] {
            assert_eq!(metrics.get(zero).copied().unwrap_or_default(), 0.0, "{zero}");
        }
        rig.until_idle().await;
    });
}

#[test]
fn the_version_that_runs_is_a_label() {
    run(async {
        let rig = shared().await;
        let metrics = rig.metrics().await;
        let (name, seen) = metrics.iter().find(|(name, _)| name.starts_with("pd_build_seen_seconds")).unwrap();
        for label in [concat!("version=\"", env!("CARGO_PKG_VERSION"), "\""), "build=\"", "wire=\""] {
            assert!(name.contains(label), "{name}");
        }
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
        assert!((now - seen).abs() < 5.0, "{seen}, now {now}");
        assert!(rig.envoy.log().contains(concat!("pd-filter ", env!("CARGO_PKG_VERSION"))));
    });
}

#[test]
fn memory_stays_where_it_is() {
    run(async {
        // The smallest index, so that it is full soon.
        let rig = Rig::builder()
            .every_engine(|config| config.record = 0)
            .plugin(json!({"prefix": {"index_bytes": 65_536}}))
            .start()
            .await;
        let batch = async |requests: usize| {
            let one = async |i: usize| {
                let mut client = rig.client(BOTH[i % 2]).await;
                for request in 0..requests / 8 {
                    let prompt = words(&new_id("memory"), 4_000);
                    match request % 4 {
                        0 => drop(client.post(CHAT, short_chat()).await),
                        1 => drop(client.post(CHAT, "{\"model\":").await),
                        _ => {
                            let stream = format!(r#","max_tokens":4,"stream":{}"#, request % 2 == 0);
                            let body = pd_support::body::chat(&[&prompt], &stream);
                            assert_right(&client.post(CHAT, body.clone()).await, &body);
                        }
                    }
                }
            };
            join_all((0..8).map(one)).await;
            rig.until_idle().await;
            rig.envoy.resident_bytes() as f64 / (1 << 20) as f64
        };
        let before = batch(3_000).await;
        let after = batch(3_000).await;
        println!("resident after 3,000 requests: {before:.1} MiB, after 6,000: {after:.1} MiB");
        assert!(after < before * 1.03, "{before:.1} MiB, then {after:.1} MiB");
    });
}

/// What the status page shows of traffic: rates and shares of pools and endpoints, and what became of requests, of all workers.
#[test]
fn the_status_says_what_endpoints_served_and_how() {
    run(async {
        let rig = Rig::builder().engines(1, 2).every_engine(|engine| engine.speed = 0.05).start().await;
        let mut client = rig.client(Http::One).await;
        let refused = r#"{"model":"sim"}x"#;
        let shown = until("the figures", async || {
            for body in [&long_chat(), &short_chat()] {
                assert_right(&client.post(CHAT, body.clone()).await, body);
            }
            assert_eq!(client.post(CHAT, refused).await.status, 400);
            let status: Value = serde_json::from_str(&rig.ask_control("/v1/status").await?).ok()?;
            let pool = &status["pools"][0]["figures"];
            let is_known = ["rate", "split_share", "hit_share", "first_ms"].iter().all(|name| pool[*name].is_number());
            let envoy = &status["gateways"][0];
            let decisions = envoy["decisions"].as_array()?;
            let of = |decision: &str| {
                let is_whole =
                    |it: &&Value| it["decision"] == decision && (it["total_ms"] != 0 || decision == "rejected");
                decisions.iter().find(is_whole).cloned()
            };
            let found = (of("split")?, of("decode_only")?, of("rejected")?);
            let is_refused = envoy["refused"].as_f64().is_some_and(|rate| rate > 0.0);
            (is_known && is_refused && pool["spark"].as_array()?.len() > 3).then_some((status, found))
        });
        let (status, (split, whole, rejected)) = shown.await;
        let share = status["pools"][0]["figures"]["split_share"].as_f64().unwrap();
        assert!((share - 0.5).abs() < 0.1, "half of the requests are split: {share}");
        assert_eq!(status["gateways"][0]["name"], "local", "the id of the node");
        for it in [&split, &whole] {
            assert_eq!(it["status"], 200);
            let [first, total] = ["first_ms", "total_ms"].map(|name| it[name].as_u64().unwrap());
            assert!(0 < first && first <= total && total < 60_000, "{it}");
        }
        assert!(split["prefill_ms"].as_u64().is_some_and(|ms| ms > 0), "{split}");
        assert_eq!((&whole["prefill_ms"], &rejected["status"]), (&json!(0), &json!(400)));
        let of_role = |role: &str| {
            let endpoints = status["endpoints"].as_array().unwrap().iter().filter(|it| it["role"] == role);
            endpoints.map(|it| it["figures"]["rate"].as_f64().unwrap()).sum::<f64>()
        };
        assert!((of_role("decode") - 2.0 * of_role("prefill")).abs() < 0.2 * of_role("decode"), "{status:#}");
    });
}
