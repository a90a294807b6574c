//! The decode profile: which endpoint gets a decode leg, and which alternates it has.

use crate::choose::decode_cost::{DecodeCost, DecodeLoad};
use crate::choose::prompt::Prompt;
use crate::choose::scheduler::{Pick, Scheduler};
use crate::choose::shortlist::HOLDERS;
use crate::endpoints::endpoint_state::EndpointState;
use crate::endpoints::pairings::Partner;
use crate::prefix::hash::rendezvous_weight;
use crate::prefix::index::EndpointIndex;
use crate::time::Monotonic;
use crate::wire::Role;

impl Scheduler<'_> {
    /// The endpoint for a decode leg, and its alternates, those with the fewest assigned tokens first.
    ///
    /// It is the endpoint of the conversation, else the [cheapest](super::decode_cost). Endpoints in `tried` are left out.
    /// `None` where no endpoint is left.
    #[must_use]
    pub fn pick_decode(
        &self,
        among: &[EndpointIndex],
        prompt: &Prompt,
        tried: &[EndpointIndex],
    ) -> Option<(Pick, Vec<EndpointIndex>)> {
        let suited = self.view().usable(among, prompt, tried).into_iter();
        let mut ranked: Vec<Ranked> =
            suited.map(|(index, state)| Ranked::new(index, state, prompt, self.now)).collect();
        let first = self.choose_decode(&mut ranked, among, prompt, tried)?;
        // One header names the rank for the pick and its alternates, so all have the same rank.
        ranked.retain(|other| other.rank == first.rank && other.index != first.index);
        Some((self.pick(first.index, prompt), self.least(ranked)))
    }

    /// Chooses among `ranked`. Where `ranked` is a sample of many endpoints, it first adds the holders of the prompt.
    fn choose_decode(
        &self,
        ranked: &mut Vec<Ranked>,
        among: &[EndpointIndex],
        prompt: &Prompt,
        tried: &[EndpointIndex],
    ) -> Option<Ranked> {
        let session = self.view().session_holder(among, prompt);
        let holders = self.index.holders(&prompt.hash.blocks, HOLDERS).into_iter().chain(session);
        for index in holders.filter(|index| !tried.contains(index)) {
            let suited = self.table.get(index).filter(|state| self.view().is_among(among, state));
            let is_new = ranked.iter().all(|other| other.index != index);
            ranked.extend(
                suited
                    .filter(|state| is_new && self.view().is_usable(state))
                    .map(|state| Ranked::new(index, state, prompt, self.now)),
            );
        }
        // Of several endpoints with equal cost the first is chosen.
        ranked.sort_unstable_by_key(|ranked| ranked.tie);
        let load = |ranked: &Ranked| DecodeLoad {
            assigned: ranked.tokens,
            held: self.matched_tokens(ranked.index, prompt),
            work: ranked.work,
            is_session: session == Some(ranked.index),
        };
        let loads: Vec<DecodeLoad> = ranked.iter().map(load).collect();
        let cost = DecodeCost { stay: self.pool.decode_stay, ..DecodeCost::default() };
        ranked.get(cost.choose(prompt.tokens, &loads)?).copied()
    }

    /// Healthy alternates of an endpoint, those with the fewest assigned tokens first; empty where there is none.
    ///
    /// An alternate has the engine and the rank of the chosen endpoint, so the same request suits it. An alternate of a
    /// prefill endpoint hands over to the same decode endpoints.
    #[must_use]
    pub fn alternates(&self, among: &[EndpointIndex], prompt: &Prompt, chosen: EndpointIndex) -> Vec<EndpointIndex> {
        let Some(first) = self.table.get(chosen) else { return Vec::new() };
        let partner = (first.endpoint.role == Role::Prefill).then(|| Partner::of(first));
        let stands_in = |state: &EndpointState| {
            self.view().is_usable(state)
                && state.engine == first.engine
                && state.endpoint.rank == first.endpoint.rank
                && partner.as_ref().is_none_or(|partner| Partner::of(state) == *partner)
        };
        let others = self.view().usable(among, prompt, &[chosen]).into_iter().filter(|(_, state)| stands_in(state));
        self.least(others.map(|(index, state)| Ranked::new(index, state, prompt, self.now)).collect())
    }

    /// As many as the pool wants alternates, those with the fewest tokens first.
    fn least(&self, mut ranked: Vec<Ranked>) -> Vec<EndpointIndex> {
        let wanted = self.pool.alternates;
        if ranked.len() > wanted {
            ranked.select_nth_unstable_by(wanted, Ranked::order);
            ranked.truncate(wanted);
        }
        ranked.sort_unstable_by(Ranked::order);
        ranked.into_iter().map(|ranked| ranked.index).collect()
    }
}

/// Assigned KV tokens, divided by the endpoint's weight.
pub(super) fn decode_load(state: &EndpointState) -> f64 {
    state.decode_tokens() as f64 / state.endpoint.weight
}

/// An endpoint that could take a decode leg, with what it is compared by.
#[derive(Clone, Copy)]
struct Ranked {
    /// [`decode_load`].
    tokens: f64,
    /// Seconds of prompts that the endpoint computes itself.
    work: f64,
    /// Inverse of the rendezvous weight, for ties.
    tie: u64,
    /// Data-parallel rank.
    rank: Option<u32>,
    index: EndpointIndex,
}

impl Ranked {
    fn new(index: EndpointIndex, state: &EndpointState, prompt: &Prompt, now: Monotonic) -> Self {
        Self {
            tokens: decode_load(state),
            work: state.work(now),
            tie: !rendezvous_weight(prompt.key, state.key),
            rank: state.endpoint.rank,
            index,
        }
    }

    fn order(a: &Self, b: &Self) -> core::cmp::Ordering {
        a.tokens.total_cmp(&b.tokens).then(a.tie.cmp(&b.tie))
    }
}
