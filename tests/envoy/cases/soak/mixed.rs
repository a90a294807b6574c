//! Everything at once: two Envoys of two workers share one pd-control, and servers fail, restart, stall and are rolled out
//! while requests flow. No text is wrong, every client is answered, nothing is left, and hardly a prompt is computed twice.
//!
//! `PD_SOAK_REQUESTS`, `PD_SOAK_SEED` and `PD_SOAK_MINUTES` say how many, in which order, and after how long it gives up.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use futures::future::join_all;
use pd_support::body::{CHAT, COMPLETIONS, request, words};
use pd_support::client::{Answer, Broken, Http};
use pd_support::wait::{until, within};
use pd_tests::rig::{Rig, run};
use serde_json::json;

use super::director::{World, mix};
use super::fleet::total;
use super::tally::{End, Tally, judge};
use crate::support::short_chat;

const CONCURRENT: u64 = 64;
/// A request's longest time: legs that hang up to their limit, then Envoy's limit for a silent stream.
const LIMIT: Duration = Duration::from_secs(25);
const DEFAULT_SEED: u64 = 20_261_130;
/// Requests below which Envoy's own buffers and pools are still being made.
const GROWS_UNTIL: u64 = 20_000;
/// Share of all requests whose prompt may be computed more than once.
const MOST_TWICE: f64 = 0.005;

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// A request, as its number and the seed decide.
struct Plan {
    path: &'static str,
    body: String,
    is_stream: bool,
    /// When the client leaves; none: it stays.
    leaves: Option<Duration>,
}

