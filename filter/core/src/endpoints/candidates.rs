//! Candidates: the sets of endpoints that a model's requests choose from.

use std::collections::BTreeMap;
use std::sync::Arc;

use hashbrown::{HashMap, HashSet};

use crate::endpoints::endpoint_state::Slot;
use crate::endpoints::table::Table;
use crate::prefix::index::EndpointIndex;
use crate::wire::{Endpoint, Engine, Role, State};

/// What a decode endpoint must have to take over from a prefill endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Partner {
    /// Hand-over protocol.
    pub engine: Engine,
    /// Pairing group; none: any.
    pub group: Option<String>,
}

impl Partner {
    /// The partner of a prefill endpoint.
    #[must_use]
    pub fn of(prefill: &Slot) -> Self {
        Self { engine: prefill.engine, group: prefill.endpoint.group.clone() }
    }
}

/// Endpoints of one pool that serve one model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Candidates {
    /// Pool whose policy applies.
    pub pool: Arc<str>,
    /// Ready endpoints that take prefill legs and nothing else, sorted by [`Slot::key`]. Those of a group without a
    /// decode endpoint are left out: nobody could take their work over.
    pub prefill: Vec<EndpointIndex>,
    /// Ready endpoints that take decode legs, sorted by [`Slot::key`].
    pub decode: Vec<EndpointIndex>,
    /// Ready endpoints that can serve a request whole: those of role `both`, and decode endpoints whose engine computes
    /// a prompt by itself. Sorted alike.
    pub whole: Vec<EndpointIndex>,
    /// Ready endpoints that a long prompt is computed at: prefill endpoints, and those of role `both`. Sorted
    /// alike, and with the same ones left out.
    pub compute: Vec<EndpointIndex>,
    /// The decode endpoints by what prefill endpoints they take over from, sorted alike.
    pub(crate) partners: HashMap<Partner, Vec<EndpointIndex>>,
    /// Whether one of them has bounds for the length of a prompt.
    pub(crate) has_prompt_bounds: bool,
}

/// Why there is nothing to choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoCandidates {
    /// The list is empty, or nothing in it is ready.
    NoEndpoint,
    /// There are endpoints, but none serves this model.
    UnknownModel,
}

/// The candidates of every model.
#[derive(Debug, Default)]
pub(super) struct CandidateSets {
    models: HashMap<String, Arc<Candidates>>,
    any_model: Option<Arc<Candidates>>,
    all_ready: Vec<EndpointIndex>,
}

impl CandidateSets {
    /// The sets of these endpoints, which are sorted by [`Slot::key`].
    ///
    /// A model belongs to one pool: when endpoints of several pools serve it, the first pool by name that can generate.
    /// Endpoints without models serve every model of their pool, and those that no endpoint names.
    pub(super) fn new<'a>(
        sorted: &[(EndpointIndex, &'a Slot)],
        slot_of: impl Fn(EndpointIndex) -> Option<&'a Slot>,
    ) -> Self {
        let mut named: BTreeMap<&str, BTreeMap<&str, Candidates>> = BTreeMap::new();
        let mut unnamed: BTreeMap<&str, Candidates> = BTreeMap::new();
        let mut all_ready = Vec::new();
        for (index, slot) in sorted {
            let Endpoint { pool, models, role, state, .. } = &slot.endpoint;
            let ready = *state == State::Ready;
            if ready {
                all_ready.push(*index);
            }
            for model in models {
                named.entry(model).or_default().entry(pool).or_default().push(*index, *role, slot.engine, ready);
            }
            if models.is_empty() {
                unnamed.entry(pool).or_default().push(*index, *role, slot.engine, ready);
            }
        }
        let models = named
            .into_iter()
            .filter_map(|(model, mut pools)| {
                for (pool, candidates) in &mut pools {
                    if let Some(others) = unnamed.get(pool) {
                        candidates.extend(others);
                        let key = |index: &EndpointIndex| slot_of(*index).map(|slot| slot.key);
                        candidates.sets().into_iter().for_each(|set| set.sort_by_key(key));
                    }
                }
                Some((model.to_owned(), first_that_generates(pools, &slot_of)?))
            })
            .collect();
        Self { models, any_model: first_that_generates(unnamed, &slot_of), all_ready }
    }

    /// The candidates of a model; `None` where no endpoint serves it.
    pub(super) fn of_model(&self, model: &str) -> Option<&Arc<Candidates>> {
        self.models.get(model).or(self.any_model.as_ref())
    }

    /// Models that endpoints name, sorted.
    pub(super) fn model_names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.models.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Whether every endpoint says which models it serves.
    pub(super) fn names_all_models(&self) -> bool {
        self.any_model.is_none() && !self.models.is_empty()
    }

    /// Every ready endpoint, whatever its pool, role and models, sorted by [`Slot::key`].
    pub(super) fn all_ready(&self) -> &[EndpointIndex] {
        &self.all_ready
    }
}

impl Candidates {
    /// Whether nobody can do anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.prefill.is_empty() && !self.can_generate()
    }

