//! Faults do what they say.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use pd_sim::{Config, Handle, Role, expected_text, start};
use pd_support::client::{BOTH, Client, Http};
use serde_json::json;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

use crate::client::{CHAT, ask, ask_with_fault, begin, chat, decode_leg, exchange, get, post, prefill_leg, send};

async fn sim(role: Role) -> Handle {
    start(Config::of(role)).await.unwrap()
}

#[tokio::test]
async fn statuses_are_errors_of_vllms_form() {
    let sim = sim(Role::Both).await;
    for status in [400, 429, 500, 503] {
        let answer = ask_with_fault(&sim, &status.to_string(), &chat("x", "")).await.unwrap();
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (status, &json!(status)));
        assert_eq!(answer.headers.contains_key("retry-after"), matches!(status, 429 | 503));
        assert_eq!(sim.stats().faults_injected[&status.to_string()], 1);
    }
    assert_eq!(ask_with_fault(&sim, "nonsense", &chat("x", "")).await.unwrap().status, 400);
    assert_eq!((sim.stats().local_prefills, sim.stats().in_flight), (0, 0));
}

#[tokio::test]
async fn a_fault_for_one_role_spares_the_other() {
    let (prefill, decode) = (sim(Role::Prefill).await, sim(Role::Decode).await);
    let params = ask_with_fault(&prefill, "decode:500", &prefill_leg("x")).await.unwrap().params();
    assert_eq!(ask_with_fault(&prefill, "prefill:500", &prefill_leg("x")).await.unwrap().status, 500);
    let body = decode_leg("x", &params, "");
    assert_eq!(ask_with_fault(&decode, "decode:500", &body).await.unwrap().status, 500);
    let answer = ask_with_fault(&decode, "prefill:500", &body).await.unwrap();
    assert_eq!(answer.choice(0), expected_text("sim", &body));
}

