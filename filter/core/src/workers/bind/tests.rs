//! Turns among several workers.

use super::*;
use crate::choose::prompt::Prompt;
use crate::endpoints::table::EndpointRef;
use crate::prefix::hash::{BlockHash, PromptHash};
use crate::workers::log::WorkersLog;
use crate::workers::shared::Shared;
use crate::workers::shared::testing::Store;
use crate::workers::wait::Ask;

const CONFIG: &[u8] = br#"{"pools":{"default":{"fit":false,"queue":{"enabled":true}}},"endpoints":[
    {"address":"10.0.0.1:1","role":"prefill"},{"address":"10.0.0.1:2","role":"prefill"},
    {"address":"10.0.0.2:1","role":"decode"}]}"#;
const FAR: Monotonic = Monotonic::from_secs(3_600);

struct Node {
    worker: Worker,
    log: WorkersLog,
}

fn ms(ms: u64) -> Monotonic {
    Monotonic::from_millis(10_000 + ms)
}

fn fleet(store: &Store, count: u64) -> Vec<Node> {
    let node = |id| {
        let mut worker = Worker::default();
        worker.configure(CONFIG).unwrap();
        let mut log = WorkersLog::default();
        log.configure(&mut worker, store, id, ms(0));
        Node { worker, log }
    };
    let mut nodes: Vec<Node> = (1..=count).map(node).collect();
    nodes.iter_mut().for_each(|node| node.catch_up(store, ms(0)));
    nodes
}

fn prompt(id: u64, tokens: f64) -> Prompt {
    let blocks = (0..8).map(|block| BlockHash(id * 100 + block)).collect();
    let hash = PromptHash { blocks, head: id };
    Prompt { tokens, block_tokens: 128.0, hash, key: id, ..Prompt::default() }
}

impl Node {
    fn catch_up(&mut self, store: &Store, now: Monotonic) {
        self.log.catch_up(&mut self.worker, store, store.announced(), now);
    }

    fn publish(&mut self, store: &Store, now: Monotonic) {
        self.log.publish(&mut self.worker, store, now);
    }

    fn tick(&mut self, store: &Store, now: Monotonic) {
        self.log.tick(&mut self.worker, store, now);
    }

    fn prefill(&self, place: usize) -> EndpointRef {
        let candidates = self.worker.state.table.candidates("m").unwrap();
        self.worker.state.table.refer(candidates.prefill[place]).unwrap()
    }

    /// Keeps an endpoint busy.
    fn start(&mut self, place: usize, seconds: f64, now: Monotonic) -> u64 {
        let leg = self.worker.next_leg();
        let endpoint = self.prefill(place);
        self.worker.prefill_started(endpoint, leg, seconds, now, FAR);
        leg
    }

    fn wait(&mut self, prompt: &Prompt, now: Monotonic) -> (u64, Option<EndpointIndex>) {
        let candidates = self.worker.state.table.candidates("m").unwrap();
        let ask = Ask {
            candidates: &candidates,
            pairing: None,
            model: "m",
            prompt,
            priority: 0,
            fairness: 0,
            body_bytes: 100,
            arrival: now,
            deadline: None,
        };
        self.worker.wait(&ask, now).unwrap()
    }
}

