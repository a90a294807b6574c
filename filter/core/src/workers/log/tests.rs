use super::*;
use crate::endpoints::beliefs::Belief;
use crate::endpoints::outliers::{ErrorClass, Leg};
use crate::endpoints::table::EndpointRef;
use crate::prefix::hash::BlockHash;
use crate::time::Monotonic;
use crate::workers::shared::testing::Store;
use crate::workers::slots::WORKER_SLOTS;
use proptest::prelude::*;

const CONFIG: &[u8] = br#"{"endpoints":[{"address":"10.0.0.1:1","role":"prefill"},{"address":"10.0.0.1:2","role":"prefill"},{"address":"10.0.0.2:1","role":"decode"}]}"#;
const TICK: Duration = Duration::from_millis(200);
const FAR: Monotonic = Monotonic::from_secs(3_600);

struct Node {
    worker: Worker,
    log: WorkersLog,
}

impl Node {
    fn new(store: &Store, id: u64, now: Monotonic) -> Self {
        let mut worker = Worker::default();
        worker.configure(CONFIG).unwrap();
        let mut log = WorkersLog::default();
        log.configure(&mut worker, store, id, now);
        Self { worker, log }
    }

    fn endpoint(&self, place: usize) -> EndpointRef {
        let mut all: Vec<_> =
            self.worker.state.table.iter().map(|(endpoint, state)| (state.address.clone(), endpoint)).collect();
        all.sort();
        self.worker.state.table.refer(all[place % all.len()].1).unwrap()
    }

    fn tick(&mut self, store: &Store, now: Monotonic) {
        self.log.tick(&mut self.worker, store, now);
    }

    fn publish(&mut self, store: &Store, now: Monotonic) {
        self.log.publish(&mut self.worker, store, now);
    }

    fn catch_up(&mut self, store: &Store, now: Monotonic) {
        self.log.catch_up(&mut self.worker, store, store.announced(), now);
    }

    /// Per endpoint: legs, seconds of prefill work, decode tokens and requests.
    fn ledger(&self, now: Monotonic) -> Vec<(usize, u64, u64, u32)> {
        let states = self.worker.state.table.iter().map(|(_, state)| {
            let work = (state.prefill.work(now) * 1e6).round() as u64;
            (state.prefill.len(), work, state.decode.tokens, state.decode.requests)
        });
        states.collect()
    }

    fn is_idle(&self) -> bool {
        self.ledger(FAR).iter().all(|(legs, _, tokens, requests)| (*legs, *tokens, *requests) == (0, 0, 0))
    }
}

fn fleet(store: &Store, count: u64, now: Monotonic) -> Vec<Node> {
    let mut nodes: Vec<_> = (1..=count).map(|id| Node::new(store, id, now)).collect();
    nodes.iter_mut().for_each(|node| node.catch_up(store, now));
    nodes
}

