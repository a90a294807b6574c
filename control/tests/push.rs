//! The long poll: when pd-control answers a poll, and with which list.

use std::time::{Duration, Instant};

use axum::http::StatusCode;
use pd_control::Control;

use crate::support::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_new_filter_gets_the_whole_list_at_once() {
    let rig = Rig::start(&four(1.0)).await;
    let mut filter = Filter::default();
    let snapshot = filter.poll(&rig.client, PATIENCE).await.unwrap();
    assert_eq!((snapshot.base, snapshot.version, snapshot.endpoints.len()), (None, 1, 4));
    let bare = rig.client.get("/v1/watch").await;
    assert_eq!(bare.status, StatusCode::OK);
    assert_eq!(bare.headers["content-type"], "application/json");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_that_is_up_to_date_waits_its_time_and_gets_304() {
    let rig = Rig::start(&four(1.0)).await;
    let filter = rig.filter().await;
    let start = Instant::now();
    let answer = filter.request(&rig.client, Duration::from_millis(80)).await;
    assert_eq!((answer.status, answer.body.as_str()), (StatusCode::NOT_MODIFIED, ""));
    assert!(start.elapsed() >= Duration::from_millis(80));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_answers_the_open_poll_with_what_changed() {
    let rig = Rig::start(&four(1.0)).await;
    let mut filter = rig.filter().await;
    let (client, file) = (rig.client.clone(), rig.file());
    let poll = tokio::spawn(async move {
        let snapshot = filter.poll(&client, PATIENCE).await.unwrap();
        (filter, snapshot)
    });
    until_true("the poll waits", || async { rig.client.metric("pd_control_pollers").await == 1.0 }).await;
    replace(&file, &endpoints(&[(1, 2.0), (2, 1.0), (3, 1.0), (5, 1.0), (6, 1.0)])).unwrap();
    let (filter, snapshot) = poll.await.unwrap();
    assert_eq!((snapshot.base, snapshot.version), (Some(1), 2));
    let names: Vec<_> = snapshot.endpoints.iter().map(|endpoint| endpoint.address.port()).collect();
    assert_eq!((names, snapshot.removed), (vec![1, 5, 6], vec!["127.0.0.1:4".to_owned()]));
    assert_eq!(filter.table.len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn edits_reach_an_open_poll_within_milliseconds() {
    let rig = Rig::start(&four(1.0)).await;
    let mut filter = rig.filter().await;
    let mut latencies = Vec::new();
    for round in 2..42 {
        let (client, mut next, waiting) = (rig.client.clone(), filter.clone(), rig.client.clone());
        let poll = tokio::spawn(async move {
            next.poll(&client, PATIENCE).await.unwrap();
            (next, Instant::now())
        });
        until_true("the poll waits", || async { waiting.metric("pd_control_pollers").await == 1.0 }).await;
        let start = Instant::now();
        if round % 2 == 0 {
            replace(&rig.file(), &four(round.into())).unwrap()
        } else {
            std::fs::write(rig.file(), four(round.into())).unwrap()
        }
        let (next, end) = poll.await.unwrap();
        assert_eq!(next.table["127.0.0.1:1"], f64::from(round));
        filter = next;
        latencies.push(end - start);
    }
    latencies.sort_unstable();
    let (median, worst) = (latencies[latencies.len() / 2], latencies[latencies.len() - 1]);
    println!("edit to answer, 40 edits: median {median:?}, worst {worst:?}");
    assert!(worst < Duration::from_secs(1), "{latencies:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_that_missed_versions_gets_them_in_one() {
    let rig = Rig::start(&four(1.0)).await;
    let old = rig.filter().await;
    let mut new = old.clone();
    for weight in [2.0, 3.0, 4.0] {
        replace(&rig.file(), &four(weight)).unwrap();
        new.until_weight(&rig.client, weight).await;
    }
    let mut late = old.clone();
    let snapshot = late.poll(&rig.client, PATIENCE).await.unwrap();
    assert_eq!((snapshot.base, snapshot.version, snapshot.endpoints.len()), (Some(1), 4, 1));
    assert_eq!(late.table, new.table);
    let mut stranger = Filter { epoch: "another".into(), version: 4, ..Filter::default() };
    assert_eq!(stranger.poll(&rig.client, PATIENCE).await.unwrap().base, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn hundreds_of_polls_wait_and_are_all_answered() {
    const FILTERS: usize = 300;
    let rig = Rig::start(&four(1.0)).await;
    let filter = rig.filter().await;
    let polls: Vec<_> = (0..FILTERS)
        .map(|_| {
            let (mut filter, client) = (filter.clone(), HttpClient::new(rig.client.address));
            tokio::spawn(async move {
                filter.poll(&client, PATIENCE).await.unwrap();
                filter.table
            })
        })
        .collect();
    until_true("all polls wait", || async { rig.client.metric("pd_control_pollers").await == FILTERS as f64 }).await;
    let start = Instant::now();
    replace(&rig.file(), &four(2.0)).unwrap();
    for poll in polls {
        assert_eq!(poll.await.unwrap()["127.0.0.1:1"], 2.0);
    }
    println!("edit to the last of {FILTERS} answers: {:?}", start.elapsed());
    until_true("no poll waits", || async { rig.client.metric("pd_control_pollers").await == 0.0 }).await;
    assert_eq!(rig.client.metric("pd_control_watch_requests_total{code=\"200\"}").await, FILTERS as f64 + 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_that_leaves_is_not_counted_any_longer() {
    let rig = Rig::start(&four(1.0)).await;
    let filter = rig.filter().await;
    let client = HttpClient::new(rig.client.address);
    let poll = tokio::spawn(async move { filter.request(&client, PATIENCE).await.status });
    until_true("the poll waits", || async { rig.client.metric("pd_control_pollers").await == 1.0 }).await;
    poll.abort();
    until_true("the poll is gone", || async { rig.client.metric("pd_control_pollers").await == 0.0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_is_another_epoch_and_gives_the_whole_list() {
    let rig = Rig::start(&four(1.0)).await;
    let mut filter = rig.filter().await;
    let epoch = filter.epoch.clone();
    rig.control.stop().await;
    let again = Control::start(rig.config).await.unwrap();
    let snapshot = filter.poll(&HttpClient::new(again.address()), PATIENCE).await.unwrap();
    assert_eq!((snapshot.base, snapshot.version, snapshot.endpoints.len()), (None, 1, 4));
    assert_ne!(snapshot.epoch, epoch);
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_answers_the_open_polls() {
    let rig = Rig::start(&four(1.0)).await;
    let filter = rig.filter().await;
    let polls: Vec<_> = (0..20)
        .map(|_| {
            let (filter, client) = (filter.clone(), rig.client.clone());
            tokio::spawn(async move { filter.request(&client, PATIENCE).await.status })
        })
        .collect();
    until_true("the polls wait", || async { rig.client.metric("pd_control_pollers").await == 20.0 }).await;
    let start = Instant::now();
    rig.control.stop().await;
    println!("stopped in {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(1));
    for poll in polls {
        assert_eq!(poll.await.unwrap(), StatusCode::NOT_MODIFIED);
    }
    assert!(rig.client.request("GET", "/healthz").await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_that_makes_no_sense_is_400() {
    let rig = Rig::start(&four(1.0)).await;
    for query in ["since=x", "since=-1", "wait_ms=1e3", "since=1&since=2"] {
        let answer = rig.client.get(&format!("/v1/watch?{query}")).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{query}");
        assert!(answer.body.contains("error"), "{}", answer.body);
    }
    assert_eq!(rig.client.metric("pd_control_watch_requests_total{code=\"400\"}").await, 4.0);
}
