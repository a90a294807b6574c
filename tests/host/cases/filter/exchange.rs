//! Several Envoys that exchange their loads and blocks through the hub that `pd-control` serves.

use std::collections::BTreeSet;
use std::time::Duration;

use pd_core::endpoints::elsewhere::Totals;
use pd_core::envoys::hub::Hub;
use pd_core::envoys::message::{Batch, ExchangeRequest, ExchangeResponse};
use pd_core::envoys::report::Report;
use pd_core::prefix::block_log::{block_event, read_event, split_events};
use pd_core::prefix::hash::BlockHash;
use pd_core::time::Monotonic;
use pd_host::{Callout, ClusterState, Fleet, Request, SharedStore, Stream, Worker, WorkerConfig};

use crate::gateway::*;

/// How often an Envoy that is not alone sends an exchange request.
const TICK: Duration = Duration::from_millis(50);
/// How often every other one looks for work.
const IDLE_TICK: Duration = Duration::from_millis(200);
/// How long `pd-control` holds a question.
const HELD: Duration = Duration::from_secs(1);

/// Envoys and their hub.
struct Envoys {
    hub: Hub,
    now: Monotonic,
    fleets: Vec<Fleet>,
    /// The requests that the hub got, oldest first.
    requests: Vec<ExchangeRequest>,
}

impl Envoys {
    fn new(count: usize, workers: usize, plugin_configuration: &str) -> Self {
        let mut envoys = Self { hub: Hub::new(7), now: Monotonic::ZERO, fleets: Vec::new(), requests: Vec::new() };
        for _ in 0..count {
            envoys.start(workers, plugin_configuration);
        }
        // An Envoy that knows no other one sends one exchange request a second.
        envoys.pass(Duration::from_millis(2_500));
        envoys
    }

    fn start(&mut self, workers: usize, plugin_configuration: &str) {
        let envoy = WorkerConfig { seed: 1 + self.fleets.len() as u64, ..envoy(plugin_configuration) };
        self.fleets.push(Fleet::new(module(), workers, SharedStore::new(), envoy).unwrap());
    }

    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until {
            self.now += TICK;
            self.hub.prune(self.now);
            self.fleets.iter().for_each(|fleet| fleet.advance(TICK));
            for (worker, call) in self.fleets.iter().flat_map(calls).collect::<Vec<_>>() {
                self.serve(&worker, &call);
            }
        }
    }

    fn serve(&mut self, worker: &Worker, call: &Callout) {
        let request = ExchangeRequest::from_bytes(&call.body).unwrap();
        self.hub.take(&request, 0, self.now);
        let is_question = path(call) == "/v1/exchange?wait_ms=1000";
        let age = Duration::from_nanos(worker.clock().now_ns() - call.at_ns);
        if is_question && !self.hub.has_news(&request) && age < HELD {
            return;
        }
        let response = self.hub.answer(&request, 0).to_bytes();
        worker.answer(call.token, [(":status", "200")], response).unwrap();
        self.requests.push(request);
    }

    /// What all Envoys together have in flight, as the hub has it.
    fn in_flight(&self) -> Vec<(u64, Totals)> {
        self.hub.answer(&ExchangeRequest { wants: true, ..ExchangeRequest::default() }, 0).loads.unwrap()
    }

    fn workers(&self, envoy: usize) -> &[Worker] {
        self.fleets[envoy].workers()
    }

    #[track_caller]
    fn assert_clean(&self) {
        for fleet in &self.fleets {
            assert_eq!(fleet.violations(), []);
        }
    }
}

/// Calls of the exchange that an Envoy has in flight.
fn calls(fleet: &Fleet) -> Vec<(Worker, Callout)> {
    let of = |worker: &Worker| exchanges(worker).into_iter().map(|call| (worker.clone(), call)).collect::<Vec<_>>();
    fleet.workers().iter().flat_map(of).collect()
}

