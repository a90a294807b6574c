//! Every engine's hand-over, through both of Envoy's legs.

use std::time::{Duration, Instant};

use pd_sim::{Engine, Role, expected_texts};
use pd_support::body::{CHAT, COMPLETIONS, request};
use pd_support::client::Http;
use pd_support::port::Port;
use pd_tests::answer::{is_done, text};
use pd_tests::builder::Builder;
use pd_tests::rig::{Rig, run};
use serde_json::{Value, json};

use crate::support::*;

/// A gateway over engines that speak that protocol.
async fn rig(engine: Engine) -> Rig {
    adapted(engine, |builder| builder).await
}

pub async fn adapted(engine: Engine, adapt: impl FnOnce(Builder) -> Builder) -> Rig {
    let name = match engine {
        Engine::VllmNixlPush => "vllm-nixl",
        other => other.name(),
    };
    let bootstrap: Vec<Port> = (0..2).map(|_| Port::reserve()).collect();
    let addresses: Vec<_> = bootstrap.iter().map(Port::address).collect();
    let mut builder = Rig::builder()
        .every_engine(|config| config.engine = engine)
        .prefill_engines(|config, i| config.side_channel = Some(addresses[i]))
        .pool(json!({"engine": name}));
    if engine == Engine::Mooncake {
        let hosts = addresses.clone();
        builder = builder.plugin(json!({"bootstrap_cluster": "bootstrap"}));
        builder = builder.envoy(move |config| config.add_cluster("bootstrap", &hosts));
    }
    adapt(builder).start().await
}

const SPLIT: [Engine; 6] =
    [Engine::VllmNixl, Engine::VllmNixlPush, Engine::Sglang, Engine::Trtllm, Engine::Mooncake, Engine::Neuron];

