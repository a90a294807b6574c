//! Pairings: which prefill and decode endpoints can hand over to each other, and how much of the load each pairing takes.
//!
//! A hand-over needs endpoints of one engine, one group and one revision. While an engine is rolled out there are
//! endpoints of two revisions, and the two sides of a revision rarely grow together: a revision with three of four prefill
//! endpoints and one of four decode endpoints can take a quarter of the load, whatever its prefill endpoints could do.
//!
//! The *share* of a pairing is therefore the smaller of two parts: its part of the weights of all prefill endpoints, and
//! its part of the weights of all decode endpoints; divided by the sum over all pairings. With these shares every pairing
//! reaches the limit of its scarcer side at the same load. No measurement is needed, so the shares follow the list at
//! once. They assume that the pool as a whole has its two roles in proportion. The work in flight corrects that, see
//! [`Given::price`].

use hashbrown::HashMap;

use crate::endpoints::endpoint_state::EndpointState;
use crate::prefix::index::EndpointIndex;
use crate::wire::Engine;

/// Most pairings for which a choice compares the best endpoint of each. With more pairings, a choice ignores shares.
const MOST: usize = 64;
/// Excess of a pairing's part of the prefill endpoints over its share above which shares count, if all pairings have
/// one revision. Below this excess the choice by work in flight gives each pairing about its share, and prompts stay at
/// the endpoints that hold their prefixes.
const LOPSIDED: f64 = 0.02;
/// Most mean requests by which a pairing counts as ahead or behind. So a pairing that could not take its share
/// for a while does not get all of the missed requests later.
const MOST_AHEAD: f64 = 8.0;
/// Most pairings of a pool for which a worker remembers how far they are ahead.
const MOST_KNOWN: usize = 4 * MOST;
/// Weight of the newest request in the mean tokens of a request.
const NEWEST: f64 = 1.0 / 32.0;

/// What a prefill and a decode endpoint must have in common for a hand-over.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Partner {
    /// Engine, and so the hand-over protocol.
    pub engine: Engine,
    /// Group; `None` of a prefill endpoint: endpoints of any group.
    pub group: Option<String>,
    /// Revision; `None` is one, too: endpoints without a revision pair with each other only.
    pub revision: Option<String>,
}

impl Partner {
    /// What a decode endpoint must have to take over from this prefill endpoint.
    #[must_use]
    pub fn of(prefill: &EndpointState) -> Self {
        let endpoint = &prefill.endpoint;
        Self { engine: prefill.engine, group: endpoint.group.clone(), revision: endpoint.revision.clone() }
    }

    /// Key of the pairing. Every worker computes the same one.
    #[must_use]
    pub fn key(&self) -> u64 {
        let Self { engine, group, revision } = self;
        xxhash_rust::xxh3::xxh3_64(format!("{engine:?}\0{group:?}\0{revision:?}").as_bytes())
    }
}

/// Prefill endpoints that can hand over to the same decode endpoints.
#[derive(Clone, Debug, PartialEq)]
pub struct Pairing {
    /// What they have in common.
    pub partner: Partner,
    /// [`Partner::key`].
    pub key: u64,
    /// The prefill endpoints, in the order of the candidates.
    pub prefill: Vec<EndpointIndex>,
    /// Part of the split requests' load that the pairing takes, 0 to 1. The sum over all pairings is 1.
    pub share: f64,
}

/// The pairings of these prefill endpoints, of which each has a decode endpoint in `partners`. Empty where shares do not
/// count:
/// - there is one pairing, or there are more than 64,
/// - all have one revision, and no pairing has a larger part of the prefill endpoints than its share.
pub(super) fn pairings<'a>(
    prefill: &[EndpointIndex],
    decode: &[EndpointIndex],
    partners: &HashMap<Partner, Vec<EndpointIndex>>,
    state_of: &impl Fn(EndpointIndex) -> Option<&'a EndpointState>,
) -> Vec<Pairing> {
    let mut pairings: Vec<Pairing> = Vec::new();
    for index in prefill {
        let Some(state) = state_of(*index) else { continue };
        let is_own = |pairing: &&mut Pairing| {
            let Partner { engine, group, revision } = &pairing.partner;
            *engine == state.engine && *group == state.endpoint.group && *revision == state.endpoint.revision
        };
        if let Some(pairing) = pairings.iter_mut().find(is_own) {
            pairing.prefill.push(*index);
            continue;
        }
        if pairings.len() == MOST {
            return Vec::new();
        }
        let partner = Partner::of(state);
        let key = partner.key();
        pairings.push(Pairing { partner, key, prefill: vec![*index], share: 0.0 });
    }
    if pairings.len() < 2 || decode.is_empty() {
        return Vec::new();
    }
    let weight =
        |set: &[EndpointIndex]| -> f64 { set.iter().filter_map(|index| Some(state_of(*index)?.endpoint.weight)).sum() };
    let (all_prefill, all_decode) = (weight(prefill), weight(decode));
    let parts: Vec<f64> = pairings.iter().map(|pairing| weight(&pairing.prefill) / all_prefill).collect();
    for (pairing, part) in pairings.iter_mut().zip(&parts) {
        let decode = partners.get(&pairing.partner).map_or(0.0, |partners| weight(partners) / all_decode);
        pairing.share = part.min(decode);
    }
    let sum: f64 = pairings.iter().map(|pairing| pairing.share).sum();
    pairings.iter_mut().for_each(|pairing| pairing.share /= sum);
    let first = pairings.first().map(|pairing| pairing.partner.revision.clone());
    let is_rolled_out = pairings.iter().any(|pairing| Some(&pairing.partner.revision) != first.as_ref());
    let is_lopsided = pairings.iter().zip(&parts).any(|(pairing, part)| part - pairing.share > LOPSIDED);
    if sum > 0.0 && (is_rolled_out || is_lopsided) { pairings } else { Vec::new() }
}

