use super::*;
use crate::endpoints::load::Left;
use proptest::prelude::*;

const COST: Cost = Cost { a: 0.015, b: 25e-6, c: 5.24e-10 };

fn time(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

fn queue() -> Queue {
    Queue::new(Rule::new(COST))
}

fn request(id: u64, arrival: f64, tokens: f64) -> Request {
    Request { id, arrival: time(arrival), tokens, key: id, ..Request::default() }
}

/// Endpoints with so much work each.
fn endpoints(work: &[f64]) -> Vec<PrefillEndpoint> {
    let endpoint = |(index, work): (usize, &f64)| PrefillEndpoint {
        index: index as u32,
        key: index as u64 + 1,
        left: Left { begun: *work, behind: 0.0 },
        cost: COST,
    };
    work.iter().enumerate().map(endpoint).collect()
}

fn held(endpoint: EndpointIndex, tokens: f64) -> Held {
    Held { endpoint, tokens }
}

/// Binds everything to one endpoint that always has room, and says in which order.
fn drain(queue: &mut Queue, now: f64) -> Vec<u64> {
    let next = |queue: &mut Queue| {
        let binding = queue.next(&endpoints(&[0.0]), time(now))?;
        queue.bind(binding.id, binding.seconds).map(|request| request.id)
    };
    core::iter::from_fn(|| next(queue)).collect()
}

#[test]
fn nothing_is_bound_to_a_server_without_room() {
    let mut queue = queue();
    assert_eq!(queue.next(&endpoints(&[0.0]), time(0.0)), None, "nothing waits");
    queue.push(request(1, 0.0, 1_000.0), &[]).unwrap();
    assert_eq!(queue.next(&endpoints(&[0.02, 5.0]), time(0.0)), None);
    assert_eq!(queue.next(&[], time(0.0)), None);
    let binding = queue.next(&endpoints(&[5.0, 0.019]), time(0.0)).unwrap();
    assert_eq!((binding.id, binding.endpoint, binding.held_tokens), (1, 1, 0.0));
    assert_eq!(binding.seconds, COST.seconds(1_000.0, 0.0));
}

/// Binds to one endpoint, which computes what it has begun for so many seconds more, until it has no room. Returns the number
/// of the requests.
fn bind_together(queue: &mut Queue, begun: f64) -> usize {
    let mut endpoint = endpoints(&[begun])[0];
    let mut bound = 0;
    while let Some(binding) = queue.next(&[endpoint], time(0.0)) {
        queue.bind(binding.id, binding.seconds);
        endpoint.left.behind += binding.seconds - if endpoint.left.behind > 0.0 { COST.a } else { 0.0 };
        bound += 1;
    }
    bound
}

#[test]
fn prompts_that_an_endpoint_will_begin_together_are_bound_together() {
    let mut queue = queue();
    (0..20).for_each(|id| queue.push(request(id, 0.0, 1_000.0), &[]).unwrap());
    assert_eq!(bind_together(&mut queue, 0.021), 0, "too early");
    // 10 of them are longer than 8,192 tokens together, because the fixed time counts once.
    assert_eq!(bind_together(&mut queue, 0.019), 9);
    queue.push(request(20, 0.0, 9_000.0), &[]).unwrap();
    assert_eq!(bind_together(&mut queue, 0.0), 9, "short ones, and no room for a long one behind them");
    assert_eq!(bind_together(&mut queue, 0.0), 2);
    assert_eq!(bind_together(&mut queue, 0.0), 1, "a long prompt has room where nothing else is");
    assert!(queue.is_empty());
}

#[test]
fn an_engine_that_computes_one_prompt_after_another_gets_one() {
    let mut rule = Rule::new(COST);
    rule.room.batch_tokens = 0.0;
    let mut queue = Queue::new(rule);
    (0..3).for_each(|id| queue.push(request(id, 0.0, 1_000.0), &[]).unwrap());
    assert_eq!(bind_together(&mut queue, 0.0), 1);
}

#[test]
fn the_shortest_goes_first_and_waiting_makes_shorter() {
    let mut queue = queue();
    queue.push(request(1, 0.0, 8_000.0), &[]).unwrap();
    queue.push(request(2, 1.0, 4_000.0), &[]).unwrap();
    queue.push(request(3, 1.0, 4_000.0), &[]).unwrap();
    queue.push(request(4, 90.0, 7_000.0), &[]).unwrap();
    assert_eq!(drain(&mut queue, 100.0), [2, 3, 1, 4], "of two alike the lower id");
}

#[test]
fn a_request_waits_for_the_server_that_holds_its_prefix_while_others_overtake() {
    let mut queue = queue();
    queue.push(request(1, 0.0, 40_000.0), &[held(0, 39_000.0)]).unwrap();
    queue.push(request(2, 1.0, 60_000.0), &[]).unwrap();
    let binding = queue.next(&endpoints(&[3.0, 0.0]), time(1.0)).unwrap();
    assert_eq!((binding.id, binding.endpoint), (2, 1));
    queue.bind(2, binding.seconds);
    assert_eq!(queue.next(&endpoints(&[3.0, 0.0]), time(1.0)), None, "endpoint 1 stays idle: 0 is through soon");
    let binding = queue.next(&endpoints(&[0.01, 0.0]), time(4.0)).unwrap();
    assert_eq!((binding.id, binding.endpoint, binding.held_tokens), (1, 0, 39_000.0));
}

#[test]
fn a_request_gives_its_server_up_when_waiting_costs_more_than_computing_anew() {
    let mut queue = queue();
    queue.push(request(1, 0.0, 40_000.0), &[held(0, 39_000.0)]).unwrap();
    let price = queue.price(2);
    assert_eq!(price, 2.5);
    let saved = COST.seconds(40_000.0, 0.0) - COST.seconds(40_000.0, 39_000.0);
    assert_eq!(queue.next(&endpoints(&[price * saved * 0.99, 0.0]), time(0.0)), None);
    assert_eq!(queue.next(&endpoints(&[price * saved * 1.01, 0.0]), time(0.0)).unwrap().endpoint, 1);
    // One that has left the list is not waited for.
    assert_eq!(queue.next(&endpoints(&[3.0, 0.0])[1..], time(0.0)).unwrap().endpoint, 1);
    // The more others wait, the dearer is the extra work.
    for id in 2..20 {
        queue.push(Request { priority: -1, ..request(id, 0.0, 40_000.0) }, &[held(0, 39_000.0)]).unwrap();
    }
    assert_eq!(queue.next(&endpoints(&[price * saved * 1.01, 0.0]), time(0.0)), None);
}

#[test]
fn a_request_goes_to_the_holder_among_several_with_room_and_else_by_its_key() {
    let mut queue = queue();
    queue.push(request(1, 0.0, 9_000.0), &[held(2, 512.0), held(1, 4_096.0)]).unwrap();
    assert_eq!(queue.next(&endpoints(&[0.0; 4]), time(0.0)).unwrap().endpoint, 1);
    queue.set_held(1, &[]);
    let first = queue.next(&endpoints(&[0.0; 4]), time(0.0)).unwrap().endpoint;
    queue.set_held(1, &[held(3, 512.0)]);
    assert_eq!(queue.next(&endpoints(&[0.0; 4]), time(0.0)).unwrap().endpoint, 3);
    queue.remove(1);
    let picks = (2..100).map(|id| {
        queue.push(request(id, 0.0, 9_000.0), &[]).unwrap();
        let endpoint = queue.next(&endpoints(&[0.0; 4]), time(0.0)).unwrap().endpoint;
        queue.remove(id);
        endpoint
    });
    let mut picks: Vec<_> = picks.chain([first]).collect();
    picks.sort_unstable();
    picks.dedup();
    assert_eq!(picks, [0, 1, 2, 3]);
}

#[test]
fn a_higher_priority_goes_before_everything() {
    let mut queue = queue();
    queue.push(request(1, 0.0, 100.0), &[]).unwrap();
    queue.push(Request { priority: 1, ..request(2, 900.0, 90_000.0) }, &[]).unwrap();
    queue.push(Request { priority: -1, ..request(3, 0.0, 10.0) }, &[]).unwrap();
    assert_eq!(drain(&mut queue, 1_000.0), [2, 1, 3]);
}

#[test]
fn who_has_waited_too_long_goes_before_the_shorter_the_oldest_first() {
    let mut queue = queue();
    queue.push(request(1, 5.0, 400_000.0), &[]).unwrap();
    queue.push(request(2, 0.0, 450_000.0), &[]).unwrap();
    queue.push(request(3, 6.0, 100.0), &[]).unwrap();
    assert_eq!(queue.next(&endpoints(&[0.0]), time(599.0)).unwrap().id, 3);
    assert_eq!(drain(&mut queue, 605.0), [2, 1, 3]);
}

#[test]
fn a_fairness_id_with_many_short_requests_leaves_the_other_its_share() {
    let mut queue = queue();
    for id in 0..200 {
        let fairness = id % 2;
        let tokens = if fairness == 0 { 40_000.0 } else { 80_000.0 };
        queue.push(Request { fairness, ..request(id, 0.0, tokens) }, &[]).unwrap();
    }
    let mut got = [0.0, 0.0];
    for _ in 0..100 {
        let binding = queue.next(&endpoints(&[0.0]), time(0.0)).unwrap();
        queue.bind(binding.id, binding.seconds);
        got[(binding.id % 2) as usize] += binding.seconds;
        assert!(f64::abs(got[0] - got[1]) < 10.0 + COST.seconds(80_000.0, 0.0), "{got:?}");
    }
}

#[test]
fn a_fairness_id_that_comes_back_has_not_saved_up() {
    let mut queue = queue();
    for id in 0..50 {
        queue.push(Request { fairness: 1, ..request(id, 0.0, 80_000.0) }, &[]).unwrap();
    }
    for _ in 0..40 {
        let binding = queue.next(&endpoints(&[0.0]), time(0.0)).unwrap();
        queue.bind(binding.id, binding.seconds);
    }
    for id in 50..100 {
        queue.push(Request { fairness: 2, ..request(id, 0.0, 90_000.0) }, &[]).unwrap();
    }
    let order = drain(&mut queue, 0.0);
    assert!(order[..12].iter().any(|id| *id < 50), "{order:?}");
}

#[test]
fn a_queue_takes_no_more_than_it_may() {
    let most_bytes = 3 * REQUEST_BYTES + 1_000;
    let mut queue = Queue::new(Rule { most_requests: 3, most_bytes, ..Rule::new(COST) });
    let large = |id| Request { bytes: 900, ..request(id, 0.0, 100.0) };
    queue.push(large(1), &[]).unwrap();
    let too_large = Request { bytes: 2 * REQUEST_BYTES, ..request(2, 0.0, 100.0) };
    assert_eq!(queue.push(too_large, &[]), Err(Full::Bytes));
    queue.push(Request { bytes: 100, ..request(2, 0.0, 100.0) }, &[]).unwrap();
    assert_eq!(queue.push(request(1, 0.0, 5.0), &[]), Err(Full::Taken));
    queue.remove(2).unwrap();
    queue.push(request(2, 0.0, 100.0), &[]).unwrap();
    queue.push(request(3, 0.0, 100.0), &[]).unwrap();
    assert_eq!(queue.push(request(4, 0.0, 100.0), &[]), Err(Full::Requests));
    assert_eq!(queue.remove(1), Some(large(1)));
    assert_eq!(queue.remove(1), None);
    assert_eq!(queue.bytes(), 2 * REQUEST_BYTES);
}

#[test]
fn a_request_takes_no_more_than_is_said() {
    let place = size_of::<Place>() * (MOST_HELD + 1);
    let others = size_of::<(Reverse<i32>, Duration, u64)>() + size_of::<(Duration, u64)>() + size_of::<(u64, u64)>();
    let entry = size_of::<(u64, Entry)>() + 1;
    // A set's node is half full at worst and has 12 places for links and counts; a map is 7/16 full at worst.
    let total = (place + others) * 5 / 2 + entry * 16 / 7 + size_of::<Held>() * MOST_HELD;
    assert!(total <= REQUEST_BYTES, "{total}");
}

#[test]
fn deadlines_end_in_their_order() {
    let mut queue = queue();
    assert_eq!(queue.next_deadline(), None);
    for (id, deadline) in [(1, Some(9.0)), (2, None), (3, Some(4.0))] {
        queue.push(Request { deadline: deadline.map(time), ..request(id, 0.0, 10.0) }, &[]).unwrap();
    }
    assert_eq!((queue.next_deadline(), queue.expired(time(3.9))), (Some(time(4.0)), None));
    assert_eq!(queue.expired(time(4.0)), Some(3));
    queue.remove(3);
    assert_eq!((queue.expired(time(4.0)), queue.expired(time(10.0))), (None, Some(1)));
    queue.bind(1, 1.0);
    assert_eq!((queue.expired(time(1e6)), queue.next_deadline()), (None, None));
}

#[test]
fn the_work_ahead_of_a_priority_is_known() {
    let mut queue = queue();
    queue.push(Request { priority: 1, ..request(1, 0.0, 9_000.0) }, &[]).unwrap();
    queue.push(request(2, 0.0, 9_000.0), &[held(1, 8_000.0), held(0, 4_000.0)]).unwrap();
    let (high, low) = (COST.seconds(9_000.0, 0.0), COST.seconds(9_000.0, 8_000.0));
    assert_eq!((queue.seconds(2), queue.seconds(1)), (0.0, high));
    assert!((queue.seconds(0) - high - low).abs() < 1e-9);
    queue.bind(1, high);
    assert!((queue.seconds(7) - 0.0).abs() < 1e-9 && (queue.seconds(0) - low).abs() < 1e-9);
}

#[test]
fn requests_with_a_key_are_found() {
    let mut queue = queue();
    for id in [3, 1, 2] {
        queue.push(Request { key: id / 3, ..request(id, 0.0, 10.0) }, &[]).unwrap();
    }
    assert_eq!(queue.sharing(0).collect::<Vec<_>>(), [1, 2]);
    queue.remove(1);
    assert_eq!(queue.sharing(0).collect::<Vec<_>>(), [2]);
    assert_eq!(queue.sharing(9).count(), 0);
}

#[derive(Clone, Debug)]
enum Step {
    Push { tokens: f64, priority: i32, fairness: u64, held: Vec<(u32, f64)> },
    Remove(usize),
    Hold(usize, Vec<(u32, f64)>),
    Bind(Vec<f64>),
}

fn holds() -> impl Strategy<Value = Vec<(u32, f64)>> {
    prop::collection::vec((0_u32..6, 0.0_f64..100_000.0), 0..6)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1.0_f64..100_000.0, -1..2_i32, 0_u64..3, holds())
            .prop_map(|(tokens, priority, fairness, held)| Step::Push { tokens, priority, fairness, held }),
        1 => any::<usize>().prop_map(Step::Remove),
        1 => (any::<usize>(), holds()).prop_map(|(index, held)| Step::Hold(index, held)),
        3 => prop::collection::vec(prop_oneof![Just(0.0), 0.0_f64..50.0], 0..6).prop_map(Step::Bind),
    ]
}

