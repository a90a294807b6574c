//! Requests that wait until a prefill endpoint has room.

use super::*;
use crate::request::reply::DROPPED_HEADER;
use crate::workers::bind::Act;
use crate::workers::waits::{Parked, PoolWaits};
use crate::workers::worker::Worker;

/// A gateway whose two prefill endpoints have room for one long prompt each.
struct Gate {
    worker: Worker,
    now: Monotonic,
}

fn gate(queue: &str) -> Gate {
    let pools = format!(r#"{{"pools":{{"default":{{"fit":false,"queue":{{"enabled":true{queue}}}}}}},"#);
    let mut worker = Worker::default();
    worker.configure(CONFIG.replacen('{', &pools, 1).as_bytes()).unwrap();
    Gate { worker, now: Monotonic::from_secs(5) }
}

/// A prompt of 4,000 tokens, 123 ms long; half of it is that of all with the same `begin`.
fn prompt(begin: &str, end: &str) -> String {
    let text = [begin.repeat(4_000), end.repeat(4_000)].concat();
    format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{text}"}}]}}"#)
}

impl Gate {
    fn send(&mut self, body: &str, extra: &[(&str, &str)]) -> (Request, Outcome) {
        let mut request = Request::default();
        let pseudo = [(":method", "POST"), (":path", "/v1/chat/completions"), (":authority", "a")];
        let headers = Headers::from_pairs(pseudo.iter().chain(extra).map(|(name, value)| (*name, *value)));
        request.headers(&mut self.worker, headers, false, self.now);
        let outcome = request.body(&mut self.worker, body.as_bytes(), self.now);
        (request, outcome)
    }

    fn answer(&mut self, request: &mut Request) {
        let body = format!(r#"{{"kv_transfer_params":{PARAMS}}}"#);
        let answer = PrefillAnswer::Answered { status: 200, content_type: None, body: body.as_bytes() };
        request.prefill_answer(&mut self.worker, answer, || Some(long_body()), self.now);
        assert!(request.is_forwarded());
    }

    /// Passes the next turn to the request that it is for.
    fn turn(&mut self, waiting: &mut [Request], body: &str) -> Option<(usize, Outcome)> {
        let turn = self.worker.next_turn(self.now)?;
        let index = waiting.iter().position(|request| request.waiting_id() == Some(turn.id)).unwrap();
        Some((index, waiting[index].turn(&mut self.worker, turn, || Some(body), self.now)))
    }

    fn later(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
    }

    fn apply(&mut self, version: u64, endpoints: &str) {
        let list = format!(r#"{{"wire":1,"epoch":"e","version":{version},"endpoints":[{endpoints}]}}"#);
        self.worker.apply(list.as_bytes()).unwrap();
    }

    fn is_idle(&mut self) -> bool {
        self.worker.prune(self.now + Duration::from_secs(1_000));
        self.worker.state.waiting.is_empty()
            && !self.worker.has_waiting()
            && self.worker.state.table.iter().all(|(_, state)| state.prefill.is_empty() && state.decode.requests == 0)
    }
}

/// Two requests with a leg each, at both endpoints.
fn two_bound(gate: &mut Gate) -> [(Request, String); 2] {
    [("a ", "b "), ("c ", "d ")].map(|(begin, end)| {
        let (request, outcome) = gate.send(&prompt(begin, end), &[]);
        assert_eq!(request.waiting_id(), None);
        let destination = leg_destination(&outcome);
        (request, destination.split(',').next().unwrap().to_owned())
    })
}

#[test]
fn a_request_that_finds_room_goes_at_once() {
    let mut gate = gate("");
    let bound = two_bound(&mut gate);
    assert_ne!(bound[0].1, bound[1].1);
    assert_eq!(gate.worker.counts.pending(Metric::BoundAtOnce), 2);
    assert_eq!(gate.worker.next_turn(gate.now), None);
    assert_eq!(gate.worker.workers_to_wake().count(), 0, "nobody waits");
    for (mut request, _) in bound {
        request.done(&mut gate.worker, gate.now);
    }
    assert!(gate.is_idle());
}

#[test]
fn a_request_waits_until_an_endpoint_has_room_and_goes_there() {
    let mut gate = gate("");
    let [(mut first, first_at), (mut second, second_at)] = two_bound(&mut gate);
    let (third, outcome) = gate.send(&prompt("e ", "f "), &[]);
    assert_eq!(outcome, Outcome::WAIT);
    assert!(third.waiting_id().is_some() && !third.awaits_call());
    assert_eq!(gate.worker.next_turn(gate.now), None);
    let look = gate.worker.next_look(gate.now).unwrap();
    assert!((100..=104).contains(&look.as_millis()), "in {look:?}: 123 ms of work, less 20 ms lead");
    gate.later(50);
    let waits = gate.worker.waits(Parked::default(), gate.now);
    let [PoolWaits { ref pool, waiting: 1, work_ms: 120..=126, parked: 0, oldest_ms: 50 }] = waits[..] else {
        panic!("{waits:?}")
    };
    assert_eq!(pool, "default");
    gate.answer(&mut second);
    assert_eq!(gate.worker.workers_to_wake().count(), 1);
    let mut waiting = [third];
    let (_, outcome) = gate.turn(&mut waiting, &prompt("e ", "f ")).unwrap();
    assert!(leg_destination(&outcome).starts_with(&second_at), "{first_at}");
    assert_eq!(state(&outcome, WAIT_MS), "50");
    assert_eq!(gate.worker.counts.pending(Metric::BoundLater), 1);
    assert_eq!(gate.worker.take_waits(), [("pd_wait_ms;pool=default".to_owned(), 50)]);
    assert_eq!(gate.worker.take_waits(), [], "each wait once");
    let [mut third] = waiting;
    gate.answer(&mut third);
    [&mut first, &mut second, &mut third].into_iter().for_each(|request| request.done(&mut gate.worker, gate.now));
    assert!(gate.is_idle());
}

#[test]
fn a_request_goes_a_lead_before_the_leg_ahead_of_it_ends() {
    let mut gate = gate("");
    let _bound = two_bound(&mut gate);
    let (third, _) = gate.send(&prompt("e ", "f "), &[]);
    gate.now += gate.worker.next_look(gate.now).unwrap();
    gate.later(1);
    let mut waiting = [third];
    assert!(gate.turn(&mut waiting, &prompt("e ", "f ")).is_some());
    // A leg that takes longer than it should is taken to need as long again.
    let (_fourth, outcome) = gate.send(&prompt("g ", "h "), &[]);
    assert_eq!(outcome.flow, Flow::Pause);
    gate.later(400);
    let (fifth, outcome) = gate.send(&prompt("i ", "j "), &[]);
    assert_eq!((outcome, fifth.waiting_id().is_some()), (Outcome::WAIT, true));
}

#[test]
fn short_requests_that_an_endpoint_computes_together_go_together() {
    for (queue, expected) in [("", 6), (r#","batch_tokens":2100"#, 4), (r#","batch_tokens":0"#, 2)] {
        let mut gate = gate(queue);
        let _bound = two_bound(&mut gate);
        // 1,000 tokens each, 40 ms.
        let text = |n: usize| format!("{n} ").repeat(2_000);
        let body = |n| format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{}"}}]}}"#, text(n));
        let bodies: Vec<String> = (0..6).map(body).collect();
        let mut waiting: Vec<Request> = bodies.iter().map(|body| gate.send(body, &[]).0).collect();
        assert!(waiting.iter().all(|request| request.waiting_id().is_some()));
        gate.now += gate.worker.next_look(gate.now).unwrap();
        gate.later(1);
        let mut bound = 0;
        while let Some(turn) = gate.worker.next_turn(gate.now) {
            let index = waiting.iter().position(|request| request.waiting_id() == Some(turn.id)).unwrap();
            waiting[index].turn(&mut gate.worker, turn, || Some(bodies[index].as_str()), gate.now);
            bound += 1;
        }
        assert_eq!(bound, expected, "{queue}");
    }
}

#[test]
fn the_holder_of_a_prefix_gets_its_requests_first() {
    let mut gate = gate("");
    let [(mut first, first_at), (mut second, second_at)] = two_bound(&mut gate);
    let (other, _) = gate.send(&prompt("e ", "f "), &[]);
    gate.later(1);
    let (of_first, _) = gate.send(&prompt("a ", "x "), &[]);
    let mut waiting = [other, of_first];
    gate.answer(&mut first);
    let (index, outcome) = gate.turn(&mut waiting, &prompt("a ", "x ")).unwrap();
    assert_eq!(index, 1, "it came later");
    assert!(leg_destination(&outcome).starts_with(&first_at));
    gate.answer(&mut second);
    let (index, outcome) = gate.turn(&mut waiting, &prompt("e ", "f ")).unwrap();
    assert!(index == 0 && leg_destination(&outcome).starts_with(&second_at));
}

#[test]
fn a_higher_priority_overtakes() {
    let mut gate = gate("");
    let [(mut first, _), _second] = two_bound(&mut gate);
    let (low, _) = gate.send(&prompt("e ", "f "), &[]);
    let (high, _) = gate.send(&prompt("g ", "h "), &[("x-llm-d-inference-objective", "7")]);
    gate.answer(&mut first);
    let mut waiting = [low, high];
    assert_eq!(gate.turn(&mut waiting, &prompt("g ", "h ")).unwrap().0, 1);
}

#[test]
fn a_client_that_leaves_waits_no_longer() {
    let mut gate = gate("");
    let bound = two_bound(&mut gate);
    let (mut third, _) = gate.send(&prompt("e ", "f "), &[]);
    third.done(&mut gate.worker, gate.now);
    third.done(&mut gate.worker, gate.now);
    assert!(!gate.worker.has_waiting() && gate.worker.state.waiting.is_empty());
    assert_eq!(gate.worker.counts.pending(Metric::WaitsLeft), 1);
    for (mut request, _) in bound {
        gate.answer(&mut request);
        request.done(&mut gate.worker, gate.now);
    }
    assert!(gate.is_idle());
}

#[test]
fn who_has_waited_too_long_gets_503_and_who_misses_a_deadline_429() {
    let mut gate = gate(r#","max_wait_ms":500"#);
    let _bound = two_bound(&mut gate);
    let (patient, _) = gate.send(&prompt("e ", "f "), &[]);
    let (hasty, _) = gate.send(&prompt("g ", "h "), &[("x-pd-deadline-ms", "400")]);
    let (_, outcome) = gate.send(&prompt("i ", "j "), &[("x-pd-deadline-ms", "150")]);
    assert_eq!(reply(&outcome), (429, "deadline"), "the ledger says so at once");
    let mut waiting = [patient, hasty];
    // The legs ahead never end.
    gate.later(400);
    let (index, outcome) = gate.turn(&mut waiting, "").unwrap();
    assert_eq!((index, reply(&outcome)), (1, (429, "deadline")));
    assert_eq!(gate.worker.next_turn(gate.now), None);
    gate.later(100);
    let (index, outcome) = gate.turn(&mut waiting, "").unwrap();
    assert_eq!((index, reply(&outcome)), (0, (503, "queue_timeout")));
    assert!(!gate.worker.has_waiting());
    let counted = [Metric::QueueDeadline, Metric::QueueTimeout].map(|metric| gate.worker.counts.pending(metric));
    assert_eq!(counted, [1, 1], "beside the one that was refused at once");
}

#[test]
fn a_full_queue_answers_429_with_a_time_and_a_reason() {
    for (limit, reason) in [(r#","max_requests":2"#, "queue_requests"), (r#","max_bytes":40000"#, "queue_bytes")] {
        let mut gate = gate(limit);
        let _bound = two_bound(&mut gate);
        let mut waiting = Vec::new();
        let refused = loop {
            let (request, outcome) = gate.send(&prompt("e ", "f "), &[]);
            if request.waiting_id().is_none() {
                break outcome;
            }
            waiting.push(request);
        };
        assert_eq!(waiting.len(), 2, "{reason}");
        assert_eq!(reply(&refused), (429, reason));
        let Some(Effect::Reply(answer)) = refused.effects.last() else { panic!() };
        for header in ["retry-after", DROPPED_HEADER] {
            assert!(answer.headers.iter().any(|(name, _)| *name == header), "{header}");
        }
        waiting.pop().unwrap().done(&mut gate.worker, gate.now);
        assert!(gate.send(&prompt("e ", "f "), &[]).0.waiting_id().is_some(), "one place is free again");
    }
}

#[test]
fn requests_whose_endpoints_are_gone_are_scheduled_anew() {
    let decode = r#"{"address":"10.0.0.2:1","role":"decode","models":["m"]}"#;
    let mut gate = gate("");
    let _bound = two_bound(&mut gate);
    let (third, _) = gate.send(&prompt("e ", "f "), &[]);
    gate.apply(1, decode);
    assert_eq!(gate.worker.workers_to_wake().count(), 1);
    let mut waiting = [third];
    let (_, outcome) = gate.turn(&mut waiting, &prompt("e ", "f ")).unwrap();
    assert_eq!((outcome.flow, state(&outcome, "pd.reason")), (Flow::Continue, "no_prefill_endpoint"));
    assert!(gate.worker.state.waiting.is_empty());
}

#[test]
fn requests_for_which_no_endpoint_is_left_get_503() {
    let other = r#"{"address":"10.0.0.9:1","role":"decode","models":["n"]}"#;
    let mut gate = gate("");
    let _bound = two_bound(&mut gate);
    let (third, _) = gate.send(&prompt("e ", "f "), &[]);
    gate.apply(1, other);
    let mut waiting = [third];
    let (_, outcome) = gate.turn(&mut waiting, &prompt("e ", "f ")).unwrap();
    assert_eq!(reply(&outcome), (503, "no_endpoint"));
    assert!(gate.worker.state.waiting.is_empty() && !gate.worker.has_waiting());
}

#[test]
fn a_new_endpoint_gets_requests_that_wait_already() {
    let all = r#"{"address":"10.0.0.1:1","role":"prefill","models":["m"]},{"address":"10.0.0.1:2","role":"prefill","models":["m"]},
        {"address":"10.0.0.1:3","role":"prefill","models":["m"]},{"address":"10.0.0.2:1","role":"decode","models":["m"]}"#;
    let mut gate = gate("");
    let _bound = two_bound(&mut gate);
    let (third, _) = gate.send(&prompt("e ", "f "), &[]);
    gate.apply(1, all);
    let mut waiting = [third];
    let (_, outcome) = gate.turn(&mut waiting, &prompt("e ", "f ")).unwrap();
    assert!(leg_destination(&outcome).starts_with("10.0.0.1:3"));
}

#[test]
fn waiting_requests_outlive_a_new_configuration() {
    let mut gate = gate("");
    let [(mut first, _), _second] = two_bound(&mut gate);
    let (third, _) = gate.send(&prompt("e ", "f "), &[]);
    let pools = r#"{"pools":{"default":{"fit":false,"queue":{"enabled":true,"lead_ms":30}}},"#;
    gate.worker.configure(CONFIG.replacen('{', pools, 1).as_bytes()).unwrap();
    let mut waiting = [third];
    let turn = gate.turn(&mut waiting, &prompt("e ", "f "));
    assert!(leg_destination(&turn.unwrap().1).starts_with("10.0.0.1:"), "the new state knows of no leg");
    first.done(&mut gate.worker, gate.now);
}

#[test]
fn a_turn_that_comes_too_late_changes_nothing() {
    let mut gate = gate("");
    let [(mut first, _), _second] = two_bound(&mut gate);
    let (mut third, _) = gate.send(&prompt("e ", "f "), &[]);
    gate.answer(&mut first);
    let turn = gate.worker.next_turn(gate.now).unwrap();
    assert!(matches!(turn.act, Act::Bind(_)));
    third.done(&mut gate.worker, gate.now);
    assert_eq!(third.turn(&mut gate.worker, turn, || Some(""), gate.now), Outcome::WAIT);
    assert_eq!(gate.worker.next_turn(gate.now), None);
    // A body that cannot be read any more.
    let (mut fourth, outcome) = gate.send(&prompt("g ", "h "), &[]);
    assert_eq!((fourth.waiting_id(), outcome.flow), (None, Flow::Pause), "there is room");
    fourth.done(&mut gate.worker, gate.now);
    let (mut fifth, _) = gate.send(&prompt("i ", "j "), &[]);
    let Some(id) = fifth.waiting_id() else { return };
    let turn = crate::workers::bind::Turn { id, act: turn.act };
    let outcome = fifth.turn(&mut gate.worker, turn, || None::<&str>, gate.now);
    assert_eq!(reply(&outcome), (503, "prefill_failed"));
    assert!(!gate.worker.has_waiting());
}

#[test]
fn engines_that_want_both_legs_at_once_do_not_wait() {
    let pools = r#"{"pools":{"default":{"engine":"sglang","queue":{"enabled":true}}},"#;
    let mut gate = Gate { worker: Worker::default(), now: Monotonic::from_secs(5) };
    gate.worker.configure(CONFIG.replacen('{', pools, 1).as_bytes()).unwrap();
    for _ in 0..6 {
        let (request, outcome) = gate.send(&prompt("a ", "b "), &[]);
        assert_eq!(request.waiting_id(), None);
        assert_eq!(outcome.flow, Flow::Continue);
    }
}

const DOWN: &str = r#"{"address":"10.0.0.1:1","role":"prefill","models":["m"],"state":"down"},{"address":"10.0.0.2:1","role":"decode","models":["m"],"state":"down"}"#;
const UP: &str = r#"{"address":"10.0.0.1:1","role":"prefill","models":["m"]},{"address":"10.0.0.2:1","role":"decode","models":["m"]}"#;

#[test]
fn requests_wait_for_an_endpoint_where_none_is_ready() {
    let mut gate = gate(r#","no_endpoint_ms":1000,"max_requests":2"#);
    gate.apply(1, DOWN);
    let (first, outcome) = gate.send(&prompt("a ", "b "), &[]);
    assert_eq!(outcome, Outcome::WAIT);
    assert!(first.waiting_id().is_some() && gate.worker.has_waiting());
    let (mut second, _) = gate.send(&prompt("c ", "d "), &[]);
    let (_, outcome) = gate.send(&prompt("e ", "f "), &[]);
    assert_eq!(reply(&outcome), (503, "no_endpoint"), "two wait already");
    assert_eq!(gate.worker.next_turn(gate.now), None);
    second.done(&mut gate.worker, gate.now);
    assert_eq!(gate.worker.counts.pending(Metric::WaitingForEndpoint), 1);
    let later = gate.now.saturating_add(Duration::from_millis(7));
    let expected = PoolWaits { pool: "default".into(), parked: 1, oldest_ms: 7, ..PoolWaits::default() };
    assert_eq!(gate.worker.waits(gate.worker.parked(), later), [expected]);
    // Another list that helps nobody.
    gate.apply(2, DOWN);
    let mut waiting = [first];
    let (_, outcome) = gate.turn(&mut waiting, &prompt("a ", "b ")).unwrap();
    assert_eq!(outcome, Outcome::WAIT);
    assert_eq!(gate.worker.next_turn(gate.now), None);
    gate.later(999);
    gate.apply(3, UP);
    assert_eq!(gate.worker.workers_to_wake().count(), 1);
    let (_, outcome) = gate.turn(&mut waiting, &prompt("a ", "b ")).unwrap();
    assert!(leg_destination(&outcome).starts_with("10.0.0.1:1"));
    assert_eq!(gate.worker.counts.pending(Metric::WaitingForEndpoint), 0);
    assert_eq!(gate.worker.counts.pending(Metric::RequestsRejected), 1);
    let [mut first] = waiting;
    first.done(&mut gate.worker, gate.now);
    assert!(gate.is_idle());
}

#[test]
fn who_finds_no_endpoint_in_time_gets_503() {
    let mut gate = gate(r#","no_endpoint_ms":1000"#);
    let [(mut first, _), (mut second, _)] = two_bound(&mut gate);
    let (third, _) = gate.send(&prompt("e ", "f "), &[]);
    let mut waiting = [third];
    gate.later(400);
    // It waited for room; then every endpoint left.
    gate.apply(1, DOWN);
    let (_, outcome) = gate.turn(&mut waiting, &prompt("e ", "f ")).unwrap();
    assert_eq!(outcome, Outcome::WAIT);
    assert!(gate.worker.state.waiting.is_empty());
    gate.later(599);
    assert_eq!(gate.worker.next_turn(gate.now), None);
    gate.later(1);
    let (_, outcome) = gate.turn(&mut waiting, "").unwrap();
    assert_eq!(reply(&outcome), (503, "no_endpoint"));
    assert!(!gate.worker.has_waiting());
    first.done(&mut gate.worker, gate.now);
    second.done(&mut gate.worker, gate.now);
    assert!(gate.is_idle());
}

#[test]
fn without_a_time_to_wait_nobody_waits_for_an_endpoint() {
    let mut gate = gate("");
    gate.apply(1, DOWN);
    let (request, outcome) = gate.send(&prompt("a ", "b "), &[]);
    assert_eq!((reply(&outcome), request.waiting_id()), ((503, "no_endpoint"), None));
}

/// Two decode endpoints with room for one long prompt each.
const SMALL: &str = r#"{"address":"10.0.0.1:1","role":"prefill"},{"address":"10.0.0.1:2","role":"prefill"},
    {"address":"10.0.0.2:1","role":"decode","cache_tokens":6000},
    {"address":"10.0.0.2:2","role":"decode","cache_tokens":6000}"#;

#[test]
fn a_request_waits_for_room_for_its_kv_cache_before_its_prefill_leg() {
    let mut gate = gate("");
    gate.apply(1, SMALL);
    let mut bound = two_bound(&mut gate).map(|(request, _)| request);
    bound.iter_mut().for_each(|request| gate.answer(request));
    let (third, outcome) = gate.send(&prompt("e ", "f "), &[]);
    assert_eq!((outcome, third.waiting_id().is_some()), (Outcome::WAIT, true), "the prefill endpoints are idle");
    let short = r#"{"model":"m","messages":[{"role":"user","content":"hello"}]}"#;
    let (mut short, outcome) = gate.send(short, &[]);
    assert_eq!(outcome.flow, Flow::Continue, "a request that is not split does not wait");
    short.done(&mut gate.worker, gate.now);
    assert_eq!(gate.worker.next_turn(gate.now), None);
    let _ = gate.worker.workers_to_wake().count();
    gate.later(3_000);
    bound[1].done(&mut gate.worker, gate.now);
    assert_eq!(gate.worker.workers_to_wake().count(), 1, "the end of a decode leg wakes those that wait");
    let mut waiting = [third];
    let (_, outcome) = gate.turn(&mut waiting, &prompt("e ", "f ")).unwrap();
    assert!(leg_destination(&outcome).starts_with("10.0.0.1:"));
    assert_eq!(state(&outcome, WAIT_MS), "3000");
    // Its own leg will need the room that is left.
    assert!(gate.send(&prompt("g ", "h "), &[]).0.waiting_id().is_some());
}

#[test]
fn requests_do_not_wait_for_room_that_the_configuration_does_not_ask_for() {
    let mut gate = gate(r#","decode_kv_percent":0"#);
    gate.apply(1, SMALL);
    two_bound(&mut gate).iter_mut().for_each(|(request, _)| gate.answer(request));
    assert_eq!(gate.send(&prompt("e ", "f "), &[]).0.waiting_id(), None);
}

#[test]
fn smaller_requests_use_the_room_until_a_larger_one_has_waited_for_too_long() {
    let mut gate = gate(r#","overtaken_ms":2000"#);
    gate.apply(1, SMALL);
    let mut bound = two_bound(&mut gate).map(|(request, _)| request);
    bound.iter_mut().for_each(|request| gate.answer(request));
    let (large, _) = gate.send(&prompt("e ", "f "), &[]);
    // 1,000 tokens fit beside the others.
    let small = |name: &str| {
        format!(r#"{{"model":"m","max_tokens":1,"messages":[{{"role":"user","content":"{}"}}]}}"#, name.repeat(2_000))
    };
    let (mut early, outcome) = gate.send(&small("x "), &[]);
    assert!(early.waiting_id().is_none() && outcome.flow == Flow::Pause);
    gate.answer(&mut early);
    early.done(&mut gate.worker, gate.now);
    gate.later(2_001);
    let (late, _) = gate.send(&small("y "), &[]);
    assert!(late.waiting_id().is_some(), "nobody overtakes any more");
    bound[0].done(&mut gate.worker, gate.now);
    let mut waiting = [large, late];
    assert_eq!(gate.turn(&mut waiting, &prompt("e ", "f ")).map(|(index, _)| index), Some(0));
}