#[tokio::test]
async fn a_delay_takes_its_time() {
    let sim = sim(Role::Both).await;
    let since = Instant::now();
    assert_eq!(ask_with_fault(&sim, "delay=30", &chat("x", "")).await.unwrap().status, 200);
    assert!(since.elapsed() >= Duration::from_millis(30));
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_its_next_request_lost() {
    let sim = start(Config { keep_alive: Some(Duration::from_millis(500)), ..Config::of(Role::Both) }).await.unwrap();
    let mut client = Client::connect(sim.addr(), Http::One).await;
    // An answer that takes longer is not idle.
    sim.set_faults("delay=700").unwrap();
    assert_eq!(client.post(CHAT, chat("x", "")).await.status, 200);
    assert_eq!(sim.stats().idle_closed, 0);
    sim.wait_for(|stats| stats.idle_closed == 1).await;
    let request = client.json(CHAT, chat("x", ""), &[]);
    assert!(client.try_send(request).await.is_err());
    assert_eq!((sim.stats().requests, sim.stats().connections), (1, 1));
    assert_eq!(ask(&sim, CHAT, &chat("x", "")).await.status, 200);
}

#[tokio::test]
async fn reset_is_a_tcp_reset() {
    let sim = sim(Role::Both).await;
    sim.set_faults("reset").unwrap();
    let mut client = begin(sim.addr(), CHAT, &chat("x", "")).await;
    let error = client.read(&mut [0; 1]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert_eq!(sim.wait_for(|stats| stats.in_flight == 0).await.client_disconnects, 0);
    sim.set_faults("").unwrap();
    assert_eq!(ask(&sim, CHAT, &chat("x", "")).await.status, 200);
}

#[tokio::test]
async fn hang_lasts_until_the_client_goes() {
    let sim = sim(Role::Both).await;
    sim.set_faults("hang*1").unwrap();
    let client = begin(sim.addr(), CHAT, &chat("x", "")).await;
    sim.wait_for(|stats| stats.faults_injected.contains_key("hang")).await;
    assert_eq!(sim.stats().in_flight, 1);
    drop(client);
    sim.wait_for(|stats| stats.in_flight == 0 && stats.client_disconnects == 1).await;
    assert_eq!(ask(&sim, CHAT, &chat("x", "")).await.status, 200);
}

#[tokio::test]
async fn die_closes_a_stream_after_so_many_tokens() {
    let sim = sim(Role::Both).await;
    sim.set_faults("die=3").unwrap();
    for http in BOTH {
        let (answer, part) = exchange(post(&sim, CHAT, &chat("x", r#","stream":true"#)), http).await;
        assert_eq!(answer.unwrap().status, 200);
        let part = part.expect("the body is cut");
        assert_eq!(part.matches("data: ").count(), 4, "{part}");
    }
    // An answer that is no stream is cut in its middle.
    let (answer, part) = exchange(post(&sim, CHAT, &chat("x", "")), Http::One).await;
    assert_eq!(answer.unwrap().status, 200);
    assert!(part.is_some_and(|part| part.starts_with('{') && !part.ends_with('}')));
    assert_eq!(sim.wait_for(|stats| stats.in_flight == 0).await.client_disconnects, 0);
}

#[tokio::test]
async fn an_error_event_ends_a_stream_of_status_200() {
    let sim = sim(Role::Both).await;
    sim.set_faults("error_event=2").unwrap();
    let answer = ask(&sim, CHAT, &chat("x", r#","stream":true"#)).await;
    let events = answer.events();
    assert_eq!((answer.status, events.len(), events[4]), (200, 5, "[DONE]"));
    assert!(events[3].starts_with(r#"{"error":{"message":"#), "{}", events[3]);
    assert_eq!(ask(&sim, CHAT, &chat("x", "")).await.status, 500);
}

#[tokio::test]
async fn params_are_spoilt_as_asked() {
    let sim = sim(Role::Prefill).await;
    let ask = |how: &str| {
        let fault = format!("malformed_params={how}");
        let sim = &sim;
        async move { ask_with_fault(sim, &fault, &prefill_leg("a prompt")).await.unwrap() }
    };
    assert!(ask("missing").await.json().get("kv_transfer_params").is_none());
    assert_eq!(ask("null").await.params(), "null");
    assert!(ask("string").await.json()["kv_transfer_params"].is_string());
    let params = ask("no_request_id").await.json()["kv_transfer_params"].take();
    assert!(params["remote_block_ids"].is_array() && params.get("remote_request_id").is_none());
    let params = ask("null_blocks").await.json()["kv_transfer_params"].take();
    assert!(params["remote_block_ids"].is_null() && params["remote_request_id"].is_string());
    assert!(serde_json::from_str::<serde_json::Value>(&ask("truncated").await.text).is_err());
    // Other requests are served as usual.
    assert_eq!(ask_with_fault(&sim, "malformed_params=missing", &chat("x", "")).await.unwrap().params(), "null");
    assert_eq!(sim.stats().faults_injected["malformed_params"], 6);
}

#[tokio::test]
async fn a_refusing_server_keeps_its_port_and_comes_back() {
    let sim = sim(Role::Both).await;
    let idle = begin(sim.addr(), CHAT, &chat("x", "")).await;
    sim.wait_for(|stats| stats.by_status.contains_key("200")).await;
    sim.set_refuse(true);
    // An idle connection is closed.
    let mut rest = Vec::new();
    let mut idle = idle;
    idle.read_to_end(&mut rest).await.unwrap();
    assert!(rest.starts_with(b"HTTP/1.1 200"));
    let refused = async {
        loop {
            match TcpStream::connect(sim.addr()).await {
                Err(error) => return error.kind(),
                Ok(_) => tokio::task::yield_now().await,
            }
        }
    };
    assert_eq!(refused.await, ErrorKind::ConnectionRefused);
    sim.set_refuse(false);
    while TcpStream::connect(sim.addr()).await.is_err() {
        tokio::task::yield_now().await;
    }
    assert_eq!(ask(&sim, CHAT, &chat("x", "")).await.status, 200);
}

#[tokio::test]
async fn refuse_ends_by_itself() {
    let sim = sim(Role::Both).await;
    assert!(ask_with_fault(&sim, "refuse=50", &chat("x", "")).await.is_err());
    let mut refused = 0;
    while send(post(&sim, CHAT, &chat("x", ""))).await.is_err() {
        refused += 1;
    }
    assert!(refused > 0);
}

#[tokio::test]
async fn exit_ends_the_server() {
    let sim = sim(Role::Both).await;
    assert!(ask_with_fault(&sim, "exit", &chat("x", "")).await.is_err());
    sim.crashed().await;
    assert_eq!(sim.wait_for(|stats| stats.in_flight == 0).await.client_disconnects, 0);
}

#[tokio::test]
async fn faults_are_set_listed_and_cleared_over_http() {
    let sim = sim(Role::Both).await;
    let set = send(post(&sim, "/fault", "prefill:503:0.5, hang@/health")).await.unwrap();
    assert_eq!(set.json(), json!({"faults": ["prefill:503:0.5", "hang@/health"]}));
    assert_eq!(send(get(&sim, "/fault")).await.unwrap().json(), set.json());
    assert_eq!(send(post(&sim, "/fault", "bogus")).await.unwrap().status, 400);
    send(post(&sim, "/fault", "500@*")).await.unwrap();
    assert_eq!(send(get(&sim, "/v1/models")).await.unwrap().status, 500);
    assert_eq!(send(post(&sim, "/fault", "")).await.unwrap().json(), json!({"faults": []}));
    assert_eq!(send(get(&sim, "/v1/models")).await.unwrap().status, 200);
    send(post(&sim, "/stats/reset", "")).await.unwrap();
    assert_eq!(sim.stats().requests, 0);
}

#[tokio::test]
async fn a_client_that_leaves_in_mid_stream_is_counted_and_its_blocks_come_back() {
    let config = Config { speed: 1.0, a_ms: 0.0, tpot_ms: 60_000.0, ..Config::default() };
    let sim = start(config).await.unwrap();
    let mut client = begin(sim.addr(), CHAT, &chat("x", r#","stream":true"#)).await;
    client.read_exact(&mut [0; 300]).await.unwrap();
    drop(client);
    sim.wait_for(|stats| stats.client_disconnects == 1 && stats.in_flight == 0).await;
    let metrics = send(get(&sim, "/metrics")).await.unwrap().text;
    assert!(metrics.contains("vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"sim\"} 0.0"), "{metrics}");
    assert!(metrics.contains("vllm:num_requests_running{engine=\"0\",model_name=\"sim\"} 0.0"));
}

#[tokio::test]
async fn a_restart_gets_its_port_back() {
    let first = sim(Role::Both).await;
    let listen = first.addr();
    ask(&first, CHAT, &chat("x", "")).await;
    let busy = start(Config { listen, ..Config::default() }).await.err().unwrap().to_string();
    assert!(busy.contains("another process has that port"), "{busy}");
    first.stop().await;
    let second = start(Config { listen, ..Config::default() }).await.unwrap();
    assert_eq!(ask(&second, CHAT, &chat("x", "")).await.status, 200);
}
