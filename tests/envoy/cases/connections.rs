//! Connections between Envoy and the engines, and what passes through them.

use std::time::Duration;

use pd_sim::FAULT_HEADER;
use pd_support::body::{CHAT, chat, words};
use pd_support::client::{BOTH, Http};
use pd_support::wait::until;
use pd_tests::builder::Builder;
use pd_tests::rig::{Rig, run};
use serde_json::{Value, json};

use crate::support::{ask, logged_chat, long_chat, new_id, only, recorded, short_chat, sum};

const OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
/// Connections that Envoy closed because they were idle.
const CLOSED: &str = "envoy_cluster_upstream_cx_idle_timeout{envoy_cluster_name=\"engines\"}";

/// One decode engine that closes idle connections, and Envoy's own limit; `null`: none.
fn rig(keep_alive: Duration, idle_timeout: Value) -> Builder {
    let builder = Rig::builder().engines(1, 1).every_engine(move |config| config.keep_alive = Some(keep_alive));
    builder.envoy(move |config| {
        let options = &mut config.cluster("engines")["typed_extension_protocol_options"][OPTIONS];
        options["common_http_protocol_options"]["idle_timeout"] = idle_timeout;
    })
}

/// uvicorn closes them after 5 s.
/// llm-d/llm-d-benchmark#1675, ray-project/ray#54127: the client must close first.
#[test]
fn envoy_closes_an_idle_connection_before_an_engine_does() {
    run(async {
        let rig = Rig::builder().engines(1, 1).every_engine(|config| config.keep_alive = Some(Duration::from_secs(5)));
        let rig = rig.start().await;
        let mut client = rig.client(Http::One).await;
        for turn in 1..=2 {
            ask(&mut client, &short_chat()).await;
            rig.until_metric(CLOSED, |value| value >= f64::from(turn)).await;
            assert_eq!(sum(rig.engines(), |stats| stats.idle_closed), 0);
        }
    });
}

/// Requests that Envoy sent once more.
const RETRIES: &str = "envoy_cluster_upstream_rq_retry{envoy_cluster_name=\"engines\"}";

