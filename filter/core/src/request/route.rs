//! Where a request goes: what Envoy is told of it, and what is counted there.

use core::time::Duration;
use std::sync::Arc;

use super::leg::prefill_ms;
use super::sent::{Companion, JUDGED_TOKENS, Response, Sent};
use super::{
    DECISION, DECODE, DESTINATION, Effect, Flow, KV_MISSING, MATCHED_TOKENS, Outcome, PREFILL, PREFILLER, RANK, REASON,
    Request, State, TRIES, decision_name, to_i64,
};
use crate::body::splice::HeadPlan;
use crate::choose::scheduler::{Pick, Prompt, Scheduler};
use crate::config::{Config, Split};
use crate::endpoints::table::EndpointRef;
use crate::endpoints::usage::Usage;
use crate::metrics::Metric;
use crate::prefix::index::EndpointIndex;
use crate::request::answer::Passage;
use crate::request::intake::{Subset, Work};
use crate::request::reply::Rejection;
use crate::workers::recent::DecisionRecord;
use crate::workers::worker::Worker;

/// Where a request goes, and why.
pub(super) struct Route<'a> {
    pub(super) decision: Metric,
    pub(super) reason: &'static str,
    pub(super) pick: Pick,
    pub(super) alternates: Vec<EndpointIndex>,
    /// Who computes the prompt.
    pub(super) prefill: Prefill,
    /// How the body becomes this leg's, and the members to put in front.
    pub(super) plan: &'a HeadPlan,
    pub(super) insert: &'a [u8],
}

/// Who computes a prompt.
pub(super) enum Prefill {
    /// Whoever generates.
    Own,
    /// A leg that is through.
    Done(Pick, EndpointRef, Duration, Option<Usage>),
    /// A leg that goes out now.
    Beside(Pick, Companion),
    /// A sidecar sees to it.
    Sidecar(Pick, EndpointRef),
}

impl Prefill {
    pub(super) fn endpoint(&self) -> Option<(Pick, EndpointRef)> {
        match self {
            Self::Own => None,
            Self::Done(pick, endpoint, ..) | Self::Sidecar(pick, endpoint) => Some((*pick, *endpoint)),
            Self::Beside(pick, companion) => Some((*pick, companion.endpoint)),
        }
    }
}

impl Request {
    /// Sends the request to an engine endpoint.
    pub(super) fn send(&mut self, worker: &mut Worker, work: &Work, route: Route<'_>, now: Duration) -> Outcome {
        let Route { decision, reason, pick, alternates, prefill, plan, insert } = route;
        // Named often enough for every try of Envoy's: beyond the last name it would take any host of the cluster.
        let others = core::iter::repeat_n(core::iter::once(pick.endpoint).chain(alternates.iter().copied()), TRIES);
        let others = others.flatten().skip(1).take(alternates.len().max(TRIES.saturating_sub(1)));
        let destination = destination(worker, pick.endpoint, others);
        let alternates = alternates.iter().filter_map(|at| worker.state.table.refer(*at)).collect();
        let tokens = (work.prompt.tokens as u64).saturating_add(work.output_tokens);
        let leg = worker.next_leg();
        let (Some(endpoint), Some(slot)) =
            (worker.state.table.refer(pick.endpoint), worker.state.table.get_mut(pick.endpoint))
        else {
            return self.reject(worker, Vec::new(), &Rejection::NoEndpoint);
        };
        slot.health.sent(now);
        let (decode, rank) = (Arc::clone(&slot.address), slot.endpoint.rank);
        let own = match &prefill {
            Prefill::Own => Some((pick, endpoint)),
            Prefill::Sidecar(pick, endpoint) => Some((*pick, *endpoint)),
            Prefill::Done(..) | Prefill::Beside(..) => None,
        };
        worker.decode_started(endpoint, tokens);
        let own = own.map(|(pick, endpoint)| {
            let expires = now.saturating_add(work.pool().prefill_timeout);
            worker.prefill_started(endpoint, leg, pick.seconds, now, expires);
            (endpoint, leg)
        });
        if own.is_some() || work.pool().split != Split::Always {
            // Where everything is split, nobody asks what decode endpoints hold.
            enter(worker, pick.endpoint, &work.prompt);
        }
        worker.counts.count(decision);
        worker.counts.add(Metric::DecodeInFlight, 1);
        worker.counts.add(Metric::DecodeTokensInFlight, to_i64(tokens));

        let matched_tokens = prefill.endpoint().map_or(pick, |(pick, _)| pick).matched_tokens;
        worker.counts.add(Metric::MatchedTokens, matched_tokens as i64);
        let mut effects = vec![
            Effect::SetState(DESTINATION, destination.into_bytes()),
            Effect::SetState(DECISION, decision_name(decision).into()),
            Effect::SetState(REASON, reason.into()),
            Effect::SetState(DECODE, decode.as_bytes().to_vec()),
            Effect::SetState(MATCHED_TOKENS, (matched_tokens as u64).to_string().into_bytes()),
        ];
        if let Some(rank) = rank {
            effects.push(Effect::SetState(RANK, rank.to_string().into_bytes()));
        }
        if let Prefill::Done(_, _, started, _) = prefill {
            effects.push(prefill_ms(worker, started, now));
        }
        if let Some((_, endpoint)) = prefill.endpoint()
            && let Some(slot) = worker.state.table.resolve(endpoint)
        {
            effects.push(Effect::SetState(PREFILL, slot.address.as_bytes().to_vec()));
            if matches!(prefill, Prefill::Sidecar(..)) {
                effects.push(Effect::SetState(PREFILLER, slot.address.as_bytes().to_vec()));
            }
        }
        worker.decided(now, |worker| DecisionRecord {
            decision: decision_name(decision).to_owned(),
            reason: reason.to_owned(),
            model: work.served.model.clone(),
            prefill: prefill
                .endpoint()
                .and_then(|(pick, _)| worker.state.table.get(pick.endpoint))
                .map_or_else(String::new, |slot| slot.address.to_string()),
            decode: decode.to_string(),
            prompt_tokens: work.prompt.tokens as u64,
            matched_tokens: matched_tokens as u64,
            ..DecisionRecord::default()
        });
        let edit = plan.with_insert(insert);
        if !edit.is_none() {
            effects.push(Effect::EditBody(edit));
        }
        let is_kv_missing = reason == KV_MISSING;
        let is_split = !matches!(prefill, Prefill::Own) && !is_kv_missing;
        // An answer is read for that only if the prompt may be long enough, were its estimate half of what it is.
        let is_judged = is_split
            && work.prompt.tokens as u64 >= JUDGED_TOKENS / 2
            && worker.state.table.get(pick.endpoint).is_some_and(|slot| slot.engine.counts_fetched_tokens());
        let passage = passage(work, &prefill, is_split, is_judged).map(Box::new);
        let companion = if let Prefill::Beside(_, companion) = prefill { Some(companion) } else { None };
        let (response, is_restricted) = (Response::Awaited, work.subset.is_some());
        let sent = Sent {
            endpoint,
            alternates,
            tokens,
            own,
            companion,
            is_kv_missing,
            passage,
            is_judged,
            is_restricted,
            response,
            answered: false,
        };
        self.state = State::Sent(Box::new(sent));
        Outcome { flow: Flow::Continue, effects }
    }

