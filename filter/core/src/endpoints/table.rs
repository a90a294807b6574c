//! The endpoint table: the list in force, each endpoint's state, and the fitted cost of each pool.

use std::sync::Arc;

use hashbrown::HashMap;

use crate::config::Cost;
use crate::endpoints::candidates::{CandidateSets, Candidates, NoCandidates};
use crate::endpoints::departed::{Departed, InFlight};
use crate::endpoints::elsewhere::{Fleet, Totals};
use crate::endpoints::endpoint_state::EndpointState;
use crate::endpoints::fitted_cost::{FittedCost, SeenPrefill};
use crate::endpoints::fitted_media::{CLASSES, MediaTokens};
use crate::endpoints::known_models::KnownModels;
use crate::endpoints::load::LedgerEntry;
use crate::endpoints::outliers::{ErrorClass, Leg, Peers};
use crate::endpoints::pairings::{Given, Partner};
use crate::endpoints::usage::Usage;
use crate::metrics::tag_value;
use crate::prefix::index::EndpointIndex;
use crate::time::Monotonic;
use crate::wire::{Endpoint, EndpointId, ModelCard, Snapshot, State, Stated};

mod apply;

/// Reference to an endpoint that survives changes of the list. Once the endpoint left the list, the reference does not
/// [resolve](Table::resolve), even if another endpoint has the same index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointRef {
    /// Index in the table.
    pub index: EndpointIndex,
    generation: u32,
    /// The endpoint's [`EndpointState::key`].
    pub(crate) key: u64,
}

/// The endpoint list in force, and the state of each endpoint.
#[derive(Debug, Default)]
pub struct Table {
    states: Vec<Option<EndpointState>>,
    free: Vec<EndpointIndex>,
    by_id: HashMap<EndpointId, EndpointIndex>,
    /// Every endpoint, sorted by [`EndpointState::key`] at the last rebuild; behind them those that came since.
    by_key: Vec<(u64, EndpointIndex)>,
    fits: Vec<(String, FittedCost)>,
    sets: CandidateSets,
    /// How far the pairings of each pool are ahead of their shares.
    given: HashMap<Arc<str>, Given>,
    models: KnownModels,
    /// Objectives and aliases of the list in force.
    stated: Stated,
    generation: u32,
    /// Generation before the first endpoint of this table.
    first_generation: u32,
    epoch: String,
    version: u64,
    /// What other Envoys have in flight, by [`EndpointState::key`], also at endpoints that are not in the list.
    elsewhere: HashMap<u64, Totals>,
    departed: Departed,
    /// Number of the Envoys that there are.
    pub fleet: Fleet,
    changes: u64,
}

/// Effect of a snapshot on the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// The table has the snapshot's version now.
    Changed,
    /// The table has the snapshot's version already; for a snapshot of changes, that version or a later one.
    Unchanged,
    /// The snapshot has the changes since a version that the table does not have. The whole list is needed.
    OutOfStep,
    /// The snapshot is a whole list without endpoints. The last good one stays in force.
    Empty,
}

/// Estimates of a prompt before its prefill leg.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PromptEstimate {
    /// Bytes of the prompt's JSON without media: an exact number.
    pub bytes: f64,
    /// Tokens of its media, as configured.
    pub media: MediaTokens,
    /// Tokens of the prompt.
    pub tokens: f64,
    /// Matched tokens at the endpoint.
    pub matched_tokens: f64,
}

impl Table {
    /// An empty table in place of this one. References to endpoints of this one do not [resolve](Self::resolve) there.
    #[must_use]
    pub fn successor(&self) -> Self {
        Self { generation: self.generation, first_generation: self.generation, ..Self::default() }
    }

    /// Whether a reference is to an endpoint that this table has or had.
    #[must_use]
    pub(crate) fn issued(&self, reference: EndpointRef) -> bool {
        reference.generation > self.first_generation
    }

