//! Pictures of the dashboard for its document: the panels' queries over the time of a replay, asked of a real Prometheus and
//! drawn in the dashboard's order, one picture for each row.
//!
//! `make dashboard-pictures` runs it. It takes about two minutes.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pd_bench::plot::{self, Lines};
use pd_sim::Handle;
use pd_support::admin::Admin;
use pd_support::body::{CHAT, chat, words};
use pd_support::client::Http;
use pd_support::places;
use pd_support::port::Port;
use pd_tests::rig::{Rig, run};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::dashboard::{dashboard, query, scrapes, start_prometheus};
use crate::files::{array, str_of};

/// Length of the replay.
const LENGTH: Duration = Duration::from_secs(90);
/// Seconds between two points of a line.
const STEP: u64 = 2;
/// Sessions at a time: few at first, many in the second third.
const FEW: usize = 8;
const MANY: usize = 40;

/// A session of a coding agent: each turn has all turns before it, and ends before the next one begins.
async fn session(address: std::net::SocketAddr, number: usize) {
    let mut client = pd_support::client::Client::connect(address, Http::One).await;
    let system = words(&format!("system {}", number % 3), 6_000);
    let mut turns = vec![system];
    for turn in 0..6 {
        turns.push(words(&format!("{number} {turn}"), if turn == 0 { 12_000 } else { 1_500 }));
        let texts: Vec<&str> = turns.iter().map(String::as_str).collect();
        let body = chat(&texts, r#","max_tokens":60,"stream":true,"stream_options":{"include_usage":true}"#);
        client.post(CHAT, body).await;
        turns.push(words(&format!("answer {number} {turn}"), 240));
        sleep(Duration::from_millis(300)).await;
    }
}

/// Sessions one after the other in so many places, until the time is over.
fn place(rig: &Rig, place: usize, from: Instant, until: Instant, sessions: &mut JoinSet<()>) {
    let address = rig.address();
    sessions.spawn(async move {
        tokio::time::sleep_until(from).await;
        for number in (place..).step_by(MANY) {
            if Instant::now() >= until {
                return;
            }
            session(address, number).await;
        }
    });
}

async fn replay(rig: &Rig) {
    let (start, third) = (Instant::now(), LENGTH / 3);
    let mut sessions = JoinSet::new();
    for number in 0..MANY {
        let (from, until) = if number < FEW { (start, start + LENGTH) } else { (start + third, start + 2 * third) };
        place(rig, number, from, until, &mut sessions);
    }
    // In the last third a prefill server answers errors for a while, and clients send what the filter refuses.
    tokio::time::sleep_until(start + 2 * third).await;
    rig.prefill[0].set_faults("500").expect("faults");
    let mut client = rig.client(Http::One).await;
    while Instant::now() < start + LENGTH - Duration::from_secs(12) {
        client.post(CHAT, "{}").await;
        sleep(Duration::from_millis(200)).await;
    }
    rig.prefill[0].set_faults("").expect("no faults");
    while sessions.join_next().await.is_some() {}
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// The lines of a query from `start` to `end`, seconds of Unix time.
async fn lines(prometheus: Admin, target: &Value, (start, end): (f64, f64)) -> Vec<(String, Vec<(f64, f64)>)> {
    let expression = query(str_of(&target["expr"])).replace("30s", "10s");
    let escaped: String = expression.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let path = format!("/api/v1/query_range?query={escaped}&start={start}&end={end}&step={STEP}");
    let text = prometheus.get(&path).await.expect("an answer of Prometheus");
    let answer: Value = serde_json::from_str(&text).expect("JSON");
    let line = |series: &Value| {
        let value = |pair: &Value| Some((pair[0].as_f64()? - start, pair[1].as_str()?.parse::<f64>().ok()?));
        let values = array(&series["values"]).iter().filter_map(value).filter(|(_, value)| value.is_finite());
        (named(str_of(&target["legendFormat"]), &series["metric"]), values.collect())
    };
    array(&answer["data"]["result"]).iter().map(line).collect()
}

/// A legend with the labels of its series in it.
fn named(legend: &str, labels: &Value) -> String {
    let mut name = legend.to_owned();
    for (label, value) in labels.as_object().into_iter().flatten() {
        name = name.replace(&format!("{{{{{label}}}}}"), value.as_str().unwrap_or_default());
    }
    name
}

/// What stands behind the values of a panel, and the factor for it.
fn unit(panel: &Value) -> (String, f64) {
    let (text, factor) = match str_of(&panel["fieldConfig"]["defaults"]["unit"]) {
        "reqps" => (" /s", 1.0),
        "ms" => (" ms", 1.0),
        "s" => (" s", 1.0),
        "percentunit" => (" %", 100.0),
        "suffix:tok/s" => (" tok/s", 1.0),
        "bytes" => (" MB", 1e-6),
        _ => ("", 1.0),
    };
    (text.to_owned(), factor)
}

async fn draw(prometheus: Admin, folder: &Path, range: (f64, f64)) {
    let dashboard = dashboard();
    let mut rows: Vec<(&str, Vec<Lines>)> = Vec::new();
    for panel in array(&dashboard["panels"]) {
        let title = str_of(&panel["title"]);
        if panel["type"] == "row" {
            rows.push((title, Vec::new()));
            continue;
        }
        let mut found = Vec::new();
        for target in array(&panel["targets"]) {
            found.extend(lines(prometheus, target, range).await);
        }
        assert!(!found.is_empty(), "{title} has no line");
        let (_, panels) = rows.last_mut().expect("a row before the first panel");
        panels.push(Lines { title: title.to_owned(), unit: unit(panel), lines: found });
    }
    for (title, panels) in rows {
        let name = title.to_lowercase().replace(' ', "-");
        plot::lines(&folder.join(format!("{name}.svg")), title, &panels).expect("a picture");
    }
}

#[test]
#[ignore = "takes two minutes: make dashboard-pictures"]
fn the_pictures_of_the_dashboard() {
    let Some(program) = places::program("prometheus", "the dashboard's pictures") else { return };
    let folder = places::root().join("docs/dashboard");
    std::fs::create_dir_all(&folder).expect("a folder");
    run(async {
        let rig = Rig::builder()
            .engines(3, 4)
            .every_engine(|engine| engine.speed = 1.0)
            .pool(json!({"max_requests": 10_000, "queue": {"enabled": true, "lead_ms": 100}}))
            .control(&["--scrape-interval=0.5"])
            .start()
            .await;
        let (directory, port) = (tempfile::tempdir().expect("a directory"), Port::reserve());
        let _prometheus = start_prometheus(&program, directory.path(), &port, &scrapes(&rig));
        sleep(Duration::from_secs(3)).await;
        let start = now();
        replay(&rig).await;
        let prefill: u64 = rig.prefill.iter().map(|engine: &Handle| engine.stats().prefill_legs).sum();
        assert!(prefill > 100, "{prefill} prefill legs in a replay of {LENGTH:?}");
        draw(Admin { address: port.address() }, &folder, (start, now())).await;
    });
}
