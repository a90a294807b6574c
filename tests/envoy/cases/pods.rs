//! Public reports of what engines and pods do to gateways. Each case names its report.

use pd_sim::FAULT_HEADER;
use pd_support::body::{CHAT, chat, words};
use pd_support::client::{BOTH, Http};
use pd_support::port::Port;
use pd_tests::rig::{Rig, entries, run};
use serde_json::{Value, json};

use crate::support::{ask, assert_rejected, assert_right, logged_chat, long_chat, new_id, recorded, short_chat, sum};

/// llm-d/llm-d#2488, istio/istio#57638: a pool's ports are for all roles, and prefill servers listen at one of four.
#[test]
fn prefill_servers_are_listed_at_ports_at_which_nothing_listens() {
    run(async {
        let closed: Vec<Port> = (0..3).map(|_| Port::reserve()).collect();
        let mut builder = Rig::builder().engines(1, 2);
        for port in &closed {
            builder = builder.other(port.address(), "prefill");
        }
        let rig = builder.start().await;
        let mut clients = rig.client_of_each_worker(Http::One).await;
        clients.extend(rig.client_of_each_worker(Http::Two).await);
        for turn in 0..40 {
            ask(&mut clients[turn % 4], &long_chat()).await;
        }
        rig.until_idle().await;
        let (legs, own) =
            (sum(&rig.prefill, |stats| stats.prefill_legs), sum(&rig.decode, |stats| stats.local_prefills));
        assert!(legs >= 36 && legs + own == 40, "{legs} prompts by the prefill server, {own} by decode servers");
    });
}

/// sgl-project/sglang#25811, vllm-project/router#60: requests that are too long opened the circuit breaker of every worker.
#[test]
fn clients_send_requests_that_every_engine_refuses() {
    run(async {
        let rig = Rig::builder().every_engine(|config| config.max_model_len = 2_048).start().await;
        for http in BOTH {
            for client in &mut rig.client_of_each_worker(http).await {
                for turn in 0..20 {
                    let body = chat(&[&words(&new_id("long"), 40 + 12_000 * (turn % 2))], r#","max_tokens":4000"#);
                    assert_eq!(client.post(CHAT, body).await.status, 400);
                    ask(client, &short_chat()).await;
                }
                ask(client, &long_chat()).await;
            }
        }
        for reason in ["server_error", "overload", "refusal", "handover"] {
            assert_eq!(rig.final_metric(&format!("pd_outliers_total{{reason=\"{reason}\"}}")).await, 0.0, "{reason}");
        }
        rig.until_idle().await;
    });
}

/// sgl-project/sglang#39464: the only server was full for a while, and got nothing for the whole cool-down.
/// defilantech/LLMKube#453: nothing brought a server back that had failed once.
#[test]
fn the_only_server_of_a_role_serves_again_at_once() {
    run(async {
        for fault in ["503", "429", "500", "401", "reset"] {
            let rig = Rig::builder().engines(1, 1).start().await;
            let mut client = rig.client(Http::One).await;
            rig.decode[0].set_faults(fault).unwrap();
            for _ in 0..40 {
                let status = client.post(CHAT, short_chat()).await.status;
                assert!(status >= 400, "{fault}: {status}");
            }
            rig.decode[0].set_faults("").unwrap();
            ask(&mut client, &short_chat()).await;
            rig.prefill[0].set_faults(fault).unwrap();
            for _ in 0..20 {
                client.post(CHAT, long_chat()).await;
            }
            rig.prefill[0].set_faults("").unwrap();
            let (request, path) = logged_chat(&client, &long_chat(), &[]);
            assert_eq!(client.send(request).await.status, 200);
            assert_eq!(rig.access_log_of(&path).await["decision"], "split", "{fault}");
            rig.until_idle().await;
        }
    });
}

/// vllm-project/vllm-ascend#15250: the router's own key took the place of the client's.
#[test]
fn a_clients_key_reaches_both_legs() {
    run(async {
        let rig = Rig::start().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            let body = long_chat();
            let request = client.json(CHAT, body.clone(), &[("authorization", b"Bearer the-clients-own")]);
            assert_right(&client.send(request).await, &body);
            let request = client.json(CHAT, short_chat(), &[("authorization", b"Bearer the-clients-own")]);
            assert_eq!(client.send(request).await.status, 200);
        }
        let legs = recorded(rig.engines());
        assert_eq!(legs.len(), 6);
        assert!(legs.iter().all(|leg| leg.header("authorization") == Some("Bearer the-clients-own")));
    });
}

