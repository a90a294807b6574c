//! Candidates: the sets of endpoints that a model's requests choose from.

use std::collections::BTreeMap;
use std::sync::Arc;

use hashbrown::{HashMap, HashSet};

use crate::endpoints::endpoint_state::EndpointState;
use crate::endpoints::pairings::{Pairing, Partner, pairings};
use crate::prefix::index::EndpointIndex;
use crate::wire::{Endpoint, Engine, Role, State};

/// Candidates of one model: ready endpoints of one pool that serve it. Each set is sorted by [`EndpointState::key`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Candidates {
    /// Name of the pool, whose policy applies.
    pub pool: Arc<str>,
    /// Endpoints of role `prefill`, without those that have no decode endpoint of their engine, group and revision: no
    /// endpoint could take over from these.
    pub prefill: Vec<EndpointIndex>,
    /// Endpoints of role `decode`.
    pub decode: Vec<EndpointIndex>,
    /// Endpoints that can serve a whole request: those of role `both`, and decode endpoints whose engine computes a prompt
    /// by itself.
    pub whole: Vec<EndpointIndex>,
    /// Endpoints that can compute a long prompt: those of `prefill`, and those of role `both`.
    pub compute: Vec<EndpointIndex>,
    /// The decode endpoints, by what they have in common with prefill endpoints.
    pub(crate) partners: HashMap<Partner, Vec<EndpointIndex>>,
    /// Decode endpoints that drain, in the same way. Where no other endpoint can, they take over prompts whose prefill leg
    /// was sent before they began to drain.
    pub(crate) leaving: HashMap<Partner, Vec<EndpointIndex>>,
    /// The draining decode endpoints, from which `leaving` is made.
    pub(crate) draining: Vec<EndpointIndex>,
    /// The prefill endpoints by pairing, where the load has to follow [shares](super::pairings); else empty.
    pub(crate) pairings: Vec<Pairing>,
    /// Whether any endpoint has bounds for the length of a prompt.
    pub(crate) has_prompt_bounds: bool,
}

/// Why a model has no candidates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoCandidates {
    /// No endpoint that serves the model is ready, or the list is empty.
    NoEndpoint,
    /// The list has endpoints, but none of them serves the model.
    UnknownModel,
}

/// The candidates of every model.
#[derive(Debug, Default)]
pub(super) struct CandidateSets {
    models: HashMap<String, Arc<Candidates>>,
    any_model: Option<Arc<Candidates>>,
    /// Whether an endpoint that names no models may serve any.
    is_open: bool,
    without_model: Vec<EndpointIndex>,
}