fn path(call: &Callout) -> &str {
    std::str::from_utf8(call.header(":path").unwrap()).unwrap()
}

fn always_split() -> String {
    config(&[r#""control":{"cluster":"pd-control"}"#], FOUR_AND_ONE, r#""split":{"mode":"always"}"#)
}

/// A split request that waits for its prefill leg, which takes some seconds, and where that is.
fn waiting(worker: &Worker, id: u64) -> (Stream, String) {
    let stream = Request::post(CHAT, chat(id, 200_000)).send(worker);
    let endpoint = chosen(worker);
    (stream, endpoint)
}

#[test]
fn every_worker_decides_as_if_all_envoys_were_one() {
    for workers in [1, 4] {
        let mut envoys = Envoys::new(3, workers, &always_split());
        for round in 0..4 {
            // One leg each at two Envoys, and one more: three of the four prefill endpoints are busy.
            let mut busy = Vec::new();
            for (id, envoy) in [0, 1, 0].into_iter().enumerate() {
                let worker = &envoys.workers(envoy)[(round + id) % workers];
                busy.push(waiting(worker, 100 * round as u64 + id as u64));
                envoys.pass(2 * TICK);
            }
            let endpoints: BTreeSet<_> = busy.iter().map(|(_, endpoint)| endpoint.clone()).collect();
            assert_eq!(endpoints.len(), 3, "{workers} workers, round {round}: {busy:?}");
            for worker in envoys.workers(2) {
                let (stream, free) = waiting(worker, 100 * round as u64 + 50);
                assert!(!endpoints.contains(&free), "{workers} workers, round {round}: {free} of {endpoints:?}");
                stream.reset();
            }
            for (stream, _) in &busy {
                stream.reset();
            }
            envoys.pass(4 * TICK);
            // Engines go on with prompts whose clients have left. Their legs count in the next choices, so each round starts
            // without any.
            assert_eq!(envoys.in_flight().len(), 4);
            envoys.pass(Duration::from_secs(20));
            assert_eq!(envoys.in_flight(), []);
        }
        envoys.assert_clean();
    }
}

#[test]
fn what_one_envoy_routed_every_envoy_knows() {
    for workers in [1, 4] {
        let mut envoys = Envoys::new(2, workers, &config(&[r#""control":{"cluster":"pd-control"}"#], TWO_AND_TWO, ""));
        for id in 0..8 {
            let first = run_split(&envoys.workers(0)[id % workers], &long_chat(id as u64));
            envoys.pass(4 * TICK);
            for worker in envoys.workers(1) {
                let again = long_chat(id as u64).send(worker);
                assert_eq!(decision(&again), ("decode_only".to_owned(), "cached".to_owned()), "{workers} workers");
                assert_eq!(destinations(&forwarded(&again))[0], destinations(&forwarded(&first))[0]);
                respond(&again);
            }
        }
        envoys.assert_clean();
    }
}

#[test]
fn one_worker_leads_the_exchange_and_calls_more_often_where_there_are_others() {
    let mut envoys = Envoys::new(1, 4, &controlled());
    let periods = |envoys: &Envoys, envoy: usize| -> Vec<Duration> {
        let mut periods: Vec<_> = envoys.workers(envoy).iter().filter_map(Worker::tick_period).collect();
        periods.sort_unstable();
        periods
    };
    envoys.requests.clear();
    envoys.pass(Duration::from_secs(10));
    assert!((9..=11).contains(&envoys.requests.len()), "once a second: {}", envoys.requests.len());
    assert_eq!(periods(&envoys, 0), [IDLE_TICK; 4]);
    envoys.start(4, &controlled());
    envoys.pass(Duration::from_secs(3));
    for envoy in 0..2 {
        assert_eq!(periods(&envoys, envoy), [TICK, IDLE_TICK, IDLE_TICK, IDLE_TICK]);
    }
    let leaders: BTreeSet<u64> = envoys.requests.iter().map(|request| request.from).collect();
    assert_eq!(leaders.len(), 2);
    let metric = |envoy: usize, name: &str| envoys.fleets[envoy].shared().counter(name);
    assert!(metric(0, "pd_exchanges_total;result=ok") > 10);
    assert_eq!(metric(0, "pd_exchanges_total;result=failed"), 0);
    // The other one leaves.
    envoys.fleets.pop();
    envoys.pass(Duration::from_secs(6));
    assert_eq!(periods(&envoys, 0), [IDLE_TICK; 4]);
    envoys.assert_clean();
}

#[test]
fn a_leader_that_dies_is_replaced_and_its_loads_count_once() {
    let mut envoys = Envoys::new(2, 3, &always_split());
    for round in 0..3 {
        let leader = envoys.workers(0).iter().position(|worker| worker.tick_period() == Some(TICK)).unwrap();
        let survivor = (leader + 1) % 3;
        let (stream, endpoint) = waiting(&envoys.workers(0)[survivor], 10 + round);
        envoys.pass(2 * TICK);
        envoys.fleets[0].replace(leader).unwrap();
        envoys.requests.clear();
        envoys.pass(Duration::from_secs(2));
        let records = || envoys.requests.iter().flat_map(|request| &request.records);
        let new = records().find(|record| record.replaces != 0 && record.turn == 1).expect("another leader");
        assert_ne!(new.gateway, new.replaces);
        // The surviving worker's leg is in flight once, although the leader that sent it first is gone.
        assert_eq!(envoys.in_flight().len(), 1);
        let (other, free) = waiting(&envoys.workers(1)[0], 20 + round);
        assert_ne!(free, endpoint);
        other.reset();
        stream.reset();
        envoys.pass(Duration::from_secs(1));
    }
    envoys.assert_clean();
}

#[test]
fn a_generation_that_takes_over_takes_the_exchange_with_it() {
    let mut envoys = Envoys::new(2, 2, &always_split());
    let revised = always_split().replacen('{', r#"{"revision":"new","#, 1);
    envoys.fleets[0].reconfigure(revised.as_bytes(), None).unwrap();
    envoys.fleets[0].retire();
    envoys.pass(Duration::from_secs(3));
    let busy: Vec<_> = (0..3).map(|id| waiting(&envoys.workers(0)[1], id)).collect();
    let endpoints: BTreeSet<_> = busy.iter().map(|(_, endpoint)| endpoint.clone()).collect();
    assert_eq!(endpoints.len(), 3, "{busy:?}");
    envoys.pass(4 * TICK);
    for worker in envoys.workers(1) {
        let (stream, free) = waiting(worker, 50);
        assert!(!endpoints.contains(&free), "{free} of {endpoints:?}");
        stream.reset();
    }
    envoys.assert_clean();
}

/// A good answer to a gateway.
pub fn response(request: &ExchangeRequest) -> ExchangeResponse {
    ExchangeResponse {
        hub: 7,
        state: 1,
        have: request.records.iter().map(|record| (record.gateway, 0)).collect(),
        gateways: 2,
        exchanging: 2,
        loads: Some(vec![(1, Totals { work: 1, tokens: 1, requests: 1, legs: 1 })]),
        batches: vec![Batch {
            gateway: 3,
            hash_scheme: request.records.first().map_or(0, |record| record.hash_scheme),
            first: 0,
            blocks: block_event(1, &[BlockHash(1), BlockHash(2)]).into_vec(),
        }],
    }
}

/// Answers that are none, by name.
fn bad_answers(request: &ExchangeRequest) -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let good = response(request).to_bytes();
    let mut another_version = good.clone();
    another_version[0] = 9;
    let mut too_long = good.clone();
    too_long[24..32].copy_from_slice(&u64::MAX.to_le_bytes());
    vec![
        ("nothing", "200", Vec::new()),
        ("a page", "200", b"<html>".to_vec()),
        ("cut short", "200", good[..good.len() - 1].to_vec()),
        ("another version", "200", another_version),
        ("a length that no memory holds", "200", too_long),
        ("no such path", "404", good.clone()),
        ("unauthorised", "401", good.clone()),
        ("Envoy's 503", "503", b"no healthy upstream".to_vec()),
        ("no status", "", good),
    ]
}

#[test]
fn bad_answers_are_counted_and_change_nothing() {
    let request = ExchangeRequest::default();
    for index in 0..bad_answers(&request).len() + 2 {
        let gateway = Gateway::pushed(FOUR_AND_ONE);
        // The filter writes counters every 200 ms.
        let counter = |result: &str| {
            gateway.advance(IDLE_TICK);
            gateway.shared.counter(&format!("pd_exchanges_total;result={result}"))
        };
        gateway.tick();
        let call = exchanges(&gateway).remove(0);
        let request = ExchangeRequest::from_bytes(&call.body).unwrap();
        let bad = bad_answers(&request);
        let name = bad.get(index).map_or("none at all", |(name, ..)| name);
        match bad.get(index) {
            Some((_, status, body)) => gateway.answer(call.token, [(":status", *status)], body).unwrap(),
            None if index == bad.len() => gateway.refuse(call.token).unwrap(),
            None => gateway.time_out(call.token).unwrap(),
        }
        assert_eq!(counter("failed"), 1, "{name}");
        run_split(&gateway, &long_chat(1));
        // After a pause, the filter sends the next request, and takes a good answer.
        assert_eq!(exchanges(&gateway), [], "{name}");
        gateway.advance(Duration::from_secs(1));
        let call = exchanges(&gateway).remove(0);
        let request = ExchangeRequest::from_bytes(&call.body).unwrap();
        assert!(!request.records.is_empty(), "{name}");
        gateway.answer(call.token, [(":status", "200")], response(&request).to_bytes()).unwrap();
        assert_eq!(counter("ok"), 1, "{name}");
        assert_eq!(counter("failed"), 1, "{name}");
        assert_eq!(gateway.tick_period(), Some(TICK), "{name}");
        gateway.assert_idle();
    }
}

#[test]
fn a_call_that_the_host_refuses_is_tried_again() {
    for cluster in [None, Some(ClusterState::FailsAtOnce)] {
        let gateway = Gateway::pushed(FOUR_AND_ONE);
        gateway.set_cluster(CONTROL, cluster);
        gateway.advance(Duration::from_secs(10));
        assert_eq!(exchanges(&gateway), []);
        gateway.set_cluster(CONTROL, Some(ClusterState::Ready));
        gateway.advance(Duration::from_secs(1));
        let call = exchanges(&gateway).remove(0);
        let request = ExchangeRequest::from_bytes(&call.body).unwrap();
        gateway.answer(call.token, [(":status", "200")], response(&request).to_bytes()).unwrap();
        gateway.advance(IDLE_TICK);
        // One failure for each pause while no hub answered.
        let failed = gateway.shared.counter("pd_exchanges_total;result=failed");
        assert!((12..=25).contains(&failed), "{failed}");
        assert_eq!(gateway.shared.counter("pd_exchanges_total;result=ok"), 1);
        gateway.assert_idle();
    }
}

#[test]
fn whatever_the_hub_says_requests_are_served() {
    let most = Totals { work: u64::MAX, tokens: u64::MAX, requests: u64::MAX, legs: u64::MAX };
    let mut gateway = Gateway::pushed(FOUR_AND_ONE);
    // The next tick makes it its Envoy's leader, and the one after that sends.
    gateway.tick();
    run_split(&gateway, &long_chat(1));
    gateway.advance(Duration::from_secs(2));
    let call = exchanges(&gateway).remove(0);
    let request = ExchangeRequest::from_bytes(&call.body).unwrap();
    // The endpoints' own keys, as this gateway sent them.
    let events: Vec<u8> = request.records[0].blocks.clone();
    let keys: BTreeSet<u64> = split_events(&events).filter_map(read_event).map(|(endpoint, _)| endpoint).collect();
    assert!(!keys.is_empty());
    let loads = |totals: Totals| Some(keys.iter().map(|key| (*key, totals)).collect::<Vec<_>>());
    let twice = loads(most).into_iter().chain(loads(most)).flatten().collect();
    let torn = [&events[..], &[0xff; 24], &events[..]].concat();
    let two = ExchangeResponse { gateways: 2, exchanging: 2, ..ExchangeResponse::default() };
    let below_zero = Totals::default().minus(Totals { work: 1, tokens: 1, requests: 1, legs: 1 });
    let batch = |gateway: u64, first: u64| Batch {
        gateway,
        hash_scheme: request.records[0].hash_scheme,
        first,
        blocks: torn.clone(),
    };
    for (name, response) in [
        (
            "as many as can be counted",
            ExchangeResponse { gateways: u64::MAX, exchanging: u64::MAX, ..ExchangeResponse::default() },
        ),
        ("fewer than one", ExchangeResponse { loads: loads(most), ..ExchangeResponse::default() }),
        (
            "more than there are",
            ExchangeResponse { gateways: 1, exchanging: 9, loads: loads(most), ..ExchangeResponse::default() },
        ),
        ("the most", ExchangeResponse { loads: loads(most), ..two.clone() }),
        ("the most twice", ExchangeResponse { loads: Some(twice), ..two.clone() }),
        ("below zero", ExchangeResponse { loads: loads(below_zero), ..two.clone() }),
        ("more of ours than there is", ExchangeResponse { have: vec![(request.from, u64::MAX)], ..two.clone() }),
        ("the last number", ExchangeResponse { batches: vec![batch(3, u64::MAX)], ..two.clone() }),
        ("our own events", ExchangeResponse { batches: vec![batch(request.from, 0), batch(0, 0)], ..two.clone() }),
    ] {
        gateway = Gateway::pushed(FOUR_AND_ONE);
        gateway.tick();
        for round in 0..4 {
            for call in exchanges(&gateway) {
                gateway.answer(call.token, [(":status", "200")], response.to_bytes()).unwrap();
            }
            let stream = run_split(&gateway, &long_chat(10 + round));
            assert_eq!(decision(&stream).0, "split", "{name}");
            gateway.advance(Duration::from_millis(100));
        }
        // Unheard of for a while, nothing of it counts any more.
        for call in exchanges(&gateway) {
            gateway.refuse(call.token).unwrap();
        }
        gateway.set_cluster(CONTROL, None);
        gateway.advance(Duration::from_secs(5));
        assert_eq!(gateway.tick_period(), Some(IDLE_TICK), "{name}");
        run_split(&gateway, &long_chat(20));
        gateway.assert_idle();
    }
}

#[test]
fn a_reported_decision_has_the_time_of_the_day() {
    let mut envoys = Envoys::new(1, 2, &always_split());
    // The clocks of a host differ by more than half a century.
    let unix_ms = |worker: &Worker| worker.clock().now_ns() / 1_000_000;
    let mut expected = Vec::new();
    for worker in envoys.workers(0).to_vec() {
        run_split(&worker, &long_chat(1));
        expected.push(unix_ms(&worker));
        envoys.pass(Duration::from_millis(1_300));
    }
    expected.reverse();
    let reports: Vec<_> = envoys.hub.reports(envoys.now).filter_map(|(.., json)| Report::from_json(json)).collect();
    let [report] = &reports[..] else { panic!("{reports:?}") };
    let times: Vec<_> = report.decisions.iter().map(|decision| decision.at_ms.as_millis()).collect();
    assert_eq!(times, expected, "newest first");
}
