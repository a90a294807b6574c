//! Roll-outs of engines: pairs are of one revision, and load follows what each revision can take.

use std::collections::VecDeque;

use super::*;
use crate::request::effect::{DESTINATION, REASON};

/// Ready prefill and decode endpoints of one revision.
type Sides = (u16, u16);

/// A gateway whose endpoints are of revisions `v1` and `v2`, in this order.
struct RollOut {
    worker: Worker,
    now: Monotonic,
    version: u64,
    sides: [Sides; 2],
    /// Requests whose prefill leg is in flight, with its destination.
    in_flight: VecDeque<(Request, String, String)>,
    asked: usize,
}

/// A list: one digit of the address is the revision, another one the role. Decode endpoints of `before` drain.
fn list(version: u64, sides: [Sides; 2], before: [Sides; 2]) -> String {
    let mut entries = Vec::new();
    for (revision, (side, before)) in [1, 2].into_iter().zip(sides.into_iter().zip(before)) {
        for (count, before, role, digit) in [(side.0, 0, "prefill", 1), (side.1, before.1, "decode", 2)] {
            entries.extend((1..=count.max(before)).map(|port| {
                let state = if port > count { "draining" } else { "ready" };
                format!(
                    r#"{{"address":"10.0.{revision}.{digit}:{port}","role":"{role}","models":["m"],
                    "revision":"v{revision}","state":"{state}"}}"#
                )
            }));
        }
    }
    format!(r#"{{"wire":1,"epoch":"e","version":{version},"endpoints":[{}]}}"#, entries.join(","))
}

impl RollOut {
    fn new(config: &str) -> Self {
        let mut worker = Worker::default();
        worker.configure(config.as_bytes()).unwrap();
        Self {
            worker,
            now: Monotonic::from_secs(5),
            version: 0,
            sides: [(0, 0); 2],
            in_flight: VecDeque::new(),
            asked: 0,
        }
    }

    fn relist(&mut self, sides: [Sides; 2]) {
        self.version += 1;
        let before = core::mem::replace(&mut self.sides, sides);
        self.worker.apply(list(self.version, sides, before).as_bytes()).unwrap();
    }

    fn body(&self, words: usize) -> String {
        let text = format!("{} {}", self.asked, "word ".repeat(words));
        format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{text}"}}]}}"#)
    }

    fn send(&mut self, body: &str) -> (Request, Outcome) {
        let headers = [(":method", "POST"), (":path", "/v1/chat/completions"), (":authority", "a")];
        let mut request = Request::default();
        request.headers(&mut self.worker, Headers::from_pairs(headers), false, self.now);
        let outcome = request.body(&mut self.worker, body.as_bytes(), self.now);
        (request, outcome)
    }

    /// Sends a request, and lets the oldest of more than eight go on. Returns the prefill leg's revision, 1 or 2, or 0 for a
    /// request that is served whole.
    fn ask(&mut self, words: usize) -> usize {
        self.now += Duration::from_millis(5);
        self.asked += 1;
        let body = self.body(words);
        let (mut request, outcome) = self.send(&body);
        if !outcome.effects.iter().any(|effect| matches!(effect, Effect::Call(_))) {
            assert_ne!(state(&outcome, DESTINATION), "", "an answer of the filter");
            request.done(&mut self.worker, self.now);
            return 0;
        }
        let destination = leg_destination(&outcome);
        let revision = revision_of(&destination);
        self.in_flight.push_back((request, destination, body));
        if self.in_flight.len() > 8 {
            self.hand_over_oldest();
        }
        revision
    }

