//! The scheduler: whether to split a request, and which endpoint serves each leg.
//!
//! - **Prefill**: the endpoint with the lowest W + w·S. W are the seconds of work ahead of the prompt, S the seconds of the
//!   prompt itself, given what the endpoint holds.
//! - **Decode**: the endpoint of the conversation, inside a load bound; else the [cheapest](super::decode_cost) by assigned
//!   KV tokens and by the tokens to move.
//! - **Decider**: a request is split if the best decode endpoint lacks at least a threshold of tokens (llm-d's
//!   `prefix-based-pd-decider`).
//! - Ties and unseen prompts go by rendezvous hash, which every worker of every Envoy computes alike.
//!
//! Of many endpoints a choice compares a [shortlist](super::shortlist).

use crate::choose::decode_cost::{DecodeCost, DecodeLoad};
use crate::choose::prompt::Prompt;
use crate::choose::shortlist::{HOLDERS, View};
use crate::config::{Cost, Pool, Split};
use crate::endpoints::candidates::Candidates;
use crate::endpoints::endpoint_state::EndpointState;
use crate::endpoints::table::Table;
use crate::engine::Protocol;
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
}

/// How a request is served.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Schedule {
    /// Two legs, the prefill leg at this endpoint. The decode endpoint is chosen later.
    Split(Pick),
    /// One endpoint serves the whole request.
    Whole(Pick, WholeReason),
    /// No endpoint can serve the request.
    Nobody,
}

/// Why a request is served whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WholeReason {
    /// The prompt is shorter than the threshold.
    Short,
    /// The decode endpoint holds so much of the prompt that it lacks fewer tokens than the threshold.
    Cached,
    /// The pool never splits.
    Never,
    /// No prefill endpoint is ready, or no decode endpoint that could take over.
    NoPrefill,
    /// The endpoint with the lowest W + w·S is an aggregated one.
    Aggregated,
    /// The request wants several sequences, and the engine hands over one.
    Several,
    /// The decode endpoint may refuse the request, and a prefill leg would strand its KV blocks.
    Refusable,
    /// The answer tells of the prompt what only the endpoint that computes it knows.
    Told,
    /// The request goes on from a response that the endpoint keeps.
    Stored,
}

impl WholeReason {
    /// Reason code for the access log.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Short => "short",
            Self::Cached => "cached",
            Self::Never => "never",
            Self::NoPrefill => "no_prefill_endpoint",
            Self::Aggregated => "aggregated",
            Self::Several => "several_sequences",
            Self::Refusable => "refusable",
            Self::Told => "prompt_told",
            Self::Stored => "stored_response",
        }
    }
}

