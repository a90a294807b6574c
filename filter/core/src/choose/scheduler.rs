//! The scheduler: which endpoint serves each leg.
//!
//! - **Prefill**, in this file: the endpoint with the lowest W + w·S. W are the seconds of work ahead of the prompt, S the
//!   seconds of the prompt itself, given what the endpoint holds. Where there are endpoints of several revisions, each
//!   [pairing's](crate::endpoints::pairings) best endpoint is compared, and a pairing that got more than its share counts as
//!   more expensive.
//! - **Decode**, in [`decode_profile`](super::decode_profile): the endpoint of the conversation, inside a load bound; else
//!   the [cheapest](super::decode_cost) by assigned KV tokens and by the tokens to move.
//! - **Split or whole**, in [`decider`](super::decider).
//! - Ties and unseen prompts go by rendezvous hash, which is the same at every worker of every Envoy.
//!
//! Of many endpoints a choice compares a [shortlist](super::shortlist).

use crate::choose::prompt::Prompt;
use crate::choose::shortlist::View;
use crate::choose::weight::affinity_weight;
use crate::config::{Cost, Pool};
use crate::endpoints::candidates::Candidates;
use crate::endpoints::endpoint_state::EndpointState;
use crate::endpoints::pairings::Pairing;
use crate::endpoints::table::Table;
use crate::prefix::hash::{prefix_units, rendezvous_weight};
use crate::prefix::index::{EndpointIndex, PrefixIndex};
use crate::time::Monotonic;
use crate::wire::Role;

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

    /// The endpoint with the lowest W + w·S among `among` without those in `tried`; `None` where none is left. Where no
    /// endpoint is healthy, it picks among all: a pool is never ejected as a whole.
    #[must_use]
    pub fn pick_by_cost(&self, among: &[EndpointIndex], prompt: &Prompt, tried: &[EndpointIndex]) -> Option<Pick> {
        self.cheapest(among, prompt, tried).map(|(best, _)| best.pick)
    }

    /// The endpoint for a prefill leg; `None` where none is left. `among` are the candidates' prefill endpoints, with
    /// aggregated ones or without.
    ///
    /// It differs from [`pick_by_cost`](Self::pick_by_cost) in two points:
    /// - A pairing that got more than its share of the load counts as more expensive.
    /// - Pairings without a healthy endpoint on both sides come last.
    #[must_use]
    pub fn pick_prefill(
        &self,
        candidates: &Candidates,
        among: &[EndpointIndex],
        prompt: &Prompt,
        tried: &[EndpointIndex],
    ) -> Option<Pick> {
        self.cost_prefill(candidates, among, prompt, tried).map(|best| best.pick)
    }

    /// As [`pick_prefill`](Self::pick_prefill), with the cost of the pick.
    pub(super) fn cost_prefill(
        &self,
        candidates: &Candidates,
        among: &[EndpointIndex],
        prompt: &Prompt,
        tried: &[EndpointIndex],
    ) -> Option<CostedPick> {
        if candidates.pairings.is_empty() {
            return self.cheapest(among, prompt, tried).map(|(best, _)| best);
        }
        let mut best: Option<(bool, f64, u64, CostedPick)> = None;
        let mut compare = |is_failing: bool, (found, weight): (CostedPick, u64), price: f64| {
            let cost = found.cost + price;
            let better = |(failing, lowest, other, _): &(bool, f64, u64, CostedPick)| {
                is_failing.cmp(failing).then(cost.total_cmp(lowest)).then(other.cmp(&weight)).is_lt()
            };
            if best.as_ref().is_none_or(better) {
                best = Some((is_failing, cost, weight, found));
            }
        };
        let is_healthy =
            |index: &EndpointIndex| self.table.get(*index).is_some_and(|state| self.view().is_usable(state));
        for pairing in &candidates.pairings {
            let Some(found) = self.cheapest(&pairing.prefill, prompt, tried) else { continue };
            let takes_over = candidates.partners(&pairing.partner).iter().any(is_healthy);
            compare(
                !(takes_over && is_healthy(&found.0.pick.endpoint)),
                found,
                self.price(candidates, pairing, found.0),
            );
        }
        let is_aggregated =
            |index: &&EndpointIndex| self.table.get(**index).is_some_and(|state| state.endpoint.role == Role::Both);
        let aggregated: Vec<_> = among.iter().filter(is_aggregated).copied().collect();
        if let Some(found) = self.cheapest(&aggregated, prompt, tried) {
            compare(!is_healthy(&found.0.pick.endpoint), found, 0.0);
        }
        best.map(|(.., found)| found)
    }

    /// Weighted seconds that a pairing counts as more expensive, because it got more than its share; below 0: cheaper.
    fn price(&self, candidates: &Candidates, pairing: &Pairing, found: CostedPick) -> f64 {
        let (Some(given), Some(state)) = (self.table.given(&candidates.pool), self.table.get(found.pick.endpoint))
        else {
            return 0.0;
        };
        let cost = self.prefill_cost(state);
        given.price(pairing.key, found.weight, |tokens| cost.seconds(tokens, 0.0))
    }

    /// The endpoint with the lowest W + w·S, and its rendezvous weight.
    fn cheapest(&self, among: &[EndpointIndex], prompt: &Prompt, tried: &[EndpointIndex]) -> Option<(CostedPick, u64)> {
        let shortlist = self.view().shortlist(among, prompt, tried);
        let session = self.view().session_holder(among, prompt);
        let mut best: Option<(CostedPick, u64)> = None;
        for (index, state) in shortlist.endpoints {
            let claims = (shortlist.owner == Some(index), session == Some(index));
            let found = self.cost(index, state, prompt, claims, shortlist.legs_each);
            let rendezvous = rendezvous_weight(prompt.key, state.key);
            let better = |(lowest, weight): &(CostedPick, u64)| (found.cost, *weight) < (lowest.cost, rendezvous);
            if best.as_ref().is_none_or(better) {
                best = Some((found, rendezvous));
            }
        }
        best
    }

    /// The pick of one given endpoint, whatever its load is.
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

    /// W + w·S of an endpoint. `owner` is the rendezvous endpoint, `session` the endpoint that served the session last.
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
        legs_each: f64,
    ) -> CostedPick {
        let pick = self.pick(index, prompt);
        let mut held = pick.matched_tokens;
        if session {
            held = prompt.tokens;
        } else if owner && prompt.is_unseen {
            held += self.rendezvous_share() * (prompt.tokens - held).max(0.0);
        }
        let own = self.seconds(state, prompt, held);
        let weight = self.weight(state, legs_each);
        CostedPick { pick, weight, cost: state.work(self.now) + weight * own }
    }

    /// w of W + w·S at an endpoint: as configured, else by what is in flight.
    pub(super) fn weight(&self, state: &EndpointState, legs_each: f64) -> f64 {
        self.pool.affinity_weight.unwrap_or_else(|| affinity_weight(state.prefill_legs(), legs_each))
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
