//! Forwarding: the filter state by which Envoy routes a request, and the counters of a forwarded request.

use super::assignment::Assignment;
use super::effect::{
    DECODE, DESTINATION, Effect, Flow, MATCHED_TOKENS, PREFILL, PREFILL_MS, PREFILLER, RANK, REASON, decision_name,
};
use super::head::Subset;
use super::kv_lease::KvLease;
use super::parsed::ParsedRequest;
use super::state::{ConcurrentPrefill, DecodeLeg, Forwarded, Response, State};
use super::step::Step;
use super::stored::keeper;
use crate::body::Api;
use crate::body::splice::HeadEdit;
use crate::choose::prompt::Prompt;
use crate::choose::scheduler::{Pick, Scheduler};
use crate::config::Config;
use crate::endpoints::beliefs::Belief;
use crate::endpoints::table::EndpointRef;
use crate::endpoints::usage::Usage;
use crate::metrics::Metric;
use crate::prefix::hash::BlockHash;
use crate::prefix::index::EndpointIndex;
use crate::request::models::Served;
use crate::request::reply::Rejection;
use crate::request::response_editor::ResponseEditor;
use crate::time::Monotonic;
use crate::workers::recent::DecisionRecord;
use crate::workers::worker::Worker;

/// How often Envoy tries to connect: once, and the route's `num_retries`. With fewer names in [`DESTINATION`] the last
/// tries would go to hosts of other pools.
pub(super) const TRIES: usize = 3;

/// Shortest prompt whose usage is judged, in tokens. In a shorter one, the part that engines compute again in any case (the
/// last block) is too large a share.
pub(super) const JUDGED_TOKENS: u64 = 256;

/// Where a request goes, and why.
#[derive(Debug)]
pub(super) struct Route {
    /// The metric that counts the decision, whose name it also has in the access log.
    pub(super) decision: Metric,
    /// Reason code.
    pub(super) reason: &'static str,
    pub(super) pick: Pick,
    pub(super) alternates: Vec<EndpointIndex>,
    /// Where the prompt is computed.
    pub(super) prefill: Prefill,
    /// How the client's body becomes this leg's.
    pub(super) edit: HeadEdit,
}

/// Where a prompt is computed.
#[derive(Debug)]
pub(super) enum Prefill {
    /// The endpoint that generates.
    Own,
    /// A prefill leg that ended well.
    Done {
        pick: Pick,
        endpoint: EndpointRef,
        started: Monotonic,
        /// What the leg's answer says it used.
        usage: Option<Usage>,
        /// Whether the KV cache could not be handed over, so that the prompt is computed a second time.
        is_kv_missing: bool,
        /// Whether the decode leg names the KV cache. The engine frees the cache after the first fetch.
        names_kv_cache: bool,
    },
    /// A prefill leg that starts with the decode leg.
    Concurrent(Pick, ConcurrentPrefill),
    /// A prefill leg that the decode endpoint's sidecar runs.
    Sidecar(Pick, EndpointRef),
}

impl Prefill {
    /// The prefill endpoint, where another one than the decode endpoint computes the prompt.
    fn endpoint(&self) -> Option<(Pick, EndpointRef)> {
        match self {
            Self::Own => None,
            Self::Done { pick, endpoint, .. } | Self::Sidecar(pick, endpoint) => Some((*pick, *endpoint)),
            Self::Concurrent(pick, concurrent) => Some((*pick, concurrent.endpoint)),
        }
    }

    fn is_kv_missing(&self) -> bool {
        matches!(self, Self::Done { is_kv_missing: true, .. })
    }

    /// The endpoint whose leg ended well before the decode leg, and whose KV cache the decode endpoint fetches.
    fn handed_over_by(&self) -> Option<EndpointRef> {
        match self {
            Self::Done { endpoint, is_kv_missing: false, .. } => Some(*endpoint),
            _ => None,
        }
    }