    fn can_generate(&self) -> bool {
        !self.decode.is_empty() || !self.whole.is_empty()
    }

    fn push(&mut self, at: EndpointIndex, role: Role, engine: Engine, ready: bool) {
        if !ready {
            return;
        }
        match role {
            Role::Prefill => self.prefill.push(at),
            Role::Decode => self.decode.push(at),
            Role::Both => {}
        }
        if role == Role::Both || (role == Role::Decode && engine.protocol().decodes_alone) {
            self.whole.push(at);
        }
        if role != Role::Decode {
            self.compute.push(at);
        }
    }

    fn extend(&mut self, others: &Self) {
        for (set, more) in
            self.sets().into_iter().zip([&others.prefill, &others.decode, &others.whole, &others.compute])
        {
            set.extend(more);
        }
    }

    /// Leaves out everybody else.
    pub fn retain(&mut self, stays: impl Fn(EndpointIndex) -> bool) {
        self.sets().into_iter().for_each(|set| set.retain(|at| stays(*at)));
        self.partners.values_mut().for_each(|set| set.retain(|at| stays(*at)));
    }

    /// Those whose bounds have room for a prompt of this length; of a set where none has, all. Endpoints without bounds
    /// cost nothing here, otherwise it is a pass over them all.
    #[must_use]
    pub fn for_prompt(self: Arc<Self>, tokens: f64, table: &Table) -> Arc<Self> {
        if !self.has_prompt_bounds {
            return self;
        }
        let takes = |at: &EndpointIndex| table.get(*at).is_some_and(|slot| slot.endpoint.takes_prompt(tokens));
        let mut rest = Self::clone(&self);
        let keep = |set: &mut Vec<EndpointIndex>| {
            if set.iter().any(takes) {
                set.retain(takes);
            }
        };
        rest.sets().into_iter().for_each(keep);
        rest.partners.values_mut().for_each(keep);
        Arc::new(rest)
    }

    /// The decode endpoints that can take over from a prefill endpoint.
    #[must_use]
    pub fn partners(&self, of: &Partner) -> &[EndpointIndex] {
        self.partners.get(of).map_or(&[], Vec::as_slice)
    }

    fn sets(&mut self) -> [&mut Vec<EndpointIndex>; 4] {
        [&mut self.prefill, &mut self.decode, &mut self.whole, &mut self.compute]
    }
}

