//! The decider: whether to split a request or to serve it whole, and where its first leg goes.
//!
//! A request is split if the best decode endpoint lacks at least a threshold of tokens (llm-d's `prefix-based-pd-decider`).

use crate::choose::decode_profile::decode_load;
use crate::choose::prompt::Prompt;
use crate::choose::scheduler::{Pick, Scheduler};
use crate::choose::shortlist::HOLDERS;
use crate::choose::split_cost::Ahead;
use crate::config::Split;
use crate::endpoints::candidates::Candidates;
use crate::endpoints::endpoint_state::EndpointState;
use crate::engine::Protocol;
use crate::prefix::hash::prefix_units;
use crate::prefix::index::EndpointIndex;
use crate::wire::Role;

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
    /// Whole costs less than split.
    Cheaper,
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
    /// The estimated prompt and the limit of tokens together exceed the model's length: the decode endpoint refuses the
    /// request.
    TooLong,
    /// The answer describes the prompt, by probabilities of its tokens. Only the endpoint that computes the prompt has them.
    DescribesPrompt,
    /// The request continues a response that this endpoint keeps.
    Stored,
}

impl WholeReason {
    /// Reason code for the access log.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Short => "short",
            Self::Cached => "cached",
            Self::Cheaper => "cheaper",
            Self::Never => "never",
            Self::NoPrefill => "no_prefill_endpoint",
            Self::Aggregated => "aggregated",
            Self::Several => "several_sequences",
            Self::Refusable => "refusable",
            Self::TooLong => "too_long",
            Self::DescribesPrompt => "prompt_in_answer",
            Self::Stored => "stored_response",
        }
    }
}

/// KV tokens by which a decode endpoint may exceed twice the load of the least loaded one and still get a request whose
/// prefix it holds: about the KV cache of one long prompt.
pub(super) const AFFINITY_SLACK_TOKENS: f64 = 32_768.0;

impl Scheduler<'_> {
    /// Decides whether to split a request, and chooses the endpoint of its first leg.
    #[must_use]
    pub fn schedule(&self, candidates: &Candidates, prompt: &Prompt) -> Schedule {
        self.schedule_behind(candidates, prompt, Ahead::default())
    }

    /// As [`schedule`](Self::schedule), for a request that would wait behind others in the gateway if it were split.
    #[must_use]
    pub fn schedule_behind(&self, candidates: &Candidates, prompt: &Prompt, ahead: Ahead) -> Schedule {
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
        let pick = candidates
            .decode
            .iter()
            .any(may_serve)
            .then(|| self.cost_prefill(candidates, among, prompt, &[]))
            .flatten();
        let Some((costed, state)) = pick.and_then(|costed| Some((costed, self.table.get(costed.pick.endpoint)?)))
        else {
            return alone(WholeReason::NoPrefill);
        };
        let pick = costed.pick;
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
            _ if self.pool.split == Split::Cost => {
                let whole = self.cheaper_whole(candidates, prompt, &costed, ahead);
                whole.map_or(Schedule::Split(pick), |whole| Schedule::Whole(whole, WholeReason::Cheaper))
            }
            _ => Schedule::Split(pick),
        }
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
}

/// Why a request of one sequence is served whole by an engine that could hand it over.
fn unsplittable(prompt: &Prompt, protocol: &Protocol) -> Option<WholeReason> {
    if prompt.describes_prompt {
        return Some(WholeReason::DescribesPrompt);
    }
    let is_refusable = protocol.limits_prefill && prompt.is_refusable;
    if is_refusable || prompt.has_budget && !protocol.allows_budget {
        return Some(WholeReason::Refusable);
    }
    (protocol.limits_prefill && prompt.is_too_long).then_some(WholeReason::TooLong)
}
