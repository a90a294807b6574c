//! How a snapshot changes the table. Endpoints that stay keep their state.

use core::net::SocketAddr;

use hashbrown::HashSet;

use super::{Applied, Table};
use crate::config::{Config, Pool};
use crate::endpoints::beliefs::Doubts;
use crate::endpoints::candidates::CandidateSets;
use crate::endpoints::departed::InFlight;
use crate::endpoints::endpoint_state::{EndpointState, FromPool};
use crate::endpoints::fitted_cost::FittedCost;
use crate::prefix::index::{EndpointIndex, PrefixIndex};
use crate::wire::{Endpoint, EndpointId, MAX_MODELS, Snapshot, State, Stated};

impl Table {
    /// Applies a [validated](Snapshot::validate) snapshot. Endpoints that stay keep their state. `prefixes` is the index of
    /// the same worker: it drops endpoints that leave, and gets the cache sizes of new ones.
    pub fn apply(&mut self, snapshot: &Snapshot, config: &Config, prefixes: &mut PrefixIndex) -> Applied {
        let same_epoch = snapshot.epoch == self.epoch;
        match snapshot.base {
            None if same_epoch && snapshot.version == self.version => return Applied::Unchanged,
            None if snapshot.endpoints.is_empty() && !self.by_id.is_empty() => return Applied::Empty,
            None => {
                let listed: HashSet<EndpointId> = snapshot.endpoints.iter().map(Endpoint::id).collect();
                let gone: Vec<EndpointId> = self.by_id.keys().filter(|id| !listed.contains(*id)).copied().collect();
                for id in gone {
                    self.remove(id, prefixes);
                }
            }
            Some(_) if same_epoch && snapshot.version <= self.version => return Applied::Unchanged,
            Some(base) if !same_epoch || base != self.version => return Applied::OutOfStep,
            Some(_) => {
                for id in snapshot.removed.iter().filter_map(|id| id.parse().ok()) {
                    self.remove(id, prefixes);
                }
            }
        }
        for endpoint in &snapshot.endpoints {
            self.upsert(endpoint, config, prefixes);
        }
        self.models.learn(&snapshot.models);
        match &snapshot.stated {
            Some(stated) => self.stated.clone_from(stated),
            None if snapshot.base.is_none() => self.stated = Stated::default(),
            None => {}
        }
        self.epoch.clone_from(&snapshot.epoch);
        self.version = snapshot.version;
        self.rebuild();
        for (key, totals) in core::mem::take(&mut self.elsewhere) {
            self.busy_elsewhere(key, totals);
        }
        Applied::Changed
    }

    /// Sets the size of each endpoint's cache in the index by the fitted bytes per token.
    pub fn resize_caches(&self, config: &Config, prefixes: &mut PrefixIndex) {
        for (index, state) in self.iter() {
            let units = self.cache_units(state, config);
            // For a small change no blocks are dropped that the endpoint may still hold.
            if prefixes.capacity(index).abs_diff(units) > units / 16 {
                prefixes.set_capacity(index, units);
            }
        }
    }

    /// Size of an endpoint's cache, in blocks of the smallest size.
    fn cache_units(&self, state: &EndpointState, config: &Config) -> usize {
        let pool = config.pool(&state.endpoint.pool);
        let bytes_per_token = self.fits.get(state.fit).map_or(pool.bytes_per_token, |(_, fit)| fit.bytes_per_token());
        let tokens = state.endpoint.cache_tokens.unwrap_or(pool.cache_tokens);
        (tokens as f64 * bytes_per_token / config.prefix.block_bytes as f64) as usize
    }

    /// Index of a pool's fitted cost. A new pool gets one.
    fn fit_of(&mut self, name: &str, pool: &Pool) -> usize {
        match self.fits.iter().position(|(known, _)| known == name) {
            Some(index) => index,
            None => {
                self.fits.push((name.to_owned(), FittedCost::new(pool)));
                self.fits.len().saturating_sub(1)
            }
        }
    }

