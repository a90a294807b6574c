//! Clients that leave before the end.

use bytes::Bytes;
use http::Request;
use pd_support::body::CHAT;
use pd_support::client::{BOTH, Body, Client, Feed, Http};
use pd_support::wait::until_true;
use pd_tests::rig::{Rig, entries, run};
use tokio::task::JoinHandle;

use crate::support::{ask, long_chat, short_chat, sum};

const PREFILL: &str = "pd_prefill_in_flight";
const DECODE: &str = "pd_decode_in_flight";
const STRANDED: &str = "pd_kv_stranded_total{reason=\"client_left\"}";

async fn every_worker_is_alive(rig: &Rig) {
    rig.until_idle().await;
    for http in BOTH {
        for client in &mut rig.client_of_each_worker(http).await {
            ask(client, &long_chat()).await;
        }
    }
    rig.until_idle().await;
}

#[test]
fn during_the_body() {
    run(async {
        let rig = Rig::start().await;
        let body = long_chat();
        for http in BOTH {
            for mut client in rig.client_of_each_worker(http).await {
                let (feed, stream) = Feed::new();
                let mut request = client.json(CHAT, Bytes::new(), &[]);
                *request.body_mut() = stream;
                feed.send(body.as_bytes()[..2_000].to_vec());
                let started = rig.metric("http.gateway.downstream_rq_active").await;
                let mut sending = Box::pin(client.try_send(request));
                // The gateway has the request: then its client gives up.
                until_request_active(&rig, started, &mut sending).await;
                feed.break_off();
                assert!(sending.await.is_err(), "no answer to half a request");
            }
        }
        every_worker_is_alive(&rig).await;
        assert_eq!(rig.final_metric(STRANDED).await, 0.0);
        assert_eq!(sum(rig.engines(), |stats| stats.client_disconnects), 0, "no engine has seen any of it");
    });
}

async fn until_request_active<T>(rig: &Rig, before: f64, sending: &mut (impl Future<Output = T> + Unpin)) {
    let name = "envoy_http_downstream_rq_active{envoy_http_conn_manager_prefix=\"gateway\"}";
    let active = rig.until_metric(name, |value| value > before);
    tokio::select! {
        _ = active => {}
        _ = sending => panic!("answered before the body's end"),
    }
}

/// Ways to leave: HTTP/2 can end a request and keep the connection.
async fn leave(
    client: Client,
    request: Request<Body>,
    gone: impl AsyncFnOnce(),
    keeps_connection: bool,
) -> Option<Client> {
    let mut client = client;
    {
        let sending = client.try_send(request);
        tokio::pin!(sending);
        tokio::select! {
            answer = &mut sending => panic!("answered: {answer:?}"),
            () = gone() => {}
        }
    }
    keeps_connection.then_some(client)
}

#[test]
fn during_the_prefill_leg() {
    run(async {
        let rig = Rig::start().await;
        let mut left = 0.0;
        for (http, keeps_connection) in [(Http::One, false), (Http::Two, false), (Http::Two, true)] {
            for client in rig.client_of_each_worker(http).await {
                rig.prefill.iter().for_each(|engine| engine.set_faults("delay=700").unwrap());
                let request = client.json(CHAT, long_chat(), &[]);
                let waiting = async || _ = rig.until_metric(PREFILL, |value| value == 1.0).await;
                let kept = leave(client, request, waiting, keeps_connection).await;
                left += 1.0;
                assert_eq!(rig.until_metric(STRANDED, |value| value >= left).await, left);
                rig.until_metric(PREFILL, |value| value == 0.0).await;
                rig.prefill.iter().for_each(|engine| engine.set_faults("").unwrap());
                if let Some(mut client) = kept {
                    ask(&mut client, &long_chat()).await;
                }
            }
        }
        // The late answers come and are nobody's.
        for engine in &rig.prefill {
            engine.wait_for(|stats| stats.in_flight == 0).await;
        }
        every_worker_is_alive(&rig).await;
        assert_eq!(rig.final_metric(STRANDED).await, left);
    });
}

