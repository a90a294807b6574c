//! Requests go where their prompt's beginning is cached.

use futures::future::join_all;
use pd_sim::Handle;
use pd_support::body::{CHAT, chat, words};
use pd_support::client::{BOTH, Client, Http};
use pd_support::port::Port;
use pd_support::wait::until;
use pd_tests::answer::text;
use pd_tests::rig::{Rig, entries, run};
use serde_json::{Value, json};

use crate::support::{assert_right, decode_process, engine_process, logged_chat, long_chat, new_id, sum};

fn cached(engines: &[Handle]) -> u64 {
    sum(engines, |stats| stats.cached_tokens)
}

#[test]
fn a_second_turn_goes_to_the_pods_that_hold_the_first() {
    run(async {
        let rig = Rig::start().await;
        for http in BOTH {
            let mut clients = rig.client_of_each_worker(http).await;
            for conversation in 0..8 {
                // Turns alternate between the workers, and the conversations' first turns too.
                let mut turns = vec![words(&new_id("turn"), 6_000)];
                let mut before_bytes = 0;
                for turn in 0..4 {
                    let client = &mut clients[(conversation + turn) % 2];
                    let texts: Vec<&str> = turns.iter().map(String::as_str).collect();
                    let body = chat(&texts, r#","max_tokens":10"#);
                    let had = cached(&rig.prefill);
                    let answer = client.post(CHAT, body.clone()).await;
                    assert_right(&answer, &body);
                    let hit_tokens = cached(&rig.prefill) - had;
                    // Four bytes are a token; a block of each turn may be incomplete.
                    let held_tokens = before_bytes / 4;
                    assert!(
                        hit_tokens + 20 * turn as u64 >= held_tokens,
                        "{http:?} conversation {conversation} turn {turn}: {hit_tokens} of {held_tokens} tokens"
                    );
                    before_bytes = turns.iter().map(String::len).sum::<usize>() as u64;
                    turns.push(text(&answer.body));
                    turns.push(words(&new_id("turn"), 3_000));
                }
            }
        }
        assert_eq!(sum(&rig.decode, |stats| stats.decode_legs), 64, "every rest was long enough to be split");
    });
}

#[test]
fn a_small_rest_is_left_to_the_decode_pod_that_holds_the_prefix() {
    run(async {
        let rig = Rig::start().await;
        for http in BOTH {
            // Each worker knows what it has routed itself.
            for mut client in rig.client_of_each_worker(http).await {
                for _ in 0..5 {
                    let first = words(&new_id("turn"), 6_000);
                    let body = chat(&[&first], r#","max_tokens":10"#);
                    let answer = client.post(CHAT, body.clone()).await;
                    assert_right(&answer, &body);
                    let (legs, had) = (sum(&rig.prefill, |stats| stats.prefill_legs), cached(&rig.decode));
                    let body = chat(&[&first, &text(&answer.body), "and then?"], r#","max_tokens":10"#);
                    let (request, path) = logged_chat(&client, &body, &[]);
                    assert_right(&client.send(request).await, &body);
                    assert_eq!(sum(&rig.prefill, |stats| stats.prefill_legs), legs, "no prefill leg");
                    assert!(cached(&rig.decode) - had >= 1_480, "{} of 1500 tokens", cached(&rig.decode) - had);
                    let entry = rig.access_log_of(&path).await;
                    assert_eq!((&entry["decision"], &entry["reason"]), (&json!("decode_only"), &json!("cached")));
                    let matched: u64 = entry["matched_tokens"].as_str().unwrap_or_default().parse().unwrap();
                    assert!((1_300..1_600).contains(&matched), "{matched}");
                }
            }
        }
    });
}

/// Clients mark where a provider's cache is to end, and the mark moves with each turn (BerriAI/litellm#27950,
/// 0xPlaygrounds/rig#2170).
#[test]
fn a_mark_of_the_providers_cache_that_moves_hides_nothing() {
    run(async {
        let rig = Rig::start().await;
        let mut client = rig.client(Http::One).await;
        let (ours, theirs) =
            (r#""cache_control":{"type":"ephemeral"}"#, r#""prompt_cache_breakpoint":{"mode":"explicit"}"#);
        for (api, key, limit, kind, mark) in [
            ("/v1/messages", "messages", "max_tokens", "text", ours),
            (CHAT, "messages", "max_tokens", "text", ours),
            (CHAT, "messages", "max_tokens", "text", theirs),
            ("/v1/responses", "input", "max_output_tokens", "input_text", ours),
            ("/v1/responses", "input", "max_output_tokens", "input_text", theirs),
        ] {
            let prompt = words(&new_id("marked"), 6_000);
            let marked =
                |text: &str| format!(r#"{{"role":"user","content":[{{"type":"{kind}","text":"{text}",{mark}}}]}}"#);
            let plain = format!(r#"{{"role":"user","content":"{prompt}"}},{{"role":"assistant","content":"yes"}}"#);
            for (turns, reason) in [(marked(&prompt), "prefilled"), (format!("{plain},{}", marked("go on")), "cached")]
            {
                let path = format!("{api}?{}", new_id("request"));
                let body = format!(r#"{{"model":"sim","{limit}":4,"{key}":[{turns}]}}"#);
                let answer = client.post(&path, body).await;
                assert_eq!(answer.status, 200, "{}", answer.text());
                assert_eq!(rig.access_log_of(&path).await["reason"], reason, "{api} {mark}");
            }
        }
    });
}

#[test]
fn the_threshold_is_the_configurations() {
    run(async {
        let rig = Rig::builder().pool(json!({"split": {"mode": "threshold", "uncached_tokens": 2_000}})).start().await;
        let mut client = rig.client(Http::Two).await;
        for (bytes, legs) in [(7_000, 0), (9_000, 1)] {
            let body = chat(&[&words(&new_id("turn"), bytes)], r#","max_tokens":4"#);
            assert_right(&client.post(CHAT, body.clone()).await, &body);
            assert_eq!(sum(&rig.prefill, |stats| stats.prefill_legs), legs, "{bytes} bytes");
        }
    });
}

/// Engines take the time that a real one takes, so that there is a load to balance.
async fn assert_no_herd(clients: usize, tail_bytes: usize) {
    let pool = json!({"split": {"mode": "always"}});
    let rig = Rig::builder().pool(pool).every_engine(|config| config.speed = 1.0).start().await;
    let system = words("the system prompt that everybody has", 6_000);
    let one = async |client: usize| {
        let mut connection = rig.client(BOTH[client % 2]).await;
        for request in 0..200 / clients {
            let tail = words(&format!("{client} {request}"), tail_bytes);
            let messages: Value = json!([{"role": "system", "content": system}, {"role": "user", "content": tail}]);
            let body = format!(r#"{{"model":"sim","messages":{messages},"max_tokens":2}}"#);
            assert_right(&connection.post(CHAT, body.clone()).await, &body);
        }
    };
    join_all((0..clients).map(one)).await;
    let legs: Vec<u64> = rig.prefill.iter().map(|engine| engine.stats().prefill_legs).collect();
    let total: u64 = legs.iter().sum();
    println!("tails of {tail_bytes} bytes: prefill legs {legs:?}");
    assert_eq!(total as usize, 200 / clients * clients);
    assert!(legs.iter().all(|legs| 10 * legs >= 3 * total), "each gets 30 %: {legs:?}");
}

#[test]
fn a_hot_system_prompt_does_not_herd_requests_onto_one_pod() {
    run(assert_no_herd(8, 2_000));
}

#[test]
fn neither_does_one_with_short_questions_behind_it() {
    run(assert_no_herd(40, 200));
}

/// A server that restarts at the same address has an empty cache.
#[test]
fn what_a_server_held_is_forgotten_when_nothing_listens_there() {
    run(async {
        let rig = Rig::builder().engines(1, 1).start().await;
        let mut client = rig.client(Http::One).await;
        let body = long_chat();
        let reason = async |client: &mut Client| {
            let (request, path) = logged_chat(client, &body, &[]);
            let answer = client.send(request).await;
            (answer.status, rig.access_log_of(&path).await["reason"].clone())
        };
        assert_eq!(reason(&mut client).await, (200, "prefilled".into()));
        assert_eq!(reason(&mut client).await, (200, "cached".into()));
        rig.refuse(&rig.decode[0]).await;
        assert_eq!(reason(&mut client).await.0, 503);
        rig.accept(&rig.decode[0]).await;
        assert_eq!(
            reason(&mut client).await,
            (200, "prefilled".into()),
            "the prompt is computed by the prefill server"
        );
        rig.until_metric("pd_caches_forgotten_total", |value| value >= 1.0).await;
        rig.until_idle().await;
    });
}

/// A restart between two requests, which no request meets; and a flap of readiness without one.
/// llm-d/llm-d-router#2853: a restart in place went unnoticed.
#[test]
fn what_a_server_held_is_forgotten_when_its_process_is_another_one_and_not_when_it_was_unready() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let port = Port::reserve();
        let process = decode_process(directory.path(), port.address()).await;
        let options = ["--scrape-interval", "0.2"];
        let rig = Rig::builder().engines(1, 0).other(port.address(), "decode").control(&options).start().await;
        let decode = port.address().to_string();
        let epoch = async || {
            let status: Value = serde_json::from_str(&rig.ask_control("/v1/status").await?).ok()?;
            status["endpoints"].as_array()?.iter().find(|it| it["address"] == decode)?["cache_epoch"].as_u64()
        };
        let first = until("pd-control knows the process", &epoch).await;
        let mut clients = rig.client_of_each_worker(Http::One).await;
        let body = long_chat();
        let mut reasons = async |turn: usize| {
            let client = &mut clients[turn % 2];
            let (request, path) = logged_chat(client, &body, &[]);
            assert_right(&client.send(request).await, &body);
            rig.access_log_of(&path).await["reason"].clone()
        };
        assert_eq!((reasons(0).await, reasons(1).await), (json!("prefilled"), json!("cached")));

        // Unready for a moment.
        let list = |state: &str| {
            let mut list: Vec<Value> = entries(&rig.prefill, "prefill").collect();
            list.push(json!({"address": decode, "role": "decode", "state": state}));
            list
        };
        rig.relist(&list("down")).await;
        rig.relist(&list("ready")).await;
        assert_eq!((reasons(0).await, reasons(1).await), (json!("cached"), json!("cached")));

        // Another process at the same address.
        let applied = "pd_snapshots_total{result=\"applied\"}";
        let before = rig.metric(applied).await;
        drop(process);
        let _process = decode_process(directory.path(), port.address()).await;
        until("pd-control knows the new process", async || epoch().await.filter(|epoch| *epoch != first)).await;
        rig.until_metric(applied, |value| value >= before + 2.0).await;
        assert_eq!((reasons(1).await, reasons(0).await), (json!("prefilled"), json!("cached")));
        rig.until_idle().await;
    });
}

/// No connection is refused, and nobody looks at the engine: only its answers show that it holds nothing any more. Whole
/// answers and streams, from two workers, of conversations that go on and of new ones.
/// azrtydxb/Fastllm-proxy#22: nothing verified what a restarted server still held.
#[test]
fn a_restart_that_nothing_tells_hides_for_three_requests_at_most() {
    run(async {
        for members in ["", r#","stream":true,"stream_options":{"include_usage":true}"#] {
            let directory = tempfile::tempdir().unwrap();
            let port = Port::reserve();
            let process = decode_process(directory.path(), port.address()).await;
            let rig = Rig::builder().engines(1, 0).other(port.address(), "decode").start().await;
            let mut clients = rig.client_of_each_worker(Http::One).await;
            let bodies: Vec<_> = (0..8)
                .map(|_| chat(&[&words(&new_id("talk"), 6_000)], &format!(r#","max_tokens":8{members}"#)))
                .collect();
            let mut reasons = async || {
                let mut reasons = Vec::new();
                for (turn, body) in bodies.iter().enumerate() {
                    let client = &mut clients[turn % 2];
                    let (request, path) = logged_chat(client, body, &[]);
                    assert_right(&client.send(request).await, body);
                    reasons.push(rig.access_log_of(&path).await["reason"].clone());
                }
                reasons
            };
            assert_eq!(reasons().await, vec![json!("prefilled"); 8]);
            assert_eq!(reasons().await, vec![json!("cached"); 8]);
            drop(process);
            let _process = decode_process(directory.path(), port.address()).await;
            let after = reasons().await;
            let wrong = after.iter().filter(|reason| **reason == "cached").count();
            assert!((1..=3).contains(&wrong), "{after:?}");
            assert_eq!(after[wrong..], vec![json!("prefilled"); 8 - wrong], "{after:?}");
            // What was asked before it was known is forgotten with the rest.
            let again = reasons().await;
            assert_eq!(again[wrong..], vec![json!("cached"); 8 - wrong], "{again:?}");
            assert_eq!(reasons().await, vec![json!("cached"); 8]);
            rig.until_metric("pd_caches_forgotten_total", |value| value >= 1.0).await;
            let missing = rig.final_metric("pd_believed_tokens_missing_total").await;
            assert!((1_000.0..=6_000.0).contains(&missing), "{missing}");
            rig.until_idle().await;
        }
    });
}

/// The same of a prefill server: answers to its legs have the count.
#[test]
fn a_restart_of_a_prefill_server_that_nothing_tells_hides_for_three_requests_at_most() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let port = Port::reserve();
        let process = engine_process("prefill", directory.path(), port.address()).await;
        let pool = json!({"split": {"mode": "always"}});
        let rig = Rig::builder().engines(0, 1).other(port.address(), "prefill").pool(pool).start().await;
        let mut clients = rig.client_of_each_worker(Http::One).await;
        let bodies: Vec<_> = (0..8).map(|_| chat(&[&words(&new_id("talk"), 6_000)], r#","max_tokens":8"#)).collect();
        // For each prompt, whether the filter believed that the server holds it.
        let mut beliefs = async || {
            let mut beliefs = Vec::new();
            for (turn, body) in bodies.iter().enumerate() {
                let client = &mut clients[turn % 2];
                let (request, path) = logged_chat(client, body, &[]);
                assert_right(&client.send(request).await, body);
                let entry = rig.access_log_of(&path).await;
                assert_eq!(entry["reason"], "prefilled");
                let matched: u64 = entry["matched_tokens"].as_str().unwrap_or_default().parse().unwrap();
                beliefs.push(matched > 512);
            }
            beliefs
        };
        assert_eq!(beliefs().await, [false; 8]);
        assert_eq!(beliefs().await, [true; 8]);
        drop(process);
        let _process = engine_process("prefill", directory.path(), port.address()).await;
        let after = beliefs().await;
        let wrong = after.iter().filter(|is_believed| **is_believed).count();
        assert!((1..=3).contains(&wrong), "{after:?}");
        assert_eq!(after[wrong..], vec![false; 8 - wrong], "{after:?}");
        assert_eq!(beliefs().await[wrong..], vec![true; 8 - wrong]);
        rig.until_metric("pd_caches_forgotten_total", |value| value >= 1.0).await;
        rig.until_idle().await;
    });
}
