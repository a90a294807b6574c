//! The endpoint table: the pushed list, each endpoint's state, and what was fitted of its pools.

use core::net::SocketAddr;
use std::sync::Arc;

use hashbrown::{HashMap, HashSet};

use crate::config::{Config, Cost, Pool};
use crate::endpoints::candidates::{CandidateSets, Candidates, NoCandidates};
use crate::endpoints::elsewhere::{Fleet, Totals};
use crate::endpoints::endpoint_state::Slot;
use crate::endpoints::fitted_cost::Fit;
use crate::endpoints::health::Health;
use crate::endpoints::load::{Load, PrefillQueue};
use crate::endpoints::usage::Usage;
use crate::prefix::index::{EndpointIndex, PrefixIndex};
use crate::time::Monotonic;
use crate::wire::{Endpoint, EndpointId, Snapshot};

/// Names an endpoint beyond its life: an index whose endpoint left the list does not resolve any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointRef {
    /// Place in the table.
    pub index: EndpointIndex,
    generation: u32,
    /// The endpoint's [`Slot::key`].
    pub(crate) key: u64,
}

/// The pushed list and its state.
#[derive(Debug, Default)]
pub struct Table {
    slots: Vec<Option<Slot>>,
    free: Vec<EndpointIndex>,
    by_id: HashMap<EndpointId, EndpointIndex>,
    /// Every endpoint by [`Slot::key`], as of the last rebuild, and behind them those that came since.
    by_key: Vec<(u64, EndpointIndex)>,
    fits: Vec<(String, Fit)>,
    sets: CandidateSets,
    generation: u32,
    epoch: String,
    version: u64,
    /// What other Envoys have in flight, by [`Slot::key`], whether it is in the list or not.
    elsewhere: HashMap<u64, Totals>,
    /// The Envoys that there are.
    pub fleet: Fleet,
}

/// What a snapshot did to the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// The table is now at the snapshot's version.
    Changed,
    /// It was there already (or, for a change, beyond it).
    Unchanged,
    /// The snapshot builds on a version that the table does not have: ask for the whole list.
    OutOfStep,
    /// A whole but empty list: the last good one stays in force.
    Empty,
}

impl Table {
    /// Applies a [validated](Snapshot::validate) snapshot. Endpoints that did not change keep their state.
    pub fn apply(&mut self, snapshot: &Snapshot, config: &Config, index: &mut PrefixIndex) -> Applied {
        let same_epoch = snapshot.epoch == self.epoch;
        match snapshot.base {
            None if same_epoch && snapshot.version == self.version => return Applied::Unchanged,
            None if snapshot.endpoints.is_empty() && !self.by_id.is_empty() => return Applied::Empty,
            None => {
                let listed: HashSet<EndpointId> = snapshot.endpoints.iter().map(Endpoint::id).collect();
                let gone: Vec<EndpointId> = self.by_id.keys().filter(|id| !listed.contains(*id)).copied().collect();
                for id in gone {
                    self.remove(id, index);
                }
            }
            Some(_) if same_epoch && snapshot.version <= self.version => return Applied::Unchanged,
            Some(base) if !same_epoch || base != self.version => return Applied::OutOfStep,
            Some(_) => {
                for id in snapshot.removed.iter().filter_map(|id| id.parse().ok()) {
                    self.remove(id, index);
                }
            }
        }
        for endpoint in &snapshot.endpoints {
            self.upsert(endpoint, config, index);
        }
        self.epoch.clone_from(&snapshot.epoch);
        self.version = snapshot.version;
        self.rebuild();
        for (key, totals) in core::mem::take(&mut self.elsewhere) {
            self.busy_elsewhere(key, totals);
        }
        Applied::Changed
    }

    /// Other Envoys have so much more in flight at the endpoint with this [`Slot::key`].
    pub(crate) fn busy_elsewhere(&mut self, key: u64, by: Totals) {
        let sum = self.elsewhere.entry(key).or_default();
        *sum = sum.plus(by);
        let sum = *sum;
        if sum == Totals::default() {
            self.elsewhere.remove(&key);
        }
        if let Some(slot) = self.by_key(key) {
            slot.elsewhere = sum;
        }
    }

    /// Epoch and version in force; `("", 0)` before the first list.
    #[must_use]
    pub fn version(&self) -> (&str, u64) {
        (&self.epoch, self.version)
    }