impl CandidateSets {
    /// The sets of these endpoints, which are sorted by [`EndpointState::key`].
    ///
    /// - A model belongs to one pool. Where endpoints of several pools serve it, its pool is the first one by name that can
    ///   generate.
    /// - An endpoint that names no models is left out while a ready endpoint of its pool does the same work and names its
    ///   models. If the endpoint's empty list is closed, it serves any model.
    /// - Any other endpoint that names no models serves every model of its pool, and models that no endpoint names.
    pub(super) fn new<'a>(
        sorted: &[(EndpointIndex, &'a EndpointState)],
        state_of: impl Fn(EndpointIndex) -> Option<&'a EndpointState>,
    ) -> Self {
        let mut named: BTreeMap<&str, BTreeMap<&str, Candidates>> = BTreeMap::new();
        let mut unnamed: BTreeMap<&str, Candidates> = BTreeMap::new();
        let (mut generating, mut prefilling) = (Vec::new(), Vec::new());
        let work = |endpoint: &'a Endpoint| (endpoint.pool.as_str(), endpoint.role == Role::Prefill);
        let names = |state: &&EndpointState| !state.endpoint.models.is_empty() && state.endpoint.state == State::Ready;
        let named_work: HashSet<_> =
            sorted.iter().map(|(_, of)| *of).filter(names).map(|of| work(&of.endpoint)).collect();
        let mut is_open = false;
        for (index, of) in sorted {
            let Endpoint { pool, models, role, state, .. } = &of.endpoint;
            let ready = *state == State::Ready;
            if ready {
                if *role == Role::Prefill { &mut prefilling } else { &mut generating }.push(*index);
            }
            for model in models {
                named.entry(model).or_default().entry(pool).or_default().push(*index, *role, of.engine, *state);
            }
            if models.is_empty() && (of.endpoint.models_closed || !named_work.contains(&work(&of.endpoint))) {
                is_open |= !of.endpoint.models_pending;
                unnamed.entry(pool).or_default().push(*index, *role, of.engine, *state);
            }
        }
        let models = named
            .into_iter()
            .filter_map(|(model, mut pools)| {
                for (pool, candidates) in &mut pools {
                    if let Some(others) = unnamed.get(pool) {
                        candidates.extend(others);
                        let key = |index: &EndpointIndex| state_of(*index).map(|state| state.key);
                        candidates.sets().into_iter().for_each(|set| set.sort_by_key(key));
                        candidates.draining.sort_by_key(key);
                    }
                }
                Some((model.to_owned(), first_that_generates(pools, &state_of)?))
            })
            .collect();
        let without_model = if generating.is_empty() { prefilling } else { generating };
        Self { models, any_model: first_that_generates(unnamed, &state_of), is_open, without_model }
    }

    /// The candidates of a model; `None` where no endpoint serves it. The sets may be empty.
    pub(super) fn of_model(&self, model: &str) -> Option<&Arc<Candidates>> {
        self.models.get(model).or(self.any_model.as_ref())
    }

    /// Models that endpoints name, sorted.
    pub(super) fn model_names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.models.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Whether an endpoint names the model.
    pub(super) fn names(&self, model: &str) -> bool {
        self.models.contains_key(model)
    }

    /// Whether endpoints name models, and no endpoint may serve a model that none names.
    pub(super) fn names_all_models(&self) -> bool {
        !self.is_open && !self.models.is_empty()
    }

    /// Endpoints for requests that name no model: every ready endpoint of any pool that does more than prefill; without any
    /// such endpoint, every ready one. Sorted by [`EndpointState::key`].
    pub(super) fn without_model(&self) -> &[EndpointIndex] {
        &self.without_model
    }
}

impl Candidates {
    /// Whether no endpoint takes any leg.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.prefill.is_empty() && !self.can_generate()
    }

    fn can_generate(&self) -> bool {
        !self.decode.is_empty() || !self.whole.is_empty()
    }

    fn push(&mut self, index: EndpointIndex, role: Role, engine: Engine, state: State) {
        if state == State::Draining && role == Role::Decode {
            self.draining.push(index);
        }
        if state != State::Ready {
            return;
        }
        match role {
            Role::Prefill => self.prefill.push(index),
            Role::Decode => self.decode.push(index),
            Role::Both => {}
        }
        if role == Role::Both || (role == Role::Decode && engine.protocol().decodes_alone) {
            self.whole.push(index);
        }
        if role != Role::Decode {
            self.compute.push(index);
        }
    }

    fn extend(&mut self, others: &Self) {
        for (set, more) in
            self.sets().into_iter().zip([&others.prefill, &others.decode, &others.whole, &others.compute])
        {
            set.extend(more);
        }
        self.draining.extend(&others.draining);
    }

