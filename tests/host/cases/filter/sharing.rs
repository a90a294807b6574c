//! The workers of one Envoy decide as one.

use std::collections::BTreeMap;
use std::time::Duration;

use pd_host::{Fleet, Stream};

use crate::gateway::*;

const COUNTS: [usize; 3] = [1, 4, 16];

/// A second of ticks.
fn settle(fleet: &Fleet) {
    for _ in 0..6 {
        fleet.advance(Duration::from_millis(200));
        fleet.tick();
    }
}

#[test]
fn each_decision_sees_those_of_the_other_workers() {
    for count in COUNTS {
        let fleet = fleet(count, &config(&[], FOUR_AND_ONE, r#""split":{"mode":"always"}"#));
        let mut legs = BTreeMap::new();
        let mut streams: Vec<(usize, Stream)> = Vec::new();
        for id in 0..32 {
            let index = id % count;
            let worker = &fleet.workers()[index];
            streams.push((index, long_chat(id as u64).send(worker)));
            *legs.entry(chosen(worker)).or_insert(0) += 1;
            // Every worker's next request goes to the endpoint with the least work of all workers.
            let (least, most) = (legs.values().min().unwrap(), legs.values().max().unwrap());
            assert!(legs.len() < 4 || most - least <= 1, "{count} workers: {legs:?}");
        }
        assert_eq!(legs.values().copied().collect::<Vec<_>>(), [8; 4], "{count} workers");
        // Half of the clients leave; the other half's prefill legs end and they are answered.
        for (_, stream) in streams.iter().skip(1).step_by(2) {
            stream.reset();
        }
        fleet.workers().iter().for_each(answer_legs);
        for (_, stream) in streams.iter().step_by(2) {
            respond(stream);
        }
        settle(&fleet);
        assert_gauges_are_zero(fleet.shared());
        assert_eq!(fleet.violations(), []);
    }
}

#[test]
fn what_one_worker_routed_every_worker_knows() {
    for count in COUNTS {
        let fleet = fleet(count, &two_and_two());
        for id in 0..8 {
            let first = run_split(&fleet.workers()[id % count], &long_chat(id as u64));
            for worker in fleet.workers() {
                let again = long_chat(id as u64).send(worker);
                assert_eq!(decision(&again), ("decode_only".to_owned(), "cached".to_owned()), "{count} workers");
                assert_eq!(destinations(&forwarded(&again))[0], destinations(&forwarded(&first))[0]);
                respond(&again);
            }
        }
        assert_eq!(fleet.violations(), []);
    }
}

#[test]
fn a_vm_that_is_gone_leaves_nothing_in_flight() {
    for count in [3, 4, 16] {
        let mut fleet = fleet(count, &config(&[], FOUR_AND_ONE, r#""split":{"mode":"always"}"#));
        let lost: Vec<_> = (0..8).map(|id| long_chat(id).send(&fleet.workers()[0])).collect();
        let of_lost = chosen(&fleet.workers()[0]);
        fleet.replace(0).unwrap();
        drop(lost);
        settle(&fleet);
        // With nothing in flight anywhere, the next four go to four endpoints.
        let mut legs = BTreeMap::new();
        for id in 100..104 {
            let worker = &fleet.workers()[(id % count as u64) as usize];
            long_chat(id).send(worker);
            *legs.entry(chosen(worker)).or_insert(0) += 1;
        }
        assert_eq!(legs.values().copied().collect::<Vec<_>>(), [1; 4], "{count} workers, {of_lost} had the last one");
    }
}

#[test]
fn a_new_generation_takes_over_while_the_old_one_drains() {
    for (count, by_roots) in [(1, false), (4, false), (16, false), (4, true)] {
        let always = |revision: &str| {
            config(&[&format!(r#""revision":"{revision}""#)], FOUR_AND_ONE, r#""split":{"mode":"always"}"#)
        };
        let mut fleet = fleet(count, &always("old"));
        for id in 0..8 {
            run_split(&fleet.workers()[id % count], &long_chat(id as u64));
        }
        settle(&fleet);
        let known: Vec<_> = (0..8)
            .map(|id| {
                let stream = long_chat(id).send(&fleet.workers()[0]);
                let endpoint = chosen(&fleet.workers()[0]);
                answer_legs(&fleet.workers()[0]);
                respond(&stream);
                endpoint
            })
            .collect();
        settle(&fleet);
        // Four legs stay in flight at the old generation.
        let old: Vec<_> = (100..104).map(|id| long_chat(id).send(&fleet.workers()[0])).collect();
        if by_roots {
            fleet.add_roots(always("new").as_bytes());
        } else {
            fleet.reconfigure(always("new").as_bytes(), None).unwrap();
        }
        settle(&fleet);
        for (id, endpoint) in (0..8).zip(known) {
            let worker = &fleet.workers()[id % count];
            let stream = long_chat(id as u64).send(worker);
            assert_eq!(chosen(worker), endpoint, "{count} workers: the prompt goes where the old generation sent it");
            answer_legs(worker);
            assert_ne!(state(&stream, "matched_tokens"), "0");
            respond(&stream);
        }
        drop(old);
        assert_eq!(fleet.violations(), []);
    }
}

#[test]
fn a_pools_limit_is_that_of_all_workers_together() {
    for count in COUNTS {
        let fleet = fleet(count, &config(&[], TWO_AND_TWO, r#""max_requests":6"#));
        let worker = |index: usize| &fleet.workers()[index % count];
        for round in 0..3 {
            let streams: Vec<_> = (0..6).map(|id| short_chat(6 * round + id).send(worker(id as usize))).collect();
            assert!(streams.iter().all(|stream| stream.forwarded().is_some()), "{count} workers");
            for index in 0..count {
                let refused = short_chat(1_000).send(worker(index)).client().local_reply.map(|reply| reply.code);
                assert_eq!(refused, Some(429), "worker {index} of {count}");
            }
            // Half of them are answered, half of the clients leave.
            for (id, stream) in streams.iter().enumerate() {
                if id % 2 == 0 { respond(stream) } else { stream.reset() }
            }
            settle(&fleet);
        }
        assert_gauges_are_zero(fleet.shared());
        assert_eq!(fleet.violations(), []);
    }
}
