use super::*;
use crate::wire::{Endpoint, Role, Snapshot};
use crate::workers::shared::testing::Store;

const CONFIG: &[u8] = br#"{"control":{"cluster":"pd-control"}}"#;

struct Node {
    worker: Worker,
    push: Push,
}

fn node(store: &Store, config: &[u8], now: Monotonic) -> Node {
    let (mut worker, mut push) = (Worker::default(), Push::default());
    let config = worker.configure(config).unwrap();
    push.configure(config.control.clone(), store, now);
    Node { worker, push }
}

fn list(epoch: &str, version: u64, ports: &[u16]) -> Vec<u8> {
    let endpoints = ports.iter().map(|port| Endpoint::new(([10, 0, 0, 1], *port).into(), Role::Both)).collect();
    Snapshot {
        wire: 1,
        epoch: epoch.into(),
        version,
        base: None,
        endpoints,
        removed: vec![],
        models: vec![],
        stated: None,
    }
    .to_json()
}

fn ms(ms: u64) -> Monotonic {
    Monotonic::from_millis(ms)
}

#[test]
fn one_worker_polls_and_every_worker_learns() {
    let store = Store::default();
    let (mut a, mut b) = (node(&store, CONFIG, ms(0)), node(&store, CONFIG, ms(0)));
    assert_ne!(a.push.worker_id(), b.push.worker_id());
    let poll = a.push.tick(&store, ms(0)).unwrap();
    assert_eq!(poll.path, "/v1/watch?epoch=&since=0&wait_ms=30000");
    assert_eq!(b.push.tick(&store, ms(0)), None);
    assert_eq!(a.push.tick(&store, ms(200)), None, "one poll at a time");
    let (next, news) = a.push.answered(&mut a.worker, &store, Some(200), &list("e-1", 3, &[1, 2]), ms(300));
    assert_eq!(news, Some(News::Applied));
    assert_eq!(next.unwrap().path, "/v1/watch?epoch=e-1&since=3&wait_ms=30000");
    assert_eq!(b.push.catch_up(&mut b.worker, &store, store.announced()), Some(News::Applied));
    assert_eq!(b.worker.state.table.len(), 2);
    assert_eq!(b.push.catch_up(&mut b.worker, &store, store.announced()), None);
    assert_eq!(a.push.catch_up(&mut a.worker, &store, store.announced()), None);
}

#[test]
fn a_new_worker_starts_with_the_list_that_is_there() {
    let store = Store::default();
    let mut a = node(&store, CONFIG, ms(0));
    a.push.tick(&store, ms(0));
    a.push.answered(&mut a.worker, &store, Some(200), &list("e", 1, &[1]), ms(1));
    let mut late = node(&store, CONFIG, ms(2));
    assert_eq!(late.push.catch_up(&mut late.worker, &store, store.announced()), Some(News::Applied));
}

#[test]
fn a_dead_workers_lease_runs_out() {
    let store = Store::default();
    let (mut a, mut b) = (node(&store, CONFIG, ms(0)), node(&store, CONFIG, ms(0)));
    assert!(a.push.tick(&store, ms(0)).is_some());
    assert_eq!(b.push.tick(&store, ms(900)), None);
    assert!(b.push.tick(&store, ms(1_000)).is_some());
    assert_eq!(a.push.tick(&store, ms(1_100)), None);
}

#[test]
fn a_new_configuration_takes_the_lease_from_the_one_that_drains() {
    let store = Store::default();
    let mut old = node(&store, CONFIG, ms(0));
    assert!(old.push.tick(&store, ms(0)).is_some());
    let mut new = node(&store, br#"{"control":{"cluster":"other"}}"#, ms(100));
    assert!(new.push.tick(&store, ms(100)).is_some());
    old.push.tick(&store, ms(200));
    assert!(!old.push.holds_lease && new.push.holds_lease);
}

#[test]
fn failures_pause_longer_and_longer_and_are_logged_once() {
    let store = Store::default();
    let mut a = node(&store, CONFIG, ms(0));
    let mut now = ms(0);
    let mut pauses = Vec::new();
    let mut news = Vec::new();
    for _ in 0..6 {
        let asked = now;
        while a.push.tick(&store, now).is_none() {
            now += Duration::from_millis(10);
        }
        pauses.push((now - asked).as_millis());
        news.extend(a.push.answered(&mut a.worker, &store, Some(503), b"", now).1);
    }
    assert_eq!(pauses, [0, 100, 200, 400, 800, 1_000]);
    assert_eq!(news, [News::Lost]);
    while a.push.tick(&store, now).is_none() {
        now += Duration::from_millis(10);
    }
    assert_eq!(a.push.answered(&mut a.worker, &store, Some(304), b"", now).1, Some(News::Found));
}

#[test]
fn bad_and_empty_lists_leave_the_last_good_one_in_force_without_a_busy_loop() {
    let store = Store::default();
    let mut a = node(&store, CONFIG, ms(0));
    a.push.tick(&store, ms(0));
    a.push.answered(&mut a.worker, &store, Some(200), &list("e", 1, &[1]), ms(0));
    let (next, news) = a.push.answered(&mut a.worker, &store, Some(200), b"{", ms(1));
    assert!(next.is_none() && matches!(news, Some(News::Refused(_))));
    let (next, news) = a.push.answered(&mut a.worker, &store, Some(200), &list("f", 1, &[]), ms(200));
    assert_eq!((next.unwrap().path, news), ("/v1/watch?epoch=f&since=1&wait_ms=30000".to_owned(), Some(News::Empty)));
    let (next, _) = a.push.answered(&mut a.worker, &store, Some(200), &list("e", 1, &[1]), ms(300));
    assert!(next.is_none(), "the same list again is answered with a pause");
    assert_eq!(a.worker.state.table.len(), 1);
}

#[test]
fn a_change_that_does_not_fit_is_answered_by_asking_for_the_whole() {
    let store = Store::default();
    let mut a = node(&store, CONFIG, ms(0));
    a.push.tick(&store, ms(0));
    a.push.answered(&mut a.worker, &store, Some(200), &list("e", 1, &[1]), ms(0));
    let change = br#"{"wire":1,"epoch":"e","version":9,"base":8}"#;
    assert_eq!(a.push.answered(&mut a.worker, &store, Some(200), change, ms(10)), (None, None));
    assert_eq!(a.push.tick(&store, ms(110)).unwrap().path, "/v1/watch?epoch=&since=0&wait_ms=30000");
}

#[test]
fn without_control_nobody_polls() {
    let store = Store::default();
    let mut a = node(&store, b"", ms(0));
    assert_eq!(a.push.tick(&store, ms(0)), None);
    assert_eq!(store.get(LEASE_KEY), None);
}
