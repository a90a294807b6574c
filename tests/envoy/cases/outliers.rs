//! Endpoints that answer errors at once, where their peers serve: the least loaded ones must not win.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use futures::future::join_all;
use pd_sim::Handle;
use pd_support::body::CHAT;
use pd_support::client::BOTH;
use pd_support::wait::until;
use pd_tests::builder::Builder;
use pd_tests::rig::{Rig, run};
use serde_json::Value;

use crate::support::{ask, long_chat, short_chat, sum};

/// Clients at once, on connections to both workers.
const CLIENTS: usize = 8;
const REQUESTS: usize = 100;

/// Engines that take a while, so that one that fails at once is always the least loaded.
fn busy(prefill: usize, decode: usize) -> Builder {
    Rig::builder().engines(prefill, decode)
}

fn delay(engines: &[Handle]) {
    engines.iter().for_each(|engine| engine.set_faults("delay=40").unwrap());
}

/// Sends chats by several clients at once; the number of answers other than 200.
async fn send(rig: &Rig, requests: usize, chat: fn() -> String) -> u64 {
    let errors = AtomicU64::new(0);
    let client = async |number: usize| {
        let mut client = rig.client(BOTH[number % 2]).await;
        for _ in 0..requests / CLIENTS {
            let answer = client.post(CHAT, chat()).await;
            errors.fetch_add(u64::from(answer.status != 200), Relaxed);
        }
    };
    join_all((0..CLIENTS).map(client)).await;
    errors.into_inner()
}

async fn ejected(rig: &Rig, reason: &str) -> f64 {
    rig.until_metric(&format!("pd_outliers_total{{reason=\"{reason}\"}}"), |value| value >= 1.0).await
}

/// thushan/olla#144, AMD-AGI/Infera#82: a server that answers 503 at once is the least loaded, and attracted most requests.
#[test]
fn a_decode_server_that_fails_at_once_gets_a_few_requests() {
    run(async {
        for servers in [2, 8] {
            for (fault, reason) in [("500", "server_error"), ("503", "overload"), ("429", "overload")] {
                let rig = busy(1, servers).start().await;
                delay(&rig.decode);
                let bad = &rig.decode[0];
                bad.set_faults(fault).unwrap();
                let errors = send(&rig, REQUESTS, short_chat).await;
                assert_eq!(bad.stats().requests, errors, "{servers} servers, {fault}");
                assert!((3..=10).contains(&errors), "{errors} errors of {servers} servers, {fault}");
                ejected(&rig, reason).await;
                rig.until_idle().await;
            }
        }
    });
}

/// Most of a role fails: the server that works gets the requests.
#[test]
fn most_servers_of_a_role_that_fail_at_once_get_a_few_requests() {
    run(async {
        for (bad, servers) in [(2, 3), (3, 4)] {
            let rig = busy(servers, servers).start().await;
            delay(&rig.decode);
            delay(&rig.prefill);
            rig.decode[..bad].iter().chain(&rig.prefill[..bad]).for_each(|engine| engine.set_faults("500").unwrap());
            let errors = send(&rig, 6 * REQUESTS, short_chat).await;
            assert_eq!(errors, sum(&rig.decode[..bad], |stats| stats.requests), "{bad} of {servers}");
            assert!(errors <= 14 * bad as u64, "{errors} errors with {bad} of {servers}");
            // Prompts that two prefill servers failed at are computed by the decode server.
            rig.decode[..bad].iter().for_each(|engine| engine.set_faults("").unwrap());
            send(&rig, 2 * REQUESTS, long_chat).await;
            let legs = sum(&rig.prefill[..bad], |stats| stats.requests);
            assert!(legs <= 14 * bad as u64, "{legs} legs failed with {bad} of {servers}");
            rig.until_idle().await;
        }
    });
}

/// Mostly an error of the client, but not where a server refuses everybody.
#[test]
fn a_decode_server_that_refuses_everything_at_once_gets_a_few_requests() {
    run(async {
        for fault in ["401", "403", "404"] {
            let rig = busy(1, 8).start().await;
            delay(&rig.decode);
            let bad = &rig.decode[0];
            bad.set_faults(fault).unwrap();
            let errors = send(&rig, 4 * REQUESTS, short_chat).await;
            assert_eq!(bad.stats().requests, errors, "{fault}");
            assert!((16..=30).contains(&errors), "{errors} errors, {fault}");
            ejected(&rig, "refusal").await;
            rig.until_idle().await;
        }
    });
}