    /// The whole list in force, as a snapshot.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            wire: crate::wire::WIRE_VERSION,
            epoch: self.epoch.clone(),
            version: self.version,
            base: None,
            endpoints: self.iter().map(|(_, slot)| slot.endpoint.clone()).collect(),
            removed: Vec::new(),
        }
    }

    /// Endpoints to choose from for a model.
    ///
    /// # Errors
    /// [`NoCandidates`] says whether the model is unknown or everything is down.
    pub fn candidates(&self, model: &str) -> Result<Arc<Candidates>, NoCandidates> {
        match self.sets.of_model(model) {
            Some(candidates) if !candidates.is_empty() => Ok(Arc::clone(candidates)),
            None if !self.by_id.is_empty() => Err(NoCandidates::UnknownModel),
            _ => Err(NoCandidates::NoEndpoint),
        }
    }

    /// Models that endpoints name, sorted.
    #[must_use]
    pub fn model_names(&self) -> Vec<&str> {
        self.sets.model_names()
    }

    /// Whether every endpoint says which models it serves.
    #[must_use]
    pub fn names_all_models(&self) -> bool {
        self.sets.names_all_models()
    }

    /// Every ready endpoint, whatever its pool, role and models, sorted by [`Slot::key`].
    #[must_use]
    pub fn all_ready(&self) -> &[EndpointIndex] {
        self.sets.all_ready()
    }

    /// Endpoints in the table.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether the table has no endpoint.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// The endpoint at a place that a set of candidates names.
    #[must_use]
    pub fn get(&self, index: EndpointIndex) -> Option<&Slot> {
        self.slots.get(index as usize)?.as_ref()
    }

    /// As [`get`](Self::get), to change its state.
    pub fn get_mut(&mut self, index: EndpointIndex) -> Option<&mut Slot> {
        self.slots.get_mut(index as usize)?.as_mut()
    }

    /// A name for the endpoint that stays right when the list changes.
    #[must_use]
    pub fn refer(&self, index: EndpointIndex) -> Option<EndpointRef> {
        self.get(index).map(|slot| EndpointRef { index, generation: slot.generation, key: slot.key })
    }

    /// The endpoint, if it is still the one that was [referred](Self::refer) to.
    pub fn resolve(&mut self, reference: EndpointRef) -> Option<&mut Slot> {
        self.get_mut(reference.index).filter(|slot| slot.generation == reference.generation)
    }

    /// Places, empty ones included: every [`EndpointIndex`] is below that.
    #[must_use]
    pub(crate) fn places(&self) -> usize {
        self.slots.len()
    }

    /// The endpoint with this [`Slot::key`].
    #[must_use]
    pub(crate) fn index_of_key(&self, key: u64) -> Option<EndpointIndex> {
        let at = self.by_key.partition_point(|(other, _)| *other < key);
        self.by_key.get(at).filter(|(found, _)| *found == key).map(|(_, index)| *index)
    }

    /// The endpoint with this [`Slot::key`].
    pub(crate) fn by_key(&mut self, key: u64) -> Option<&mut Slot> {
        self.get_mut(self.index_of_key(key)?)
    }

    /// The endpoint with this name.
    #[must_use]
    pub fn find(&self, id: EndpointId) -> Option<EndpointIndex> {
        self.by_id.get(&id).copied()
    }

    /// All endpoints.
    pub fn iter(&self) -> impl Iterator<Item = (EndpointIndex, &Slot)> {
        (0..).zip(&self.slots).filter_map(|(index, slot)| Some((index, slot.as_ref()?)))
    }

    /// Prefill seconds of an endpoint's pool, as fitted so far.
    #[must_use]
    pub fn cost(&self, slot: &Slot) -> Option<Cost> {
        self.fits.get(slot.fit).map(|(_, fit)| fit.cost())
    }

    /// Bytes per token of a pool's prompts, as learnt so far.
    #[must_use]
    pub fn bytes_per_token(&self, pool: &str) -> Option<f64> {
        self.fits().find(|(name, _)| *name == pool).map(|(_, fit)| fit.bytes_per_token())
    }

    /// What was learnt of each pool.
    pub fn fits(&self) -> impl Iterator<Item = (&str, &Fit)> {
        self.fits.iter().map(|(name, fit)| (name.as_str(), fit))
    }

    /// Gauges of the pools of which anything was learnt: name with the pool as a tag, value.
    pub fn fitted_gauges(&self) -> impl Iterator<Item = (String, u64)> {
        let fits = self.fits().filter(|(_, fit)| fit.observations() > 0);
        fits.flat_map(|(pool, fit)| {
            // Envoy and the tags' syntax take less than a pool's name may have.
            let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '_' };
            let pool: String = pool.chars().map(plain).collect();
            fit.gauges().map(|(name, value)| (format!("{name};pool={pool}"), value))
        })
    }

    /// A prefill leg of an endpoint ended well: what it tells of its pool. `tokens` and `cached` are what was thought of
    /// the prompt, `bytes` what it has, `seconds` what the endpoint took, where that is known.
    pub fn saw_prefill(
        &mut self,
        reference: EndpointRef,
        (bytes, tokens, cached): (f64, f64, f64),
        seconds: Option<f64>,
        usage: Option<Usage>,
    ) {
        let Some(slot) = self.get(reference.index).filter(|slot| slot.generation == reference.generation) else {
            return;
        };
        let (at, weight) = (slot.fit, slot.endpoint.weight);
        let Some((_, fit)) = self.fits.get_mut(at) else { return };
        let n = usage.map_or(tokens, |usage| usage.prompt_tokens as f64);
        if usage.is_some() {
            fit.saw_text(bytes, n);
        }
        // A match is a guess, and where most of a prompt matches, a small error of it is a large one of the rest.
        let guess = Some(cached).filter(|cached| cached * 8.0 <= tokens);
        let p = usage.and_then(|usage| usage.cached_tokens).map(|cached| cached as f64).or(guess);
        if let (Some(p), Some(seconds)) = (p, seconds) {
            fit.saw_prefill(n, p, seconds * weight);
        }
    }

    /// Fits caches to the bytes per token that were learnt since they were [last](Self::apply) measured.
    pub fn resize_caches(&self, config: &Config, index: &mut PrefixIndex) {
        for (at, slot) in self.iter() {
            let units = self.cache_units(slot, config);
            // Small changes would only drop what is still there.
            if index.capacity(at).abs_diff(units) > units / 16 {
                index.set_capacity(at, units);
            }
        }
    }

    /// Size of an endpoint's cache in blocks of the smallest size.
    fn cache_units(&self, slot: &Slot, config: &Config) -> usize {
        let pool = config.pool(&slot.endpoint.pool);
        let bytes_per_token = self.fits.get(slot.fit).map_or(pool.bytes_per_token, |(_, fit)| fit.bytes_per_token());
        let tokens = slot.endpoint.cache_tokens.unwrap_or(pool.cache_tokens);
        (tokens as f64 * bytes_per_token / config.prefix.block_bytes as f64) as usize
    }

    /// Place of a pool's fit.
    fn fit_of(&mut self, name: &str, pool: &Pool) -> usize {
        match self.fits.iter().position(|(known, _)| known == name) {
            Some(at) => at,
            None => {
                self.fits.push((name.to_owned(), Fit::new(pool)));
                self.fits.len().saturating_sub(1)
            }
        }
    }

    /// Drops ledger entries whose end was never told.
    pub fn prune(&mut self, now: Monotonic) {
        for slot in self.slots.iter_mut().flatten() {
            slot.prefill.prune(now);
            slot.health.prune(now);
        }
    }

    fn upsert(&mut self, endpoint: &Endpoint, config: &Config, index: &mut PrefixIndex) {
        let pool = config.pool(&endpoint.pool);
        let fit = self.fit_of(&endpoint.pool, pool);
        let engine = endpoint.engine.unwrap_or(pool.engine);
        let bootstrap_port = endpoint.bootstrap_port.unwrap_or(pool.bootstrap_port);
        let bootstrap = SocketAddr::new(endpoint.address.ip(), bootstrap_port);
        let at = match self.by_id.get(&endpoint.id()).copied() {
            Some(at) => {
                if let Some(slot) = self.get_mut(at) {
                    slot.endpoint.clone_from(endpoint);
                    if (slot.engine, slot.bootstrap) != (engine, bootstrap) {
                        slot.engine_id = None;
                    }
                    slot.engine = engine;
                    slot.bootstrap = bootstrap;
                    slot.fit = fit;
                }
                at
            }
            None => {
                let next = EndpointIndex::try_from(self.slots.len());
                let Some(at) = self.free.pop().or(next.ok()) else { return };
                if at as usize == self.slots.len() {
                    self.slots.push(None);
                }
                self.generation = self.generation.wrapping_add(1);
                let key = xxhash_rust::xxh3::xxh3_64(endpoint.id().to_string().as_bytes());
                self.by_key.push((key, at));
                let slot = Slot {
                    endpoint: endpoint.clone(),
                    address: endpoint.address.to_string().into(),
                    key,
                    engine,
                    bootstrap,
                    engine_id: None,
                    is_kv_missing: false,
                    kv_doubts: 0,
                    prefill: PrefillQueue::default(),
                    decode: Load::default(),
                    elsewhere: Totals::default(),
                    health: Health::default(),
                    generation: self.generation,
                    fit,
                };
                if let Some(place) = self.slots.get_mut(at as usize) {
                    *place = Some(slot);
                }
                self.by_id.insert(endpoint.id(), at);
                at
            }
        };
        if let Some(slot) = self.get(at) {
            index.set_capacity(at, self.cache_units(slot, config));
        }
    }

    fn remove(&mut self, id: EndpointId, index: &mut PrefixIndex) {
        let Some(at) = self.by_id.remove(&id) else { return };
        if let Some(slot) = self.slots.get_mut(at as usize) {
            *slot = None;
            self.free.push(at);
        }
        index.remove_endpoint(at);
    }

    /// Sorts the endpoints and makes the sets of candidates from them.
    fn rebuild(&mut self) {
        let slots = &self.slots;
        let slot_of = |index: EndpointIndex| slots.get(index as usize)?.as_ref();
        self.by_key.retain(|(key, index)| slot_of(*index).is_some_and(|slot| slot.key == *key));
        // Stable, so a list with a few new ones at its end is sorted in one pass.
        self.by_key.sort();
        self.by_key.dedup();
        let sorted: Vec<_> = self.by_key.iter().filter_map(|(_, index)| Some((*index, slot_of(*index)?))).collect();
        self.sets = CandidateSets::new(&sorted, slot_of);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::prefix::hash::BlockHash;
    use crate::wire::{Role, State};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    pub(crate) fn endpoint(port: u16, role: Role, models: &[&str]) -> Endpoint {
        let models = models.iter().map(|model| (*model).to_owned()).collect();
        Endpoint { models, ..Endpoint::new(([10, 0, 0, 1], port).into(), role) }
    }

    pub(crate) fn whole(version: u64, endpoints: Vec<Endpoint>) -> Snapshot {
        Snapshot { wire: 1, epoch: "e".into(), version, base: None, endpoints, removed: vec![] }
    }

    pub(crate) struct Fixture {
        pub(crate) table: Table,
        index: PrefixIndex,
        config: Config,
    }

    impl Fixture {
        pub(crate) fn new(endpoints: Vec<Endpoint>) -> Self {
            let mut new =
                Self { table: Table::default(), index: PrefixIndex::new(1 << 20), config: Config::parse(b"").unwrap() };
            assert_eq!(new.apply(&whole(1, endpoints)), Applied::Changed);
            new
        }

        pub(crate) fn apply(&mut self, snapshot: &Snapshot) -> Applied {
            self.table.apply(snapshot, &self.config, &mut self.index)
        }

        pub(crate) fn ports(&self, indexes: &[EndpointIndex]) -> Vec<u16> {
            let mut ports: Vec<u16> =
                indexes.iter().map(|at| self.table.get(*at).unwrap().endpoint.address.port()).collect();
            ports.sort_unstable();
            ports
        }
    }

    #[test]
    fn candidates_are_in_the_order_of_their_keys_whoever_came_first() {
        let ports = 1..40;
        let named = |port: u16| endpoint(port, Role::Both, if port.is_multiple_of(3) { &["m"] } else { &[] });
        let mut fixture = Fixture::new(ports.clone().map(named).collect());
        let change = |version, removed: &[u16], added: Vec<u16>| Snapshot {
            base: Some(version - 1),
            removed: removed.iter().map(|port| named(*port).id().to_string()).collect(),
            ..whole(version, added.into_iter().map(named).collect())
        };
        fixture.apply(&change(2, &[3, 7, 9], vec![]));
        fixture.apply(&change(3, &[], vec![9, 60, 61]));
        for model in ["m", "other"] {
            let candidates = fixture.table.candidates(model).unwrap();
            let key = |at: &EndpointIndex| fixture.table.get(*at).unwrap().key;
            assert!(candidates.whole.is_sorted_by_key(key));
            let mut all = candidates.whole.clone();
            all.dedup();
            assert_eq!(all.len(), if model == "m" { 39 - 3 + 3 } else { 39 - 13 - 1 + 1 });
        }
    }

    #[test]
    fn an_unknown_model_and_a_model_that_is_down_differ() {
        let mut down = endpoint(1, Role::Decode, &["m"]);
        down.state = State::Down;
        let fixture = Fixture::new(vec![down, endpoint(2, Role::Decode, &["n"])]);
        assert_eq!(fixture.table.candidates("m"), Err(NoCandidates::NoEndpoint));
        assert_eq!(fixture.table.candidates("x"), Err(NoCandidates::UnknownModel));
        assert_eq!(Table::default().candidates("m"), Err(NoCandidates::NoEndpoint));
    }

    #[test]
    fn endpoints_that_stay_keep_their_state() {
        let (a, b) = (endpoint(1, Role::Both, &[]), endpoint(2, Role::Both, &[]));
        let mut fixture = Fixture::new(vec![a.clone(), b.clone()]);
        let at = fixture.table.find(a.id()).unwrap();
        fixture.table.get_mut(at).unwrap().decode.add(7);
        fixture.index.insert(at, &[BlockHash(1)]);
        let kept = fixture.table.refer(at).unwrap();
        let left = fixture.table.refer(fixture.table.find(b.id()).unwrap()).unwrap();
        let c = endpoint(3, Role::Both, &[]);
        assert_eq!(fixture.apply(&whole(2, vec![c.clone(), Endpoint { weight: 2.0, ..a.clone() }])), Applied::Changed);
        assert_eq!(fixture.table.resolve(kept).unwrap().decode.tokens, 7);
        assert_eq!(fixture.table.resolve(kept).unwrap().endpoint.weight, 2.0);
        assert_eq!(fixture.index.matched(at, &[BlockHash(1)]), 1);
        assert!(fixture.table.resolve(left).is_none(), "its place was taken by another endpoint");
        assert_eq!(fixture.table.len(), 2);
    }

    #[test]
    fn versions_decide_what_is_applied() {
        let (a, b) = (endpoint(1, Role::Both, &[]), endpoint(2, Role::Both, &[]));
        let mut fixture = Fixture::new(vec![a.clone()]);
        assert_eq!(fixture.apply(&whole(1, vec![b.clone()])), Applied::Unchanged);
        let change = |base, version| Snapshot { base: Some(base), ..whole(version, vec![b.clone()]) };
        assert_eq!(fixture.apply(&change(5, 6)), Applied::OutOfStep);
        assert_eq!(fixture.apply(&change(1, 2)), Applied::Changed);
        assert_eq!(fixture.apply(&change(1, 2)), Applied::Unchanged);
        assert_eq!(fixture.apply(&Snapshot { epoch: "f".into(), ..change(2, 3) }), Applied::OutOfStep);
        assert_eq!(fixture.table.len(), 2);
        assert_eq!(fixture.apply(&Snapshot { epoch: "f".into(), ..whole(1, vec![]) }), Applied::Empty);
        assert_eq!(fixture.table.len(), 2, "an empty list leaves the last good one in force");
        assert_eq!(fixture.apply(&Snapshot { epoch: "f".into(), ..whole(1, vec![b]) }), Applied::Changed);
        assert_eq!(fixture.table.len(), 1);
        assert_eq!(fixture.table.version(), ("f", 1));
    }

    proptest! {
        #[test]
        fn changes_lead_to_the_same_table_as_the_whole_list(lists in prop::collection::vec(prop::collection::btree_map(1_u16..12, 0_u8..3, 1..8), 1..8)) {
            let make = |list: &BTreeMap<u16, u8>| -> Vec<Endpoint> {
                let role = |n: &u8| [Role::Prefill, Role::Decode, Role::Both][*n as usize];
                list.iter().map(|(port, n)| endpoint(*port, role(n), if port % 2 == 0 { &["m"] } else { &[] })).collect()
            };
            let mut fixture = Fixture::new(make(&lists[0]));
            for (version, pair) in (2..).zip(lists.windows(2)) {
                let (before, after) = (make(&pair[0]), make(&pair[1]));
                let change = Snapshot {
                    base: Some(version - 1),
                    removed: before.iter().filter(|old| !after.iter().any(|new| new.id() == old.id())).map(|old| old.id().to_string()).collect(),
                    ..whole(version, after.iter().filter(|new| !before.contains(new)).cloned().collect())
                };
                fixture.apply(&change);
                let rebuilt = Fixture::new(after);
                for model in ["m", "other"] {
                    let sorted = |fixture: &Fixture| {
                        fixture.table.candidates(model).map(|set| (fixture.ports(&set.prefill), fixture.ports(&set.decode)))
                    };
                    prop_assert_eq!(sorted(&fixture), sorted(&rebuilt));
                }
            }
        }
    }
}
