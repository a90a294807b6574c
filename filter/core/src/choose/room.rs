//! What the queue needs to know of endpoints: the work that each has left, and what each holds of a prompt.

use core::time::Duration;

use crate::choose::prompt::Prompt;
use crate::choose::queue::{Held, PrefillEndpoint};
use crate::choose::scheduler::Scheduler;
use crate::choose::shortlist::HOLDERS;
use crate::endpoints::endpoint_state::EndpointState;
use crate::prefix::index::EndpointIndex;

impl Scheduler<'_> {
    /// Seconds until an endpoint has done its work; 0 or more. `waited` is the wait of the oldest waiting request.
    ///
    /// `waited` is subtracted from the work of other Envoys. An Envoy learns of the end of its own legs first, so
    /// without the subtraction one Envoy could always bind its own requests first. With it, a request that has waited
    /// as long as that work takes gets an endpoint at which this Envoy has nothing in flight.
    #[must_use]
    pub(crate) fn seconds_left(&self, state: &EndpointState, waited: Duration) -> f64 {
        state.own_seconds_left(self.now) + (state.elsewhere_seconds() - waited.as_secs_f64()).max(0.0)
    }

    /// Whether an endpoint has room for a prompt that has come now.
    #[must_use]
    pub(crate) fn has_room(&self, endpoint: EndpointIndex) -> bool {
        let state = self.table.get(endpoint);
        state.is_some_and(|state| self.seconds_left(state, Duration::ZERO) < self.pool.queue.lead.as_secs_f64())
    }

    /// The healthy ones of `among`, ordered by index; all of them where none is healthy.
    #[must_use]
    pub(crate) fn prefill_endpoints(&self, among: &[EndpointIndex], waited: Duration) -> Vec<PrefillEndpoint> {
        let endpoint = |index: EndpointIndex, state: &EndpointState| PrefillEndpoint {
            index,
            key: state.key,
            work: self.seconds_left(state, waited),
            cost: self.prefill_cost(state),
        };
        let states = || among.iter().filter_map(|index| Some((*index, self.table.get(*index)?)));
        let healthy = states().filter(|(_, state)| self.view().is_usable(state));
        let mut endpoints: Vec<PrefillEndpoint> = healthy.map(|(index, state)| endpoint(index, state)).collect();
        if endpoints.is_empty() {
            endpoints = states().map(|(index, state)| endpoint(index, state)).collect();
        }
        endpoints.sort_unstable_by_key(|endpoint| endpoint.index);
        endpoints.dedup_by_key(|endpoint| endpoint.index);
        endpoints
    }

    /// What these endpoints hold of a prompt. The endpoint of its session counts as holding all.
    #[must_use]
    pub(crate) fn held(&self, among: &[EndpointIndex], prompt: &Prompt) -> Vec<Held> {
        let is_among =
            |index: &EndpointIndex| self.table.get(*index).is_some_and(|state| self.view().is_among(among, state));
        let session = self.view().session_holder(among, prompt);
        let holders = self.index.holders(&prompt.hash.blocks, HOLDERS).into_iter().filter(is_among);
        let held = holders.filter(|index| session != Some(*index));
        let held = held.map(|endpoint| Held { endpoint, tokens: self.matched_tokens(endpoint, prompt) });
        session.map(|endpoint| Held { endpoint, tokens: prompt.tokens }).into_iter().chain(held).collect()
    }
}
