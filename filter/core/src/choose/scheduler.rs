//! The scheduler: which endpoint serves each leg.
//!
//! - **Prefill**, in this file: the endpoint with the lowest W + w·S. W are the seconds of work ahead of the prompt, S the
//!   seconds of the prompt itself, given what the endpoint holds.
//! - **Decode**, in [`decode_profile`](super::decode_profile): the endpoint of the conversation, inside a load bound; else
//!   the [cheapest](super::decode_cost) by assigned KV tokens and by the tokens to move.
//! - **Split or whole**, in [`decider`](super::decider).
//! - Ties and unseen prompts go by rendezvous hash, which every worker of every Envoy computes alike.
//!
//! Of many endpoints a choice compares a [shortlist](super::shortlist).

use crate::choose::prompt::Prompt;
use crate::choose::shortlist::{Legs, View};
use crate::choose::weight::affinity_weight;
use crate::config::{Cost, Pool};
use crate::endpoints::endpoint_state::EndpointState;
use crate::endpoints::table::Table;
use crate::prefix::hash::{prefix_units, rendezvous_weight};
use crate::prefix::index::{EndpointIndex, PrefixIndex};
use crate::time::Monotonic;

/// A chosen endpoint, and what the choice expects of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pick {
    /// The endpoint.
    pub endpoint: EndpointIndex,
    /// Tokens of the prompt that the endpoint holds, by the index; 0 or more.
    pub matched_tokens: f64,
    /// S: seconds that the endpoint needs for the prompt.
    pub seconds: f64,
}

/// An endpoint that may be chosen, and what the choice compares.
#[derive(Clone, Copy, Debug)]
pub(super) struct CostedPick {
    pub(super) pick: Pick,
    /// W + w·S, weighted seconds.
    pub(super) cost: f64,
    /// w.
    pub(super) weight: f64,
}

/// β where no other Envoy exchanges. In the trace simulator four Envoys that do not exchange keep their hits with it.
const NO_EXCHANGE_SHARE: f64 = 0.6;

/// What the scheduler reads: the state of one worker, and the policy of one pool.
#[derive(Clone, Copy)]
pub struct Scheduler<'a> {
    /// Endpoints.
    pub table: &'a Table,
    /// Which endpoint holds which blocks.
    pub index: &'a PrefixIndex,
    /// The pool's policy.
    pub pool: &'a Pool,
    /// Monotonic time.
    pub now: Monotonic,
}

impl<'a> Scheduler<'a> {
    pub(super) fn view(&self) -> View<'a> {
        View { table: self.table, index: self.index, now: self.now }
    }

    /// The endpoint with the lowest W + w·S among these, without those that were `tried`. Where no endpoint is healthy it
    /// picks among all: a pool is never ejected as a whole. `None` where there is none left.
    #[must_use]
    pub fn pick_by_cost(&self, among: &[EndpointIndex], prompt: &Prompt, tried: &[EndpointIndex]) -> Option<Pick> {
        let shortlist = self.view().shortlist(among, prompt, tried);
        let session = self.view().session_holder(among, prompt);
        let mut best: Option<(f64, u64, Pick)> = None;
        for (index, state) in shortlist.endpoints {
            let claims = (shortlist.owner == Some(index), session == Some(index));
            let CostedPick { pick, cost, .. } = self.cost(index, state, prompt, claims, &shortlist.legs);
            let rendezvous = rendezvous_weight(prompt.key, state.key);
            let better = |(lowest, weight, _): &(f64, u64, Pick)| (cost, *weight) < (*lowest, rendezvous);
            if best.as_ref().is_none_or(better) {
                best = Some((cost, rendezvous, pick));
            }
        }
        best.map(|(_, _, pick)| pick)
    }

    /// That endpoint, whatever it has to do.
    #[must_use]
    pub fn pick(&self, endpoint: EndpointIndex, prompt: &Prompt) -> Pick {
        let matched_tokens = self.matched_tokens(endpoint, prompt);
        let seconds = self.table.get(endpoint).map_or(0.0, |state| self.seconds(state, prompt, matched_tokens));
        Pick { endpoint, matched_tokens, seconds }
    }

    /// S: seconds that this endpoint needs for the prompt, of which it holds `held` tokens.
    fn seconds(&self, state: &EndpointState, prompt: &Prompt, held: f64) -> f64 {
        self.prefill_cost(state).seconds(prompt.tokens, held)
    }

    /// W + w·S of an endpoint; `owner`: it is the rendezvous endpoint, `session`: it served the session last.
    ///
    /// - An unseen prompt may have been routed by another Envoy, to the rendezvous endpoint. That endpoint counts as holding
    ///   the part β of the tokens that it lacks.
    /// - The endpoint of the session counts as holding all: a session stays where it was, until w times the prompt's seconds
    ///   wait there.
    pub(super) fn cost(
        &self,
        index: EndpointIndex,
        state: &EndpointState,
        prompt: &Prompt,
        (owner, session): (bool, bool),
        legs: &Legs,
    ) -> CostedPick {
        let pick = self.pick(index, prompt);
        let mut held = pick.matched_tokens;
        if session {
            held = prompt.tokens;
        } else if owner && prompt.is_unseen {
            held += self.rendezvous_share() * (prompt.tokens - held).max(0.0);
        }
        let own = self.seconds(state, prompt, held);
        let weight = self.weight(state, legs);
        CostedPick { pick, weight, cost: state.work(self.now) + weight * own }
    }

    /// w of W + w·S at an endpoint: as configured, else by what is in flight.
    pub(super) fn weight(&self, state: &EndpointState, legs: &Legs) -> f64 {
        self.pool.affinity_weight.unwrap_or_else(|| affinity_weight(legs.at(state), legs.each))
    }

    /// The prefill cost of an endpoint.
    pub(super) fn prefill_cost(&self, state: &EndpointState) -> Cost {
        let Cost { a, b, c } = self.table.cost(state).filter(|_| self.pool.fit).unwrap_or(self.pool.cost);
        let weight = state.endpoint.weight;
        Cost { a: a / weight, b: b / weight, c: c / weight }
    }

    /// β: as configured, or by the share of the other Envoys that do not exchange.
    fn rendezvous_share(&self) -> f64 {
        self.pool.rendezvous_share.unwrap_or_else(|| NO_EXCHANGE_SHARE * self.table.fleet.not_exchanging())
    }

    pub(super) fn matched_tokens(&self, endpoint: EndpointIndex, prompt: &Prompt) -> f64 {
        let units = prefix_units(self.index.matched(endpoint, &prompt.hash.blocks));
        (units as f64 * prompt.block_tokens).min(prompt.tokens)
    }
}

#[cfg(test)]
pub(super) mod tests;
