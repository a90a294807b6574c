//! Names of models: aliases, adapters, and what answers say of model and usage.

use std::collections::BTreeMap;

use pd_sim::{Engine, expected_text};
use pd_support::body::{CHAT, COMPLETIONS, request};
use pd_support::client::{BOTH, Client};
use pd_support::wait::until;
use pd_tests::answer::{is_done, text};
use pd_tests::builder::Builder;
use pd_tests::rig::{Rig, run};
use serde_json::{Value, json};

use crate::support::*;

/// The whole answer, or each event of a stream.
fn documents(answer: &[u8]) -> Vec<Value> {
    let answer = std::str::from_utf8(answer).unwrap();
    if !answer.starts_with("data:") {
        return vec![serde_json::from_str(answer).unwrap()];
    }
    let events = answer.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
    events.filter(|event| *event != "[DONE]").map(|event| serde_json::from_str(event).unwrap()).collect()
}

#[test]
fn an_alias_reaches_both_legs_and_every_event_of_the_answer() {
    run(async {
        let names = |list: &mut [Value]| list.iter_mut().for_each(|entry| entry["models"] = json!(["sim"]));
        let alias = json!({"models": {"gpt/é": {"targets": [{"model": "sim"}], "answer": "asked"}}});
        let rig = Rig::builder().list(names).plugin(alias).start().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            for path in [CHAT, COMPLETIONS] {
                for (prompt, legs) in [(new_prompt(), 2), (new_id("short"), 1)] {
                    for stream in [false, true] {
                        rig.engines().for_each(pd_sim::Handle::clear_requests);
                        let prompt = format!("{stream} {prompt}");
                        let body = request(path, &prompt, &format!(r#","max_tokens":9,"stream":{stream}"#));
                        let asked = body.replace(r#""model":"sim""#, r#""model":"gpt\/\u00e9""#);
                        let answer = client.post(path, asked).await;
                        assert_right(&answer, &body);
                        assert_eq!(is_done(&answer.body), stream);
                        let documents = documents(&answer.body);
                        assert!(documents.len() > 1 || !stream);
                        assert!(documents.iter().all(|document| document["model"] == "gpt/é"), "{documents:?}");
                        let got = recorded(rig.engines());
                        assert_eq!(got.len(), legs);
                        assert!(got.iter().all(|leg| String::from_utf8_lossy(&leg.body).contains(r#""model":"sim""#)));
                    }
                }
            }
        }
        rig.until_idle().await;
    });
}

#[test]
fn an_adapter_goes_to_those_who_have_it() {
    run(async {
        let rig = Rig::builder()
            .every_engine(|config| config.loras = vec!["sim-lora".to_owned()])
            .list(|list| {
                for (i, entry) in list.iter_mut().enumerate() {
                    entry["models"] = if i % 2 == 0 { json!(["sim", "sim-lora"]) } else { json!(["sim"]) };
                }
            })
            .start()
            .await;
        let mut client = rig.client(BOTH[0]).await;
        for _ in 0..6 {
            for body in [long_chat(), short_chat()] {
                let body = body.replace("\"sim\"", "\"sim-lora\"");
                let answer = client.post(CHAT, body.clone()).await;
                assert_eq!((answer.status, text(&answer.body)), (200, expected_text("sim-lora", &body)));
            }
        }
        let got = |engines: &[pd_sim::Handle]| engines.iter().map(|engine| engine.stats().requests).collect::<Vec<_>>();
        assert_eq!((got(&rig.prefill), got(&rig.decode)), (vec![6, 0], vec![12, 0]));
    });
}

/// The card of each model that the gateway lists, by name.
async fn cards(client: &mut Client) -> BTreeMap<String, Value> {
    let list = client.get("/v1/models").await.json();
    let cards = list["data"].as_array().unwrap().iter();
    cards.map(|card| (card["id"].as_str().unwrap().to_owned(), card.clone())).collect()
}

const SCRAPES: &[&str] = &["--scrape-interval=0.1"];

#[test]
fn lists_have_the_engines_cards_and_adapters_that_are_loaded_later() {
    run(async {
        let alias = json!({"models": {"gpt": {"targets": [{"model": "sim"}]}}});
        let rig = Rig::builder()
            .control(SCRAPES)
            .prefill_engines(|config, i| config.max_model_len = 8_192 - i as u64)
            .decode_engines(|config, i| config.max_model_len = 16_384 + i as u64)
            .list(|list| list.iter_mut().for_each(|entry| entry["models"] = json!(["sim"])))
            .plugin(alias)
            .start()
            .await;
        let mut client = rig.client(BOTH[0]).await;
        until("the engines' cards are there", async || {
            let cards = cards(&mut rig.client(BOTH[0]).await).await;
            cards.get("sim").is_some_and(|card| card["max_model_len"] == 8_191).then_some(())
        })
        .await;
        let sim = json!({"id": "sim", "object": "model", "created": 0, "owned_by": "vllm", "root": "sim", "parent": null, "max_model_len": 8_191});
        let mut gpt = sim.clone();
        gpt["id"] = "gpt".into();
        assert_eq!(
            cards(&mut client).await,
            BTreeMap::from([("sim".into(), sim.clone()), ("gpt".into(), gpt.clone())])
        );
        for http in BOTH {
            let mut client = rig.client(http).await;
            for (path, card) in [("sim", &sim), ("gpt", &gpt), ("s%69m/?x", &sim)] {
                let answer = client.get(&format!("/v1/models/{path}")).await;
                assert_eq!((answer.status, answer.json()), (200, card.clone()));
            }
            assert_eq!(client.get("/v1/models/never").await.status, 404);
            let answer = client.send(client.request("HEAD", "/v1/models")).await;
            assert_eq!((answer.status, answer.body.len()), (200, 0));
        }
        for engine in [&rig.prefill[0], &rig.decode[0]] {
            engine.load_lora("late");
        }
        // pd-control lists the adapter with the first server that answers it.
        until("a decode server lists the adapter", async || {
            let body = short_chat().replace("\"sim\"", "\"late\"");
            (rig.client(BOTH[0]).await.post(CHAT, body).await.status == 200).then_some(())
        })
        .await;
        assert_eq!(cards(&mut client).await["late"]["parent"], "sim");
        for body in [long_chat(), short_chat()] {
            let body = body.replace("\"sim\"", "\"late\"");
            let answer = client.post(CHAT, body.clone()).await;
            assert_eq!((answer.status, text(&answer.body)), (200, expected_text("late", &body)));
        }
        // All servers of the model leave.
        let other = json!({"address": rig.decode[1].addr().to_string(), "role": "both", "models": ["other"], "models_closed": true});
        rig.relist(&[other]).await;
        for (model, status) in [("sim", 503), ("late", 503), ("gpt", 503), ("never", 404)] {
            let answer = client.post(CHAT, short_chat().replace("\"sim\"", &format!("\"{model}\""))).await;
            assert_eq!(answer.status, status, "{model}: {}", answer.text());
            assert_eq!(answer.header("retry-after").is_some(), status == 503, "{model}");
        }
        assert_eq!(cards(&mut client).await.keys().collect::<Vec<_>>(), ["other"]);
    });
}

#[test]
fn an_adapter_is_not_added_where_the_operator_says_that_the_list_is_closed() {
    run(async {
        let rig = Rig::builder()
            .control(SCRAPES)
            .list(|list| {
                for (i, entry) in list.iter_mut().enumerate() {
                    entry["models"] = json!(["sim"]);
                    entry["models_closed"] = json!(i == 2);
                }
            })
            .start()
            .await;
        rig.engines().for_each(|engine| engine.load_lora("late"));
        let of_adapter = || short_chat().replace("\"sim\"", "\"late\"");
        until("an open server lists the adapter", async || {
            (rig.client(BOTH[0]).await.post(CHAT, of_adapter()).await.status == 200).then_some(())
        })
        .await;
        let mut client = rig.client(BOTH[0]).await;
        for _ in 0..12 {
            assert_eq!(client.post(CHAT, of_adapter()).await.status, 200);
        }
        let got = |engine| recorded([engine]).iter().filter(|request| request.text().contains("late")).count();
        assert_eq!((got(&rig.decode[0]), got(&rig.decode[1]) > 12), (0, true));
    });
}

#[test]
fn lists_do_not_change_while_a_new_pd_control_asks_the_engines() {
    run(async {
        let mut rig =
            Rig::builder().control(SCRAPES).every_engine(|config| config.loras = vec!["lora".to_owned()]).start().await;
        until("the filter knows the engines' models", async || {
            (cards(&mut rig.client(BOTH[0]).await).await.len() == 2).then_some(())
        })
        .await;
        let mut client = rig.client(BOTH[0]).await;
        let list = client.get("/v1/models").await.text();
        assert!(list.contains(r#""max_model_len""#) && list.contains(r#""parent":"sim""#), "{list}");
        for engine in rig.engines() {
            engine.set_faults("hang@/v1/models").unwrap();
        }
        rig.kill_control();
        rig.start_control().await;
        let version = rig.metric("pd_snapshots_total{result=\"applied\"}").await;
        rig.until_metric("pd_snapshots_total{result=\"applied\"}", |value| value > version).await;
        for _ in 0..50 {
            let answer = client.get("/v1/models").await;
            assert_eq!((answer.status, answer.text()), (200, list.clone()));
            let answer = client.post(CHAT, short_chat().replace("\"sim\"", "\"never\"")).await;
            assert_eq!(answer.status, 404);
        }
    });
}

fn always(engine: &str) -> Builder {
    Rig::builder().engines(1, 1).pool(json!({"engine": engine, "split": {"mode": "always"}}))
}

/// `cached_tokens` and `prompt_tokens` of an answer.
fn usage(answer: &[u8]) -> (u64, u64) {
    let documents = documents(answer);
    let usage = &documents.last().unwrap()["usage"];
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{usage}"));
    (number(&usage["prompt_tokens_details"]["cached_tokens"]), number(&usage["prompt_tokens"]))
}

#[test]
fn cached_tokens_are_those_that_the_prefill_engine_had() {
    run(async {
        for stream in ["", r#","stream":true,"stream_options":{"include_usage":true}"#] {
            let rig = always("vllm-nixl").start().await;
            let mut client = rig.client(BOTH[1]).await;
            let body = request(CHAT, &new_prompt(), &format!(r#","max_tokens":8{stream}"#));
            for is_first in [true, false] {
                let before = sum(&rig.prefill, |stats| stats.cached_tokens);
                let answer = client.post(CHAT, body.clone()).await;
                assert_right(&answer, &body);
                let (cached, prompt) = usage(&answer.body);
                assert_eq!(cached, sum(&rig.prefill, |stats| stats.cached_tokens) - before);
                assert_eq!(cached > prompt / 2, !is_first, "{cached} of {prompt}");
            }
            assert_eq!(rig.final_metric("pd_kv_not_moved_total").await, 0.0);
        }
        let rig = always("vllm-nixl").pool(json!({"cached_tokens": "decode"})).start().await;
        let mut client = rig.client(BOTH[0]).await;
        let answer = client.post(CHAT, long_chat()).await;
        let (cached, prompt) = usage(&answer.body);
        assert_eq!(cached, prompt, "what was fetched, as the decode engine says");
    });
}

/// vLLM 0.32 and later: decode repeats the prefill engine's count, unless the filter takes it out of the parameters.
#[test]
fn a_kv_cache_that_did_not_come_is_noticed_with_parameters() {
    run(async {
        let rig = always("vllm-nixl").start().await;
        let mut client = rig.client(BOTH[0]).await;
        let split = "pd_requests_total{decision=\"split\"}";
        for (fault, total, not_moved) in [("", 3.0, 0.0), ("handover:recompute", 6.0, 3.0), ("", 9.0, 3.0)] {
            rig.decode[0].set_faults(fault).unwrap();
            for _ in 0..3 {
                let body = long_chat();
                let answer = client.post(CHAT, body.clone()).await;
                assert_right(&answer, &body);
                let (cached, prompt) = usage(&answer.body);
                assert!(cached < prompt / 2, "the prefill engine had not seen it: {cached} of {prompt}");
            }
            rig.until_metric(split, |value| value == total).await;
            rig.until_metric("pd_kv_not_moved_total", |value| value == not_moved).await;
        }
        assert!(rig.envoy.log().contains("KV caches do not reach it"));
    });
}

#[test]
fn a_prompt_that_was_computed_twice_is_noticed_without_parameters() {
    run(async {
        let directories = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        for is_shared in [true, false] {
            let of = |i: usize| directories[if is_shared { 0 } else { i }].path().to_owned();
            let (prefill, decode) = (of(0), of(1));
            let rig = always("vllm-shared")
                .every_engine(|config| config.engine = Engine::VllmShared)
                .prefill_engines(|config, _| config.shared_dir = Some(prefill.clone()))
                .decode_engines(|config, _| config.shared_dir = Some(decode.clone()))
                .start()
                .await;
            let mut client = rig.client(BOTH[0]).await;
            for _ in 0..3 {
                ask(&mut client, &long_chat()).await;
            }
            let expected = if is_shared { 0.0 } else { 3.0 };
            rig.until_metric("pd_requests_total{decision=\"split\"}", |value| value == 3.0).await;
            rig.until_metric("pd_kv_not_moved_total", |value| value == expected).await;
        }
    });
}
