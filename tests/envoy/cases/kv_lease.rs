//! Decode servers that fetch a KV cache later than its prefill server keeps it for: they answer wrong text with 200.

use std::time::Duration;

use futures::future::join_all;
use pd_sim::{FAULT_HEADER, WRONG_PREFIX, expected_text};
use pd_support::body::{CHAT, COMPLETIONS, chat, request};
use pd_support::client::{BOTH, Client, Http};
use pd_support::port::Port;
use pd_support::wait::until;
use pd_tests::answer::text;
use pd_tests::builder::Builder;
use pd_tests::rig::{Rig, run};
use serde_json::{Value, json};

use crate::support::{ask, assert_rejected, decode_process, long_chat, new_prompt, sum};

/// Lease of the prefill servers, and the lease in the filter's configuration.
const LEASE: Duration = Duration::from_millis(1_500);
const LATE: &str = "pd_late_answers_total{result=\"refused\"}";

fn builder(prefill: usize, decode: usize) -> Builder {
    Rig::builder()
        .engines(prefill, decode)
        .every_engine(|config| config.lease = LEASE)
        .pool(json!({"kv_lease_ms": LEASE.as_millis(), "split": {"mode": "always"}}))
        .control(&["--scrape-interval", "0.25"])
}

/// What a client got.
#[derive(Debug, PartialEq, Eq)]
enum Got {
    Right,
    /// An error in place of the answer, or as the last event of a stream.
    Error,
    Wrong(String),
}

/// Sends a request and reads whatever comes, to the end or the reset.
async fn got(client: &mut Client, path: &str, body: &str, fault: &str) -> Got {
    let headers = [(FAULT_HEADER, fault.as_bytes())];
    let headers = if fault.is_empty() { &[][..] } else { &headers };
    let request = client.json(path, body.to_owned(), headers);
    let Ok(mut answer) = client.try_open(request).await else { return Got::Error };
    let (status, mut bytes) = (answer.status, Vec::new());
    let is_whole = loop {
        match answer.piece().await {
            Ok(Some(piece)) => bytes.extend_from_slice(&piece),
            Ok(None) => break true,
            Err(_) => break false,
        }
    };
    let said = String::from_utf8_lossy(&bytes).into_owned();
    if said.contains(WRONG_PREFIX) {
        return Got::Wrong(said);
    }
    if status == 200 && is_whole && !said.contains("kv_lease_over") {
        return if text(&bytes) == expected_text("sim", body) { Got::Right } else { Got::Wrong(said) };
    }
    assert!(status != 200 || said.contains("kv_lease_over"), "{said}");
    Got::Error
}