/// vllm-project/router#197: what is in flight was taken for nothing each time that servers were looked at.
#[test]
fn a_list_that_comes_again_and_again_leaves_the_account_of_what_is_in_flight() {
    run(async {
        let rig = Rig::builder()
            .engines(1, 2)
            .decode_engines(|config, _| (config.speed, config.tpot_ms) = (1.0, 10.0))
            .start()
            .await;
        let mut client = rig.client(Http::Two).await;
        let body = long_chat().replace(":8}", ":100000,\"ignore_eos\":true,\"stream\":true}");
        let stream = client.open(client.json(CHAT, body, &[])).await;
        let in_flight = "pd_decode_tokens_in_flight";
        let tokens = rig.until_metric(in_flight, |value| value > 0.0).await;
        let mut list: Vec<Value> = entries(&rig.prefill, "prefill").chain(entries(&rig.decode, "decode")).collect();
        for weight in [1.5, 2.0, 2.5] {
            list[0]["weight"] = weight.into();
            rig.relist(&list).await;
            assert_eq!(rig.metric(in_flight).await, tokens, "{weight}");
        }
        drop(stream);
        drop(client);
        rig.until_idle().await;
    });
}

/// sgl-project/sglang#9726: decode waits for minutes for a prompt whose prefill leg has failed already.
#[test]
fn a_prefill_leg_fails_while_its_decode_leg_waits() {
    run(async {
        let rig = crate::engines::adapted(pd_sim::Engine::Sglang, |builder| builder).await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            let request = client.json(CHAT, long_chat(), &[(FAULT_HEADER, b"prefill:500")]);
            let began = std::time::Instant::now();
            assert_rejected(&client.send(request).await, 503, "prefill_failed");
            assert!(began.elapsed().as_secs() < 5, "{:?}", began.elapsed());
            ask(&mut client, &long_chat()).await;
        }
        rig.until_idle().await;
    });
}

/// llm-d/llm-d-router#2427: prompts went to decode servers while the prefill servers were not ready, and nobody noticed.
#[test]
fn no_prefill_server_is_ready() {
    run(async {
        for policy in ["decode_only", "fail"] {
            let down = |list: &mut [Value]| list[..2].iter_mut().for_each(|entry| entry["state"] = "down".into());
            let rig = Rig::builder().pool(json!({"on_prefill_failure": policy})).list(down).start().await;
            for http in BOTH {
                let mut client = rig.client(http).await;
                let body = long_chat();
                let (request, path) = logged_chat(&client, &body, &[]);
                let answer = client.send(request).await;
                if policy == "fail" {
                    assert_rejected(&answer, 503, "prefill_failed");
                } else {
                    assert_right(&answer, &body);
                    assert_eq!(rig.access_log_of(&path).await["reason"], "no_prefill_endpoint");
                }
                ask(&mut client, &short_chat()).await;
            }
            rig.until_idle().await;
        }
    });
}

/// llm-d/llm-d#1564, kserve/kserve#5446: a server closed an idle connection, and the next prefill leg met that.
#[test]
fn a_prefill_leg_meets_the_end_of_an_idle_connection() {
    run(async {
        const OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
        const RETRIES: &str = "pd_prefill_retries_total";
        // Over a shared directory: no decode server has a connection to the prefill server.
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().to_owned();
        let rig = Rig::builder()
            .engines(1, 1)
            .every_engine(move |config| {
                config.engine = pd_sim::Engine::VllmShared;
                config.shared_dir = Some(path.clone());
            })
            .pool(json!({"engine": "vllm-shared"}))
            .prefill_engines(|config, _| config.keep_alive = Some(std::time::Duration::from_millis(200)))
            .envoy(|config| {
                let options = &mut config.cluster("engines")["typed_extension_protocol_options"][OPTIONS];
                options["common_http_protocol_options"]["idle_timeout"] = Value::Null;
            })
            .start()
            .await;
        for http in BOTH {
            for client in &mut rig.client_of_each_worker(http).await {
                // Connections of pd-control end, too, so not every end is the one that the next leg meets.
                let before = rig.final_metric(RETRIES).await;
                for _ in 0..20 {
                    let closed = rig.prefill[0].stats().idle_closed;
                    ask(client, &long_chat()).await;
                    rig.prefill[0].wait_for(|stats| stats.idle_closed > closed).await;
                    let body = long_chat();
                    let (request, path) = logged_chat(client, &body, &[]);
                    assert_right(&client.send(request).await, &body);
                    assert_eq!(rig.access_log_of(&path).await["reason"], "prefilled");
                    if rig.final_metric(RETRIES).await > before {
                        break;
                    }
                }
                assert!(rig.final_metric(RETRIES).await > before, "{http:?}: no leg met the end of a connection");
            }
        }
        assert_eq!(sum(&rig.decode, |stats| stats.local_prefills), 0);
        rig.until_idle().await;
    });
}