    /// Ends the oldest prefill leg, and checks that the decode endpoint is of its revision.
    fn hand_over_oldest(&mut self) {
        let (mut request, prefill, body) = self.in_flight.pop_front().unwrap();
        let text = format!(r#"{{"kv_transfer_params":{PARAMS}}}"#);
        let answer = PrefillAnswer::Answered { status: 200, content_type: None, body: text.as_bytes() };
        let outcome = request.prefill_answer(&mut self.worker, answer, || Some(body), self.now);
        assert_eq!(state(&outcome, REASON), "prefilled");
        assert_eq!(revision_of(state(&outcome, DESTINATION)), revision_of(&prefill));
        request.done(&mut self.worker, self.now);
    }

    /// Parts of the prompts' tokens that revisions get, of 400 split requests; and of the first 100 of them.
    fn parts(&mut self, words: impl Fn(usize) -> usize) -> [[f64; 2]; 2] {
        let mut got = [0.0; 3];
        let mut early = [0.0; 3];
        for turn in 0..400 {
            // A request counts with its output, too.
            got[self.ask(words(turn))] += words(turn) as f64 * 5.0 / 4.0 + 256.0;
            if turn == 99 {
                early = got;
            }
        }
        [got, early].map(|[_, v1, v2]| [v1 / (v1 + v2), v2 / (v1 + v2)])
    }
}

/// The revision of every address of a destination, which is the same.
fn revision_of(destination: &str) -> usize {
    let of = |address: &str| address.split('.').nth(2).unwrap().parse().unwrap();
    let all: Vec<usize> = destination.split(',').map(of).collect();
    assert!(!all.is_empty() && all.iter().all(|revision| *revision == all[0]), "{destination}");
    all[0]
}

/// What the scarcer side of each revision can take.
fn shares([v1, v2]: [Sides; 2]) -> [f64; 2] {
    let (prefill, decode) = (f64::from(v1.0 + v2.0), f64::from(v1.1 + v2.1));
    let takes = |side: Sides| (f64::from(side.0) / prefill).min(f64::from(side.1) / decode);
    let sum = takes(v1) + takes(v2);
    [takes(v1) / sum, takes(v2) / sum]
}

/// Steps of roll-outs: of both roles together, of one after the other, and of two prefill and ten decode endpoints.
const STEPS: [&[[Sides; 2]]; 3] = [
    &[
        [(4, 4), (0, 0)],
        [(4, 4), (1, 1)],
        [(3, 3), (1, 1)],
        [(3, 2), (2, 2)],
        [(1, 2), (3, 3)],
        [(1, 1), (4, 4)],
        [(0, 0), (4, 4)],
    ],
    &[[(4, 4), (0, 0)], [(4, 3), (0, 1)], [(3, 3), (1, 1)], [(3, 1), (1, 3)], [(2, 1), (2, 4)], [(0, 0), (4, 4)]],
    &[[(2, 10), (0, 0)], [(2, 9), (1, 1)], [(1, 6), (1, 4)], [(1, 4), (1, 6)], [(1, 2), (1, 8)], [(0, 0), (2, 10)]],
];

#[test]
fn load_follows_what_each_revision_can_take_throughout_a_roll_out() {
    for steps in STEPS {
        for back in [false, true] {
            let mut rollout = RollOut::new("");
            let mut steps = steps.to_vec();
            if back {
                steps.reverse();
            }
            for sides in steps {
                rollout.relist(sides);
                let expected = shares(sides);
                for (parts, requests) in rollout.parts(|turn| 500 + 37 * (turn % 9)).into_iter().zip([400.0, 100.0]) {
                    for (part, share) in parts.iter().zip(expected) {
                        // Within 5 % of the share, and a long request or two: they are whole.
                        let off = (part - share).abs();
                        assert!(off <= 0.05 * share + 2.0 / requests, "{sides:?}: {parts:?} for {expected:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_role_that_is_rolled_alone_leaves_the_load_to_the_pairs_that_there_are() {
    for steps in
        [[[(4, 4), (0, 0)], [(3, 4), (1, 0)], [(1, 4), (3, 0)]], [[(4, 4), (0, 0)], [(4, 3), (0, 1)], [(4, 1), (0, 3)]]]
    {
        let mut rollout = RollOut::new("");
        for sides in steps {
            rollout.relist(sides);
            assert_eq!(rollout.parts(|_| 600)[0], [1.0, 0.0], "{sides:?}");
        }
    }
    // At its end no prefill endpoint has a partner: decode endpoints compute.
    let mut rollout = RollOut::new("");
    rollout.relist([(0, 4), (4, 0)]);
    assert_eq!(rollout.ask(600), 0);
}

#[test]
fn load_follows_the_shares_where_prompts_have_prefixes_and_lengths() {
    let mut rollout = RollOut::new("");
    rollout.relist([(4, 4), (0, 0)]);
    rollout.parts(|turn| 300 + 3 * turn);
    for sides in [[(3, 3), (1, 1)], [(3, 1), (1, 3)]] {
        rollout.relist(sides);
        let mut got = [0.0; 3];
        for turn in 0..400 {
            // Conversations of ten turns that share all but the end.
            rollout.asked = 1_000 + turn % 40;
            got[rollout.ask(500 + 50 * (turn / 40))] += 1.0;
        }
        let part = got[1] / (got[1] + got[2]);
        let share = shares(sides)[0];
        assert!((part - share).abs() <= 0.05 * share, "{sides:?}: {part} for {share}");
    }
}

#[test]
fn a_revision_whose_endpoints_fall_behind_gets_less() {
    let mut rollout = RollOut::new("");
    rollout.relist([(2, 2), (2, 2)]);
    let table = &rollout.worker.state.table;
    let behind = table.iter().filter(|(_, of)| of.endpoint.revision.as_deref() == Some("v2"));
    let behind: Vec<_> = behind.map(|(index, _)| index).collect();
    for index in behind {
        let far = rollout.now.saturating_add(Duration::from_secs(600));
        rollout.worker.state.table.get_mut(index).unwrap().prefill.add(0, 100.0, rollout.now, far);
    }
    let [[v1, _], _] = rollout.parts(|_| 600);
    assert!(v1 > 0.9, "{v1}");
}

#[test]
fn a_revision_whose_endpoints_fail_gets_nothing_while_another_works() {
    for role in [crate::wire::Role::Prefill, crate::wire::Role::Decode] {
        let mut rollout = RollOut::new("");
        rollout.relist([(2, 2), (2, 2)]);
        let table = &rollout.worker.state.table;
        let of_v2 =
            table.iter().filter(|(_, of)| of.endpoint.revision.as_deref() == Some("v2") && of.endpoint.role == role);
        let failing: Vec<_> = of_v2.filter_map(|(index, _)| table.refer(index)).collect();
        for _ in 0..20 {
            failing.iter().for_each(|endpoint| rollout.worker.failed(*endpoint, rollout.now));
            assert_eq!(rollout.ask(600), 1, "{role:?}");
        }
    }
}

#[test]
fn a_draining_decode_endpoint_takes_over_where_no_other_can() {
    let mut rollout = RollOut::new("");
    rollout.relist([(1, 1), (1, 1)]);
    let mut of_v1 = 0;
    for _ in 0..8 {
        of_v1 += usize::from(rollout.ask(600) == 1);
    }
    assert_eq!(of_v1, 4);
    // The last decode endpoints of v1 drain while its prefill legs are in flight.
    rollout.relist([(1, 0), (1, 1)]);
    assert_eq!((0..8).map(|_| rollout.ask(600)).filter(|revision| *revision == 1).count(), 0, "nothing new");
    while !rollout.in_flight.is_empty() {
        rollout.hand_over_oldest();
    }
    // Also where no endpoint at all is ready.
    rollout.relist([(1, 1), (0, 0)]);
    rollout.ask(600);
    rollout.relist([(0, 0), (0, 0)]);
    rollout.hand_over_oldest();
}

#[test]
fn requests_wait_for_room_at_the_revision_whose_turn_it_is() {
    let mut rollout = RollOut::new(r#"{"pools":{"default":{"queue":{"enabled":true}}}}"#);
    let sides = [(3, 1), (1, 3)];
    rollout.relist(sides);
    let mut waiting: Vec<(Request, String)> = Vec::new();
    let mut got = [0.0; 3];
    let mut started = |rollout: &mut RollOut, request: Request, outcome: &Outcome, body: String| {
        let destination = leg_destination(outcome);
        got[revision_of(&destination)] += 1.0;
        rollout.in_flight.push_back((request, destination, body));
    };
    for _ in 0..200 {
        rollout.asked += 1;
        let body = rollout.body(600);
        let (request, outcome) = rollout.send(&body);
        match request.waiting_id() {
            None => started(&mut rollout, request, &outcome, body),
            Some(_) => waiting.push((request, body)),
        }
    }
    assert!(waiting.len() > 150, "{}", waiting.len());
    while !waiting.is_empty() {
        rollout.now += Duration::from_millis(10);
        rollout.hand_over_oldest();
        while let Some(turn) = rollout.worker.next_turn(rollout.now) {
            let index = waiting.iter().position(|(request, _)| request.waiting_id() == Some(turn.id)).unwrap();
            let (mut request, body) = waiting.swap_remove(index);
            let outcome = request.turn(&mut rollout.worker, turn, || Some(body.clone()), rollout.now);
            started(&mut rollout, request, &outcome, body);
        }
    }
    assert_eq!(got[1] + got[2], 200.0);
    assert!((got[1] / 200.0 - shares(sides)[0]).abs() < 0.05 * 0.5, "{got:?}");
}