    /// Whether the request to the decode endpoint may be sent twice, because it names no KV cache that the first one may have
    /// fetched, and no prefill leg waits for it.
    fn may_repeat(&self) -> bool {
        match self {
            Self::Own | Self::Sidecar(..) => true,
            Self::Done { names_kv_cache, .. } => !names_kv_cache,
            Self::Concurrent(..) => false,
        }
    }

    /// Whether the decode endpoint gets the KV cache of a prefill endpoint.
    fn hands_over(&self) -> bool {
        !matches!(self, Self::Own) && !self.is_kv_missing()
    }
}

impl Route {
    /// Prompt tokens thought to be cached where the prompt is computed.
    fn matched_tokens(&self) -> f64 {
        self.prefill.endpoint().map_or(self.pick, |(pick, _)| pick).matched_tokens
    }
}

/// Sends the request to an engine endpoint.
pub(super) fn forward(
    worker: &mut Worker,
    parsed: &ParsedRequest,
    route: Route,
    now: Monotonic,
) -> Result<Step, Rejection> {
    let belief = belief(worker, parsed, &route);
    let assignment = account(worker, parsed, &route, now).ok_or(Rejection::NoEndpoint)?;
    let mut effects = describe(worker, &route, now);
    // A peer that names a phase hands over itself.
    if route.prefill.may_repeat() && parsed.head.phase.is_none() {
        effects.extend(Effect::may_repeat());
    }
    let chosen = if let Prefill::Done { started, .. } = route.prefill { started } else { now };
    let prefill_ms = millis(now.saturating_sub(chosen));
    let recorded =
        worker.record_decision(now, |worker| DecisionRecord { prefill_ms, ..decision_record(worker, parsed, &route) });
    let is_judged = is_judged(worker, parsed, &route);
    let told = told_cached_tokens(parsed, &route.prefill);
    let wants_usage = (is_judged && parsed.shows_usage) || belief.is_some();
    // A stream has many parts. Where it is not read anyway, few are: those tell enough.
    let is_long = parsed.is_stream && wants_usage && !told.is_told;
    let reads_stream_of = if is_long { worker.start_to_read(route.pick.endpoint) } else { None };
    let reads_usage = wants_usage && (!is_long || reads_stream_of.is_some());
    let forwarded = Forwarded {
        assignment,
        alternates: route.alternates.iter().filter_map(|index| worker.state.table.refer(*index)).collect(),
        strands_if_refused: matches!(
            route.prefill,
            Prefill::Done { is_kv_missing: false, .. } | Prefill::Concurrent(..)
        ),
        handed_over_by: route.prefill.handed_over_by(),
        kv_lease: route.prefill.handed_over_by().and_then(|prefill| KvLease::begin(worker, parsed, prefill, now)),
        is_kv_missing: route.prefill.is_kv_missing(),
        editor: response_editor(parsed, told, (reads_usage, reads_stream_of.is_some())).map(Box::new),
        is_judged,
        belief,
        reads_stream_of,
        is_restricted: parsed.head.subset.is_some(),
        decode_leg: DecodeLeg {
            started: now,
            chosen,
            recorded,
            silent_after: parsed.pool().prefill_timeout.of(route.pick.seconds),
            is_stream: parsed.is_stream,
        },
        response: Response::Awaited,
        is_accepted: false,
        has_first_byte: false,
        concurrent_prefill: if let Prefill::Concurrent(_, concurrent) = route.prefill {
            Some(concurrent)
        } else {
            None
        },
    };
    effects.extend(Effect::edit_body(route.edit));
    Ok(Step::new(State::Forwarded(Box::new(forwarded)), Flow::Continue, effects))
}