fn bound(turn: Option<Turn>) -> (u64, EndpointIndex) {
    match turn {
        Some(Turn { id, act: Act::Bind(endpoint) }) => (id, endpoint),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_worker_with_room_for_a_request_of_another_one_wakes_that_one() {
    let store = Store::default();
    let mut nodes = fleet(&store, 3);
    let legs = [nodes[1].start(0, 9.0, ms(0)), nodes[1].start(1, 9.0, ms(0))];
    nodes[1].publish(&store, ms(0));
    nodes[0].catch_up(&store, ms(1));
    let (id, room) = nodes[0].wait(&prompt(1, 4_000.0), ms(1));
    assert_eq!(room, None);
    nodes[0].publish(&store, ms(1));
    nodes.iter_mut().for_each(|node| node.catch_up(&store, ms(2)));
    assert!(nodes.iter().all(|node| node.worker.state.waiting.len() == 1));
    // The leg of worker 2 ends.
    let endpoint = nodes[1].prefill(0);
    nodes[1].worker.prefill_ended(endpoint, legs[0], ms(3));
    nodes[1].publish(&store, ms(3));
    assert_eq!(nodes[1].worker.workers_to_wake().collect::<Vec<_>>(), [1]);
    assert_eq!(nodes[1].worker.next_turn(ms(3)), None, "it has none of its own");
    nodes[0].catch_up(&store, ms(3));
    let turn = nodes[0].worker.next_turn(ms(3));
    assert_eq!(bound(turn), (id, endpoint.index));
    assert_eq!(nodes[0].worker.bind(id, 0.1, ms(3)), Some(Duration::from_millis(2)));
    nodes[0].publish(&store, ms(3));
    nodes.iter_mut().for_each(|node| node.catch_up(&store, ms(3)));
    assert!(nodes.iter().all(|node| node.worker.state.waiting.is_empty()));
}

#[test]
fn the_shorter_request_of_another_worker_goes_first_and_one_that_does_not_come_is_passed_over() {
    let store = Store::default();
    let mut nodes = fleet(&store, 3);
    let leg = nodes[0].start(0, 9.0, ms(0));
    nodes[0].start(1, 9.0, ms(0));
    nodes[0].publish(&store, ms(0));
    nodes[1].catch_up(&store, ms(0));
    let (long, _) = nodes[0].wait(&prompt(1, 8_000.0), ms(0));
    let (short, _) = nodes[1].wait(&prompt(2, 1_000.0), ms(0));
    nodes.iter_mut().for_each(|node| node.publish(&store, ms(0)));
    nodes.iter_mut().for_each(|node| node.catch_up(&store, ms(0)));
    let endpoint = nodes[0].prefill(0);
    nodes[0].worker.prefill_ended(endpoint, leg, ms(10));
    assert_eq!(nodes[0].worker.next_turn(ms(10)), None, "the other worker's is shorter");
    let woken: Vec<u64> = nodes[0].worker.workers_to_wake().collect();
    assert!(woken.contains(&2), "{woken:?}");
    assert!(nodes[0].worker.next_look(ms(10)).unwrap() <= WAKE);
    nodes[0].publish(&store, ms(10));
    nodes[1].catch_up(&store, ms(10));
    assert_eq!(bound(nodes[1].worker.next_turn(ms(10))).0, short);
    // It stands still.
    assert_eq!(nodes[0].worker.next_turn(ms(14)), None);
    assert_eq!(bound(nodes[0].worker.next_turn(ms(15))).0, long);
}

#[test]
fn the_requests_of_a_worker_that_died_wait_no_longer() {
    let store = Store::default();
    let mut nodes = fleet(&store, 2);
    nodes[0].start(0, 9.0, ms(0));
    nodes[0].start(1, 9.0, ms(0));
    nodes[0].publish(&store, ms(0));
    nodes[1].catch_up(&store, ms(0));
    nodes[1].wait(&prompt(1, 8_000.0), ms(0));
    nodes[1].publish(&store, ms(0));
    nodes[1].tick(&store, ms(0));
    nodes.truncate(1);
    nodes[0].catch_up(&store, ms(0));
    assert_eq!(nodes[0].worker.state.waiting.len(), 1);
    for tick in 1..6 {
        nodes[0].tick(&store, ms(tick * 200));
    }
    assert!(nodes[0].worker.state.waiting.is_empty());
    assert_eq!(nodes[0].worker.state.waiting.workers().count(), 0);
}

#[test]
fn a_worker_that_comes_later_knows_what_waits() {
    let store = Store::default();
    let mut nodes = fleet(&store, 1);
    nodes[0].start(0, 9.0, ms(0));
    nodes[0].start(1, 9.0, ms(0));
    let (id, _) = nodes[0].wait(&prompt(1, 8_000.0), ms(0));
    nodes[0].tick(&store, ms(0));
    let mut worker = Worker::default();
    worker.configure(CONFIG).unwrap();
    let mut log = WorkersLog::default();
    log.configure(&mut worker, &store, 7, ms(1));
    assert_eq!(worker.state.waiting.len(), 1);
    assert_eq!(worker.state.waiting.workers().collect::<Vec<_>>(), [1]);
    nodes[0].worker.stop_waiting(id);
    nodes[0].tick(&store, ms(2));
    log.catch_up(&mut worker, &store, store.announced(), ms(2));
    assert!(worker.state.waiting.is_empty());
}

#[test]
fn a_burst_is_served_once_each_by_whichever_worker_has_it() {
    let store = Store::default();
    let mut nodes = fleet(&store, 4);
    let mut now = 0;
    let mut waiting = 0;
    let mut legs: Vec<(usize, u64, EndpointRef, u64)> = Vec::new();
    let mut served = std::collections::BTreeSet::new();
    for request in 0..200_u64 {
        let index = (request % 4) as usize;
        nodes[index].catch_up(&store, ms(now));
        let (id, room) = nodes[index].wait(&prompt(request % 7, 1_000.0 + request as f64), ms(now));
        waiting += 1;
        if let Some(endpoint) = room {
            legs.push(start(&mut nodes[index], index, id, endpoint, now));
            assert!(served.insert(id));
        }
        nodes[index].publish(&store, ms(now));
    }
    while served.len() < waiting {
        now += 1;
        let ended: Vec<_> = legs.extract_if(.., |leg| leg.3 <= now).collect();
        for (index, leg, endpoint, _) in ended {
            nodes[index].worker.prefill_ended(endpoint, leg, ms(now));
            nodes[index].publish(&store, ms(now));
        }
        // Wakes go round until nobody has anything to do.
        let mut woken: Vec<u64> =
            nodes.iter_mut().flat_map(|node| node.worker.workers_to_wake().collect::<Vec<_>>()).collect();
        let mut rounds = 0;
        while let Some(worker) = woken.pop() {
            rounds += 1;
            assert!(rounds < 200, "workers wake each other without end");
            let index = worker as usize - 1;
            nodes[index].catch_up(&store, ms(now));
            if let Some(Turn { id, act: Act::Bind(endpoint) }) = nodes[index].worker.next_turn(ms(now)) {
                legs.push(start(&mut nodes[index], index, id, endpoint, now));
                assert!(served.insert(id), "{id} twice");
                woken.push(worker);
            }
            nodes[index].publish(&store, ms(now));
            woken.extend(nodes[index].worker.workers_to_wake());
        }
        assert!(now < 60_000, "{} of {waiting}", served.len());
    }
    let busy = legs.len();
    assert!(busy <= 4, "{busy} legs at two endpoints");
    nodes.iter_mut().for_each(|node| node.catch_up(&store, ms(now)));
    assert!(nodes.iter().all(|node| node.worker.state.waiting.is_empty()));
    let least = (200.0 * 0.045 / 2.0 * 1e3) as u64;
    assert!(now < least * 2, "{now} ms for work of {least} ms at each endpoint");
}

/// Binds a request and starts its leg, which takes as long as the ledger says.
fn start(node: &mut Node, index: usize, id: u64, endpoint: EndpointIndex, now: u64) -> (usize, u64, EndpointRef, u64) {
    let seconds = 0.045;
    node.worker.bind(id, seconds, ms(now));
    let of = node.worker.state.table.refer(endpoint).unwrap();
    let leg = node.worker.next_leg();
    let work = node.worker.state.table.get(endpoint).unwrap().prefill.work(ms(now));
    node.worker.prefill_started(of, leg, seconds, ms(now), FAR);
    (index, leg, of, now + ((work + seconds) * 1e3) as u64)
}

#[test]
fn work_of_other_envoys_is_waited_for_once() {
    let store = Store::default();
    let mut node = fleet(&store, 1).remove(0);
    for place in 0..2 {
        let key = node.prefill(place).key;
        let by = crate::endpoints::elsewhere::Totals { work: 1_000_000, ..Default::default() };
        node.worker.busy_elsewhere(key, by);
    }
    let (id, room) = node.wait(&prompt(1, 1_000.0), ms(0));
    assert_eq!(room, None);
    assert!((970..=981).contains(&node.worker.next_look(ms(0)).unwrap().as_millis()));
    assert_eq!(node.worker.next_turn(ms(900)), None);
    // The other Envoy keeps the endpoints busy, and yet this one's request has its turn.
    assert_eq!(bound(node.worker.next_turn(ms(985))).0, id);
    node.worker.bind(id, 0.04, ms(985));
    let (_, room) = node.wait(&prompt(2, 1_000.0), ms(985));
    assert_eq!(room, None, "the next one waits as long again");
}
