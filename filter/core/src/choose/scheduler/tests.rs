use super::*;
use crate::choose::decider::{AFFINITY_SLACK_TOKENS, Schedule, WholeReason};
use crate::config::Config;
use crate::endpoints::candidates::Candidates;
use crate::endpoints::elsewhere::Totals;
use crate::endpoints::health::Cause;
use crate::prefix::hash::{BlockHash, PromptHash};
use crate::wire::{Endpoint, Role, Snapshot};
use proptest::prelude::*;

pub(crate) struct Fixture {
    pub(crate) table: Table,
    pub(crate) index: PrefixIndex,
    pub(crate) config: Config,
    pub(crate) candidates: std::sync::Arc<Candidates>,
}

const NOW: Monotonic = Monotonic::from_secs(100);
const FAR: Monotonic = Monotonic::from_secs(1_000);

pub(crate) fn fixture(prefill: u16, decode: u16, config: &str) -> Fixture {
    let config = Config::parse(config.as_bytes()).unwrap();
    let (mut table, mut index) = (Table::default(), PrefixIndex::new(1 << 20));
    let roles =
        (0..prefill).map(|port| (port, Role::Prefill)).chain((0..decode).map(|port| (10_000 + port, Role::Decode)));
    let endpoints = roles.map(|(port, role)| Endpoint::new(([10, 0, 0, 1], 1 + port).into(), role)).collect();
    let snapshot = Snapshot {
        wire: 1,
        epoch: "e".into(),
        version: 1,
        base: None,
        endpoints,
        removed: vec![],
        models: vec![],
        stated: None,
    };
    table.apply(&snapshot, &config, &mut index);
    let candidates = table.candidates("m").unwrap();
    Fixture { table, index, config, candidates }
}

impl Fixture {
    pub(crate) fn scheduler(&self) -> Scheduler<'_> {
        Scheduler { table: &self.table, index: &self.index, pool: self.config.pool("default"), now: NOW }
    }

    fn prefill(&self, prompt: &Prompt) -> Pick {
        self.scheduler().pick_by_cost(&self.candidates.prefill, prompt, &[]).unwrap()
    }

    fn schedule(&self, prompt: &Prompt) -> Schedule {
        self.scheduler().schedule(&self.candidates, prompt)
    }

    pub(crate) fn busy(&mut self, index: EndpointIndex, seconds: f64) {
        self.table.get_mut(index).unwrap().prefill.add(0, seconds, NOW, FAR);
    }

    fn busy_elsewhere(&mut self, index: EndpointIndex, by: Totals) {
        let key = self.table.get(index).unwrap().key;
        self.table.busy_elsewhere(key, by);
    }
}