impl Plan {
    fn new(seed: u64, number: u64) -> Self {
        let random = mix(seed, number);
        let draw = |shift: u32, below: u64| (random >> shift & 0xfff) % below;
        let path = if draw(0, 3) == 0 { COMPLETIONS } else { CHAT };
        let is_stream = draw(8, 2) == 0;
        let own = |bytes| words(&format!("{seed}-{number}"), bytes);
        let prompt = match draw(16, 10) {
            0 | 1 => own(200),
            // Eight requests of a conversation begin alike.
            2..=4 => words(&format!("{seed}-{}", number / (8 * CONCURRENT)), 4_000) + &own(1_500),
            5 => own(12_000),
            _ => own(3_000),
        };
        let body = request(path, &prompt, &format!(r#","max_tokens":9,"stream":{is_stream}"#));
        let leaves = (draw(28, 100) == 0).then(|| Duration::from_millis(draw(40, 40)));
        Self { path, body, is_stream, leaves }
    }
}

/// Sends requests, one after the other, until all have been sent.
async fn client(rig: &Rig, world: &World, tally: &Tally, seed: u64, next: &AtomicU64, http: Http) {
    let mut client = rig.client(http).await;
    loop {
        let number = next.fetch_add(1, Relaxed);
        if number >= world.total {
            return;
        }
        let plan = Plan::new(seed, number);
        let mut disturbances = world.disturbances();
        let sent = client.try_send(client.json(plan.path, plan.body.clone(), &[]));
        let time = plan.leaves.unwrap_or(LIMIT);
        let (end, answer): (End, Result<Answer, Broken>) = match tokio::time::timeout(time, sent).await {
            Ok(answer) => (judge(&plan.body, plan.is_stream, &answer), answer),
            Err(_) => {
                let end = if plan.leaves.is_some() { End::Left } else { End::Unanswered };
                (end, Err(Broken::of("no answer")))
            }
        };
        disturbances.extend(world.disturbances());
        disturbances.sort_unstable();
        disturbances.dedup();
        tally.count(&disturbances, end, &answer, &format!("request {number} at {}", rig.address()));
        if answer.is_err() {
            client = rig.client(http).await;
        }
        world.ended.fetch_add(1, Relaxed);
    }
}

/// Says every few seconds how far it is, and ends it when it takes too long.
async fn progress(world: &World, tally: &Tally, limit: Duration) {
    let began = Instant::now();
    loop {
        tokio::time::sleep(Duration::from_secs(5)).await;
        let (ended, elapsed) = (world.ended.load(Relaxed), began.elapsed());
        let rate = ended as f64 / elapsed.as_secs_f64();
        let now = world.disturbances().join(", ");
        println!("{ended} of {} requests, {rate:.0} a second, {} right; now {now}", world.total, tally.of(End::Right));
        assert!(elapsed < limit, "given up after {limit:?}");
    }
}

/// What an Envoy and pd-control say is in flight.
async fn in_flight(rigs: [&Rig; 2]) -> Vec<String> {
    let mut left = Vec::new();
    for rig in rigs {
        let metrics = rig.metrics().await;
        for name in
            ["pd_prefill_in_flight", "pd_decode_in_flight", "pd_decode_tokens_in_flight", "pd_waiting_for_endpoint"]
        {
            let value = metrics.get(name).copied().unwrap_or(0.0);
            if value != 0.0 {
                left.push(format!("{name} {value} at {}", rig.address()));
            }
        }
    }
    let text = rigs[0].ask_control("/metrics").await.unwrap_or_default();
    let names = [
        "pd_control_role_requests_in_flight{",
        "pd_control_role_kv_tokens_assigned{",
        "pd_control_role_prefill_work_seconds{",
    ];
    let lines = text.lines().filter(|line| names.iter().any(|name| line.starts_with(name)));
    left.extend(lines.filter(|line| !line.ends_with(" 0") && !line.ends_with(" 0.0")).map(str::to_owned));
    left
}

async fn start(world: &World) -> (Rig, Rig) {
    let mut builder = Rig::builder().engines(0, 0);
    let servers = world.all();
    for server in &servers {
        builder = builder.other(server.address, server.role.name());
    }
    let entries: Vec<_> = servers.iter().map(|server| server.entry()).collect();
    let first = builder
        .list(move |list| list.clone_from_slice(&entries))
        .plugin(json!({"prefix": {"index_bytes": 4 << 20}}))
        .pool(json!({"prefill_timeout_ms": 3_000}))
        .envoy(|config| config.http()["stream_idle_timeout"] = "4s".into())
        .start()
        .await;
    let second = first.beside().await;
    (first, second)
}

async fn alive(rig: &Rig) {
    for client in &mut rig.client_of_each_worker(Http::One).await {
        let body = short_chat();
        until("every worker serves", async || {
            let answer = client.try_send(client.json(CHAT, body.clone(), &[])).await.ok()?;
            (answer.status == 200).then_some(())
        })
        .await;
    }
}

#[test]
fn everything_at_once_on_two_envoys_leaves_no_wrong_answer_and_nothing_behind() {
    let requests = number("PD_SOAK_REQUESTS", 2_000);
    let seed = number("PD_SOAK_SEED", DEFAULT_SEED);
    let limit = Duration::from_secs(60 * number("PD_SOAK_MINUTES", 25));
    run(async {
        println!("{requests} requests with PD_SOAK_SEED={seed}");
        let world = Arc::new(World::start(seed, requests).await);
        let (first, second) = start(&world).await;
        let (tally, next, rigs) = (Tally::default(), AtomicU64::new(0), [&first, &second]);
        let third = AtomicU64::new(0);
        let clients = async {
            let http = |index: u64| if (index / 2).is_multiple_of(2) { Http::One } else { Http::Two };
            let all =
                (0..CONCURRENT).map(|index| client(rigs[index as usize % 2], &world, &tally, seed, &next, http(index)));
            join_all(all).await;
            world.is_over.store(true, Relaxed);
        };
        let memory = async {
            while world.ended.load(Relaxed) < requests / 3 {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            third.store(rigs.map(|rig| rig.envoy.resident_bytes()).iter().sum(), Relaxed);
        };
        let began = Instant::now();
        let lanes = async {
            tokio::join!(clients, memory, world.disturb_servers(0), world.disturb_servers(1), world.change_list(rigs));
        };
        tokio::select! {
            () = lanes => {}
            () = progress(&world, &tally, limit) => {}
        }
        let took = began.elapsed();

        world.calm(rigs).await;
        let left = within(Duration::from_secs(30), Duration::from_millis(100), "nothing is in flight", async || {
            in_flight(rigs).await.is_empty().then_some(())
        });
        left.await;
        let all = world.all();
        until("no engine has anything left", async || (total(&all).await.left == 0).then_some(())).await;

        let done = total(&all).await;
        let (once, more) = world.computed.once_and_more();
        let share = more as f64 / requests as f64;
        let resident: u64 = rigs.map(|rig| rig.envoy.resident_bytes()).iter().sum();
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        println!("{}", tally.table());
        println!("{requests} requests in {took:?}, {:.0} a second", requests as f64 / took.as_secs_f64());
        println!("engines: {done:?}");
        println!("prompts computed once {once}, more than once {more}: {:.3} % of the requests", share * 100.0);
        println!(
            "both Envoys: {:.1} MiB resident after a third, {:.1} MiB at the end",
            mib(third.load(Relaxed)),
            mib(resident)
        );
        tally.check();
        assert_eq!(done.wrong, 0, "texts of another prompt");
        assert_eq!(world.ended.load(Relaxed), requests);
        assert!(share < MOST_TWICE, "{more} prompts computed more than once");
        assert!(tally.of(End::Right) * 10 > requests * 8, "{} right", tally.of(End::Right));
        assert!(tally.of(End::Broken) * 50 < requests, "{} broken off", tally.of(End::Broken));
        let before = mib(third.load(Relaxed));
        assert!(
            requests < GROWS_UNTIL || mib(resident) < before * 1.05 + 8.0,
            "{before:.1} MiB, then {:.1}",
            mib(resident)
        );
        for rig in rigs {
            alive(rig).await;
        }
    });
}