#[test]
fn both_legs_give_the_text_of_one_server() {
    run(async {
        for engine in SPLIT {
            let rig = rig(engine).await;
            let mut legs = 0;
            for http in [Http::One, Http::Two] {
                let mut client = rig.client(http).await;
                for path in [CHAT, COMPLETIONS] {
                    for stream in [false, true] {
                        let body = request(path, &new_prompt(), &format!(r#","max_tokens":20,"stream":{stream}"#));
                        let answer = client.post(path, body.clone()).await;
                        assert_right(&answer, &body);
                        assert_eq!(is_done(&answer.body), stream, "{engine:?}");
                        legs += 1;
                    }
                }
            }
            rig.until_idle().await;
            assert_eq!(sum(&rig.prefill, |stats| stats.prefill_legs), legs, "{engine:?}");
            assert_eq!(sum(&rig.decode, |stats| stats.decode_legs), legs, "{engine:?}");
            assert_eq!(sum(&rig.decode, |stats| stats.local_prefills), 0, "{engine:?}");
            assert_eq!(sum(rig.engines(), |stats| stats.wrong_text + stats.leases_open), 0, "{engine:?}");
        }
    });
}

#[test]
fn a_mooncake_engines_id_is_asked_once_by_each_worker() {
    run(async {
        let rig = rig(Engine::Mooncake).await;
        for _ in 0..10 {
            let mut client = rig.client(Http::One).await;
            ask(&mut client, &long_chat()).await;
        }
        let asked = sum(&rig.prefill, |stats| stats.by_path.get("/query").copied().unwrap_or(0));
        assert!((1..=4).contains(&asked), "{asked}: two workers, two prefill engines");
    });
}

#[test]
fn sglang_gets_short_prompts_and_batches_in_two_legs() {
    run(async {
        let rig = rig(Engine::Sglang).await;
        let mut client = rig.client(Http::One).await;
        ask(&mut client, &short_chat()).await;
        let prompt = new_prompt();
        let body = format!(r#"{{"model":"sim","prompt":["{prompt} 1","{prompt} 2","short"],"max_tokens":9}}"#);
        let answer = client.post(COMPLETIONS, body.clone()).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let texts: Vec<_> = answer.json()["choices"].as_array().unwrap().iter().map(|c| c["text"].clone()).collect();
        assert_eq!(texts, expected_texts("sim", &body));
        assert_eq!(sum(&rig.decode, |stats| stats.decode_legs), 4);
    });
}

#[test]
fn several_answers_are_right_whatever_the_engine_hands_over() {
    run(async {
        for engine in SPLIT {
            let rig = rig(engine).await;
            let mut client = rig.client(Http::One).await;
            let body = request(CHAT, &new_prompt(), r#","max_tokens":9,"n":2"#);
            let answer = client.post(CHAT, body.clone()).await;
            let texts: Vec<_> =
                answer.json()["choices"].as_array().unwrap().iter().map(|c| c["message"]["content"].clone()).collect();
            assert_eq!(texts, expected_texts("sim", &body), "{engine:?}");
        }
    });
}

/// A prefill leg that fails beside its decode leg is an error at once, not the decode engine's long wait.
#[test]
fn a_failed_prefill_leg_beside_its_decode_leg_is_an_error_at_once() {
    run(async {
        for engine in [Engine::Sglang, Engine::Mooncake] {
            for (fault, status, reason) in
                [("500", 503, "prefill_failed"), ("reset", 503, "prefill_failed"), ("400", 400, "prefill_answer")]
            {
                let rig = rig(engine).await;
                let mut client = rig.client(Http::One).await;
                // What a real one asks for before its leg has been asked already.
                ask(&mut client, &long_chat()).await;
                rig.prefill.iter().for_each(|prefill| prefill.set_faults(fault).unwrap());
                for stream in [false, true] {
                    let body = request(CHAT, &new_prompt(), &format!(r#","max_tokens":8,"stream":{stream}"#));
                    let sent = Instant::now();
                    let answer = client.post(CHAT, body).await;
                    assert_eq!(
                        (answer.status, answer.reason().unwrap_or("prefill_answer")),
                        (status, reason),
                        "{engine:?} {fault}"
                    );
                    assert!(sent.elapsed() < Duration::from_secs(5), "{engine:?} {fault}: {:?}", sent.elapsed());
                }
                rig.until_idle().await;
                rig.prefill.iter().for_each(|prefill| prefill.set_faults("").unwrap());
                let body = long_chat();
                assert_right(&client.post(CHAT, body.clone()).await, &body);
            }
        }
    });
}

#[test]
fn each_leg_carries_the_data_parallel_rank() {
    run(async {
        let rig = adapted(Engine::VllmNixl, |builder| {
            builder.engines(1, 1).list(|list| {
                list[0]["rank"] = 3.into();
                list[1]["rank"] = 5.into();
            })
        })
        .await;
        let mut client = rig.client(Http::One).await;
        let body = long_chat();
        let forged: [(&str, &[u8]); 1] = [("x-data-parallel-rank", b"9")];
        let answer = client.send(client.json(CHAT, body.clone(), &forged)).await;
        assert_right(&answer, &body);
        let ranks = [&rig.prefill, &rig.decode].map(|engines| {
            let leg = only(engines);
            let ranks = leg.headers.get_all("x-data-parallel-rank").iter();
            ranks.map(|rank| rank.to_str().unwrap().to_owned()).collect::<Vec<_>>()
        });
        assert_eq!(ranks, [vec!["3".to_owned()], vec!["5".to_owned()]]);
        // Without a rank there is no such header.
        let list: Vec<Value> = [(&rig.prefill, "prefill"), (&rig.decode, "decode")]
            .into_iter()
            .flat_map(|(engines, role)| pd_tests::rig::entries(engines, role))
            .collect();
        rig.relist(&list).await;
        rig.engines().for_each(|engine| engine.clear_requests());
        let body = long_chat();
        assert_right(&client.send(client.json(CHAT, body.clone(), &forged)).await, &body);
        for engines in [&rig.prefill, &rig.decode] {
            assert_eq!(only(engines).header("x-data-parallel-rank"), None);
        }
    });
}

#[test]
fn a_sidecar_gets_the_prefill_endpoint() {
    run(async {
        let rig = Rig::builder().pool(json!({"engine": "sidecar"})).start().await;
        let mut client = rig.client(Http::One).await;
        let body = long_chat();
        let forged: [(&str, &[u8]); 1] = [("x-prefiller-host-port", b"6.6.6.6:6")];
        assert_right(&client.send(client.json(CHAT, body.clone(), &forged)).await, &body);
        let leg = only(&rig.decode);
        let addresses: Vec<_> = rig.prefill.iter().map(|prefill| prefill.addr().to_string()).collect();
        assert!(addresses.iter().any(|address| leg.header("x-prefiller-host-port") == Some(address)), "{leg:?}");
        assert_eq!((leg.body, sum(&rig.prefill, |stats| stats.requests)), (body.into(), 0));
        rig.decode.iter().for_each(|engine| engine.clear_requests());
        let body = short_chat();
        assert_right(&client.send(client.json(CHAT, body.clone(), &forged)).await, &body);
        assert_eq!(only(&rig.decode).header("x-prefiller-host-port"), None);
    });
}

#[test]
fn an_aggregated_endpoint_serves_whole_requests_beside_a_pair() {
    run(async {
        let rig = Rig::builder()
            .engines(1, 2)
            .decode_engines(|config, i| config.role = if i == 1 { Role::Both } else { Role::Decode })
            .list(|list| list[2]["role"] = "both".into())
            .start()
            .await;
        let mut client = rig.client(Http::One).await;
        for _ in 0..20 {
            ask(&mut client, &long_chat()).await;
        }
        let (pair, aggregated) = (rig.decode[0].stats(), rig.decode[1].stats());
        assert_eq!((aggregated.decode_legs, pair.local_prefills), (0, 0));
        assert!(aggregated.local_prefills > 0 && pair.decode_legs > 0, "{aggregated:?} {pair:?}");
        assert_eq!(aggregated.local_prefills + pair.decode_legs, 20);
        assert!(text(&client.post(CHAT, long_chat()).await.body).len() > 1);
    });
}