    /// Sends a request without a prompt to whoever has the least to do.
    pub(super) fn pass(
        &mut self,
        worker: &mut Worker,
        config: &Config,
        subset: Option<&Subset>,
        mut effects: Vec<Effect>,
        now: Duration,
    ) -> Outcome {
        let key = worker.next_leg();
        let prompt = Prompt { key: key.wrapping_mul(0x9e37_79b9_7f4a_7c15), ..Prompt::default() };
        let scheduler =
            Scheduler { table: &worker.state.table, index: &worker.state.index, pool: config.pool("default"), now };
        let is_allowed = |at: &EndpointIndex| {
            worker.state.table.get(*at).is_some_and(|slot| subset.is_none_or(|subset| subset.allows(slot)))
        };
        let restricted: Vec<EndpointIndex>;
        let mut among = worker.state.table.all_ready();
        if subset.is_some() {
            restricted = among.iter().copied().filter(is_allowed).collect();
            among = &restricted;
        }
        let Some((pick, alternates)) = scheduler.pick_decode(among, &prompt, &[]) else {
            return self.reject(worker, effects, &Rejection::NoEndpoint);
        };
        let destination = destination(worker, pick.endpoint, alternates.iter().copied());
        effects.push(Effect::SetState(DESTINATION, destination.into_bytes()));
        effects.push(Effect::SetState(DECISION, decision_name(Metric::RequestsPassed).into()));
        worker.counts.count(Metric::RequestsPassed);
        self.state = if subset.is_some() { State::Watched } else { State::Over };
        Outcome { flow: Flow::Continue, effects }
    }
}

/// Records that an endpoint has the prompt, and its session.
pub(super) fn enter(worker: &mut Worker, endpoint: EndpointIndex, prompt: &Prompt) {
    if let Some(endpoint) = worker.state.table.refer(endpoint) {
        worker.holds(endpoint, &prompt.hash.blocks);
        if prompt.session.is_some() {
            worker.holds(endpoint, prompt.session.as_slice());
        }
    }
}

/// `ip:port[,ip:port…]`.
pub(super) fn destination(
    worker: &Worker,
    first: EndpointIndex,
    others: impl Iterator<Item = EndpointIndex>,
) -> String {
    let mut text = String::with_capacity(64);
    for slot in core::iter::once(first).chain(others).filter_map(|at| worker.state.table.get(at)) {
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(&slot.address);
    }
    text
}

/// What to look for in the answer of a request: the model's name where it is to be put back, and what was used where
/// that will be told. A stream is read for its cached tokens only where they are to be put right, for it has many parts.
fn passage(work: &Work, prefill: &Prefill, is_split: bool, is_judged: bool) -> Option<Passage> {
    let (tells_cached_tokens, cached_tokens) = match prefill {
        Prefill::Done(.., usage) => {
            let cached = usage.and_then(|usage| usage.cached_tokens);
            (cached.is_some(), cached)
        }
        Prefill::Beside(..) => (true, None),
        Prefill::Own | Prefill::Sidecar(..) => (false, None),
    };
    let tells_cached_tokens = tells_cached_tokens && is_split && work.pool().tells_prefills_cached_tokens;
    let reads_usage = work.shows_usage && is_split && (tells_cached_tokens || is_judged && !work.is_stream);
    if !reads_usage && work.put_back.is_none() {
        return None;
    }
    let mut passage = Passage::new(tells_cached_tokens, cached_tokens);
    if let Some(asked) = &work.put_back {
        passage.rename(&work.served.model, asked);
    }
    Some(passage)
}