fn first_that_generates<'a>(
    pools: BTreeMap<&str, Candidates>,
    slot_of: &impl Fn(EndpointIndex) -> Option<&'a Slot>,
) -> Option<Arc<Candidates>> {
    let generating = pools.iter().find(|(_, candidates)| candidates.can_generate());
    let (pool, candidates) = generating.or_else(|| pools.iter().next())?;
    let mut candidates = Candidates { pool: (*pool).into(), ..candidates.clone() };
    let group_of = |at: &EndpointIndex| slot_of(*at)?.endpoint.group.as_deref();
    let groups: HashSet<&str> = candidates.decode.iter().filter_map(group_of).collect();
    let is_whole = |at: &EndpointIndex| slot_of(*at).is_some_and(|slot| slot.endpoint.role == Role::Both);
    let has_partner = |at: &EndpointIndex| is_whole(at) || group_of(at).is_none_or(|group| groups.contains(group));
    if !candidates.decode.is_empty() {
        candidates.prefill.retain(has_partner);
        candidates.compute.retain(has_partner);
    }
    let is_bounded = |at: &EndpointIndex| slot_of(*at).is_some_and(|slot| slot.endpoint.has_prompt_bounds());
    let has_prompt_bounds = candidates.sets().into_iter().any(|set| set.iter().any(is_bounded));
    candidates.has_prompt_bounds = has_prompt_bounds;
    for at in &candidates.decode {
        let Some(partner) = slot_of(*at).map(Partner::of) else { continue };
        if partner.group.is_some() {
            let any = Partner { group: None, ..partner };
            candidates.partners.entry(any).or_default().push(*at);
        }
        candidates.partners.entry(partner).or_default().push(*at);
    }
    Some(Arc::new(candidates))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoints::table::tests::{Fixture, endpoint};
    use proptest::prelude::*;

    #[test]
    fn roles_and_models_decide_who_is_a_candidate() {
        let mut down = endpoint(5, Role::Decode, &["m"]);
        down.state = State::Draining;
        let fixture = Fixture::new(vec![
            endpoint(1, Role::Prefill, &["m"]),
            endpoint(2, Role::Decode, &["m", "n"]),
            endpoint(3, Role::Both, &[]),
            endpoint(4, Role::Decode, &["n"]),
            down,
        ]);
        let m = fixture.table.candidates("m").unwrap();
        assert_eq!((fixture.ports(&m.prefill), fixture.ports(&m.decode)), (vec![1], vec![2]));
        assert_eq!((fixture.ports(&m.whole), fixture.ports(&m.compute)), (vec![2, 3], vec![1, 3]));
        let n = fixture.table.candidates("n").unwrap();
        assert_eq!((fixture.ports(&n.decode), fixture.ports(&n.whole)), (vec![2, 4], vec![2, 3, 4]));
        assert_eq!(fixture.ports(&fixture.table.candidates("other").unwrap().whole), [3]);
        assert_eq!(fixture.table.model_names(), ["m", "n"]);
        assert_eq!(fixture.table.all_ready().len(), 4);
    }

    #[test]
    fn a_prefill_endpoint_whose_group_cannot_generate_is_no_candidate() {
        let grouped = |port, role, group: &str| Endpoint { group: Some(group.into()), ..endpoint(port, role, &[]) };
        let mut down = grouped(4, Role::Decode, "b");
        down.state = State::Draining;
        let fixture = Fixture::new(vec![
            grouped(1, Role::Prefill, "a"),
            grouped(2, Role::Prefill, "b"),
            grouped(3, Role::Decode, "a"),
            down,
            endpoint(5, Role::Prefill, &[]),
        ]);
        assert_eq!(fixture.ports(&fixture.table.candidates("m").unwrap().prefill), [1, 5]);
    }

    #[test]
    fn prompts_go_to_endpoints_whose_bounds_have_room_while_there_are_some() {
        let bounded = |port, role, min, max| Endpoint {
            min_prompt_tokens: min,
            max_prompt_tokens: max,
            ..endpoint(port, role, &[])
        };
        let fixture = Fixture::new(vec![
            bounded(1, Role::Prefill, None, Some(2_000)),
            bounded(2, Role::Prefill, Some(2_000), Some(8_000)),
            bounded(3, Role::Decode, None, Some(8_000)),
            bounded(4, Role::Both, Some(2_001), None),
        ]);
        let candidates = fixture.table.candidates("m").unwrap();
        let sets = |tokens: f64| {
            let Candidates { prefill, decode, whole, compute, partners, .. } =
                &*Arc::clone(&candidates).for_prompt(tokens, &fixture.table);
            let partners = partners.values().next().unwrap();
            [prefill, decode, whole, compute, partners].map(|set| fixture.ports(set))
        };
        assert_eq!(sets(100.0), [vec![1], vec![3], vec![3], vec![1], vec![3]]);
        assert_eq!(sets(2_000.0), [vec![1, 2], vec![3], vec![3], vec![1, 2], vec![3]]);
        assert_eq!(sets(5_000.0), [vec![2], vec![3], vec![3, 4], vec![2, 4], vec![3]]);
        // Of those that take a prefill leg or a decode leg nobody has room, so all are candidates.
        assert_eq!(sets(1e9), [vec![1, 2], vec![3], vec![4], vec![4], vec![3]]);
        let unbounded = Fixture::new(vec![endpoint(1, Role::Both, &[])]);
        let candidates = unbounded.table.candidates("m").unwrap();
        assert!(Arc::ptr_eq(&Arc::clone(&candidates).for_prompt(1.0, &unbounded.table), &candidates));
    }

    proptest! {
        #[test]
        fn a_set_keeps_those_with_room_or_all(list in prop::collection::vec((0_u8..3, 0_u64..4, 0_u64..4), 1..12), tokens in 0.0..6.0) {
            let endpoints = (1_u16..).zip(&list).map(|(port, (role, min, over))| Endpoint {
                min_prompt_tokens: Some(*min).filter(|min| *min > 0),
                max_prompt_tokens: Some(min + over).filter(|_| *over < 3),
                ..endpoint(port, [Role::Prefill, Role::Decode, Role::Both][usize::from(*role)], &[])
            });
            let fixture = Fixture::new(endpoints.collect());
            let takes = |at: &EndpointIndex| fixture.table.get(*at).unwrap().endpoint.takes_prompt(tokens);
            let before = fixture.table.candidates("m").unwrap();
            let after = Arc::clone(&before).for_prompt(tokens, &fixture.table);
            let (mut before, mut after) = (Candidates::clone(&before), Candidates::clone(&after));
            for (set, kept) in before.sets().into_iter().zip(after.sets()) {
                let fitting: Vec<_> = set.iter().copied().filter(takes).collect();
                prop_assert_eq!(kept, if fitting.is_empty() { set } else { &fitting });
            }
        }
    }
}
