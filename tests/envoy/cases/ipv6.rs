//! Engines at IPv6 addresses, and fleets of both families.

use std::net::{Ipv6Addr, SocketAddr};

use pd_sim::Engine;
use pd_support::client::{BOTH, Http};
use pd_support::port::Port;
use pd_support::wait::until;
use pd_tests::builder::Builder;
use pd_tests::rig::{Rig, run};
use serde_json::json;

use crate::support::{ask, logged_chat, long_chat, short_chat, sum};

fn local(port: u16) -> SocketAddr {
    (Ipv6Addr::LOCALHOST, port).into()
}

/// A gateway whose prefill servers have IPv6 addresses, and the decode servers too or not.
fn rig(engine: Engine, is_dual: bool) -> Builder {
    let ports: Vec<Port> = (0..2).map(|_| Port::reserve()).collect();
    let bootstrap: Vec<_> = ports.iter().map(|port| local(port.address().port())).collect();
    let hosts = bootstrap.clone();
    let builder = Rig::builder()
        .every_engine(|config| config.engine = engine)
        .prefill_engines(|config, i| {
            config.listen = local(0);
            config.side_channel = Some(bootstrap[i]);
        })
        .decode_engines(|config, _| {
            if !is_dual {
                config.listen = local(0);
            }
        })
        .pool(json!({"engine": engine.name()}));
    if engine != Engine::Mooncake {
        return builder;
    }
    builder
        .plugin(json!({"bootstrap_cluster": "bootstrap"}))
        .envoy(move |config| config.add_cluster("bootstrap", &hosts))
}

/// ai-dynamo/dynamo#3019, sgl-project/sglang#7858, sgl-project/sglang#10389, vllm-project/vllm-ascend#4103:
/// addresses of bootstrap servers lacked brackets.
#[test]
fn both_legs_reach_servers_at_ipv6_addresses() {
    run(async {
        for engine in [Engine::VllmNixl, Engine::Sglang, Engine::Mooncake] {
            for is_dual in [false, true] {
                let rig = rig(engine, is_dual).start().await;
                for http in BOTH {
                    for client in &mut rig.client_of_each_worker(http).await {
                        ask(client, &long_chat()).await;
                        ask(client, &short_chat()).await;
                    }
                }
                rig.until_idle().await;
                let legs = sum(&rig.prefill, |stats| stats.prefill_legs);
                assert!(legs >= 4, "{legs} legs of {engine:?}");
                assert_eq!(sum(&rig.decode, |stats| stats.wrong_text), 0);
                assert_eq!(rig.final_metric("pd_answered_by_other_total").await, 0.0, "{engine:?}, {is_dual}");
                assert_eq!(rig.final_metric("pd_prefill_retries_total").await, 0.0, "{engine:?}, {is_dual}");
            }
        }
    });
}

#[test]
fn an_alternate_of_the_other_family_serves() {
    run(async {
        let rig = rig(Engine::VllmNixl, false).decode_engines(|config, i| {
            config.listen = if i == 0 { local(0) } else { ([127, 0, 0, 1], 0).into() };
        });
        let rig = rig.start().await;
        for bad in &rig.decode {
            rig.refuse(bad).await;
            let moved = rig.metric("pd_decode_moved_total").await;
            until("a request is moved", async || {
                let mut client = rig.client(Http::One).await;
                ask(&mut client, &long_chat()).await;
                ask(&mut client, &short_chat()).await;
                (rig.metric("pd_decode_moved_total").await > moved).then_some(())
            })
            .await;
            rig.accept(bad).await;
            let served = bad.stats().requests;
            until("the server is back", async || {
                ask(&mut rig.client(Http::One).await, &short_chat()).await;
                (bad.stats().requests > served).then_some(())
            })
            .await;
        }
        rig.until_idle().await;
    });
}

/// One address has many spellings; Envoy knows it by the shortest.
#[test]
fn an_address_is_the_same_however_the_list_spells_it() {
    run(async {
        let long = |list: &mut [serde_json::Value]| {
            for entry in list {
                let text = entry["address"].as_str().expect("an address").replace("[::1]", "[0:0:0:0:0:0:0:1]");
                entry["address"] = text.into();
            }
        };
        let rig = rig(Engine::VllmNixl, false).list(long).start().await;
        let mut client = rig.client(Http::Two).await;
        for _ in 0..4 {
            let (request, path) = logged_chat(&client, &short_chat(), &[]);
            assert_eq!(client.send(request).await.status, 200);
            let entry = rig.access_log_of(&path).await;
            let decode = entry["decode"].as_str().unwrap_or_default();
            assert_eq!(Some(decode), entry["upstream"].as_str(), "{entry}");
            assert!(decode.starts_with("[::1]:"), "{entry}");
        }
        ask(&mut client, &long_chat()).await;
        rig.until_idle().await;
        assert_eq!(rig.final_metric("pd_answered_by_other_total").await, 0.0);
    });
}