    /// The ledger's entry of the endpoint with this [`EndpointState::key`]. The list may lack the endpoint.
    pub(crate) fn ledger_entry(&mut self, key: u64) -> LedgerEntry<'_> {
        match self.index_of_key(key).and_then(|index| self.states.get_mut(index as usize)?.as_mut()) {
            Some(state) => state.ledger_entry(),
            None => {
                let InFlight { prefill, decode } = self.departed.entry(key);
                LedgerEntry { prefill, decode, elsewhere_seconds: 0.0 }
            }
        }
    }

    /// Adds `by` to what other Envoys have in flight at the endpoint with this [`EndpointState::key`]. The list may lack the
    /// endpoint.
    pub(crate) fn busy_elsewhere(&mut self, key: u64, by: Totals) {
        let sum = self.elsewhere.entry(key).or_default();
        *sum = sum.plus(by);
        let sum = *sum;
        if sum == Totals::default() {
            self.elsewhere.remove(&key);
        }
        if let Some(state) = self.by_key(key) {
            state.elsewhere = sum;
        }
    }

    /// Epoch and version in force; `("", 0)` before the first list.
    #[must_use]
    pub fn version(&self) -> (&str, u64) {
        (&self.epoch, self.version)
    }

    /// Number of changes of the list. While it stays the same, candidates stay valid.
    #[must_use]
    pub(crate) fn changes(&self) -> u64 {
        self.changes
    }

    /// The whole list in force, as a snapshot.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            wire: crate::wire::WIRE_VERSION,
            epoch: self.epoch.clone(),
            version: self.version,
            base: None,
            endpoints: self.iter().map(|(_, state)| state.endpoint.clone()).collect(),
            removed: Vec::new(),
            models: self.models.cards(),
            stated: Some(&self.stated).filter(|stated| **stated != Stated::default()).cloned(),
        }
    }

    /// Objectives and aliases from objects of the Kubernetes cluster.
    #[must_use]
    pub fn stated(&self) -> &Stated {
        &self.stated
    }

    /// The candidates of a model.
    ///
    /// # Errors
    /// [`NoCandidates`]: why there are none.
    pub fn candidates(&self, model: &str) -> Result<Arc<Candidates>, NoCandidates> {
        match self.sets.of_model(model) {
            Some(candidates) if !candidates.is_empty() => Ok(Arc::clone(candidates)),
            None if !self.by_id.is_empty() && self.models.get(model).is_none() => Err(NoCandidates::UnknownModel),
            _ => Err(NoCandidates::NoEndpoint),
        }
    }

    /// Candidates whose bounds have room for a prompt of so many tokens. A set in which no endpoint has room stays whole.
    #[must_use]
    pub fn with_room(&self, candidates: Arc<Candidates>, tokens: f64) -> Arc<Candidates> {
        candidates.with_room(|index| self.get(*index).is_some_and(|state| state.endpoint.takes_prompt(tokens)))
    }

    /// The candidates of a model, also where none of them is ready: decode endpoints that drain may have to take over.
    #[must_use]
    pub(crate) fn listed_candidates(&self, model: &str) -> Option<Arc<Candidates>> {
        self.sets.of_model(model).map(Arc::clone)
    }

    /// Notes that a request of so many KV tokens is split, with its prefill leg at this endpoint.
    pub(crate) fn gave(&mut self, candidates: &Candidates, prefill: EndpointIndex, tokens: f64) {
        if candidates.pairings.is_empty() {
            self.given.remove(&candidates.pool);
        } else if let Some(key) = self.get(prefill).map(|state| Partner::of(state).key()) {
            let given = self.given.entry(Arc::clone(&candidates.pool)).or_default();
            given.add(&candidates.pairings, key, tokens);
        }
    }

    /// How far the pairings of a pool are ahead of their shares; `None` where shares do not count.
    #[must_use]
    pub(crate) fn given(&self, pool: &str) -> Option<&Given> {
        self.given.get(pool)
    }

    /// Models that endpoints name, sorted.
    #[must_use]
    pub fn model_names(&self) -> Vec<&str> {
        self.sets.model_names()
    }

    /// The card of a model that an endpoint serves or served; `None` for a name that no endpoint ever served.
    #[must_use]
    pub fn card(&self, model: &str) -> Option<&ModelCard> {
        self.models.get(model)
    }

    /// Most tokens of prompt and answer together that a model takes: its own length, else the length of its base model,
    /// because engines report none for an adapter. `None` where no engine reported it.
    #[must_use]
    pub fn model_len(&self, model: &str) -> Option<u64> {
        let card = self.card(model)?;
        card.max_model_len.or_else(|| self.card(card.parent.as_deref()?)?.max_model_len)
    }

    /// Whether an endpoint of the list names the model, ready or not.
    #[must_use]
    pub fn lists_model(&self, model: &str) -> bool {
        self.sets.names(model)
    }

    /// Whether no endpoint may serve a model that none names. Endpoints whose models `pd-control` has yet to learn do not
    /// count while others name theirs.
    #[must_use]
    pub fn names_all_models(&self) -> bool {
        self.sets.names_all_models()
    }

    /// Endpoints for requests that name no model: every ready endpoint of any pool that does more than prefill; without any
    /// such endpoint, every ready one. Sorted by [`EndpointState::key`].
    #[must_use]
    pub fn without_model(&self) -> &[EndpointIndex] {
        self.sets.without_model()
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

    /// The endpoint at an index; `None` where the index is free.
    #[must_use]
    pub fn get(&self, index: EndpointIndex) -> Option<&EndpointState> {
        self.states.get(index as usize)?.as_ref()
    }

    /// As [`get`](Self::get), to change the state.
    pub fn get_mut(&mut self, index: EndpointIndex) -> Option<&mut EndpointState> {
        self.states.get_mut(index as usize)?.as_mut()
    }

    /// A reference to the endpoint at an index, which survives changes of the list. `None` where the index is free.
    #[must_use]
    pub fn refer(&self, index: EndpointIndex) -> Option<EndpointRef> {
        self.get(index).map(|state| EndpointRef { index, generation: state.generation, key: state.key })
    }

    /// The endpoint that was [referred](Self::refer) to; `None` once it left the list.
    pub fn resolve(&mut self, reference: EndpointRef) -> Option<&mut EndpointState> {
        self.get_mut(reference.index).filter(|state| state.generation == reference.generation)
    }

    /// Number of indices, free ones included: every [`EndpointIndex`] is below it.
    #[must_use]
    pub(crate) fn places(&self) -> usize {
        self.states.len()
    }

    /// Index of the endpoint with this [`EndpointState::key`].
    #[must_use]
    pub(crate) fn index_of_key(&self, key: u64) -> Option<EndpointIndex> {
        let position = self.by_key.partition_point(|(other, _)| *other < key);
        self.by_key.get(position).filter(|(found, _)| *found == key).map(|(_, index)| *index)
    }

    /// The endpoint with this [`EndpointState::key`].
    pub(crate) fn by_key(&mut self, key: u64) -> Option<&mut EndpointState> {
        self.get_mut(self.index_of_key(key)?)
    }

    /// Index of the endpoint with this id.
    #[must_use]
    pub fn find(&self, id: EndpointId) -> Option<EndpointIndex> {
        self.by_id.get(&id).copied()
    }

    /// All endpoints, by index.
    pub fn iter(&self) -> impl Iterator<Item = (EndpointIndex, &EndpointState)> {
        (0..).zip(&self.states).filter_map(|(index, state)| Some((index, state.as_ref()?)))
    }

    /// Fitted prefill cost of an endpoint's pool.
    #[must_use]
    pub fn cost(&self, state: &EndpointState) -> Option<Cost> {
        self.fits.get(state.fit).map(|(_, fit)| fit.cost())
    }

    /// Fitted bytes per token of a pool's prompts; `None` where the pool never had an endpoint.
    #[must_use]
    pub fn bytes_per_token(&self, pool: &str) -> Option<f64> {
        self.fits().find(|(name, _)| *name == pool).map(|(_, fit)| fit.bytes_per_token())
    }

    /// Fitted factors on the tokens of a pool's media; `None` where the pool never had an endpoint.
    #[must_use]
    pub fn media_factors(&self, pool: &str) -> Option<[f64; CLASSES]> {
        self.fits().find(|(name, _)| *name == pool).map(|(_, fit)| fit.media_factors())
    }

    /// Fitted cost of each pool, by name.
    pub fn fits(&self) -> impl Iterator<Item = (&str, &FittedCost)> {
        self.fits.iter().map(|(name, fit)| (name.as_str(), fit))
    }

    /// [Gauges](FittedCost::gauges) of pools with observations: name with the pool as a tag, and value.
    pub fn fitted_gauges(&self) -> impl Iterator<Item = (String, u64)> {
        let fits = self.fits().filter(|(_, fit)| fit.observations() > 0);
        fits.flat_map(|(pool, fit)| {
            let pool = tag_value(pool);
            fit.gauges().map(|(name, value)| (format!("{name};pool={pool}"), value))
        })
    }

    /// Fits the pool's cost to a prefill leg that ended with success: to the `estimate` before it, the usage in its answer,
    /// and the `seconds` that the endpoint took, where they are known. If the endpoint left the list, nothing changes.
    pub fn saw_prefill(
        &mut self,
        reference: EndpointRef,
        estimate: PromptEstimate,
        seconds: Option<f64>,
        usage: Option<Usage>,
    ) {
        let Some(state) = self.get(reference.index).filter(|state| state.generation == reference.generation) else {
            return;
        };
        let (fit_index, weight) = (state.fit, state.endpoint.weight);
        let Some((_, fit)) = self.fits.get_mut(fit_index) else { return };
        let tokens = usage.map_or(estimate.tokens, |usage| usage.prompt_tokens as f64);
        if usage.is_some() && estimate.media.is_empty() {
            fit.saw_text(estimate.bytes, tokens);
        } else if usage.is_some() {
            fit.saw_media(&estimate.media, estimate.bytes, tokens);
        }
        // The matched tokens are an estimate. Where they are most of the prompt, a small error in them is a large one in the
        // rest.
        let guess = Some(estimate.matched_tokens).filter(|matched| matched * 8.0 <= estimate.tokens);
        let cached_tokens = usage.and_then(|usage| usage.cached_tokens).map(|cached| cached as f64).or(guess);
        if let (Some(cached_tokens), Some(seconds)) = (cached_tokens, seconds) {
            fit.saw_prefill(SeenPrefill { tokens, cached_tokens, seconds: seconds * weight });
        }
    }

    /// Sums over the peers of an endpoint. It passes over all endpoints.
    #[must_use]
    pub fn peers(&self, of: EndpointIndex, leg: Leg, class: ErrorClass) -> Peers {
        let mut peers = Peers::default();
        let Some(own) = self.get(of) else { return peers };
        let is_peer = |other: &EndpointState| {
            let (other, own) = (&other.endpoint, &own.endpoint);
            other.state == State::Ready && other.role == own.role && other.pool == own.pool
        };
        for (_, state) in self.iter().filter(|(index, state)| *index != of && is_peer(state)) {
            peers.add(&state.answers, leg, class, state.health.is_failing());
        }
        peers
    }

    /// Whether a [peer](Self::peers) of an endpoint has answered since then, as far as this worker knows.
    #[must_use]
    pub(crate) fn have_peers_answered(&self, of: EndpointIndex, since: Monotonic) -> bool {
        let Some(own) = self.get(of).map(|state| &state.endpoint) else { return false };
        let is_peer = |it: &Endpoint| it.state == State::Ready && it.role == own.role && it.pool == own.pool;
        self.iter().any(|(index, state)| index != of && is_peer(&state.endpoint) && state.answered_at > since)
    }

    /// Drops prefill legs that expired, and ends probes without an end.
    pub fn prune(&mut self, now: Monotonic) {
        for state in self.states.iter_mut().flatten() {
            state.prefill.prune(now);
            state.health.prune(now);
        }
        self.departed.prune(now);
    }
}

#[cfg(test)]
pub(super) mod tests;