/// vllm-project/router#215: each client that left in this moment stayed in the load of its server for ever.
#[test]
fn before_the_first_byte_of_the_answer() {
    run(async {
        let rig = Rig::start().await;
        let mut left = 0;
        for (http, keeps_connection) in [(Http::One, false), (Http::Two, false), (Http::Two, true)] {
            for client in rig.client_of_each_worker(http).await {
                rig.decode.iter().for_each(|engine| engine.set_faults("hang").unwrap());
                let request = client.json(CHAT, long_chat(), &[]);
                let waiting = async || _ = rig.until_metric(DECODE, |value| value == 1.0).await;
                let kept = leave(client, request, waiting, keeps_connection).await;
                left += 1;
                rig.until_idle().await;
                rig.decode.iter().for_each(|engine| engine.set_faults("").unwrap());
                if let Some(mut client) = kept {
                    ask(&mut client, &long_chat()).await;
                }
            }
        }
        every_worker_is_alive(&rig).await;
        assert_eq!(sum(&rig.decode, |stats| stats.client_disconnects), left, "the engines are told");
    });
}

#[test]
fn during_the_stream() {
    run(async {
        let rig = Rig::builder().decode_engines(|config, _| (config.speed, config.tpot_ms) = (1.0, 10.0)).start().await;
        let mut left = 0;
        for http in BOTH {
            for mut client in rig.client_of_each_worker(http).await {
                let body = long_chat().replace(":8}", ":20000,\"ignore_eos\":true,\"stream\":true}");
                let mut stream = client.open(client.json(CHAT, body, &[])).await;
                for _ in 0..4 {
                    assert!(stream.event().await.unwrap().is_some());
                }
                rig.until_metric(DECODE, |value| value == 1.0).await;
                // HTTP/2 ends the stream alone and goes on.
                drop(stream);
                if http == Http::One {
                    drop(client);
                } else {
                    rig.until_idle().await;
                    ask(&mut client, &long_chat()).await;
                }
                left += 1;
                rig.until_idle().await;
            }
        }
        every_worker_is_alive(&rig).await;
        for engine in &rig.decode {
            engine.wait_for(|stats| stats.in_flight == 0).await;
        }
        assert_eq!(sum(&rig.decode, |stats| stats.client_disconnects), left);
        assert_eq!(rig.final_metric(STRANDED).await, 0.0);
    });
}

/// Requests that each decode server got.
fn served(rig: &Rig) -> [u64; 2] {
    [0, 1].map(|index| rig.decode[index].stats().requests)
}

/// Sends chats, one after the other arrived, until the decode servers have got so many.
async fn hang(rig: &Rig, hanging: &mut Vec<JoinHandle<()>>, until_total: u64) {
    while served(rig).iter().sum::<u64>() < until_total {
        let before: u64 = served(rig).iter().sum();
        let mut client = rig.client(BOTH[hanging.len() % 2]).await;
        hanging.push(tokio::spawn(async move {
            let request = client.json(CHAT, short_chat(), &[]);
            drop(client.try_send(request).await);
        }));
        until_true("the request arrives", async || served(rig).iter().sum::<u64>() > before).await;
    }
}

/// A readiness flap: what the server has in flight counts when it is listed again.
/// llm-d/llm-d-router#1739, llm-d/llm-d#1950: such counts fell below zero.
#[test]
fn a_server_that_returns_has_what_is_in_flight_there() {
    run(async {
        let rig = Rig::start().await;
        rig.decode.iter().for_each(|engine| engine.set_faults("hang").unwrap());
        let mut hanging = Vec::new();
        hang(&rig, &mut hanging, 8).await;
        // By one more or less, where a first server's short work is over before the next request comes.
        let is_even = |[a, b]: [u64; 2]| a.abs_diff(b) <= 2;
        assert!(is_even(served(&rig)), "{:?}", served(&rig));
        let all: Vec<_> = entries(&rig.prefill, "prefill").chain(entries(&rig.decode, "decode")).collect();
        let left = rig.decode[0].addr().to_string();
        let without: Vec<_> = all.iter().filter(|entry| entry["address"] != *left).cloned().collect();
        rig.relist(&without).await;
        rig.relist(&all).await;
        hang(&rig, &mut hanging, 14).await;
        assert!(is_even(served(&rig)), "the server that returned is taken for idle: {:?}", served(&rig));
        hanging.iter().for_each(JoinHandle::abort);
        rig.decode.iter().for_each(|engine| engine.set_faults("").unwrap());
        rig.until_idle().await;
    });
}