/// Counts the request at its endpoint; `None` if the endpoint is gone.
fn account(worker: &mut Worker, parsed: &ParsedRequest, route: &Route, now: Monotonic) -> Option<Assignment> {
    let leg = worker.next_leg();
    let endpoint = worker.state.table.refer(route.pick.endpoint)?;
    worker.state.table.get_mut(route.pick.endpoint)?.health.sent(now);
    let mut assignment = Assignment::start(worker, endpoint, parsed.kv_tokens());
    let own = match &route.prefill {
        Prefill::Own => Some((route.pick, endpoint)),
        Prefill::Sidecar(pick, endpoint) => Some((*pick, *endpoint)),
        Prefill::Done { .. } | Prefill::Concurrent(..) => None,
    };
    assignment.own_prefill = own.map(|(pick, endpoint)| {
        let expires = now.saturating_add(parsed.pool().prefill_timeout.of(route.pick.seconds));
        worker.prefill_started(endpoint, leg, pick.seconds, now, expires);
        (endpoint, leg)
    });
    if route.prefill.hands_over() {
        let moved = (parsed.prompt.tokens - route.pick.matched_tokens).max(0.0);
        worker.counts.add(Metric::MovedTokens, moved as i64);
    }
    assignment.new_blocks = remember_prompt(worker, route.pick.endpoint, &parsed.prompt);
    worker.counts.count(route.decision);
    worker.counts.add(Metric::MatchedTokens, route.matched_tokens() as i64);
    let is_split = u64::from(route.decision == Metric::RequestsSplit);
    worker.served.note(endpoint.key, |sums| {
        sums.legs = sums.legs.saturating_add(1);
        sums.split = sums.split.saturating_add(is_split);
    });
    let computed_by = route.prefill.endpoint().map_or(endpoint.key, |(_, prefill)| prefill.key);
    let (prompt, matched) = (parsed.prompt.tokens as u64, route.matched_tokens() as u64);
    worker.served.note(computed_by, |sums| {
        sums.prompt_tokens = sums.prompt_tokens.saturating_add(prompt);
        sums.matched_tokens = sums.matched_tokens.saturating_add(matched);
    });
    Some(assignment)
}

/// Filter states of a request that goes to an engine endpoint.
fn describe(worker: &mut Worker, route: &Route, now: Monotonic) -> Vec<Effect> {
    let mut effects = vec![
        Effect::SetState(DESTINATION, destination_with_retries(worker, route.pick, &route.alternates).into_bytes()),
        Effect::decision(route.decision),
        Effect::SetState(REASON, route.reason.into()),
    ];
    if let Some(state) = worker.state.table.get(route.pick.endpoint) {
        effects.push(Effect::SetState(DECODE, state.address.as_bytes().to_vec()));
        let matched_tokens = route.matched_tokens() as u64;
        effects.push(Effect::SetState(MATCHED_TOKENS, matched_tokens.to_string().into_bytes()));
        effects.extend(state.endpoint.rank.map(|rank| Effect::SetState(RANK, rank.to_string().into_bytes())));
    }
    if let Prefill::Done { started, .. } = route.prefill {
        effects.push(prefill_ms(worker, started, now));
    }
    if let Some((_, endpoint)) = route.prefill.endpoint()
        && let Some(state) = worker.state.table.resolve(endpoint)
    {
        effects.push(Effect::SetState(PREFILL, state.address.as_bytes().to_vec()));
        if matches!(route.prefill, Prefill::Sidecar(..)) {
            effects.push(Effect::SetState(PREFILLER, state.address.as_bytes().to_vec()));
        }
    }
    effects
}

/// The time that a prefill leg took, as filter state.
pub(super) fn prefill_ms(worker: &mut Worker, started: Monotonic, now: Monotonic) -> Effect {
    let ms = millis(now.saturating_sub(started));
    worker.counts.record(Metric::PrefillMs, ms);
    Effect::SetState(PREFILL_MS, ms.to_string().into_bytes())
}