/// A prompt of `blocks` units of 128 tokens, as long as they are at most 32.
pub(crate) fn prompt(id: u64, blocks: u64) -> Prompt {
    let hash = |i: u64| BlockHash((id * 1_000 + i).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let blocks: Vec<_> = (0..blocks).map(hash).collect();
    let tokens = 128.0 * prefix_units(blocks.len()) as f64;
    let key = hash(0).0;
    let hash = PromptHash { blocks, head: id };
    Prompt { tokens, block_tokens: 128.0, hash, key, ..Prompt::default() }
}

#[test]
fn no_prompt_is_computed_without_a_decode_endpoint() {
    for split in ["always", "never", "threshold"] {
        let fixture = fixture(2, 0, &format!(r#"{{"pools":{{"default":{{"split":{{"mode":"{split}"}}}}}}}}"#));
        assert_eq!(fixture.schedule(&prompt(1, 20)), Schedule::Nobody, "{split}");
        assert_eq!(fixture.schedule(&prompt(1, 0)), Schedule::Nobody, "{split}");
    }
}

#[test]
fn a_prompt_goes_where_its_prefix_is() {
    let mut fixture = fixture(4, 1, "");
    for index in fixture.candidates.prefill.clone() {
        fixture.index.insert(index, &prompt(1, 20).hash.blocks);
        assert_eq!(fixture.prefill(&prompt(1, 40)).endpoint, index);
        assert_eq!(fixture.prefill(&prompt(1, 40)).matched_tokens, 20.0 * 128.0);
        fixture.index.remove_endpoint(index);
    }
}

#[test]
fn work_ahead_outweighs_a_prefix() {
    let mut fixture = fixture(2, 1, r#"{"pools":{"default":{"affinity_weight":3}}}"#);
    fixture.index.insert(0, &prompt(1, 32).hash.blocks);
    let saved = 3.0 * (fixture.config.pool("default").cost.seconds(4_096.0, 0.0) - 0.015);
    fixture.busy(0, saved * 0.9);
    assert_eq!(fixture.prefill(&prompt(1, 32)).endpoint, 0);
    fixture.busy(0, saved * 0.2);
    assert_eq!(fixture.prefill(&prompt(1, 32)).endpoint, 1);
}

#[test]
fn the_more_is_in_flight_the_longer_a_prompt_stays_with_its_prefix() {
    // The second endpoint is free by so many seconds earlier, of those that the prefix saves at the first one.
    let is_kept = |legs: usize, is_elsewhere: bool, times: f64| {
        let mut fixture = fixture(2, 1, "");
        fixture.index.insert(0, &prompt(1, 32).hash.blocks);
        let saved = fixture.config.pool("default").cost.seconds(4_096.0, 0.0) - 0.015;
        for index in [0, 1] {
            match is_elsewhere {
                true => fixture.busy_elsewhere(index, Totals { legs: legs as u64, ..Totals::default() }),
                false => (0..legs).for_each(|_| fixture.busy(index, 0.0)),
            }
        }
        fixture.busy(0, saved * times);
        fixture.prefill(&prompt(1, 32)).endpoint == 0
    };
    // At the second: 1, none there, half a leg each. At the first one leg more, which costs it 15 ms.
    for is_elsewhere in [false, true] {
        assert_eq!([1.3, 1.5].map(|times| is_kept(0, is_elsewhere, times)), [true, false]);
        assert_eq!([21.3, 21.5].map(|times| is_kept(10, is_elsewhere, times)), [true, false]);
    }
}

#[test]
fn work_elsewhere_without_a_count_of_legs_is_one_leg() {
    let mut fixture = fixture(1, 1, "");
    let legs = |fixture: &Fixture| fixture.table.get(0).unwrap().prefill_legs();
    for (by, expected) in [
        (Totals { work: 5_000_000, ..Totals::default() }, 1.0),
        (Totals { legs: 3, ..Totals::default() }, 3.0),
        (Totals::default().minus(Totals { legs: 9, work: 9_000_000, ..Totals::default() }), 0.0),
    ] {
        fixture.busy_elsewhere(0, by);
        assert_eq!(legs(&fixture), expected, "{by:?}");
    }
    fixture.busy(0, 1.0);
    assert_eq!(legs(&fixture), 1.0);
}

#[test]
fn a_session_stays_where_it_was_until_too_much_waits_there() {
    let mut fixture = fixture(3, 1, "");
    let session = BlockHash(77);
    let asked = Prompt { session: Some(session), ..prompt(1, 32) };
    fixture.index.insert(1, &asked.hash.blocks);
    fixture.index.insert(2, &[session]);
    assert_eq!(fixture.prefill(&prompt(1, 32)).endpoint, 1);
    fixture.busy(2, 0.04);
    assert_eq!(fixture.prefill(&Prompt { tokens: 6_000.0, ..asked.clone() }).endpoint, 2, "over the longer prefix");
    assert_eq!(fixture.prefill(&asked).matched_tokens, 4_096.0, "all of it is at 1, nothing is won by waiting");
    fixture.busy(2, 10.0);
    assert_eq!(fixture.prefill(&asked).endpoint, 1);
}

#[test]
fn the_whole_requests_of_a_session_stay_together_inside_a_bound() {
    let mut fixture = fixture(1, 3, "");
    let decode = fixture.candidates.decode.clone();
    let session = BlockHash(77);
    for short in [true, false] {
        let mut asked = Prompt { session: Some(session), ..prompt(1, 32) };
        if short {
            asked.tokens = 100.0;
        } else {
            for endpoint in &decode {
                fixture.index.insert(*endpoint, &asked.hash.blocks);
            }
        }
        for holder in &decode {
            fixture.index.insert(*holder, &[session]);
            let state = fixture.table.get_mut(*holder).unwrap();
            state.decode.add(AFFINITY_SLACK_TOKENS as u64);
            let scheduled = fixture.scheduler().schedule(&fixture.candidates, &asked);
            let reason = if short { WholeReason::Short } else { WholeReason::Cached };
            assert!(matches!(scheduled, Schedule::Whole(pick, why) if pick.endpoint == *holder && why == reason));
            fixture.table.get_mut(*holder).unwrap().decode.add(1);
            let scheduled = fixture.scheduler().schedule(&fixture.candidates, &asked);
            assert!(matches!(scheduled, Schedule::Whole(pick, _) if pick.endpoint != *holder), "overloaded");
            fixture.table.get_mut(*holder).unwrap().decode = Default::default();
            let state = fixture.table.get_mut(*holder).unwrap();
            state.health.failed(Cause::Unreachable, NOW);
            let scheduled = fixture.scheduler().schedule(&fixture.candidates, &asked);
            assert!(matches!(scheduled, Schedule::Whole(pick, _) if pick.endpoint != *holder), "ejected");
            fixture.table.get_mut(*holder).unwrap().health = Default::default();
        }
    }
}

#[test]
fn unknown_prefixes_spread_and_stick() {
    let fixture = fixture(4, 1, "");
    let picks: Vec<_> = (0..400).map(|id| fixture.prefill(&prompt(id, 8)).endpoint).collect();
    for index in 0..4 {
        let share = picks.iter().filter(|pick| **pick == index).count();
        assert!((60..140).contains(&share), "{share}");
    }
    assert_eq!(fixture.prefill(&prompt(7, 8)), fixture.prefill(&prompt(7, 8)));
}

#[test]
fn an_unseen_prefix_is_worth_a_wait_at_its_rendezvous_endpoint() {
    let mut fixture = fixture(2, 1, r#"{"pools":{"default":{"rendezvous_share":0.6,"affinity_weight":3}}}"#);
    let unseen = Prompt { is_unseen: true, ..prompt(1, 40) };
    let owner = fixture.prefill(&unseen).endpoint;
    fixture.busy(owner, 0.1);
    assert_eq!(fixture.prefill(&unseen).endpoint, owner);
    assert_ne!(fixture.prefill(&prompt(1, 40)).endpoint, owner, "a seen one is held by nobody");
}

#[test]
fn a_failing_endpoint_is_left_out_unless_all_fail() {
    let mut fixture = fixture(2, 1, "");
    let first = fixture.prefill(&prompt(1, 8)).endpoint;
    fixture.table.get_mut(first).unwrap().health.failed(Cause::Unreachable, NOW);
    let second = fixture.prefill(&prompt(1, 8)).endpoint;
    assert_ne!(first, second);
    fixture.table.get_mut(second).unwrap().health.failed(Cause::Unreachable, NOW);
    assert_eq!(fixture.prefill(&prompt(1, 8)).endpoint, first);
    let scheduler = fixture.scheduler();
    assert_eq!(scheduler.pick_by_cost(&fixture.candidates.prefill, &prompt(1, 8), &[first, second]), None);
}

#[test]
fn a_conversation_keeps_its_decode_endpoint_inside_a_load_bound() {
    let mut fixture = fixture(1, 3, "");
    let decode = fixture.candidates.decode.clone();
    fixture.index.insert(decode[1], &prompt(1, 30).hash.blocks);
    let asked = prompt(1, 32);
    let pick = |fixture: &Fixture, asked: &Prompt| {
        let (pick, alternates) = fixture.scheduler().pick_decode(&decode, asked, &[]).unwrap();
        assert!(alternates.len() == 2 && !alternates.contains(&pick.endpoint));
        (pick.endpoint, pick.matched_tokens)
    };
    assert_eq!(pick(&fixture, &asked), (decode[1], 30.0 * 128.0));
    fixture.table.get_mut(decode[1]).unwrap().decode.add(10 * 32 * 128);
    assert_eq!(pick(&fixture, &asked).0, decode[1]);
    fixture.table.get_mut(decode[1]).unwrap().decode.add(100_000);
    assert_ne!(pick(&fixture, &asked).0, decode[1]);
    // The session outweighs the prefix.
    let session = BlockHash(77);
    fixture.index.insert(decode[2], &[session]);
    assert_eq!(pick(&fixture, &Prompt { session: Some(session), ..prompt(1, 32) }).0, decode[2]);
}

#[test]
fn decode_goes_to_the_fewest_assigned_tokens() {
    let mut fixture = fixture(1, 4, "");
    let decode = fixture.candidates.decode.clone();
    for (index, tokens) in decode.iter().zip([50, 10, 30, 40]) {
        fixture.table.get_mut(*index).unwrap().decode.add(tokens);
    }
    let (pick, alternates) = fixture.scheduler().pick_decode(&decode, &prompt(1, 8), &[]).unwrap();
    assert_eq!((pick.endpoint, alternates), (decode[1], vec![decode[2], decode[3]]));
}

#[test]
fn a_small_uncached_rest_skips_prefill() {
    let mut fixture = fixture(2, 2, r#"{"pools":{"default":{"split":{"uncached_tokens":300}}}}"#);
    assert!(matches!(fixture.schedule(&prompt(1, 2)), Schedule::Whole(_, WholeReason::Short)), "a short prompt");
    assert!(matches!(fixture.schedule(&prompt(1, 3)), Schedule::Split(_)));
    let decode = fixture.candidates.decode[1];
    fixture.index.insert(decode, &prompt(1, 20).hash.blocks);
    let Schedule::Whole(pick, WholeReason::Cached) = fixture.schedule(&prompt(1, 22)) else { panic!() };
    assert_eq!((pick.endpoint, pick.matched_tokens), (decode, 20.0 * 128.0));
    assert!(matches!(fixture.schedule(&prompt(1, 23)), Schedule::Whole(..)), "a match may end behind its last block");
    assert!(matches!(fixture.schedule(&prompt(1, 24)), Schedule::Split(_)));
    fixture.table.get_mut(decode).unwrap().decode.add(100_000);
    assert!(matches!(fixture.schedule(&prompt(1, 22)), Schedule::Split(_)), "the holder is overloaded");
}

#[test]
fn without_prefill_endpoints_decode_serves_whole() {
    let fixture = fixture(0, 2, "");
    assert!(matches!(fixture.schedule(&prompt(1, 50)), Schedule::Whole(_, WholeReason::NoPrefill)));
    assert_eq!(fixture.scheduler().schedule(&Candidates::default(), &prompt(1, 50)), Schedule::Nobody);
}

#[test]
fn the_split_mode_of_the_pool_rules() {
    let always = fixture(1, 1, r#"{"pools":{"default":{"split":{"mode":"always"}}}}"#);
    assert!(matches!(always.schedule(&prompt(1, 0)), Schedule::Split(_)));
    let never = fixture(1, 1, r#"{"pools":{"default":{"split":{"mode":"never"}}}}"#);
    assert!(matches!(never.schedule(&prompt(1, 50)), Schedule::Whole(_, WholeReason::Never)));
}

#[test]
fn idle_endpoints_get_cold_prompts_evenly_however_many_there_are() {
    for count in [32_u16, 500] {
        let fixture = fixture(count, 1, "");
        let mut picks = vec![0_u32; usize::from(count)];
        let requests = 40 * u32::from(count);
        for id in 0..requests {
            picks[fixture.prefill(&prompt(u64::from(id), 8)).endpoint as usize] += 1;
        }
        assert!(picks.iter().all(|n| (5..120).contains(n)), "{count}: {picks:?}");
    }
}

#[test]
fn among_many_the_holder_is_found_and_the_busy_are_avoided() {
    let mut fixture = fixture(500, 300, "");
    fixture.index.insert(77, &prompt(1, 20).hash.blocks);
    assert_eq!(fixture.prefill(&prompt(1, 22)).endpoint, 77);
    for index in 0..500 {
        if index % 4 != 0 {
            fixture.busy(index, 5.0);
        }
    }
    for id in 2..200 {
        assert_eq!(fixture.prefill(&prompt(id, 8)).endpoint % 4, 0);
    }
    for index in fixture.candidates.decode.clone().into_iter().filter(|index| index % 4 != 0) {
        fixture.table.get_mut(index).unwrap().decode.add(9);
    }
    let pick = fixture.scheduler().pick_decode(&fixture.candidates.decode, &prompt(1, 8), &[]);
    assert_eq!(pick.unwrap().0.endpoint % 4, 0);
}

#[test]
fn the_last_healthy_endpoint_of_many_is_found() {
    let mut fixture = fixture(500, 1, "");
    for index in (0..500).filter(|index| *index != 123) {
        fixture.table.get_mut(index).unwrap().health.failed(Cause::Unreachable, NOW);
    }
    assert_eq!(fixture.prefill(&prompt(1, 8)).endpoint, 123);
}

proptest! {
    #[test]
    fn the_shortlist_holds_the_cheapest_endpoint(
        work in prop::collection::vec(0.0_f64..2.0, 2..12),
        held in prop::collection::vec((0_usize..12, 1_u64..30), 0..6),
    ) {
        let mut fixture = fixture(work.len() as u16, 1, "");
        for (index, seconds) in work.iter().enumerate() {
            fixture.busy(index as u32, *seconds);
        }
        for (index, blocks) in held {
            fixture.index.insert((index % work.len()) as u32, &prompt(1, blocks).hash.blocks);
        }
        let prompt = prompt(1, 30);
        let scheduler = fixture.scheduler();
        let among = &fixture.candidates.prefill;
        let legs = scheduler.view().shortlist(among, &prompt, &[]).legs_each;
        let owner = among.iter().copied().max_by_key(|index| rendezvous_weight(prompt.key, fixture.table.get(*index).unwrap().key));
        let cost = |index: u32| scheduler.cost(index, fixture.table.get(index).unwrap(), &prompt, (owner == Some(index), false), legs).cost;
        let lowest = among.iter().map(|index| cost(*index)).fold(f64::INFINITY, f64::min);
        prop_assert_eq!(cost(fixture.prefill(&prompt).endpoint), lowest);
    }
}
