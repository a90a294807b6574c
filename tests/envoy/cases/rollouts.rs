//! Roll-outs of engines whose revisions refuse each other's KV caches: no request fails, no prompt is computed twice, and
//! load follows what each revision can take.

use pd_sim::Handle;
use pd_tests::builder::Builder;
use pd_tests::rig::{Rig, entries, run};
use pd_tests::traffic::Traffic;
use serde_json::Value;

use crate::support::sum;

/// Engines of each role and revision.
const EACH: usize = 4;
/// Requests in which load is compared with the shares.
const REQUESTS: u64 = 400;

/// Ready prefill and decode engines of a revision.
type Sides = (usize, usize);

/// Engines of two revisions; the first half of each role is `v1`.
fn builder() -> Builder {
    let revision = |index| Some(if index < EACH { "v1" } else { "v2" }.to_owned());
    Rig::builder()
        .engines(2 * EACH, 2 * EACH)
        .every_engine(|config| config.speed = 0.2)
        .prefill_engines(move |config, index| config.revision = revision(index))
        .decode_engines(move |config, index| config.revision = revision(index))
        .list(|list| state(list, [(EACH, EACH), (0, 0)], [(EACH, EACH), (0, 0)]))
}

/// Puts revisions and states into a list. Engines that there were `before` drain.
fn state(list: &mut [Value], sides: [Sides; 2], before: [Sides; 2]) {
    for (index, entry) in list.iter_mut().enumerate() {
        let (is_decode, index) = (index >= 2 * EACH, index % (2 * EACH));
        let (revision, place) = (index / EACH, index % EACH);
        let count = |sides: [Sides; 2]| if is_decode { sides[revision].1 } else { sides[revision].0 };
        entry["revision"] = ["v1", "v2"][revision].into();
        entry["state"] = match place {
            _ if place < count(sides) => "ready",
            _ if place < count(before) => "draining",
            _ => "down",
        }
        .into();
    }
}

/// Parts of the load that the revisions should get: what the scarcer side of each can take.
fn shares([v1, v2]: [Sides; 2]) -> [f64; 2] {
    let part = |one: usize, other: usize| one as f64 / (one + other) as f64;
    let takes = [part(v1.0, v2.0).min(part(v1.1, v2.1)), part(v2.0, v1.0).min(part(v2.1, v1.1))];
    takes.map(|takes_one| takes_one / (takes[0] + takes[1]))
}

/// Goes through the steps under load, and compares in each one what the revisions get with their shares.
async fn roll(rig: &Rig, traffic: &Traffic, steps: &[[Sides; 2]]) {
    let mut before = steps[0];
    let legs = |engines: &[Handle]| sum(engines, |stats| stats.prefill_legs) as f64;
    for sides in steps {
        let mut list: Vec<Value> = entries(&rig.prefill, "prefill").chain(entries(&rig.decode, "decode")).collect();
        state(&mut list, *sides, before);
        if *sides != before {
            rig.relist(&list).await;
        }
        before = *sides;
        // What was chosen by the old list is through.
        traffic.more(40).await;
        let (v1, v2) = rig.prefill.split_at(EACH);
        let start = [legs(v1), legs(v2)];
        traffic.more(REQUESTS).await;
        let got = [legs(v1) - start[0], legs(v2) - start[1]];
        for (got_one, share) in got.iter().zip(shares(*sides)) {
            let part = got_one / (got[0] + got[1]);
            // Within 5 % of the share. Each of two workers is at most a request off, and the counts are not of one moment.
            let slack = 4.0 / REQUESTS as f64;
            assert!((part - share).abs() <= 0.05 * share + slack, "{sides:?}: {got:?}, not {:?}", shares(*sides));
        }
    }
}

/// Ends the load and checks that every prompt was computed once, by a prefill engine.
async fn check(rig: &Rig, traffic: Traffic) {
    let answered = traffic.stop().await;
    rig.until_idle().await;
    assert_eq!(sum(&rig.prefill, |stats| stats.prefill_legs), answered, "prefill legs");
    assert_eq!(sum(&rig.decode, |stats| stats.decode_legs), answered, "decode legs");
    for (what, count) in [
        ("computed by a decode engine", sum(&rig.decode, |stats| stats.local_prefills)),
        ("refused for the revision", sum(&rig.decode, |stats| stats.failed_pulls)),
        ("wrong text", sum(rig.engines(), |stats| stats.wrong_text)),
        ("KV blocks that nobody fetched", sum(&rig.prefill, |stats| stats.leases_open)),
    ] {
        assert_eq!(count, 0, "{what}");
    }
    println!("{answered} requests, none failed, no prompt computed twice");
}

/// llm-d/llm-d#499, llm-d/llm-d-router#2141, volcano-sh/kthena#1352, ai-dynamo/grove#640: servers of two revisions
/// cannot hand over to each other, and what a revision can take depends on both of its sides.
#[test]
fn load_follows_what_each_revision_can_take_throughout_a_roll_out_and_back() {
    const STEPS: [[Sides; 2]; 7] = [
        [(4, 4), (0, 0)],
        [(4, 4), (1, 1)],
        [(3, 3), (1, 1)],
        [(3, 1), (1, 3)],
        [(2, 1), (2, 4)],
        [(1, 1), (4, 4)],
        [(0, 0), (4, 4)],
    ];
    run(async {
        let rig = builder().start().await;
        let traffic = Traffic::start_long(rig.address(), 16);
        roll(&rig, &traffic, &STEPS).await;
        let back: Vec<_> = STEPS.into_iter().rev().collect();
        roll(&rig, &traffic, &back).await;
        check(&rig, traffic).await;
    });
}

/// Each role alone, and back: the pairs that there are take everything.
/// volcano-sh/kthena#1406: one role is ahead of the other.
#[test]
fn a_role_that_is_rolled_alone_leaves_the_load_to_the_pairs_that_there_are() {
    const PREFILL: [[Sides; 2]; 4] = [[(4, 4), (0, 0)], [(3, 4), (1, 0)], [(1, 4), (3, 0)], [(1, 4), (4, 0)]];
    const DECODE: [[Sides; 2]; 4] = [[(4, 4), (0, 0)], [(4, 3), (0, 1)], [(4, 1), (0, 3)], [(4, 1), (0, 4)]];
    run(async {
        let rig = builder().start().await;
        let traffic = Traffic::start_long(rig.address(), 16);
        for steps in [PREFILL, DECODE] {
            roll(&rig, &traffic, &steps).await;
            let back: Vec<_> = steps.into_iter().rev().collect();
            roll(&rig, &traffic, &back).await;
        }
        check(&rig, traffic).await;
    });
}