pub(super) fn millis(time: core::time::Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The request for the report to pd-control.
fn decision_record(worker: &Worker, parsed: &ParsedRequest, route: &Route) -> DecisionRecord {
    let address =
        |endpoint| worker.state.table.get(endpoint).map_or_else(String::new, |state| state.address.to_string());
    DecisionRecord {
        decision: decision_name(route.decision).to_owned(),
        reason: route.reason.to_owned(),
        model: parsed.served.model.clone(),
        prefill: route.prefill.endpoint().map_or_else(String::new, |(pick, _)| address(pick.endpoint)),
        decode: address(route.pick.endpoint),
        prompt_tokens: parsed.prompt.tokens as u64,
        matched_tokens: route.matched_tokens() as u64,
        ..DecisionRecord::default()
    }
}

/// The chosen endpoint and its alternates, named often enough for every try of Envoy's: beyond the last name Envoy would
/// take any host of the cluster.
fn destination_with_retries(worker: &Worker, pick: Pick, alternates: &[EndpointIndex]) -> String {
    let others = core::iter::repeat_n(core::iter::once(pick.endpoint).chain(alternates.iter().copied()), TRIES);
    let others = others.flatten().skip(1).take(alternates.len().max(TRIES.saturating_sub(1)));
    destination(worker, pick.endpoint, others)
}

/// `ip:port[,ip:port…]`.
pub(super) fn destination(
    worker: &Worker,
    first: EndpointIndex,
    others: impl Iterator<Item = EndpointIndex>,
) -> String {
    let mut text = String::with_capacity(64);
    for state in core::iter::once(first).chain(others).filter_map(|index| worker.state.table.get(index)) {
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(&state.address);
    }
    text
}

/// Records that an endpoint has the prompt, and its session. Returns the blocks that the endpoint did not hold before.
/// If the endpoint refuses the request, the caller takes these blocks out of the index again.
pub(super) fn remember_prompt(worker: &mut Worker, endpoint: EndpointIndex, prompt: &Prompt) -> Vec<BlockHash> {
    let Some(endpoint) = worker.state.table.refer(endpoint) else { return Vec::new() };
    let index = &worker.state.index;
    let held = index.matched(endpoint.index, &prompt.hash.blocks);
    let is_new = |session: &BlockHash| index.matched(endpoint.index, core::slice::from_ref(session)) == 0;
    let mut new = prompt.hash.blocks.get(held..).unwrap_or_default().to_vec();
    new.extend(prompt.session.filter(is_new));
    worker.holds(endpoint, &prompt.hash.blocks);
    if prompt.session.is_some() {
        worker.holds(endpoint, prompt.session.as_slice());
    }
    new
}

/// Whether the usage in the response shows that the KV cache arrived. The filter reads the response for that only if
/// the estimated prompt has at least half of [`JUDGED_TOKENS`]: the real prompt may be twice the estimate.
fn is_judged(worker: &Worker, parsed: &ParsedRequest, route: &Route) -> bool {
    route.prefill.hands_over()
        && parsed.prompt.tokens as u64 >= JUDGED_TOKENS / 2
        && worker
            .state
            .table
            .get(route.pick.endpoint)
            .is_some_and(|state| state.engine.protocol().counts_fetched_tokens)
}

/// What the endpoint that serves a request whole is believed to hold of the prompt, where it is so much that the answer can be
/// judged by it, and the answer may tell. Streams of `/v1/responses` and `/v1/messages` do so unasked.
fn belief(worker: &Worker, parsed: &ParsedRequest, route: &Route) -> Option<Belief> {
    let may_tell = parsed.shows_usage || matches!(parsed.api, Api::Responses | Api::Messages);
    let Pick { endpoint, matched_tokens, .. } = route.pick;
    let belief = || worker.belief(endpoint, &parsed.prompt.hash.blocks, matched_tokens);
    let is_whole = matches!(route.prefill, Prefill::Own);
    (is_whole && may_tell).then(belief).filter(|belief| belief.can_be_judged())
}

/// Cached tokens that the client is told in place of the decode endpoint's own.
#[derive(Clone, Copy, Debug)]
struct ToldCachedTokens {
    is_told: bool,
    /// Those of the prefill leg, once it has ended.
    tokens: Option<u64>,
}

/// What the client of a split request is told of cached tokens.
fn told_cached_tokens(parsed: &ParsedRequest, prefill: &Prefill) -> ToldCachedTokens {
    let (is_known, tokens) = match prefill {
        Prefill::Done { usage, .. } => {
            let cached = usage.and_then(|usage| usage.cached_tokens);
            (cached.is_some(), cached)
        }
        Prefill::Concurrent(..) => (true, None),
        Prefill::Own | Prefill::Sidecar(..) => (false, None),
    };
    let is_wanted = parsed.shows_usage && parsed.pool().shows_prefills_cached_tokens;
    ToldCachedTokens { is_told: is_known && prefill.hands_over() && is_wanted, tokens }
}

/// Editor of the response to a request: of the model's name where it is put back, of its cached tokens where they are
/// corrected, and of the usage where that is read. `is_long`: the response is a stream, read only until its usage is known.
fn response_editor(
    parsed: &ParsedRequest,
    told: ToldCachedTokens,
    (reads_usage, is_long): (bool, bool),
) -> Option<ResponseEditor> {
    if !told.is_told && !reads_usage && parsed.put_back.is_none() {
        return parsed.is_kept.then(ResponseEditor::of_id);
    }
    let mut editor = ResponseEditor::new(told.is_told, told.tokens);
    if let Some(asked) = &parsed.put_back {
        editor.rename(&parsed.served.model, asked);
    } else if is_long {
        editor.end_at_usage();
    }
    if parsed.is_kept {
        editor.find_id();
    }
    Some(editor)
}

/// Which endpoints may get a request without a prompt, beside those of its model.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Restriction<'a> {
    /// Those that a trusted header names.
    pub(super) subset: Option<&'a Subset>,
    /// The one that keeps the response of that id.
    pub(super) response: Option<&'a str>,
}