/// How far each pairing is ahead of its share, by the requests that this worker split. Each worker has its own: if every
/// worker follows the shares, the whole Envoy does.
#[derive(Debug, Default)]
pub struct Given {
    /// KV tokens more than its share that a pairing got, by [`Pairing::key`]; below 0: fewer.
    ahead: HashMap<u64, f64>,
    /// Mean KV tokens of a request; 0 before the first.
    mean: f64,
}

impl Given {
    /// Notes that a request of so many KV tokens goes to the pairing with this key.
    pub(crate) fn add(&mut self, pairings: &[Pairing], key: u64, tokens: f64) {
        if !pairings.iter().any(|pairing| pairing.key == key) {
            return;
        }
        let is_first = self.mean == 0.0;
        self.mean = if is_first { tokens } else { self.mean + NEWEST * (tokens - self.mean) };
        let most = MOST_AHEAD * self.mean;
        // Models of one pool may have different pairings. Pairings of old revisions must not accumulate.
        if self.ahead.len() > MOST_KNOWN {
            self.ahead.clear();
        }
        for pairing in pairings {
            let ahead = self.ahead.entry(pairing.key).or_default();
            let got = if pairing.key == key { tokens } else { 0.0 };
            *ahead = (*ahead + got - pairing.share * tokens).clamp(-most, most);
        }
    }

    /// Mean requests that a pairing is ahead of its share, at most 8; below 0: behind.
    #[must_use]
    pub fn ahead(&self, key: u64) -> f64 {
        let ahead = self.ahead.get(&key).copied().unwrap_or_default();
        if self.mean > 0.0 { ahead / self.mean } else { 0.0 }
    }