#[test]
fn an_answer_that_begins_after_the_lease_is_an_error_in_its_own_form() {
    run(async {
        let rig = builder(1, 1).start().await;
        let mut clients = rig.client_of_each_worker(Http::One).await;
        clients.extend(rig.client_of_each_worker(Http::Two).await);
        let all = clients.iter_mut().map(async |client| {
            for (path, stream) in [(CHAT, true), (CHAT, false), (COMPLETIONS, true), (COMPLETIONS, false)] {
                let body = request(path, &new_prompt(), &format!(r#","max_tokens":8,"stream":{stream}"#));
                assert_eq!(got(client, path, &body, "").await, Got::Right, "{path} {stream}");
                let late = format!("handover:stall={}", 2 * LEASE.as_millis());
                assert_eq!(got(client, path, &body, &late).await, Got::Error, "{path} {stream}");
                // An engine that is only slow, within the lease.
                let slow = format!("handover:stall={}", LEASE.as_millis() / 4);
                assert_eq!(got(client, path, &body, &slow).await, Got::Right, "{path} {stream}");
            }
        });
        join_all(all).await;
        rig.until_metric(LATE, |value| value == 16.0).await;
        assert_eq!(sum(&rig.decode, |stats| stats.wrong_text), 16, "the engine answered all of them");
        assert!(rig.envoy.log().contains("began an answer later than its KV lease"));
        rig.until_idle().await;
        // pd-control has seen it, too.
        let address = rig.prefill[0].addr().to_string();
        until("the status shows it", async || {
            let status: Value = serde_json::from_str(&rig.ask_control("/v1/status").await?).ok()?;
            let endpoint = status["endpoints"].as_array()?.iter().find(|it| it["address"] == address)?.clone();
            endpoint["problem"].as_str()?.contains("fetched KV caches from it after their KV lease").then_some(())
        })
        .await;
        let metrics = rig.ask_control("/metrics").await.unwrap();
        let line = format!("pd_control_engine_late_kv_fetches{{address=\"{address}\"}} 16");
        assert!(metrics.lines().any(|it| it.starts_with(&line)), "{metrics}");
    });
}

#[test]
fn a_whole_answer_that_takes_longer_than_the_lease_is_right_where_no_lease_expired() {
    run(async {
        // Tokens take so long that the answer ends after the lease, but its KV cache was fetched at once.
        let rig = builder(1, 1)
            .decode_engines(|config, _| (config.speed, config.tpot_ms, config.transfer_ms) = (1.0, 300.0, 0.0))
            .start()
            .await;
        let mut clients = rig.client_of_each_worker(Http::One).await;
        let body = chat(&[&new_prompt()], r#","max_tokens":8"#);
        assert_eq!(got(&mut clients[0], CHAT, &body, "").await, Got::Right);
        // Somebody's lease expires: the answers that were under way then may be wrong, and those that come later are not.
        let stranded = long_chat();
        let (one, other) = futures::future::join(
            got(&mut clients[0], CHAT, &body.replace("\"max_tokens\":8", "\"max_tokens\":8,\"seed\":1"), ""),
            async { rig.client(Http::One).await.try_send(prefill_leg(&rig, &stranded).await).await },
        )
        .await;
        assert!(other.is_ok());
        assert_eq!(one, Got::Error, "its own lease may be the one that expired");
        let again = body.replace("\"max_tokens\":8", "\"max_tokens\":8,\"seed\":2");
        assert_eq!(got(&mut clients[0], CHAT, &again, "").await, Got::Right);
        rig.until_metric("pd_late_answers_total{result=\"passed\"}", |value| value == 2.0).await;
        rig.until_metric(LATE, |value| value == 1.0).await;
        rig.until_idle().await;
    });
}

/// A request whose decode leg never fetches: its lease expires.
async fn prefill_leg(rig: &Rig, body: &str) -> http::Request<pd_support::client::Body> {
    let client = rig.client(Http::One).await;
    client.json(CHAT, body.to_owned(), &[(FAULT_HEADER, b"decode:400")])
}

/// vllm-project/vllm#21570, vllm-project/vllm#52234, aws-samples/aws-do-eks#84: 200 with the text of another prompt.
#[test]
fn a_decode_server_that_is_stopped_for_longer_than_the_lease_gives_no_wrong_text() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let port = Port::reserve();
        let address = port.address();
        let process = decode_process(directory.path(), address).await;
        let rig = builder(2, 0).other(address, "decode").start().await;
        let stats = async || -> Value {
            let mut client = Client::connect(address, Http::One).await;
            client.get("/stats").await.json()
        };
        let mut counts = [0, 0];
        for round in 0..3 {
            let mut clients = rig.client_of_each_worker(BOTH[round % 2]).await;
            for _ in 0..22 {
                clients.push(rig.client(BOTH[round % 2]).await);
            }
            let many = clients.iter_mut().enumerate().map(async |(number, client)| {
                let mut gots = Vec::new();
                for turn in 0..8 {
                    let stream = (number + turn) % 2 == 0;
                    let body = request(CHAT, &new_prompt(), &format!(r#","max_tokens":24,"stream":{stream}"#));
                    gots.push(got(client, CHAT, &body, "").await);
                }
                gots
            });
            let stop = async {
                tokio::time::sleep(Duration::from_millis(150)).await;
                process.signal("STOP");
                tokio::time::sleep(2 * LEASE).await;
                process.signal("CONT");
            };
            let (gots, ()) = futures::future::join(join_all(many), stop).await;
            for one in gots.into_iter().flatten() {
                match one {
                    Got::Right => counts[0] += 1,
                    Got::Error => counts[1] += 1,
                    Got::Wrong(said) => panic!("wrong text: {said}"),
                }
            }
        }
        let wrong = stats().await["wrong_text"].as_u64().unwrap();
        println!("{} right answers, {} errors; the engine answered {wrong} wrong texts", counts[0], counts[1]);
        assert!(wrong > 0, "no lease expired");
        assert!(counts[0] > counts[1] && counts[1] >= wrong, "{counts:?} {wrong}");
        rig.until_metric(LATE, |value| value >= wrong as f64).await;
        ask(&mut rig.client(Http::One).await, &long_chat()).await;
        rig.until_idle().await;
    });
}

#[test]
fn without_a_lease_in_the_configuration_answers_pass_however_late() {
    run(async {
        let rig = builder(1, 1).pool(json!({"kv_lease_ms": 0})).start().await;
        let mut client = rig.client(Http::One).await;
        let late = format!("handover:stall={}", 2 * LEASE.as_millis());
        assert!(matches!(got(&mut client, CHAT, &long_chat(), &late).await, Got::Wrong(_)));
        let rig = builder(1, 1).start().await;
        let mut client = rig.client(Http::One).await;
        let request = client.json(CHAT, long_chat(), &[(FAULT_HEADER, late.as_bytes())]);
        assert_rejected(&client.send(request).await, 503, "kv_lease_over");
    });
}