/// Short requests, and one that is longer than Envoy's buffer for a connection.
/// NVIDIA-NeMo/nemo-platform#1101, rllm-org/rllm#592: a request met the end of an idle connection, and the client got an error.
#[test]
fn a_whole_request_that_meets_the_close_of_its_connection_is_sent_once_more() {
    run(async {
        let rig = rig(Duration::from_millis(200), Value::Null).pool(json!({"split": {"mode": "never"}})).start().await;
        let mut sent = 0;
        for (http, bytes) in [(Http::One, 20), (Http::Two, 20), (Http::One, 400_000)] {
            for client in &mut rig.client_of_each_worker(http).await {
                let before = rig.final_metric(RETRIES).await;
                for _ in 0..20 {
                    let closed = rig.decode[0].stats().idle_closed;
                    ask(client, &short_chat()).await;
                    until_closed(&rig, closed).await;
                    let body = chat(&[&words(&new_id("request"), bytes)], r#","max_tokens":8"#);
                    ask(client, &body).await;
                    sent += 2;
                    if rig.final_metric(RETRIES).await > before {
                        break;
                    }
                }
                assert!(rig.final_metric(RETRIES).await > before, "{http:?}: no request met the end of a connection");
            }
        }
        let requests = recorded(&rig.decode);
        assert_eq!(requests.iter().filter(|request| request.path == CHAT).count(), sent, "none came twice");
        for name in ["x-envoy-retry-on", "x-envoy-max-retries"] {
            assert!(requests.iter().all(|request| request.header(name).is_none()), "{name}");
        }
        assert_eq!(rig.final_metric("pd_decode_unanswered_total").await, 0.0);
        assert_eq!(rig.final_metric("pd_caches_forgotten_total").await, 0.0, "the server is the same");
        rig.until_idle().await;
    });
}

/// Where there are two servers, the other one gets it. The first one bears the blame once, and comes back.
#[test]
fn a_whole_request_that_meets_the_close_of_its_connection_goes_to_another_server() {
    run(async {
        let rig = Rig::builder().engines(1, 2).decode_engines(|config, i| {
            config.keep_alive = (i == 0).then_some(Duration::from_millis(200));
        });
        let rig = rig.envoy(|config| {
            let options = &mut config.cluster("engines")["typed_extension_protocol_options"][OPTIONS];
            options["common_http_protocol_options"]["idle_timeout"] = Value::Null;
        });
        let rig = rig.start().await;
        let mut client = rig.client(Http::One).await;
        for turn in 0.. {
            assert!(turn < 100, "no request met the end of a connection");
            let before = rig.decode[0].stats();
            ask(&mut client, &short_chat()).await;
            if rig.final_metric(RETRIES).await > 0.0 {
                break;
            }
            if rig.decode[0].stats().requests > before.requests {
                until_closed(&rig, before.idle_closed).await;
            }
        }
        rig.until_metric("pd_decode_moved_total", |value| value == 1.0).await;
        rig.until_metric("pd_caches_forgotten_total", |value| value == 1.0).await;
        assert_eq!(rig.final_metric("pd_decode_unanswered_total").await, 0.0);
        let requests = rig.decode[0].stats().requests;
        until("the first server gets requests again", async || {
            ask(&mut client, &short_chat()).await;
            (rig.decode[0].stats().requests > requests).then_some(())
        })
        .await;
        rig.until_idle().await;
    });
}

async fn until_closed(rig: &Rig, before: u64) {
    rig.decode[0].wait_for(|stats| stats.idle_closed > before).await;
}

/// The decode server may have fetched the KV cache before the connection ended, and vLLM answers a second fetch with wrong text.
#[test]
fn a_decode_leg_that_names_a_kv_cache_is_sent_once() {
    run(async {
        let rig = rig(Duration::from_millis(200), Value::Null);
        let rig = rig.prefill_engines(|config, _| config.keep_alive = None).start().await;
        let mut client = rig.client(Http::One).await;
        let mut sent = 0;
        let lost = loop {
            let closed = rig.decode[0].stats().idle_closed;
            ask(&mut client, &long_chat()).await;
            until_closed(&rig, closed).await;
            sent += 2;
            assert!(sent < 40, "no decode leg met the end of a connection");
            let answer = client.post(CHAT, long_chat()).await;
            if answer.status != 200 {
                break answer;
            }
        };
        assert_eq!((lost.status, lost.reason()), (503, Some("envoy")), "{}", lost.text());
        assert_eq!(rig.final_metric(RETRIES).await, 0.0);
        let stats = rig.decode[0].stats();
        assert_eq!((stats.decode_legs, stats.wrong_text), (sent - 1, 0));
        rig.until_metric("pd_decode_unanswered_total", |value| value == 1.0).await;
        rig.until_idle().await;
    });
}

/// With a shared directory a decode leg names no KV cache.
#[test]
fn a_decode_leg_that_names_no_kv_cache_is_sent_once_more() {
    run(async {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().to_owned();
        let rig = rig(Duration::from_millis(200), Value::Null).pool(json!({"engine": "vllm-shared"}));
        let rig = rig.every_engine(move |config| {
            config.engine = pd_sim::Engine::VllmShared;
            config.shared_dir = Some(path.clone());
        });
        let rig = rig.prefill_engines(|config, _| config.keep_alive = None).start().await;
        let mut client = rig.client(Http::One).await;
        for _ in 0..20 {
            let closed = rig.decode[0].stats().idle_closed;
            ask(&mut client, &long_chat()).await;
            until_closed(&rig, closed).await;
            ask(&mut client, &long_chat()).await;
            if rig.final_metric(RETRIES).await > 0.0 {
                break;
            }
        }
        assert!(rig.final_metric(RETRIES).await > 0.0, "no decode leg met the end of a connection");
        assert_eq!(sum(&rig.decode, |stats| stats.local_prefills), 0);
        rig.until_idle().await;
    });
}

/// The client gets an error, and the other servers serve. Each of the two bears the blame once.
#[test]
fn a_request_that_ends_each_connection_reaches_two_servers_of_five() {
    run(async {
        let rig = Rig::builder().engines(1, 5).start().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            let before = (sum(&rig.decode, |stats| stats.requests), rig.final_metric(RETRIES).await);
            let unanswered = rig.final_metric("pd_decode_unanswered_total").await;
            let request = client.json(CHAT, short_chat(), &[(FAULT_HEADER, b"reset")]);
            assert_eq!(client.send(request).await.status, 503);
            assert_eq!(sum(&rig.decode, |stats| stats.requests), before.0 + 2);
            rig.until_metric(RETRIES, |value| value == before.1 + 1.0).await;
            rig.until_metric("pd_decode_unanswered_total", |value| value == unanswered + 1.0).await;
            for _ in 0..20 {
                ask(&mut client, &short_chat()).await;
            }
            rig.until_metric("pd_answered_by_envoy_total", |value| value == 0.0).await;
        }
        rig.until_idle().await;
    });
}

