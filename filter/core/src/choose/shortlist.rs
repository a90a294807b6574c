//! Shortlist: the endpoints that a choice looks at.
//!
//! Of many endpoints not all are looked at: the holders of the prefix always, then those that the prompt's key names and
//! a sample of the others. The lowest of some tens of random queues is hardly longer than the lowest of all
//! (Mitzenmacher 2001), so the cost of a choice stays flat.

use crate::choose::scheduler::{Prompt, Scheduler};
use crate::endpoints::endpoint_state::Slot;
use crate::prefix::hash::rendezvous_weight;
use crate::prefix::index::EndpointIndex;

/// Least-loaded endpoints that are costed exactly, beside the holders of the prefix.
const LEAST_LOADED: usize = 4;
/// Holders of the prefix that are costed.
pub(super) const HOLDERS: usize = 8;
/// Endpoints up to which all are looked at.
const ALL: usize = 64;
/// Of more endpoints, those that the prompt's key names: neighbours in the order of their keys, one of which owns it.
const NEIGHBOURS: usize = 8;
/// Of more endpoints, those taken at random: at a load of 70 % all of 24 are busy once in 5,000 requests.
const SAMPLE: usize = 24;
impl Scheduler<'_> {
    /// The endpoint that served the prompt's session last.
    pub(super) fn session_holder(&self, among: &[EndpointIndex], prompt: &Prompt) -> Option<EndpointIndex> {
        let holders = self.index.holders(prompt.session.as_slice(), HOLDERS);
        holders.into_iter().find(|at| self.table.get(*at).is_some_and(|slot| self.is_among(among, slot)))
    }

    /// Endpoints that are worth costing, and the one that owns the prompt's key: the least loaded, the owner, and those
    /// that hold most of the prompt.
    pub(super) fn shortlist(
        &self,
        among: &[EndpointIndex],
        prompt: &Prompt,
        tried: &[EndpointIndex],
    ) -> (Vec<(EndpointIndex, &Slot)>, Option<EndpointIndex>) {
        let usable = self.usable(among, prompt, tried);
        let any_healthy = usable.first().is_some_and(|(_, slot)| self.is_usable(slot));
        let weight = |slot: &Slot| rendezvous_weight(prompt.key, slot.key);
        let owner = match among.len() > ALL {
            true => {
                self.healthy(&self.neighbours(among, prompt), tried).into_iter().max_by_key(|(_, slot)| weight(slot))
            }
            false => usable.iter().copied().max_by_key(|(_, slot)| weight(slot)),
        };
        let mut least: Vec<_> =
            usable.into_iter().map(|(at, slot)| (slot.work(self.now), !weight(slot), (at, slot))).collect();
        let order = |a: &(f64, u64, _), b: &(f64, u64, _)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
        if least.len() > LEAST_LOADED {
            least.select_nth_unstable_by(LEAST_LOADED, order);
            least.truncate(LEAST_LOADED);
        }
        let holders = self.index.holders(&prompt.hash.blocks, HOLDERS).into_iter();
        let holders = holders.chain(self.session_holder(among, prompt)).filter_map(|at| {
            let slot = self.table.get(at)?;
            let fits = self.is_among(among, slot) && !tried.contains(&at) && (!any_healthy || self.is_usable(slot));
            fits.then_some((at, slot))
        });
        let shortlist = least.into_iter().map(|(.., of)| of).chain(owner).chain(holders).collect();
        (shortlist, owner.map(|(at, _)| at))
    }

    pub(super) fn is_usable(&self, slot: &Slot) -> bool {
        slot.health.is_usable(self.now)
    }

    /// Whether candidates, which are in the order of their keys, have this endpoint.
    pub(super) fn is_among(&self, among: &[EndpointIndex], slot: &Slot) -> bool {
        among.binary_search_by_key(&Some(slot.key), |at| self.table.get(*at).map(|slot| slot.key)).is_ok()
    }

    /// Endpoints that may be chosen: the healthy ones that were not tried, or all that were not tried if none is. Of many
    /// a part, unless nobody in it is healthy.
    pub(super) fn usable(
        &self,
        among: &[EndpointIndex],
        prompt: &Prompt,
        tried: &[EndpointIndex],
    ) -> Vec<(EndpointIndex, &Slot)> {
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
        let untried = among.iter().filter(|at| !tried.contains(at));
        untried.filter_map(|at| Some((*at, self.table.get(*at)?))).collect()
    }

    fn healthy(&self, among: &[EndpointIndex], tried: &[EndpointIndex]) -> Vec<(EndpointIndex, &Slot)> {
        let untried = among.iter().filter(|at| !tried.contains(at));
        let slots = untried.filter_map(|at| Some((*at, self.table.get(*at)?)));
        slots.filter(|(_, slot)| self.is_usable(slot)).collect()
    }

    /// Some of many endpoints: the neighbours of the prompt's key, and every n-th of all from a place that differs from
    /// request to request. Keys are hashes, so that is a random sample.
    fn sample(&self, among: &[EndpointIndex], prompt: &Prompt) -> Vec<EndpointIndex> {
        let mut sample = self.neighbours(among, prompt);
        let step = among.len().div_ceil(SAMPLE);
        let salt = rendezvous_weight(prompt.hash.head, self.now.as_nanos()) as usize >> 8;
        let places = (0..SAMPLE).map(|i| salt.saturating_add(i.saturating_mul(step)));
        sample.extend(places.filter_map(|place| among.get(place.checked_rem(among.len())?)));
        sample.sort_unstable();
        sample.dedup();
        sample
    }

    /// Endpoints whose keys follow the prompt's, which every worker and replica finds alike.
    fn neighbours(&self, among: &[EndpointIndex], prompt: &Prompt) -> Vec<EndpointIndex> {
        let key_of = |at: &EndpointIndex| self.table.get(*at).map(|slot| slot.key);
        let first = among.partition_point(|at| key_of(at) < Some(prompt.key));
        among.iter().cycle().skip(first).take(NEIGHBOURS.min(among.len())).copied().collect()
    }
}