fn blocks(id: u64, len: u64) -> Vec<BlockHash> {
    (0..len).map(|i| BlockHash((id * 1_000_003 + i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect()
}

/// Outlier detection costs a healthy pool nothing.
#[test]
fn answers_of_a_healthy_pool_are_no_events() {
    let (store, now) = (Store::default(), Monotonic::from_secs(1));
    let mut node = Node::new(&store, 1, now);
    node.publish(&store, now);
    for place in 0..3 {
        let endpoint = node.endpoint(place);
        for leg in [Leg::Prefill, Leg::Decode] {
            assert_eq!(node.worker.judge_answer(endpoint, leg, None, now), None);
        }
    }
    assert!(node.worker.pending.is_empty());
    let endpoint = node.endpoint(2);
    node.worker.judge_answer(endpoint, Leg::Decode, Some(ErrorClass::Server), now);
    assert!(!node.worker.pending.is_empty(), "an error is one, and so is an answer after it");
}

#[test]
fn a_decision_is_seen_before_the_next_one_of_any_worker() {
    for count in [3, 4, 16] {
        let (store, now) = (Store::default(), Monotonic::from_secs(1));
        let mut nodes = fleet(&store, count, now);
        for i in 0..count as usize {
            let leg = nodes[i].worker.next_leg();
            let (prefill, decode) = (nodes[i].endpoint(i % 2), nodes[i].endpoint(2));
            nodes[i].worker.prefill_started(prefill, leg, 0.5, now, FAR);
            nodes[i].worker.holds(prefill, &blocks(i as u64, 9));
            nodes[i].worker.decode_started(decode, 100);
            nodes[i].publish(&store, now);
            for other in &mut nodes {
                other.catch_up(&store, now);
                let place = other.endpoint(i % 2).index;
                assert_eq!(other.worker.state.index.matched(place, &blocks(i as u64, 9)), 9);
            }
            let expected = nodes[i].ledger(now);
            assert!(nodes.iter().all(|node| node.ledger(now) == expected), "{count} workers");
            assert_eq!(expected.iter().map(|of| of.3).sum::<u32>() as usize, i + 1);
        }
    }
}

#[test]
fn parked_requests_of_all_workers_are_counted_until_their_worker_is_gone() {
    let (store, now) = (Store::default(), Monotonic::from_secs(1));
    let mut nodes = fleet(&store, 3, now);
    let queue = crate::config::Queue {
        no_endpoint: Duration::from_secs(60),
        ..nodes[0].worker.config.as_ref().unwrap().pool("default").queue
    };
    let parked = |nodes: &[Node]| nodes[0].log.parked(&nodes[0].worker, &store);
    let at = |millis| now.saturating_add(Duration::from_millis(millis));
    nodes[1].worker.park(&queue, 10, at(2), at(2)).unwrap();
    let id = nodes[2].worker.park(&queue, 10, at(1), at(2)).unwrap();
    assert_eq!(parked(&nodes).requests, 0, "not before the others' tick");
    nodes.iter_mut().for_each(|node| node.tick(&store, at(10)));
    assert_eq!(parked(&nodes), Parked { requests: 2, oldest: at(1) });
    nodes[2].worker.unpark(id);
    nodes.iter_mut().for_each(|node| node.tick(&store, at(20)));
    assert_eq!(parked(&nodes), Parked { requests: 1, oldest: at(2) });
    // The second worker is gone.
    for millis in [400, 800, 1_200] {
        nodes[0].tick(&store, at(millis));
        nodes[2].tick(&store, at(millis));
    }
    assert_eq!(parked(&nodes).requests, 0);
}

#[test]
fn a_worker_that_died_is_out_of_the_ledger_within_a_second() {
    let (store, mut now) = (Store::default(), Monotonic::from_secs(1));
    let mut nodes = fleet(&store, 3, now);
    let leg = nodes[2].worker.next_leg();
    let (prefill, decode) = (nodes[2].endpoint(0), nodes[2].endpoint(2));
    nodes[2].worker.prefill_started(prefill, leg, 9.0, now, FAR);
    nodes[2].worker.decode_started(decode, 7_000);
    nodes[2].publish(&store, now);
    nodes.truncate(2);
    nodes.iter_mut().for_each(|node| node.catch_up(&store, now));
    assert!(nodes.iter().all(|node| !node.is_idle()));
    for _ in 0..5 {
        now += TICK;
        nodes.iter_mut().for_each(|node| node.tick(&store, now));
    }
    assert!(nodes.iter().all(|node| node.is_idle() && node.log.others.len() == 1));
    // Its slot is given to the next one.
    let mut next = Node::new(&store, 9, now);
    assert_eq!(next.log.slot, Some(2));
    let decode = next.endpoint(2);
    next.worker.decode_started(decode, 5);
    next.publish(&store, now);
    nodes.iter_mut().for_each(|node| node.catch_up(&store, now));
    assert!(nodes.iter().all(|node| node.ledger(now) == next.ledger(now)));
}

/// A list of these endpoints of the configuration above, as pd-control sends it.
fn list(node: &mut Node, version: u64, decode: bool) {
    let decode = if decode { r#",{"address":"10.0.0.2:1","role":"decode"}"# } else { "" };
    let text = format!(
        r#"{{"wire":1,"epoch":"e","version":{version},"endpoints":[{{"address":"10.0.0.1:1","role":"prefill"}}{decode}]}}"#
    );
    node.worker.apply(text.as_bytes()).unwrap();
}

#[test]
fn an_endpoint_that_returns_has_all_that_is_in_flight_there() {
    let (store, mut now) = (Store::default(), Monotonic::from_secs(1));
    let mut nodes = fleet(&store, 2, now);
    let mut open = Vec::new();
    let tick = |nodes: &mut Vec<Node>, now: &mut Monotonic| {
        for _ in 0..3 {
            *now += TICK;
            nodes.iter_mut().for_each(|node| node.tick(&store, *now));
        }
    };
    for turn in 0..40 {
        let decode = nodes[turn % 2].endpoint(2);
        let worker = &mut nodes[turn % 2].worker;
        let leg = worker.next_leg();
        worker.prefill_started(decode, leg, 1.0, now, FAR);
        worker.decode_started(decode, 1_000);
        open.push((turn % 2, decode, leg));
    }
    tick(&mut nodes, &mut now);
    nodes.iter_mut().for_each(|node| list(node, 1, false));
    // Some end while the endpoint is away, and a worker that has it still, or already, sends one more.
    for (node, decode, leg) in open.drain(..10) {
        nodes[node].worker.prefill_ended(decode, leg, now);
        nodes[node].worker.decode_ended(decode, 1_000);
    }
    tick(&mut nodes, &mut now);
    list(&mut nodes[0], 2, true);
    let decode = nodes[0].endpoint(1);
    let leg = nodes[0].worker.next_leg();
    nodes[0].worker.prefill_started(decode, leg, 1.0, now, FAR);
    nodes[0].worker.decode_started(decode, 1_000);
    open.push((0, decode, leg));
    tick(&mut nodes, &mut now);
    list(&mut nodes[1], 2, true);
    tick(&mut nodes, &mut now);
    for node in &nodes {
        let (_, state) = node.worker.state.table.iter().find(|(_, state)| &*state.address == "10.0.0.2:1").unwrap();
        assert_eq!((state.prefill.len(), state.decode.tokens, state.decode.requests), (31, 31_000, 31));
    }
    // A worker that joins now learns the same.
    let mut third = Node::new(&store, 7, now);
    list(&mut third, 2, true);
    third.tick(&store, now);
    nodes.push(third);
    tick(&mut nodes, &mut now);
    assert!(nodes.iter().all(|node| node.ledger(now).iter().map(|of| of.3).sum::<u32>() == 31));
    for (node, decode, leg) in open {
        nodes[node].worker.prefill_ended(decode, leg, now);
        nodes[node].worker.decode_ended(decode, 1_000);
    }
    tick(&mut nodes, &mut now);
    assert!(nodes.iter().all(Node::is_idle));
}

#[test]
fn what_ends_after_a_new_configuration_is_not_taken_from_new_requests() {
    let (store, now) = (Store::default(), Monotonic::from_secs(1));
    let mut node = Node::new(&store, 1, now);
    let before = node.endpoint(2);
    node.worker.decode_started(before, 1_000);
    node.worker.configure(CONFIG).unwrap();
    let after = node.endpoint(2);
    node.worker.decode_started(after, 500);
    node.worker.decode_ended(before, 1_000);
    assert_eq!(node.ledger(now).last().map(|of| (of.2, of.3)), Some((500, 1)));
}

#[test]
fn a_worker_that_was_only_slow_is_back_with_all_it_has() {
    let (store, mut now) = (Store::default(), Monotonic::from_secs(1));
    let mut nodes = fleet(&store, 2, now);
    let decode = nodes[1].endpoint(2);
    nodes[1].worker.decode_started(decode, 50);
    nodes[1].tick(&store, now);
    for _ in 0..10 {
        now += TICK;
        nodes[0].tick(&store, now);
    }
    assert!(nodes[0].is_idle());
    nodes[1].tick(&store, now);
    nodes[0].tick(&store, now);
    assert_eq!(nodes[0].ledger(now), nodes[1].ledger(now));
    assert!(!nodes[0].is_idle());
}

#[test]
fn a_reader_that_fell_far_behind_catches_up_with_the_next_tick() {
    let (store, mut now) = (Store::default(), Monotonic::from_secs(1));
    let mut nodes = fleet(&store, 2, now);
    let (prefill, decode) = (nodes[0].endpoint(0), nodes[0].endpoint(2));
    for id in 0..5_000 {
        nodes[0].worker.decode_started(decode, 10);
        nodes[0].worker.holds(prefill, &blocks(id, 20));
        nodes[0].publish(&store, now);
    }
    now += TICK;
    nodes[1].catch_up(&store, now);
    nodes[0].tick(&store, now);
    nodes[1].tick(&store, now);
    assert_eq!(nodes[1].ledger(now), nodes[0].ledger(now));
    assert_eq!(nodes[1].ledger(now).iter().map(|of| of.3).sum::<u32>(), 5_000);
    let store = store.data.borrow();
    assert!(store.values().map(|(value, _)| value.len()).sum::<usize>() < 400_000, "what is shared is bounded");
}

#[test]
fn a_new_generation_begins_with_what_the_old_one_knew() {
    let (store, mut now) = (Store::default(), Monotonic::from_secs(1));
    let mut old = fleet(&store, 3, now);
    for id in 0..40 {
        let held = old[1].endpoint(id as usize % 3);
        old[1].worker.holds(held, &blocks(id, 12));
        let decode = old[1].endpoint(2);
        old[1].worker.decode_started(decode, 10);
        old[1].publish(&store, now);
    }
    for _ in 0..4 {
        now += TICK;
        old.iter_mut().for_each(|node| node.tick(&store, now));
    }
    let mut new = Node::new(&store, 9, now);
    for id in 0..40 {
        assert_eq!(new.worker.state.index.matched(new.endpoint(id as usize % 3).index, &blocks(id, 12)), 12, "{id}");
    }
    assert_eq!(new.ledger(now), old[0].ledger(now), "the old generation's work counts once");
    // The old one drains: its work ends, and the new one learns of it.
    for _ in 0..40 {
        let decode = old[1].endpoint(2);
        old[1].worker.decode_ended(decode, 10);
    }
    now += PATIENCE;
    old[1].publish(&store, now);
    new.catch_up(&store, now);
    assert!(new.is_idle());
}

#[test]
fn the_choice_of_a_decode_endpoint_waits_until_its_request_ends_and_not_longer() {
    let (store, now) = (Store::default(), Monotonic::from_secs(1));
    let mut nodes = fleet(&store, 3, now);
    let (prefill, decode) = (nodes[0].endpoint(0), nodes[0].endpoint(2));
    let leg = nodes[0].worker.next_leg();
    nodes[0].worker.prefill_started(prefill, leg, 0.5, now, now + Duration::from_secs(9));
    nodes[0].publish(&store, now);
    nodes[0].worker.decode_started(decode, 10);
    nodes[0].publish(&store, now);
    let is_seen = |nodes: &mut [Node]| {
        nodes[1].catch_up(&store, now);
        nodes[1].ledger(now) == nodes[0].ledger(now)
    };
    assert!(!is_seen(&mut nodes), "one write has the events of several requests");
    nodes[0].worker.pending.request_ended();
    nodes[0].publish(&store, now);
    assert!(is_seen(&mut nodes));
}

#[test]
fn a_worker_beside_which_only_the_main_thread_has_a_vm_publishes_at_its_tick() {
    for (vms, is_seen) in [(2, false), (3, true)] {
        let (store, now) = (Store::default(), Monotonic::from_secs(1));
        let mut nodes = fleet(&store, vms, now);
        let leg = nodes[0].worker.next_leg();
        let prefill = nodes[0].endpoint(0);
        nodes[0].worker.prefill_started(prefill, leg, 0.5, now, now + Duration::from_secs(9));
        nodes[0].publish(&store, now);
        nodes[1].catch_up(&store, now);
        assert_eq!(nodes[1].ledger(now) == nodes[0].ledger(now), is_seen, "{vms} VMs");
        nodes[0].tick(&store, now + TICK);
        nodes[1].catch_up(&store, now + TICK);
        assert_eq!(nodes[1].ledger(now + TICK), nodes[0].ledger(now + TICK), "{vms} VMs");
    }
}

#[test]
fn ends_of_requests_wait_for_a_decision_but_not_for_long() {
    let (store, now) = (Store::default(), Monotonic::from_secs(1));
    let mut nodes = fleet(&store, 3, now);
    let decode = nodes[0].endpoint(2);
    nodes[0].worker.decode_started(decode, 10);
    nodes[0].publish(&store, now);
    nodes[0].worker.decode_ended(decode, 10);
    let node = &mut nodes[0];
    node.log.publish(&mut node.worker, &store, now + Duration::from_millis(3));
    nodes[1].catch_up(&store, now);
    assert!(!nodes[1].is_idle());
    let node = &mut nodes[0];
    node.log.publish(&mut node.worker, &store, now + PATIENCE);
    nodes[1].catch_up(&store, now);
    assert!(nodes[1].is_idle());
}

#[test]
fn a_worker_without_a_slot_decides_for_itself_and_keeps_nothing() {
    let (store, now) = (Store::default(), Monotonic::from_secs(1));
    let mut nodes = fleet(&store, WORKER_SLOTS as u64 + 1, now);
    let last = nodes.last_mut().unwrap();
    assert_eq!(last.log.slot, None);
    let decode = last.endpoint(2);
    last.worker.decode_started(decode, 10);
    last.publish(&store, now);
    assert_eq!(last.worker.pending.unpublished.as_ref().map(Vec::len), Some(0));
}

#[derive(Clone, Debug)]
enum Step {
    Start { node: usize, place: usize, tokens: u64 },
    End { node: usize },
    Hold { node: usize, place: usize, id: u64 },
    Publish { node: usize },
    CatchUp { node: usize },
    Tick { node: usize },
    Kill { node: usize },
    Join,
    Wait { ms: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let node = || 0_usize..6;
    prop_oneof![
        4 => (node(), 0_usize..3, 1_u64..99).prop_map(|(node, place, tokens)| Step::Start { node, place, tokens }),
        4 => node().prop_map(|node| Step::End { node }),
        2 => (node(), 0_usize..3, 0_u64..9).prop_map(|(node, place, id)| Step::Hold { node, place, id }),
        4 => node().prop_map(|node| Step::Publish { node }),
        4 => node().prop_map(|node| Step::CatchUp { node }),
        2 => node().prop_map(|node| Step::Tick { node }),
        1 => node().prop_map(|node| Step::Kill { node }),
        1 => Just(Step::Join),
        1 => (1_u64..400).prop_map(|ms| Step::Wait { ms }),
    ]
}

proptest! {
    /// Whatever the order: once every worker has published and read everything, all ledgers are equal, and once everything
    /// has ended they are empty.
    #[test]
    fn all_ledgers_become_equal_and_then_empty(steps in prop::collection::vec(step(), 1..120)) {
        let (store, mut now) = (Store::default(), Monotonic::from_secs(1));
        let mut nodes = fleet(&store, 3, now);
        let mut open: Vec<Vec<(usize, u64, u64)>> = vec![Vec::new(); 3];
        let mut next_id = 4;
        for step in steps {
            let count = nodes.len();
            match step {
                Step::Start { node, place, tokens } => {
                    let node = node % count;
                    let leg = nodes[node].worker.next_leg();
                    let endpoint = nodes[node].endpoint(place);
                    nodes[node].worker.prefill_started(endpoint, leg, tokens as f64, now, FAR);
                    nodes[node].worker.decode_started(endpoint, tokens);
                    open[node].push((place, tokens, leg));
                }
                Step::End { node } => {
                    let node = node % count;
                    if let Some((place, tokens, leg)) = open[node].pop() {
                        let endpoint = nodes[node].endpoint(place);
                        nodes[node].worker.prefill_ended(endpoint, leg, now);
                        nodes[node].worker.decode_ended(endpoint, tokens);
                    }
                }
                Step::Hold { node, place, id } => {
                    let endpoint = nodes[node % count].endpoint(place);
                    nodes[node % count].worker.holds(endpoint, &blocks(id, 30));
                }
                Step::Publish { node } => nodes[node % count].publish(&store, now),
                Step::CatchUp { node } => nodes[node % count].catch_up(&store, now),
                Step::Tick { node } => nodes[node % count].tick(&store, now),
                Step::Kill { node } if count > 1 => {
                    nodes.remove(node % count);
                    open.remove(node % count);
                }
                Step::Kill { .. } => {}
                Step::Join => {
                    nodes.push(Node::new(&store, next_id, now));
                    open.push(Vec::new());
                    next_id += 1;
                }
                Step::Wait { ms } => now += Duration::from_millis(ms),
            }
        }
        let settle = |nodes: &mut Vec<Node>, now: &mut Monotonic| {
            for _ in 0..6 {
                *now += TICK;
                nodes.iter_mut().for_each(|node| node.tick(&store, *now));
            }
        };
        settle(&mut nodes, &mut now);
        let totals = |node: &Node| {
            node.ledger(FAR).iter().map(|(legs, _, tokens, requests)| (*legs, *tokens, *requests)).collect::<Vec<_>>()
        };
        let expected = totals(&nodes[0]);
        prop_assert_eq!(expected.iter().map(|of| of.2 as usize).sum::<usize>(), open.iter().map(Vec::len).sum::<usize>());
        for node in &nodes {
            prop_assert_eq!(totals(node), expected.clone());
        }
        for (node, open) in nodes.iter_mut().zip(&open) {
            for (place, tokens, leg) in open {
                let endpoint = node.endpoint(*place);
                node.worker.prefill_ended(endpoint, *leg, now);
                node.worker.decode_ended(endpoint, *tokens);
            }
        }
        settle(&mut nodes, &mut now);
        for node in &nodes {
            prop_assert!(node.is_idle());
            prop_assert_eq!(node.log.others.len(), nodes.len() - 1);
        }
    }
}

#[test]
fn workers_share_their_doubts_in_what_an_endpoint_holds() {
    for count in [3, 4, 16] {
        let (store, now) = (Store::default(), Monotonic::from_secs(1));
        let mut nodes = fleet(&store, count, now);
        let endpoint = nodes[0].endpoint(2);
        nodes[0].worker.holds(endpoint, &blocks(1, 40));
        nodes[0].publish(&store, now);
        let mut answers = 0;
        let holds = |node: &Node| node.worker.state.index.newest(endpoint.index, 99).count();
        // Each answer is another worker's.
        for at in (0..count as usize).cycle().take(5) {
            nodes[at].catch_up(&store, now);
            if holds(&nodes[at]) == 0 {
                break;
            }
            answers += 1;
            nodes[at].worker.judge_belief(endpoint, Belief { tokens: 1_000.0, ..Belief::default() }, 300);
            nodes[at].publish(&store, now);
        }
        assert_eq!(answers, 3, "{count} workers");
        for node in &mut nodes {
            node.catch_up(&store, now);
            assert_eq!(holds(node), 0);
        }
    }
}