    /// Keeps in every set the endpoints for which `stays` is true, and of the prefill endpoints only those that still have a
    /// partner. A set may become empty. `state_of` looks an endpoint up in the table.
    pub fn retain<'a>(
        &mut self,
        stays: impl Fn(EndpointIndex) -> bool,
        state_of: impl Fn(EndpointIndex) -> Option<&'a EndpointState>,
    ) {
        self.sets().into_iter().for_each(|set| set.retain(|index| stays(*index)));
        let of_partners = self.partners.values_mut().chain(self.leaving.values_mut());
        of_partners.for_each(|set| set.retain(|index| stays(*index)));
        self.drop_those_without_partner(&state_of);
        self.pairings = pairings(&self.prefill, &self.decode, &self.partners, &state_of);
    }

    /// The candidates with the prefill endpoints of one pairing only; `None` where there is no such pairing.
    #[must_use]
    pub(crate) fn of_pairing(self: &Arc<Self>, key: u64) -> Option<Arc<Self>> {
        let pairing = self.pairings.iter().find(|pairing| pairing.key == key)?;
        let mut some = Self::clone(self);
        some.prefill.clone_from(&pairing.prefill);
        some.compute.retain(|index| pairing.prefill.contains(index) || !self.prefill.contains(index));
        some.pairings.clear();
        Some(Arc::new(some))
    }

    /// Drops the prefill endpoints from which no decode endpoint could take over. Without any decode endpoint all stay.
    fn drop_those_without_partner<'a>(&mut self, state_of: &impl Fn(EndpointIndex) -> Option<&'a EndpointState>) {
        if self.decode.is_empty() {
            return;
        }
        let Self { prefill, compute, partners, .. } = self;
        let has_partner = |index: &EndpointIndex| {
            state_of(*index).is_some_and(|state| {
                let mine = partners.get(&Partner::of(state));
                state.endpoint.role == Role::Both || mine.is_some_and(|partners| !partners.is_empty())
            })
        };
        prefill.retain(has_partner);
        compute.retain(has_partner);
    }

    /// Keeps in each set the endpoints for which `takes` is true; a set without such an endpoint stays whole. It passes over
    /// all candidates, unless no endpoint has bounds.
    #[must_use]
    pub(super) fn with_room(self: Arc<Self>, takes: impl Fn(&EndpointIndex) -> bool) -> Arc<Self> {
        if !self.has_prompt_bounds {
            return self;
        }
        let mut rest = Self::clone(&self);
        let keep = |set: &mut Vec<EndpointIndex>| {
            if set.iter().any(&takes) {
                set.retain(&takes);
            }
        };
        rest.sets().into_iter().for_each(keep);
        rest.partners.values_mut().for_each(keep);
        for pairing in &mut rest.pairings {
            pairing.prefill.retain(|index| rest.prefill.contains(index));
        }
        rest.pairings.retain(|pairing| !pairing.prefill.is_empty());
        Arc::new(rest)
    }

    /// Endpoints for requests with a model and without a prompt: those that generate; without any, those that prefill.
    #[must_use]
    pub fn without_prompt(&self) -> &[EndpointIndex] {
        let sets = [&self.whole, &self.decode, &self.prefill];
        sets.into_iter().find(|set| !set.is_empty()).map_or(&[], Vec::as_slice)
    }

    /// The decode endpoints that can take over from a prefill endpoint; empty where there is none.
    #[must_use]
    pub fn partners(&self, of: &Partner) -> &[EndpointIndex] {
        self.partners.get(of).map_or(&[], Vec::as_slice)
    }

    /// Decode endpoints that drain and could take over from a prefill endpoint.
    #[must_use]
    pub fn leaving_partners(&self, of: &Partner) -> &[EndpointIndex] {
        self.leaving.get(of).map_or(&[], Vec::as_slice)
    }

    fn sets(&mut self) -> [&mut Vec<EndpointIndex>; 4] {
        [&mut self.prefill, &mut self.decode, &mut self.whole, &mut self.compute]
    }
}

fn first_that_generates<'a>(
    pools: BTreeMap<&str, Candidates>,
    state_of: &impl Fn(EndpointIndex) -> Option<&'a EndpointState>,
) -> Option<Arc<Candidates>> {
    let generating = pools.iter().find(|(_, candidates)| candidates.can_generate());
    let (pool, candidates) = generating.or_else(|| pools.iter().next())?;
    let mut candidates = Candidates { pool: (*pool).into(), ..candidates.clone() };
    let is_bounded = |index: &EndpointIndex| state_of(*index).is_some_and(|state| state.endpoint.has_prompt_bounds());
    let has_prompt_bounds = candidates.sets().into_iter().any(|set| set.iter().any(is_bounded));
    candidates.has_prompt_bounds = has_prompt_bounds;
    candidates.partners = by_partner(&candidates.decode, state_of);
    candidates.leaving = by_partner(&core::mem::take(&mut candidates.draining), state_of);
    candidates.drop_those_without_partner(state_of);
    candidates.pairings = pairings(&candidates.prefill, &candidates.decode, &candidates.partners, state_of);
    Some(Arc::new(candidates))
}

/// Decode endpoints by the prefill endpoints that they can take over from.
fn by_partner<'a>(
    decode: &[EndpointIndex],
    state_of: &impl Fn(EndpointIndex) -> Option<&'a EndpointState>,
) -> HashMap<Partner, Vec<EndpointIndex>> {
    let mut partners: HashMap<Partner, Vec<EndpointIndex>> = HashMap::new();
    for index in decode {
        let Some(partner) = state_of(*index).map(Partner::of) else { continue };
        if partner.group.is_some() {
            let any = Partner { group: None, ..partner.clone() };
            partners.entry(any).or_default().push(*index);
        }
        partners.entry(partner).or_default().push(*index);
    }
    partners
}

#[cfg(test)]
mod tests;