/// defilantech/LLMKube#453: a server that had failed was never asked again.
#[test]
fn an_ejected_server_is_shown_with_its_reason_and_comes_back() {
    run(async {
        let rig = busy(1, 2).start().await;
        delay(&rig.decode);
        let bad = &rig.decode[0];
        bad.set_faults("500").unwrap();
        send(&rig, REQUESTS, short_chat).await;
        let address = bad.addr().to_string();
        let shown = until("the status shows it", async || {
            let status: Value = serde_json::from_str(&rig.ask_control("/v1/status").await?).ok()?;
            let ejected = status["gateways"].as_array()?.iter().find_map(|it| it["ejected"].get(0).cloned())?;
            Some((ejected, status))
        });
        let (ejected, status) = shown.await;
        assert_eq!(ejected["address"], *address);
        let reason = "answers 5xx where others of its pool do not";
        assert_eq!(ejected["reason"], reason);
        assert!(ejected["since_ms"].as_u64().is_some_and(|since| since > 1_000_000_000_000), "{ejected}");
        let of_endpoint = status["endpoints"].as_array().unwrap().iter().find(|it| it["address"] == *address).unwrap();
        let problem = of_endpoint["problem"].as_str().unwrap_or_default();
        assert!(problem == format!("1 of 1 Envoys avoid it: it {reason}"), "{problem}");
        let advice = status["advice"].to_string();
        assert!(advice.contains(&format!("{address} {reason}")), "{advice}");
        let ready = rig.client(BOTH[0]).await.get("/.pd-ready").await;
        assert_eq!(ready.status, 200);
        assert_eq!(ready.json()["ejected"], 1, "{}", ready.text());
        let line = format!("{address} {reason}: it is ejected until a probe succeeds");
        let lines = rig.envoy.log().matches(&line).count();
        assert!((1..=2).contains(&lines), "{lines} lines");

        bad.set_faults("").unwrap();
        let mut client = rig.client(BOTH[0]).await;
        let served = bad.stats().requests;
        until("the server is back", async || {
            ask(&mut client, &short_chat()).await;
            (bad.stats().requests > served + 2).then_some(())
        })
        .await;
        rig.until_idle().await;
    });
}

#[test]
fn a_pool_that_fails_as_a_whole_is_not_ejected() {
    run(async {
        for fault in ["500", "503", "429"] {
            let rig = busy(1, 2).start().await;
            rig.decode.iter().for_each(|engine| engine.set_faults(fault).unwrap());
            let mut errors = 0;
            // The first one to answer three errors is ejected, until the other one answers as many.
            until(format_args!("both get requests in spite of {fault}"), async || {
                errors += send(&rig, REQUESTS, short_chat).await;
                rig.decode.iter().all(|engine| engine.stats().requests >= 10).then_some(())
            })
            .await;
            assert_eq!(errors, sum(&rig.decode, |stats| stats.requests), "every answer is an engine's");
            rig.until_idle().await;
        }
    });
}

#[test]
fn a_healthy_pool_has_no_outlier() {
    run(async {
        let rig = Rig::start().await;
        // One in twenty fails everywhere.
        rig.decode.iter().for_each(|engine| engine.set_faults("500:0.05").unwrap());
        send(&rig, 2 * REQUESTS, short_chat).await;
        rig.until_idle().await;
        for reason in ["server_error", "overload", "refusal"] {
            assert_eq!(rig.final_metric(&format!("pd_outliers_total{{reason=\"{reason}\"}}")).await, 0.0);
        }
        assert!(!rig.envoy.log().contains("it is ejected"));
    });
}

#[test]
fn no_client_sees_the_error_of_one_prefill_server() {
    run(async {
        for (fault, reason) in [
            ("404", "refusal"),
            ("401", "refusal"),
            ("403", "refusal"),
            ("400", "refusal"),
            ("500", "server_error"),
            ("503", "overload"),
            ("429", "overload"),
        ] {
            let rig = busy(2, 2).start().await;
            delay(&rig.prefill);
            rig.prefill[0].set_faults(fault).unwrap();
            assert_eq!(send(&rig, REQUESTS, long_chat).await, 0, "{fault}");
            let requests = rig.prefill[0].stats().requests;
            assert!((3..=12).contains(&requests), "{requests} legs met {fault}");
            ejected(&rig, reason).await;
            rig.until_idle().await;
            assert_eq!(rig.final_metric("pd_prefill_retries_denied_total").await, 0.0, "{fault}");
            assert_eq!(sum(&rig.decode, |stats| stats.local_prefills), 0, "decode computed no prompt");
        }
    });
}