/// Sends a request without a prompt to the least loaded endpoint that serves its model; if the request names no model,
/// to the least loaded of all. A prefill endpoint gets the request only if no other endpoint could.
pub(super) fn pass(
    worker: &mut Worker,
    config: &Config,
    served: Option<&Served>,
    Restriction { subset, response }: Restriction<'_>,
    now: Monotonic,
) -> Result<Step, Rejection> {
    let key = worker.next_leg();
    let prompt = Prompt { key: key.wrapping_mul(0x9e37_79b9_7f4a_7c15), ..Prompt::default() };
    let scheduler = Scheduler {
        table: &worker.state.table,
        index: &worker.state.index,
        pool: config.pool(served.map_or("default", |served| &served.candidates.pool)),
        now,
    };
    let is_allowed = |index: &EndpointIndex| {
        worker.state.table.get(*index).is_some_and(|state| subset.is_none_or(|subset| subset.allows(state)))
    };
    let restricted: Vec<EndpointIndex>;
    let mut among = match served {
        Some(Served { candidates, .. }) => candidates.without_prompt(),
        None => worker.state.table.without_model(),
    };
    if subset.is_some() {
        restricted = among.iter().copied().filter(is_allowed).collect();
        among = &restricted;
    }
    let keeper = response.map(|id| keeper(worker, id, among)).transpose()?;
    if let Some(keeper) = &keeper {
        among = core::slice::from_ref(keeper);
    }
    let (pick, alternates) = scheduler.pick_decode(among, &prompt, &[]).ok_or(Rejection::NoEndpoint)?;
    let destination = destination_with_retries(worker, pick, &alternates);
    worker.counts.count(Metric::RequestsPassed);
    let next = if subset.is_some() { State::Watched } else { State::Over };
    let effects =
        vec![Effect::SetState(DESTINATION, destination.into_bytes()), Effect::decision(Metric::RequestsPassed)];
    Ok(Step::new(next, Flow::Continue, effects))
}