    fn upsert(&mut self, endpoint: &Endpoint, config: &Config, prefixes: &mut PrefixIndex) {
        let pool = config.pool(&endpoint.pool);
        let bootstrap_port = endpoint.bootstrap_port.unwrap_or(pool.bootstrap_port);
        let from_pool = FromPool {
            engine: endpoint.engine.unwrap_or(pool.engine),
            bootstrap: SocketAddr::new(endpoint.address.ip(), bootstrap_port),
            fit: self.fit_of(&endpoint.pool, pool),
        };
        let known = self.by_id.get(&endpoint.id()).copied();
        if let Some(state) = known.and_then(|index| self.get_mut(index)) {
            let is_new_process = is_new_process(&state.endpoint, endpoint);
            if is_new_process || (state.engine, state.bootstrap) != (from_pool.engine, from_pool.bootstrap) {
                state.engine_id = None;
            }
            if is_new_process {
                state.doubts = Doubts::default();
            }
            if let Some(expired) = endpoint.expired_kv_leases
                && endpoint.expired_kv_leases != state.endpoint.expired_kv_leases
            {
                state.expired_kv_leases = expired as f64;
            }
            let before = core::mem::replace(&mut state.endpoint, endpoint.clone());
            // A source that does not know the process for a moment does not make it another one.
            let Endpoint { container, cache_epoch, .. } = &mut state.endpoint;
            *container = container.take().or_else(|| before.container.clone());
            *cache_epoch = cache_epoch.or(before.cache_epoch);
            keep_models(&mut state.endpoint, before);
            state.set(from_pool);
            if let Some(index) = known.filter(|_| is_new_process) {
                prefixes.forget(index);
            }
        }
        let Some(index) = known.or_else(|| self.add(endpoint, from_pool)) else { return };
        if let Some(state) = self.get(index) {
            prefixes.set_capacity(index, self.cache_units(state, config));
        }
    }

    /// Adds a new endpoint; `None` where there are too many.
    fn add(&mut self, endpoint: &Endpoint, from_pool: FromPool) -> Option<EndpointIndex> {
        let next = EndpointIndex::try_from(self.states.len());
        let index = self.free.pop().or(next.ok())?;
        if index as usize == self.states.len() {
            self.states.push(None);
        }
        self.generation = self.generation.wrapping_add(1);
        let key = endpoint.id().key();
        self.by_key.push((key, index));
        let state = EndpointState::new(endpoint.clone(), key, from_pool, self.departed.comes(key), self.generation);
        if let Some(place) = self.states.get_mut(index as usize) {
            *place = Some(state);
        }
        self.by_id.insert(endpoint.id(), index);
        Some(index)
    }

    fn remove(&mut self, id: EndpointId, prefixes: &mut PrefixIndex) {
        let Some(index) = self.by_id.remove(&id) else { return };
        if let Some(place) = self.states.get_mut(index as usize) {
            if let Some(EndpointState { key, prefill, decode, .. }) = place.take() {
                self.departed.left(key, InFlight { prefill, decode });
            }
            self.free.push(index);
        }
        prefixes.remove_endpoint(index);
    }

    /// Sorts the endpoints and makes the sets of candidates from them.
    fn rebuild(&mut self) {
        self.changes = self.changes.wrapping_add(1);
        let states = &self.states;
        let state_of = |index: EndpointIndex| states.get(index as usize)?.as_ref();
        self.by_key.retain(|(key, index)| state_of(*index).is_some_and(|state| state.key == *key));
        // The sort is stable and takes one pass over a sorted list with a few new endpoints at its end.
        self.by_key.sort();
        self.by_key.dedup();
        let sorted: Vec<_> = self.by_key.iter().filter_map(|(_, index)| Some((*index, state_of(*index)?))).collect();
        self.sets = CandidateSets::new(&sorted, state_of);
        self.models.serve(self.sets.model_names().into_iter());
    }
}

/// Whether the process behind an endpoint is a new one, so that its cache is empty. If no source names the process, an
/// endpoint that was down has a new one.
fn is_new_process(before: &Endpoint, now: &Endpoint) -> bool {
    let containers = before.container.as_ref().zip(now.container.as_ref()).map(|(before, now)| before == now);
    let caches = before.cache_epoch.zip(now.cache_epoch).map(|(before, now)| before == now);
    match (containers, caches) {
        (Some(false), _) | (_, Some(false)) => true,
        (Some(true), _) | (_, Some(true)) => false,
        (None, None) => before.state == State::Down && now.state == State::Ready,
    }
}

/// Keeps the known models of an endpoint while `pd-control` has yet to learn them again.
fn keep_models(endpoint: &mut Endpoint, before: Endpoint) {
    let is_same = before.pool == endpoint.pool && before.role == endpoint.role && before.engine == endpoint.engine;
    if !endpoint.models_pending || !is_same {
        return;
    }
    for model in before.models {
        if endpoint.models.len() < MAX_MODELS && !endpoint.models.contains(&model) {
            endpoint.models.push(model);
        }
    }
}