proptest! {
    #[test]
    fn nothing_is_lost_and_nothing_is_bound_twice(steps in prop::collection::vec(step(), 1..120)) {
        let mut queue = queue();
        let mut waiting: Vec<u64> = Vec::new();
        let helds = |held: Vec<(u32, f64)>| held.into_iter().map(|(endpoint, tokens)| Held { endpoint, tokens }).collect::<Vec<_>>();
        for (i, step) in steps.into_iter().enumerate() {
            let now = i as f64 * 30.0;
            let some = |index: usize| waiting.get(index % waiting.len().max(1)).copied();
            match step {
                Step::Push { tokens, priority, fairness, held } => {
                    let request = Request { priority, fairness, deadline: Some(time(now + 7.0)), ..request(i as u64, now, tokens) };
                    prop_assert_eq!(queue.push(request, &helds(held)), Ok(()));
                    waiting.push(i as u64);
                }
                Step::Remove(which) => if let Some(id) = some(which) {
                    prop_assert_eq!(queue.remove(id).map(|request| request.id), Some(id));
                    waiting.retain(|of| *of != id);
                },
                Step::Hold(which, held) => if let Some(id) = some(which) {
                    queue.set_held(id, &helds(held));
                },
                Step::Bind(work) => {
                    let endpoints = endpoints(&work);
                    let next = queue.next(&endpoints, time(now));
                    if waiting.is_empty() || work.iter().all(|work| *work >= 0.02) {
                        prop_assert_eq!(next, None);
                    } else if work.iter().all(|work| *work < 0.02) {
                        prop_assert!(next.is_some(), "all have room and nobody is sent");
                    }
                    if let Some(binding) = next {
                        prop_assert!(work[binding.endpoint as usize] < 0.02);
                        prop_assert!(waiting.contains(&binding.id));
                        let highest = waiting.iter().filter_map(|id| queue.get(*id)).map(|request| request.priority).max();
                        let all_have_room = work.iter().all(|work| *work < 0.02);
                        let priority = queue.get(binding.id).unwrap().priority;
                        prop_assert!(!all_have_room || Some(priority) == highest);
                        prop_assert!(queue.bind(binding.id, binding.seconds).is_some());
                        prop_assert!(queue.bind(binding.id, binding.seconds).is_none());
                        waiting.retain(|of| *of != binding.id);
                    }
                }
            }
            prop_assert_eq!(queue.len(), waiting.len());
            prop_assert_eq!(queue.bytes(), waiting.len() * REQUEST_BYTES);
            prop_assert_eq!(queue.deadlines.len(), waiting.len());
            prop_assert_eq!(queue.keys.len(), waiting.len());
            prop_assert_eq!(queue.arrivals.len(), waiting.len());
            let places: usize = queue.entries.values().map(|entry| entry.held.len() + 1).sum();
            prop_assert_eq!(queue.places.len(), places);
        }
        while let Some(id) = waiting.pop() {
            prop_assert!(queue.remove(id).is_some());
        }
        prop_assert!(queue.is_empty() && queue.places.is_empty() && queue.bytes() == 0 && queue.seconds(i32::MIN) == 0.0);
    }

    #[test]
    fn nobody_is_overtaken_beyond_the_bound(
        tokens in prop::collection::vec(1.0_f64..300_000.0, 1..60),
        gap in 0.0_f64..20.0,
    ) {
        let mut queue = queue();
        let (mut now, mut next, mut bound) = (0.0_f64, 0, Vec::new());
        while bound.len() < tokens.len() {
            while next < tokens.len() && next as f64 * gap <= now {
                queue.push(request(next as u64, next as f64 * gap, tokens[next]), &[]).unwrap();
                next += 1;
            }
            match queue.next(&endpoints(&[0.0]), time(now)) {
                None => now = next as f64 * gap,
                Some(binding) => {
                    queue.bind(binding.id, binding.seconds);
                    bound.push(binding.id as usize);
                    now += binding.seconds;
                }
            }
        }
        let Rule { patience, longest_wait, .. } = *queue.rule();
        for (turn, early) in bound.iter().enumerate() {
            for late in bound[..turn].iter().filter(|late| *late > early) {
                let gap = (late - early) as f64 * gap;
                let (own, other) = (COST.seconds(tokens[*early], 0.0), COST.seconds(tokens[*late], 0.0));
                prop_assert!(gap <= patience * (own / other).ln() + 1e-6, "{gap} s, {own} s by {other} s");
                prop_assert!(gap <= longest_wait.as_secs_f64());
            }
        }
    }

    #[test]
    fn the_order_does_not_depend_on_the_order_of_coming_in(
        tokens in prop::collection::vec((1.0_f64..300_000.0, holds()), 1..40),
        work in prop::collection::vec(prop_oneof![Just(0.0), 0.0_f64..50.0], 1..6),
    ) {
        let (mut one, mut other) = (queue(), queue());
        let push = |queue: &mut Queue, i: usize| {
            let (tokens, held) = &tokens[i];
            let held: Vec<Held> = held.iter().map(|(endpoint, tokens)| Held { endpoint: *endpoint, tokens: *tokens }).collect();
            queue.push(request(i as u64, 0.0, *tokens), &held).unwrap();
        };
        (0..tokens.len()).for_each(|i| push(&mut one, i));
        (0..tokens.len()).rev().for_each(|i| push(&mut other, i));
        loop {
            let next = one.next(&endpoints(&work), time(1.0));
            prop_assert_eq!(next, other.next(&endpoints(&work), time(1.0)));
            let Some(binding) = next else { break };
            one.bind(binding.id, binding.seconds);
            other.bind(binding.id, binding.seconds);
        }
    }
}
