//! The status page, as a browser shows it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use pd_control::access::token::Token;
use pd_core::envoys::message::{ExchangeRequest, Record};
use pd_core::envoys::report::{Ejected, Report, ReportedDecision};
use pd_core::time::UnixTime;
use pd_core::workers::recent::{DecisionRecord, Generation};
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

/// An Envoy with so many workers, which reports as long as this runs.
fn reporting(address: SocketAddr, gateway: u64, workers: u64) -> JoinHandle<()> {
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
    };
    let decision = ReportedDecision { at_ms: UnixTime::from_millis(1_700_000_000_000), decision };
    let ejected = Ejected {
        address: "10.0.0.3:8000".into(),
        reason: "answers 5xx".into(),
        since_ms: UnixTime::from_millis(1_700_000_000_000),
    };
    let report = Report {
        generations: vec![generation],
        decisions: vec![decision],
        ejected: vec![ejected],
        ..Report::default()
    };
    let report = report.to_json();
    tokio::spawn(async move {
        for turn in 1.. {
            let record = Record { gateway, turn, report: report.clone(), ..Record::default() };
            let request = ExchangeRequest { from: gateway, records: vec![record], ..ExchangeRequest::default() };
            // At the end no pd-control answers.
            let _ = client.send("POST", "/v1/exchange?wait_ms=0", request.to_bytes()).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    })
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

    let envoys = [(1, 4), (2, 3)].map(|(gateway, workers)| reporting(rig.client.address, gateway, workers));

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
    for shown in ["blue", "0123456789ab", "4 of 4", "3 of 4", "Recent decisions", "prefilled", "4321"] {
        until_shown(&mut browser, shown);
    }
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
    if let Some(path) = std::env::var_os("PD_SCREENSHOT") {
        std::fs::write(path, browser.screenshot()).unwrap();
    }
    replace(&rig.file(), &text).unwrap();
    until_true(&mut browser, "document.getElementById('degraded').hidden");
    assert_eq!(browser.complaints, Vec::<String>::new());

    envoys.iter().for_each(JoinHandle::abort);

    // A pd-control that is gone is said, too, and what was known of it stays to be read.
    rig.control.stop().await;
    until_shown(&mut browser, "pd-control does not answer");
    until_shown(&mut browser, "Pool default");
}