/// An answer that began ends with an error: no other server begins it again.
#[test]
fn a_request_is_not_sent_once_more_when_its_answer_has_begun() {
    run(async {
        let rig = Rig::builder().engines(1, 2).start().await;
        let mut client = rig.client(Http::One).await;
        let body = short_chat().replace(":8}", ":300,\"ignore_eos\":true,\"stream\":true}");
        let mut stream = client.open(client.json(CHAT, body, &[(FAULT_HEADER, b"die=2")])).await;
        assert!(stream.event().await.unwrap().is_some());
        assert!(stream.rest().await.is_err(), "the stream breaks off");
        assert_eq!(sum(&rig.decode, |stats| stats.requests), 1);
        assert_eq!(rig.final_metric(RETRIES).await, 0.0);
        rig.until_idle().await;
    });
}

/// A client that Envoy takes for an internal one may not ask for retries: KV parameters would be sent twice.
#[test]
fn a_client_gets_no_retries_that_it_asks_for() {
    run(async {
        let rig = Rig::builder().engines(1, 2).envoy(|config| {
            config.http()["internal_address_config"] =
                json!({"cidr_ranges": [{"address_prefix": "127.0.0.0", "prefix_len": 8}]});
        });
        let rig = rig.start().await;
        let mut client = rig.client(Http::One).await;
        for (fault, body) in [(&b"decode:500"[..], long_chat()), (b"500", short_chat())] {
            let before = sum(&rig.decode, |stats| stats.requests);
            let headers: [(&str, &[u8]); 3] =
                [(FAULT_HEADER, fault), ("x-envoy-retry-on", b"5xx"), ("x-envoy-max-retries", b"3")];
            let request = client.json(CHAT, body, &headers);
            assert_eq!(client.send(request).await.status, 500);
            assert_eq!(sum(&rig.decode, |stats| stats.requests), before + 1);
        }
        assert_eq!(rig.final_metric(RETRIES).await, 0.0);
        rig.until_idle().await;
    });
}

#[test]
fn with_a_shorter_limit_of_envoys_none_is() {
    run(async {
        let rig = rig(Duration::from_secs(2), json!("0.1s")).start().await;
        let mut client = rig.client(Http::One).await;
        for turn in 1..=5 {
            ask(&mut client, &short_chat()).await;
            rig.until_metric(CLOSED, |value| value >= f64::from(turn)).await;
        }
        assert_eq!(sum(rig.engines(), |stats| stats.idle_closed), 0);
    });
}

#[test]
fn the_access_log_names_the_cluster_and_the_destination() {
    run(async {
        let rig = Rig::start().await;
        let mut client = rig.client(Http::One).await;
        let (request, path) = logged_chat(&client, &short_chat(), &[]);
        assert_eq!(client.send(request).await.status, 200);
        let entry = rig.access_log_of(&path).await;
        assert_eq!(entry["cluster"], "engines");
        let destination = entry["destination"].as_str().expect("a destination");
        assert_eq!(destination.split(',').next(), entry["upstream"].as_str(), "{entry}");
    });
}

/// Coding agents name their session so.
#[test]
fn headers_with_underscores_reach_the_engine() {
    run(async {
        let rig = Rig::start().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            let request = client.json(CHAT, short_chat(), &[("session_id", b"a-b"), ("x_other", b"1")]);
            assert_eq!(client.send(request).await.status, 200);
            let got = only(&rig.decode);
            assert_eq!(got.header("session_id"), Some("a-b"));
            assert_eq!(got.header("x_other"), Some("1"));
            rig.decode.iter().for_each(pd_sim::Handle::clear_requests);
        }
    });
}