    /// Seconds by which an endpoint of the pairing counts as more expensive. `seconds_of` returns the seconds of a request
    /// with so many tokens, `weight` is w of W + w·S.
    ///
    /// The price is in the unit of W + w·S: a pairing that is one request ahead costs as much as a prompt that is
    /// computed anew. So a pairing that holds the prefix of a prompt may get the prompt while the pairing is up to
    /// about one request ahead. A pairing whose endpoints fall behind by more than the price gets less than its share.
    #[must_use]
    pub(crate) fn price(&self, key: u64, weight: f64, seconds_of: impl Fn(f64) -> f64) -> f64 {
        weight.max(1.0) * seconds_of(self.mean) * self.ahead(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoints::candidates::Candidates;
    use crate::endpoints::table::tests::{Fixture, endpoint};
    use crate::wire::{Endpoint, Role};
    use proptest::prelude::*;
    use std::sync::Arc;

    /// Prefill and decode endpoints of revisions `a`, `b` and so on.
    fn rolled(revisions: &[(u16, u16)]) -> Vec<Endpoint> {
        let mut list = Vec::new();
        let mut port = 0;
        for (name, (prefill, decode)) in ["a", "b", "c"].into_iter().zip(revisions) {
            for (count, role) in [(*prefill, Role::Prefill), (*decode, Role::Decode)] {
                for _ in 0..count {
                    port += 1;
                    list.push(Endpoint { revision: Some(name.into()), ..endpoint(port, role, &[]) });
                }
            }
        }
        list
    }

    fn candidates(list: Vec<Endpoint>) -> Arc<Candidates> {
        Fixture::new(list).table.candidates("m").unwrap()
    }

    fn shares(list: Vec<Endpoint>) -> Vec<(String, f64)> {
        let shares = candidates(list).pairings.clone();
        let name = |pairing: &Pairing| pairing.partner.revision.clone().or(pairing.partner.group.clone());
        let mut shares: Vec<_> =
            shares.iter().map(|pairing| (name(pairing).unwrap_or_default(), pairing.share)).collect();
        shares.sort_by(|a, b| a.0.cmp(&b.0));
        shares
    }

    #[test]
    fn a_share_is_what_the_scarcer_side_of_a_revision_can_take() {
        let expect = |revisions: &[(u16, u16)], expected: &[(&str, f64)]| {
            let found = shares(rolled(revisions));
            let expected: Vec<_> = expected.iter().map(|(name, share)| ((*name).to_owned(), *share)).collect();
            assert_eq!(found.len(), expected.len(), "{revisions:?}: {found:?}");
            for (found, expected) in found.iter().zip(&expected) {
                assert!(found.0 == expected.0 && (found.1 - expected.1).abs() < 1e-9, "{revisions:?}: {found:?}");
            }
        };
        expect(&[(2, 2), (2, 2)], &[("a", 0.5), ("b", 0.5)]);
        expect(&[(3, 1), (1, 3)], &[("a", 0.5), ("b", 0.5)]);
        expect(&[(3, 3), (3, 1)], &[("a", 2.0 / 3.0), ("b", 1.0 / 3.0)]);
        // Two prefill and ten decode servers on the way (llm-d-router's example).
        expect(&[(2, 9), (1, 1)], &[("a", 20.0 / 23.0), ("b", 3.0 / 23.0)]);
        // A revision with one side only takes nothing, and nothing is to be shared.
        expect(&[(2, 4), (2, 0)], &[]);
        expect(&[(4, 4)], &[]);
        expect(&[(2, 2), (1, 1), (1, 1)], &[("a", 0.5), ("b", 0.25), ("c", 0.25)]);
    }

    #[test]
    fn weights_count_in_a_share() {
        let mut list = rolled(&[(1, 1), (1, 1)]);
        for entry in &mut list[2..] {
            entry.weight = 3.0;
        }
        assert_eq!(shares(list), [("a".to_owned(), 0.25), ("b".to_owned(), 0.75)]);
    }

    #[test]
    fn groups_have_shares_only_where_one_side_is_scarce() {
        let grouped = |port, role, group: &str| Endpoint { group: Some(group.into()), ..endpoint(port, role, &[]) };
        let (p, d) = (Role::Prefill, Role::Decode);
        let even = vec![grouped(1, p, "a"), grouped(2, d, "a"), grouped(3, p, "b"), grouped(4, d, "b")];
        assert_eq!(shares(even.clone()), []);
        let lopsided = even.into_iter().chain([grouped(5, p, "a"), grouped(6, d, "b")]).collect();
        assert_eq!(shares(lopsided), [("a".to_owned(), 0.5), ("b".to_owned(), 0.5)]);
    }

    #[test]
    fn endpoints_without_a_revision_pair_with_each_other_only() {
        let mut list = rolled(&[(1, 1), (1, 1)]);
        list[0].revision = None;
        let found = candidates(list.clone());
        assert_eq!(found.prefill.len(), 1, "no decode endpoint takes over from it");
        list[1].revision = None;
        let found = candidates(list);
        assert_eq!(found.prefill.len(), 2);
        assert!(found.partners.values().all(|partners| partners.len() == 1));
    }

    #[test]
    fn a_pairing_that_cannot_keep_up_is_not_flooded_later() {
        let found = candidates(rolled(&[(2, 2), (2, 2)])).pairings.clone();
        let mut given = Given::default();
        assert_eq!(given.price(found[0].key, 3.0, |tokens| tokens), 0.0);
        for _ in 0..1_000 {
            given.add(&found, found[0].key, 100.0);
        }
        assert_eq!((given.ahead(found[0].key), given.ahead(found[1].key)), (8.0, -8.0));
        assert_eq!(given.price(found[0].key, 3.0, |tokens| tokens), 3.0 * 100.0 * 8.0);
        given.add(&found, 77, 100.0);
        assert_eq!(given.ahead(found[0].key), 8.0, "a pairing of another list");
    }

    proptest! {
        /// The pairing that is behind most gets the next request: each is at most one request off its share at any time.
        #[test]
        fn the_one_behind_most_is_never_a_request_off(
            counts in prop::collection::vec((1_u16..9, 1_u16..9), 2..4),
            turns in 1_usize..300,
        ) {
            let found = candidates(rolled(&counts)).pairings.clone();
            prop_assume!(found.len() > 1);
            let mut given = Given::default();
            let mut got = vec![0.0; found.len()];
            for turn in 1..=turns {
                let price = |index: &usize| given.price(found[*index].key, 3.0, |tokens| tokens);
                let next = (0..found.len()).min_by(|a, b| price(a).total_cmp(&price(b))).unwrap();
                given.add(&found, found[next].key, 1_000.0);
                got[next] += 1.0;
                for (got, pairing) in got.iter().zip(&found) {
                    let off = got - pairing.share * turn as f64;
                    prop_assert!(off.abs() <= 2.0, "{off} at {turn}");
                }
            }
        }
    }
}