/// How many tokens more than the least loaded decode endpoint one may have assigned and still get a request because it
/// holds the prefix: about the KV cache of one long prompt.
const AFFINITY_SLACK_TOKENS: f64 = 32_768.0;
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

    /// Decides whether to split a request, and chooses the endpoint of its first leg.
    #[must_use]
    pub fn schedule(&self, candidates: &Candidates, prompt: &Prompt) -> Schedule {
        let alone = |reason| {
            let pick = self.pick_by_cost(&candidates.whole, prompt, &[]);
            pick.map_or(Schedule::Nobody, |pick| Schedule::Whole(pick, reason))
        };
        // Where no endpoint serves whole requests, everything is split.
        if self.pool.split == Split::Never && !candidates.whole.is_empty() {
            return alone(WholeReason::Never);
        }
        if let Split::Threshold { uncached_tokens } = self.pool.split
            && let Some(whole) = self.below_threshold(&candidates.whole, prompt, uncached_tokens as f64)
        {
            return whole;
        }
        let among = if self.pool.split == Split::Always { &candidates.prefill } else { &candidates.compute };
        // Without a decode endpoint no prefill leg is sent.
        let may_serve =
            |index: &EndpointIndex| self.table.get(*index).is_some_and(|state| !state.health.is_excluded(self.now));
        let pick = candidates.decode.iter().any(may_serve).then(|| self.pick_by_cost(among, prompt, &[])).flatten();
        let Some((pick, state)) = pick.and_then(|pick| Some((pick, self.table.get(pick.endpoint)?))) else {
            return alone(WholeReason::NoPrefill);
        };
        if state.endpoint.role == Role::Both {
            return Schedule::Whole(pick, WholeReason::Aggregated);
        }
        let protocol = state.engine.protocol();
        if prompt.is_several && !protocol.hands_over_several {
            return alone(WholeReason::Several);
        }
        match unsplittable(prompt, protocol) {
            // An engine that decodes nothing alone gets both legs, and refuses both.
            Some(reason) if !candidates.whole.is_empty() => alone(reason),
            _ => Schedule::Split(pick),
        }
    }

    /// The endpoint with the lowest W + w·S among these, without those that were `tried`. Where no endpoint is healthy it
    /// picks among all: a pool is never ejected as a whole. `None` where there is none left.
    #[must_use]
    pub fn pick_by_cost(&self, among: &[EndpointIndex], prompt: &Prompt, tried: &[EndpointIndex]) -> Option<Pick> {
        let (shortlist, owner) = self.view().shortlist(among, prompt, tried);
        let session = self.view().session_holder(among, prompt);
        let mut best: Option<(f64, u64, Pick)> = None;
        for (index, state) in shortlist {
            let CostedPick { pick, cost } =
                self.cost(index, state, prompt, (owner == Some(index), session == Some(index)));
            let rendezvous = rendezvous_weight(prompt.key, state.key);
            let better = |(lowest, weight, _): &(f64, u64, Pick)| (cost, *weight) < (*lowest, rendezvous);
            if best.as_ref().is_none_or(better) {
                best = Some((cost, rendezvous, pick));
            }
        }
        best.map(|(_, _, pick)| pick)
    }

    /// The endpoint of the conversation, else the one that is cheapest by its assigned KV tokens and by the tokens to move
    /// to it, among these without those that were `tried`; and its alternates, those with the fewest tokens first. `None`
    /// where there is none left.
    #[must_use]
    pub fn pick_decode(
        &self,
        among: &[EndpointIndex],
        prompt: &Prompt,
        tried: &[EndpointIndex],
    ) -> Option<(Pick, Vec<EndpointIndex>)> {
        let suited = self.view().usable(among, prompt, tried).into_iter();
        let mut ranked: Vec<Ranked> = suited.map(|(index, state)| Ranked::new(index, state, prompt)).collect();
        let first = self.choose_decode(&mut ranked, among, prompt, tried)?;
        // One header names the rank for all of them, so alternates have the same rank.
        ranked.retain(|other| other.rank == first.rank && other.index != first.index);
        Some((self.pick(first.index, prompt), self.least(ranked)))
    }

    /// Chooses among `ranked`, to which it adds the holders of the prompt where they are a part of many.
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
                    .map(|state| Ranked::new(index, state, prompt)),
            );
        }
        // Of several alike the first is chosen.
        ranked.sort_unstable_by_key(|ranked| ranked.tie);
        let load = |ranked: &Ranked| DecodeLoad {
            assigned: ranked.tokens,
            held: self.matched_tokens(ranked.index, prompt),
            is_session: session == Some(ranked.index),
        };
        let loads: Vec<DecodeLoad> = ranked.iter().map(load).collect();
        let cost = DecodeCost { stay: self.pool.decode_stay, ..DecodeCost::default() };
        ranked.get(cost.choose(prompt.tokens, &loads)?).copied()
    }

    /// Healthy alternates of an endpoint, those with the fewest assigned tokens first. They have the same engine and rank,
    /// so the same request suits them.
    #[must_use]
    pub fn alternates(&self, among: &[EndpointIndex], prompt: &Prompt, chosen: EndpointIndex) -> Vec<EndpointIndex> {
        let Some(first) = self.table.get(chosen) else { return Vec::new() };
        let stands_in = |state: &EndpointState| {
            self.view().is_usable(state) && state.engine == first.engine && state.endpoint.rank == first.endpoint.rank
        };
        let others = self.view().usable(among, prompt, &[chosen]).into_iter().filter(|(_, state)| stands_in(state));
        self.least(others.map(|(index, state)| Ranked::new(index, state, prompt)).collect())
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

    /// Serves a request whole where an endpoint has to compute fewer than `threshold` tokens of its prompt. Such a request of
    /// a session goes to the endpoint that served the session last, unless that one is overloaded.
    fn below_threshold(&self, among: &[EndpointIndex], prompt: &Prompt, threshold: f64) -> Option<Schedule> {
        if prompt.tokens < threshold {
            let least = || self.pick_decode(among, prompt, &[]).map(|(pick, _)| pick);
            let pick = self.pick_session(among, prompt).or_else(least);
            return pick.map(|pick| Schedule::Whole(pick, WholeReason::Short));
        }
        self.pick_cached_decode(among, prompt, threshold).map(|pick| Schedule::Whole(pick, WholeReason::Cached))
    }

    /// The endpoint that served the prompt's session last; `None` where it is ejected, overloaded or not among these.
    fn pick_session(&self, among: &[EndpointIndex], prompt: &Prompt) -> Option<Pick> {
        let holder = self.view().session_holder(among, prompt)?;
        let bound = self.most_tokens(among, prompt)?;
        let fits = |state: &EndpointState| self.view().is_usable(state) && decode_load(state) <= bound;
        self.table.get(holder).is_some_and(fits).then(|| self.pick(holder, prompt))
    }

    /// Most tokens that an endpoint may have assigned and still get a request because of what it holds.
    fn most_tokens(&self, among: &[EndpointIndex], prompt: &Prompt) -> Option<f64> {
        let usable = self.view().usable(among, prompt, &[]);
        let least = usable.into_iter().map(|(_, state)| decode_load(state)).reduce(f64::min)?;
        Some(2.0 * least + AFFINITY_SLACK_TOKENS)
    }

    /// Of the endpoints that lack fewer than `threshold` tokens of the prompt, the one that served its session last, else the
    /// least loaded one; `None` where all those are ejected or overloaded.
    fn pick_cached_decode(&self, among: &[EndpointIndex], prompt: &Prompt, threshold: f64) -> Option<Pick> {
        let bound = self.most_tokens(among, prompt)?;
        let session = self.view().session_holder(among, prompt);
        let holders = self.index.holders(&prompt.hash.blocks, HOLDERS);
        let cached = holders.into_iter().filter_map(|index| {
            let state = self.table.get(index).filter(|state| self.view().is_among(among, state))?;
            let pick = self.pick(index, prompt);
            // The block in which the match ends counts as held: it is 1/32 of the prompt at most.
            let blocks = self.index.matched(index, &prompt.hash.blocks);
            let at_most = prefix_units(blocks.saturating_add(1)) as f64 * prompt.block_tokens;
            let load = decode_load(state);
            let fits = self.view().is_usable(state) && load <= bound && prompt.tokens - at_most < threshold;
            fits.then_some((session != Some(index), load, pick))
        });
        cached.min_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))).map(|(.., pick)| pick)
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
    ) -> CostedPick {
        let pick = self.pick(index, prompt);
        let mut held = pick.matched_tokens;
        if session {
            held = prompt.tokens;
        } else if owner && prompt.is_unseen {
            held += self.rendezvous_share() * (prompt.tokens - held).max(0.0);
        }
        let own = self.seconds(state, prompt, held);
        CostedPick { pick, cost: state.work(self.now) + self.pool.affinity_weight * own }
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

/// Why a request of one sequence is served whole by an engine that could hand it over.
fn unsplittable(prompt: &Prompt, protocol: &Protocol) -> Option<WholeReason> {
    if prompt.is_told {
        return Some(WholeReason::Told);
    }
    let is_refusable = protocol.limits_prefill && prompt.is_refusable;
    (is_refusable || prompt.has_budget && !protocol.allows_budget).then_some(WholeReason::Refusable)
}

/// Assigned KV tokens, divided by the endpoint's weight.
fn decode_load(state: &EndpointState) -> f64 {
    state.decode_tokens() as f64 / state.endpoint.weight
}

/// An endpoint that could take a decode leg, with what it is compared by.
#[derive(Clone, Copy)]
struct Ranked {
    /// [`decode_load`].
    tokens: f64,
    /// Inverse of the rendezvous weight, for ties.
    tie: u64,
    /// Data-parallel rank.
    rank: Option<u32>,
    index: EndpointIndex,
}

impl Ranked {
    fn new(index: EndpointIndex, state: &EndpointState, prompt: &Prompt) -> Self {
        Self {
            tokens: decode_load(state),
            tie: !rendezvous_weight(prompt.key, state.key),
            rank: state.endpoint.rank,
            index,
        }
    }

    fn order(a: &Self, b: &Self) -> core::cmp::Ordering {
        a.tokens.total_cmp(&b.tokens).then(a.tie.cmp(&b.tie))
    }
}

#[cfg(test)]
pub(super) mod tests;
