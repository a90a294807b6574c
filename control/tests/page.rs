//! The status page, as a browser shows it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use pd_control::access::token::Token;
use pd_core::envoys::message::{ExchangeRequest, Record};
use pd_core::envoys::report::{Ejected, Report, ReportedDecision, Served};
use pd_core::time::UnixTime;
use pd_core::wire::{Endpoint, Role as WireRole};
use pd_core::workers::recent::{DecisionRecord, Generation};
use pd_core::workers::served::{REFUSED_KEY, Sums};
use pd_sim::Role;
use serde_json::Value;
use tokio::task::JoinHandle;

use crate::browser::Browser;
use crate::support::*;

/// Waits until an expression is true on the page.
fn until_true(browser: &mut Browser, expression: &str) {
    let start = Instant::now();
    while browser.evaluate(expression) != Value::Bool(true) {
        let text = browser.evaluate("document.body?.innerText ?? ''");
        assert!(start.elapsed() < PATIENCE, "{expression} is not true of {text}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn until_shown(browser: &mut Browser, text: &str) {
    until_true(browser, &format!("(document.body?.innerText ?? '').includes({})", Value::from(text)));
}

fn key(address: SocketAddr) -> u64 {
    Endpoint::new(address, WireRole::Decode).id().key()
}

/// What an Envoy served until its turn of that number, three turns a second: six legs a turn of which three are split, at a
/// prefill and at a decode endpoint.
fn served(turn: u64, [prefill, decode]: [SocketAddr; 2]) -> Vec<Served> {
    let sums = Sums { legs: 6 * turn, answers: 6 * turn, first_ms: 720 * turn, ..Sums::default() };
    let prompts = Sums { prompt_tokens: 600 * turn, matched_tokens: 150 * turn, ..sums };
    let refused = Sums { errors: turn, ..Sums::default() };
    let each = [(key(prefill), prompts), (key(decode), Sums { split: 3 * turn, ..sums }), (REFUSED_KEY, refused)];
    each.into_iter().map(|(key, sums)| Served(key, sums.words())).collect()
}

/// An Envoy with so many workers, which reports as long as this runs.
fn reporting(address: SocketAddr, gateway: u64, workers: u64, engines: [SocketAddr; 2]) -> JoinHandle<()> {
    let client = HttpClient { token: Some("secret"), ..HttpClient::new(address) };
    let generation =
        Generation { version: "0.1.0".into(), build: "0123456789ab".into(), revision: "blue".into(), workers };
    let decision = DecisionRecord {
        decision: "split".into(),
        reason: "prefilled".into(),
        model: "sim".into(),
        prefill: "10.0.0.1:8000".into(),
        decode: "10.0.0.2:8000".into(),
        prompt_tokens: 4_321,
        matched_tokens: 1_024,
        status: 200,
        prefill_ms: 87,
        first_ms: 120,
        total_ms: 2_500,
    };
    let decision = ReportedDecision { at_ms: UnixTime::from_millis(1_700_000_000_000), decision };
    let ejected = Ejected {
        address: engines[1].to_string(),
        reason: "answers 5xx".into(),
        since_ms: UnixTime::from_millis(1_700_000_000_000),
    };
    let rejected = DecisionRecord {
        decision: "rejected".into(),
        reason: "saturated".into(),
        status: 429,
        ..DecisionRecord::default()
    };
    let rejected = ReportedDecision { at_ms: UnixTime::from_millis(1_700_000_000_001), decision: rejected };
    let report = Report {
        name: format!("<b>envoy-{gateway}</b>"),
        generations: vec![generation],
        decisions: vec![rejected, decision],
        failing: vec![ejected.address.clone()],
        ejected: vec![ejected],
        ..Report::default()
    };
    tokio::spawn(async move {
        for turn in 1.. {
            let report = Report { served: served(turn, engines), ..report.clone() }.to_json();
            let record = Record { gateway, turn, report, ..Record::default() };
            let request = ExchangeRequest { from: gateway, records: vec![record], ..ExchangeRequest::default() };
            // At the end no pd-control answers.
            let _ = client.send("POST", "/v1/exchange?wait_ms=0", request.to_bytes()).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    })
}

/// Writes a picture of the page, in base64, into the folder that `PD_SCREENSHOTS` names.
fn picture(browser: &mut Browser, name: &str) {
    if let Some(folder) = std::env::var_os("PD_SCREENSHOTS") {
        let path = std::path::Path::new(&folder).join(format!("{name}.png.base64"));
        std::fs::write(path, browser.screenshot()).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_page_shows_all_that_is_known() {
    let directory = tempfile::tempdir().unwrap();
    let Some(mut browser) = Browser::open(directory.path()) else { return };
    let mut engines = Vec::new();
    for role in [Role::Prefill, Role::Decode] {
        engines.push(pd_sim::start(pd_sim::Config::of(role)).await.unwrap());
    }
    let port = Port::reserve();
    let silent = port.address();
    let text = format!(
        "endpoints:\n- {{address: '{}', role: prefill}}\n- {{address: '{}', role: decode, max_prompt_tokens: 8000}}\n\
         - {{address: '{silent}', role: both, pool: big, models: ['<img src=x onerror=alert(1)>'], state: draining}}\n",
        engines[0].addr(),
        engines[1].addr(),
    );
    let rig = Rig::start_with(&text, |config, _| {
        config.token = Token::new("secret");
        config.scrape = Some(Duration::from_millis(100));
    })
    .await;
    let mut client = rig.client.clone();
    client.token = Some("secret");
    Filter::default().poll(&client, PATIENCE).await.unwrap();

    let addresses = [engines[0].addr(), engines[1].addr()];
    let envoys = [(1, 4), (2, 3)].map(|(gateway, workers)| reporting(rig.client.address, gateway, workers, addresses));

    // Without the token it shows nothing and asks for it.
    let page = format!("http://{}/", rig.client.address);
    browser.go(&page);
    until_shown(&mut browser, "pd-control requires a token");
    assert!(!browser.evaluate("document.body?.innerText ?? ''").as_str().unwrap().contains("127.0.0.1:"));
    until_true(&mut browser, "!document.getElementById('login').hidden");
    browser.complaints.clear();
    let log_in = |token: &str| {
        format!("document.getElementById('token').value = '{token}'; document.getElementById('login').requestSubmit()")
    };
    browser.evaluate(&log_in("secret"));

    for shown in [
        "Pool default",
        "Pool big",
        "0 of 1 both ready",
        "to 8000",
        "Polls",
        "draining",
        "Ejected endpoints",
        "22:13:20 UTC",
        "<img src=x onerror=alert(1)>",
    ] {
        until_shown(&mut browser, shown);
    }
    for address in [engines[0].addr(), engines[1].addr(), silent] {
        until_shown(&mut browser, &address.to_string());
    }
    // Envoys, their problems, and their decisions.
    for shown in [
        "blue",
        "0123456789ab",
        "4 of 4",
        "3 of 4",
        "Recent decisions",
        "prefilled",
        "4321",
        "<b>envoy-1</b>",
        "saturated",
    ] {
        until_shown(&mut browser, shown);
    }
    // Figures of pools and endpoints, from what the Envoys report: two of them, six legs each in a third of a second.
    let cell = |table: &str, row: &str, column: &str| {
        format!(
            "(() => {{ const frame = [...document.querySelectorAll('h2')].find(it => it.textContent.startsWith('{table}'))\
             ?.nextElementSibling; if (!frame) return ''; const rows = [...frame.querySelectorAll('tr')];\
             const place = [...rows[0].children].findIndex(it => it.textContent === '{column}');\
             return rows.find(it => it.textContent.includes('{row}'))?.children[place]?.textContent ?? ''; }})()"
        )
    };
    let [prefill, decode] = addresses.map(|address| address.to_string());
    until_true(&mut browser, &format!("parseFloat({}) > 10", cell("Pools", "default", "Requests/s")));
    for (table, row, column, shown) in [
        ("Pools", "default", "Split", "50 %"),
        ("Pools", "default", "Hits", "25 %"),
        ("Pools", "default", "First byte", "120 ms"),
        ("Pool default", &prefill, "Hits", "25 %"),
        ("Pool default", &decode, "Split", "50 %"),
        ("Pool default", &decode, "State", "failing"),
        ("Recent decisions", "prefilled", "Time", "22:13:20 UTC"),
        ("Recent decisions", "prefilled", "Status", "200"),
        ("Recent decisions", "prefilled", "Prefill leg", "87 ms"),
        ("Recent decisions", "prefilled", "End", "2.5 s"),
        ("Recent decisions", "saturated", "Status", "429"),
    ] {
        until_true(&mut browser, &format!("{} === '{shown}'", cell(table, row, column)));
    }
    until_true(&mut browser, &format!("parseFloat({}) > 0", cell("Envoys", "envoy-1", "Refused/s")));
    until_shown(&mut browser, "2 of 2 Envoys avoid it: it answers 5xx · since 22:13:20 UTC");
    let red = "getComputedStyle(document.querySelector('tr.failing td')).backgroundColor";
    assert_eq!(browser.evaluate(red), "rgb(255, 240, 240)");
    until_true(&mut browser, "document.querySelectorAll('svg.spark path.line').length > 2");
    // Filters, which the address of the page keeps.
    let rows = "[...document.querySelectorAll('h2')].filter(it => it.textContent.startsWith('Pool ')).map(it => it.nextElementSibling.querySelectorAll('tr:not(.why)').length - 1)";
    let choose = |id: &str, value: &str| {
        format!(
            "(() => {{ const it = document.getElementById('{id}'); it.value = '{value}'; it.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"
        )
    };
    for (id, value, expected) in [
        ("pool", "big", "1"),
        ("pool", "default", "2"),
        ("state", "failing", "1"),
        ("state", "draining", "1"),
        ("model", "<img src=x onerror=alert(1)>", "1"),
        ("name", &prefill, "1"),
    ] {
        browser.evaluate(&choose(id, value));
        assert_eq!(browser.evaluate(&format!("({rows}).join()")), expected, "{id} {value}");
        browser.evaluate(&choose(id, ""));
    }
    browser.evaluate(&choose("state", "failing"));
    assert_eq!(browser.evaluate("location.hash"), "#state=failing");
    browser.evaluate(&choose("state", ""));
    assert_eq!(browser.evaluate(&format!("({rows}).join()")), "1,2");
    // Dark, where the browser asks for it.
    browser.prefer("dark");
    assert_eq!(browser.evaluate("getComputedStyle(document.body).backgroundColor"), "rgb(13, 17, 23)");
    picture(&mut browser, "dark");
    browser.prefer("light");
    picture(&mut browser, "light");
    until_shown(&mut browser, " has 3 of 4 workers with the filter");
    assert_eq!(browser.evaluate("document.images.length"), 0, "names are text, whatever they hold");
    until_true(&mut browser, "document.getElementById('login').hidden");
    until_true(&mut browser, "document.getElementById('degraded').hidden");
    let outside = "performance.getEntriesByType('resource').some(it => !it.name.startsWith(location.origin))";
    assert_eq!(browser.evaluate(outside), Value::Bool(false), "no assets from elsewhere");

    // What goes wrong is said, and that it is over.
    replace(&rig.file(), "endpoints: [broken]").unwrap();
    until_true(&mut browser, "!document.getElementById('degraded').hidden");
    until_shown(&mut browser, "endpoints[0]: must be a mapping of keys");
    replace(&rig.file(), &text).unwrap();
    until_true(&mut browser, "document.getElementById('degraded').hidden");
    assert_eq!(browser.complaints, Vec::<String>::new());

    envoys.iter().for_each(JoinHandle::abort);

    // A pd-control that is gone is said, too, and what was known of it stays to be read.
    rig.control.stop().await;
    until_shown(&mut browser, "pd-control does not answer");
    until_shown(&mut browser, "Pool default");
}

/// A fleet of a thousand endpoints: the page shows the first hundred of a pool at once, and all on demand.
#[tokio::test(flavor = "multi_thread")]
async fn the_status_page_shows_a_thousand_endpoints() {
    let directory = tempfile::tempdir().unwrap();
    let Some(mut browser) = Browser::open(directory.path()) else { return };
    let line = |n: u32| {
        let (role, pool) = (["prefill", "decode"][n as usize % 2], ["small", "large"][n as usize / 500]);
        let state = if n % 100 == 7 { "down" } else { "ready" };
        format!("- {{address: '10.{}.{}.1:8000', role: {role}, pool: {pool}, state: {state}}}\n", n / 250, n % 250)
    };
    let rig = Rig::start(&format!("endpoints:\n{}", (0..1_000).map(line).collect::<String>())).await;
    browser.go(&format!("http://{}/", rig.client.address));
    until_shown(&mut browser, "Pool large");
    until_shown(&mut browser, "Show all 500");
    let rows = "document.querySelectorAll('#tables tr').length";
    assert!(browser.evaluate(rows).as_u64().unwrap() < 300);
    // Those that fail stand first, and say since when.
    until_shown(&mut browser, "down: the list says so · since ");
    assert_eq!(browser.evaluate("document.querySelectorAll('tr.failing').length"), 10);
    picture(&mut browser, "thousand");
    browser.evaluate("[...document.querySelectorAll('button')].filter(it => it.textContent === 'Show all 500').forEach(it => it.click())");
    until_true(&mut browser, &format!("{rows} > 1000"));
    // To draw it takes no longer than a person notices.
    let drawn =
        browser.evaluate("(() => { const start = performance.now(); draw(); return performance.now() - start; })()");
    println!("1,000 endpoints are drawn in {drawn} ms");
    assert!(drawn.as_f64().unwrap() < 1_000.0);
    assert_eq!(browser.complaints, Vec::<String>::new());
}
