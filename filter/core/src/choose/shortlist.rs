//! Shortlist: the endpoints that a choice compares.
//!
//! Of many endpoints a choice compares the holders of the prefix, those that the prompt's key names, and a sample of the
//! others. The lowest of some tens of random queues is hardly longer than the lowest of all (Mitzenmacher 2001), so the
//! time of a choice stays flat.

use crate::choose::prompt::Prompt;
use crate::endpoints::endpoint_state::EndpointState;
use crate::endpoints::table::Table;
use crate::prefix::hash::rendezvous_weight;
use crate::prefix::index::{EndpointIndex, PrefixIndex};
use crate::time::Monotonic;

/// Number of least loaded endpoints on the shortlist, beside the holders of the prefix.
const LEAST_LOADED: usize = 4;
/// Most holders of the prefix on the shortlist.
pub(super) const HOLDERS: usize = 8;
/// Number of endpoints up to which all are looked at.
const ALL: usize = 64;
/// Of more endpoints: number of those whose keys follow the prompt's key. The rendezvous endpoint is one of them.
const NEIGHBOURS: usize = 8;
/// Of more endpoints: number of those in the sample. At a load of 70 % all of 24 are busy once in 5,000 requests.
const SAMPLE: usize = 24;

/// Endpoints that a choice compares.
pub(super) struct Shortlist<'a> {
    /// The endpoints. One may be there twice.
    pub(super) endpoints: Vec<(EndpointIndex, &'a EndpointState)>,
    /// The rendezvous endpoint of the prompt.
    pub(super) owner: Option<EndpointIndex>,
    /// Prefill legs in flight at each endpoint that may be chosen, on average; of many endpoints at a sample of them.
    pub(super) legs_each: f64,
}

/// What a choice looks at: the state of one worker at one time.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) table: &'a Table,
    pub(super) index: &'a PrefixIndex,
    pub(super) now: Monotonic,
}

impl<'a> View<'a> {
    /// The endpoint that served the prompt's session last, where it is among these.
    pub(super) fn session_holder(self, among: &[EndpointIndex], prompt: &Prompt) -> Option<EndpointIndex> {
        let holders = self.index.holders(prompt.session.as_slice(), HOLDERS);
        holders.into_iter().find(|index| self.table.get(*index).is_some_and(|state| self.is_among(among, state)))
    }

    /// The least loaded endpoints, the rendezvous endpoint, those that hold most of the prompt, and the endpoint of its
    /// session.
    pub(super) fn shortlist(self, among: &[EndpointIndex], prompt: &Prompt, tried: &[EndpointIndex]) -> Shortlist<'a> {
        let usable = self.usable(among, prompt, tried);
        let legs_each = legs_each(&usable);
        let any_healthy = usable.first().is_some_and(|(_, state)| self.is_usable(state));
        let weight = |state: &EndpointState| rendezvous_weight(prompt.key, state.key);
        let owner = match among.len() > ALL {
            true => {
                self.healthy(&self.neighbours(among, prompt), tried).into_iter().max_by_key(|(_, state)| weight(state))
            }
            false => usable.iter().copied().max_by_key(|(_, state)| weight(state)),
        };
        let mut least: Vec<_> =
            usable.into_iter().map(|(index, state)| (state.work(self.now), !weight(state), (index, state))).collect();
        let order = |a: &(f64, u64, _), b: &(f64, u64, _)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
        if least.len() > LEAST_LOADED {
            least.select_nth_unstable_by(LEAST_LOADED, order);
            least.truncate(LEAST_LOADED);
        }
        let holders = self.index.holders(&prompt.hash.blocks, HOLDERS).into_iter();
        let holders = holders.chain(self.session_holder(among, prompt)).filter_map(|index| {
            let state = self.table.get(index)?;
            let may_serve = if any_healthy { self.is_usable(state) } else { !state.health.is_excluded(self.now) };
            let fits = self.is_among(among, state) && !tried.contains(&index) && may_serve;
            fits.then_some((index, state))
        });
        let endpoints = least.into_iter().map(|(.., of)| of).chain(owner).chain(holders).collect();
        Shortlist { endpoints, owner: owner.map(|(index, _)| index), legs_each }
    }

    pub(super) fn is_usable(self, state: &EndpointState) -> bool {
        state.health.is_usable(self.now)
    }

    /// Whether an endpoint is among candidates, which are sorted by key.
    pub(super) fn is_among(self, among: &[EndpointIndex], state: &EndpointState) -> bool {
        among.binary_search_by_key(&Some(state.key), |index| self.table.get(*index).map(|state| state.key)).is_ok()
    }

    /// Endpoints that may be chosen: the healthy ones that were not tried, else all that were not tried. Of many endpoints
    /// it is a sample, unless no endpoint of the sample is healthy.
    pub(super) fn usable(
        self,
        among: &[EndpointIndex],
        prompt: &Prompt,
        tried: &[EndpointIndex],
    ) -> Vec<(EndpointIndex, &'a EndpointState)> {
        if among.len() > ALL {
            let part = self.healthy(&self.sample(among, prompt), tried);
            if !part.is_empty() {
                return part;
            }
        }
        let all = self.healthy(among, tried);
        if !all.is_empty() {
            return all;
        }
        let untried = among.iter().filter(|index| !tried.contains(index));
        let states = untried.filter_map(|index| Some((*index, self.table.get(*index)?)));
        states.filter(|(_, state)| !state.health.is_excluded(self.now)).collect()
    }

    fn healthy(self, among: &[EndpointIndex], tried: &[EndpointIndex]) -> Vec<(EndpointIndex, &'a EndpointState)> {
        let untried = among.iter().filter(|index| !tried.contains(index));
        let states = untried.filter_map(|index| Some((*index, self.table.get(*index)?)));
        states.filter(|(_, state)| self.is_usable(state)).collect()
    }

    /// A sample of many endpoints: the neighbours of the prompt's key, and every n-th endpoint, starting at a place that
    /// differs from request to request. Candidates are sorted by a hash, so the sample is random.
    fn sample(self, among: &[EndpointIndex], prompt: &Prompt) -> Vec<EndpointIndex> {
        let mut sample = self.neighbours(among, prompt);
        let step = among.len().div_ceil(SAMPLE);
        let salt = rendezvous_weight(prompt.hash.head, self.now.as_nanos()) as usize >> 8;
        let places = (0..SAMPLE).map(|i| salt.saturating_add(i.saturating_mul(step)));
        sample.extend(places.filter_map(|place| among.get(place.checked_rem(among.len())?)));
        sample.sort_unstable();
        sample.dedup();
        sample
    }

    /// Endpoints whose keys follow the prompt's key. Every worker of every Envoy finds the same ones.
    fn neighbours(self, among: &[EndpointIndex], prompt: &Prompt) -> Vec<EndpointIndex> {
        let key_of = |index: &EndpointIndex| self.table.get(*index).map(|state| state.key);
        let first = among.partition_point(|index| key_of(index) < Some(prompt.key));
        among.iter().cycle().skip(first).take(NEIGHBOURS.min(among.len())).copied().collect()
    }
}

/// Prefill legs in flight at each of these endpoints, on average; 0 where there is none.
pub(super) fn legs_each(endpoints: &[(EndpointIndex, &EndpointState)]) -> f64 {
    endpoints.iter().map(|(_, state)| state.prefill_legs()).sum::<f64>() / endpoints.len().max(1) as f64
}
