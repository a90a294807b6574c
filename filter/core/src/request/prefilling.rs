//! The state Prefilling: the end of the prefill leg, another try, and the decode leg.

use super::effect::Effect;
use super::leg::{Fault, LegEnd, PrefillAnswer, abandon, engines_reply, leg_ended, refused_alone};
use super::parsed::{ParsedRequest, ScannedBody};
use super::route::{Prefill, Route, forward};
use super::state::{Prefilling, Split};
use super::step::Step;
use crate::body::splice::HeadEdit;
use crate::choose::prompt::Prompt;
use crate::choose::scheduler::Pick;
use crate::config::OnPrefillFailure;
use crate::endpoints::table::{EndpointRef, PromptEstimate};
use crate::endpoints::usage::Usage;
use crate::engine::{CachedTokensOf, Handover, LegAnswer, legs};
use crate::metrics::Metric;
use crate::request::reply::{Rejection, Reply};
use crate::time::Monotonic;
use crate::workers::worker::Worker;

/// Reason code of a split whose KV cache could not be handed over.
const KV_MISSING: &str = "kv_missing";
/// Reason code of a request whose prefill leg ended well when no decode endpoint was left that could take over.
const NO_PARTNER: &str = "no_partner";
/// Reason code of a request that no prefill endpoint served.
const PREFILL_FAILED: &str = "prefill_failed";
/// Reason code of a request whose prefill leg took longer than its limit at an endpoint that answers others.
const PREFILL_TIMEOUT: &str = "prefill_timeout";

impl Prefilling {
    /// The call ended: the leg, or the question before it. `body` reads the client's body again.
    pub(super) fn answered<B: AsRef<[u8]>>(
        mut self,
        worker: &mut Worker,
        answer: PrefillAnswer<'_>,
        body: impl FnOnce() -> Option<B>,
        now: Monotonic,
    ) -> Result<Step, Rejection> {
        let Some(leg) = self.leg else {
            self.split.parsed.refresh_candidates(worker);
            return self.engine_id_answered(worker, answer, body, now);
        };
        let LegEnd { seconds, mut warning, is_too_slow } =
            leg_ended(worker, self.prefiller.endpoint, (leg, self.sent), &answer, now);
        self.split.parsed.refresh_candidates(worker);
        let step = match (answer, answer.fault()) {
            (PrefillAnswer::Answered { status: 200, body: answer, .. }, None) => {
                if let Some((refusing, _)) = self.split.refusal.take() {
                    warning = refused_alone(worker, refusing, now).or(warning);
                }
                let answer = LegAnswer::read(answer);
                self.hand_over(worker, &answer, seconds, body, now)
            }
            (PrefillAnswer::Answered { status, content_type, body: answer }, None) => {
                worker.lacks(self.prefiller.endpoint, &self.prefiller.new_blocks);
                self.refused(worker, engines_reply(status, content_type, answer), body, now)
            }
            // Another endpoint would compute the same prompt against the same limit.
            _ if is_too_slow => give_up(worker, &self.split.parsed, PREFILL_TIMEOUT, now),
            _ => {
                let is_cut_off = answer.is_cut_off();
                self.try_another(worker, is_cut_off, body, now)
            }
        };
        Ok(Step::or_reject(step, worker).after(warning))
    }

    /// The endpoint refused the request. The filter asks one other endpoint, without the retry budget. If both refuse
    /// the request, the refusal is the client's error.
    fn refused<B: AsRef<[u8]>>(
        mut self,
        worker: &mut Worker,
        refusal: Reply,
        body: impl FnOnce() -> Option<B>,
        now: Monotonic,
    ) -> Result<Step, Rejection> {
        let endpoint = self.prefiller.endpoint;
        let refusal = match self.split.refusal.take() {
            Some((first, earlier)) => {
                worker.answered(first);
                // 401, 403 and 404 may come from an endpoint that did not read the body, so another refusal says more.
                if matches!(refusal.status, 401 | 403 | 404) { earlier } else { refusal }
            }
            None => {
                self.split.tried.push(endpoint);
                if let Some(pick) = self.pick_another(worker, now)
                    && let Some(body) = body()
                    && let Ok(body) = ScannedBody::read(body.as_ref())
                {
                    worker.counts.count(Metric::PrefillRetries);
                    self.split.refusal = Some((endpoint, refusal));
                    return self.split.start(worker, pick, &body, now);
                }
                refusal
            }
        };
        worker.answered(endpoint);
        worker.counts.count(Metric::RequestsRejected);
        Ok(Step::answer(refusal))
    }

    /// Takes back what was counted for the leg: the stream ended, so its answer will not be read.
    pub(super) fn end(&self, worker: &mut Worker, now: Monotonic) {
        if let Some(leg) = self.leg {
            abandon(worker, self.prefiller.endpoint, leg, now);
        }
    }

    /// The bootstrap server answered the question for the engine's id, or failed.
    fn engine_id_answered<B: AsRef<[u8]>>(
        self,
        worker: &mut Worker,
        answer: PrefillAnswer<'_>,
        body: impl FnOnce() -> Option<B>,
        now: Monotonic,
    ) -> Result<Step, Rejection> {
        let endpoint = self.prefiller.endpoint;
        if let PrefillAnswer::Answered { status: 200, body: answer, .. } = answer
            && note_engine_id(worker, endpoint, answer).is_some()
        {
            let body = body();
            let Some(body) = body.as_ref().and_then(|body| ScannedBody::read(body.as_ref()).ok()) else {
                return give_up(worker, &self.split.parsed, PREFILL_FAILED, now);
            };
            return self.split.start(worker, self.prefiller.pick, &body, now);
        }
        if answer.fault() == Some(Fault::Unreachable) {
            worker.failed(endpoint, now);
        }
        self.try_another(worker, false, body, now)
    }

    /// The endpoint failed: another one, as long as the pool and the budget of retries allow it. Where there is no other one
    /// and the endpoint closed the connection, the leg is tried there once more: Envoy takes another connection.
    fn try_another<B: AsRef<[u8]>>(
        mut self,
        worker: &mut Worker,
        is_cut_off: bool,
        body: impl FnOnce() -> Option<B>,
        now: Monotonic,
    ) -> Result<Step, Rejection> {
        let is_first = self.split.tried.is_empty();
        self.split.tried.push(self.prefiller.endpoint);
        let again = is_cut_off && is_first && self.split.parsed.pool().prefill_attempts > 1;
        let pick = self.pick_another(worker, now);
        if let Some(pick) = pick.or_else(|| if again { self.pick_again(worker, now) } else { None })
            && let Some(body) = body()
            && let Ok(body) = ScannedBody::read(body.as_ref())
        {
            if worker.retries.spend() {
                worker.counts.count(Metric::PrefillRetries);
                return self.split.start(worker, pick, &body, now);
            }
            worker.counts.count(Metric::RetriesDenied);
        }
        let step = give_up(worker, &self.split.parsed, PREFILL_FAILED, now);
        match (step, self.split.refusal.take()) {
            (Err(_), Some((_, refusal))) => {
                worker.counts.count(Metric::RequestsRejected);
                Ok(Step::answer(refusal))
            }
            (step, _) => step,
        }
    }

    /// The same endpoint, while it is in the list.
    fn pick_again(&self, worker: &Worker, now: Monotonic) -> Option<Pick> {
        let endpoint = self.prefiller.endpoint;
        let is_listed = worker.state.table.refer(endpoint.index) == Some(endpoint);
        let parsed = &self.split.parsed;
        is_listed.then(|| parsed.scheduler(worker, now).pick(endpoint.index, &parsed.prompt))
    }

    fn pick_another(&self, worker: &Worker, now: Monotonic) -> Option<Pick> {
        let Split { parsed, tried, .. } = &self.split;
        if tried.len() >= parsed.pool().prefill_attempts as usize {
            return None;
        }
        let is_listed = |tried: &&EndpointRef| worker.state.table.refer(tried.index) == Some(**tried);
        let tried: Vec<_> = tried.iter().filter(is_listed).map(|tried| tried.index).collect();
        let candidates = &parsed.served.candidates;
        parsed.scheduler(worker, now).pick_prefill(candidates, &candidates.prefill, &parsed.prompt, &tried)
    }

    /// The prompt is computed: on to a decode endpoint.
    fn hand_over<B: AsRef<[u8]>>(
        self,
        worker: &mut Worker,
        answer: &LegAnswer<'_>,
        seconds: Option<f64>,
        body: impl FnOnce() -> Option<B>,
        now: Monotonic,
    ) -> Result<Step, Rejection> {
        let Self { split, prefiller, .. } = &self;
        let Prompt { bytes, tokens, media, .. } = split.parsed.prompt;
        let matched_tokens = prefiller.pick.matched_tokens;
        let estimate = PromptEstimate { bytes: bytes as f64, media, tokens, matched_tokens };
        let protocol = prefiller.partner.engine.protocol();
        let cached_tokens = (protocol.cached_tokens_in_params)(answer);
        let usage = Usage::of_answer(&answer.answer).map(|usage| usage.with_cached_tokens(cached_tokens));
        worker.state.table.saw_prefill(prefiller.endpoint, estimate, seconds, usage);
        if let Some(cached) = usage.and_then(|usage| usage.cached_tokens) {
            worker.judge_belief(prefiller.endpoint, prefiller.belief, cached);
        }
        // The filter knows the prefill leg's cached tokens, and writes them into the answer.
        let cached_tokens = if usage.is_some() && split.parsed.shows_cached_tokens() {
            CachedTokensOf::Decode
        } else {
            CachedTokensOf::Prefill
        };
        let handover = (protocol.handover)(split.parsed.api, answer, cached_tokens);
        let kv_warning = note_kv_missing(worker, prefiller.endpoint, handover == Handover::Missing);
        let edit = edit_with(&split.parsed, &handover, body);
        let is_kv_missing = edit.is_none();
        let names_kv_cache = !is_kv_missing && matches!(handover, Handover::Insert { .. });
        if is_kv_missing {
            worker.counts.count(Metric::KvMissing);
        }
        let Ok((pick, alternates)) = split.pick_decode(worker, &prefiller.partner, now) else {
            worker.counts.count(Metric::KvStrandedNoPartner);
            let step = give_up(worker, &split.parsed, NO_PARTNER, now);
            let may_serve_whole = split.parsed.pool().on_prefill_failure == OnPrefillFailure::DecodeOnly;
            return if may_serve_whole { step.map_err(|_| Rejection::NoEndpoint) } else { step };
        };
        let (endpoint, started) = (prefiller.endpoint, split.started);
        let route = Route {
            decision: Metric::RequestsSplit,
            reason: if is_kv_missing { KV_MISSING } else { "prefilled" },
            pick,
            alternates,
            prefill: Prefill::Done { pick: prefiller.pick, endpoint, started, usage, is_kv_missing, names_kv_cache },
            edit: edit.unwrap_or_else(|| split.parsed.plain_edit()),
        };
        let mut step = forward(worker, &split.parsed, route, now)?;
        step.outcome.effects.extend(kv_warning);
        Ok(step)
    }
}

/// Notes the id of an endpoint's engine out of its bootstrap server's answer; `None` if the answer has none.
fn note_engine_id(worker: &mut Worker, endpoint: EndpointRef, answer: &[u8]) -> Option<()> {
    let state = worker.state.table.resolve(endpoint)?;
    let query = state.engine.protocol().engine_id.as_ref()?;
    state.engine_id = Some((query.read)(answer, state.endpoint.rank)?.into());
    Some(())
}

/// Notes whether an endpoint's answers lack usable KV parameters; a warning when that begins.
fn note_kv_missing(worker: &mut Worker, endpoint: EndpointRef, is_missing: bool) -> Option<Effect> {
    let state = worker.state.table.resolve(endpoint)?;
    let begins = is_missing && !state.is_kv_missing;
    state.is_kv_missing = is_missing;
    begins.then(|| {
        let address = &state.address;
        Effect::Warn(format!("{address} gives no usable KV parameters: its prompts are computed twice"))
    })
}

/// The edit that makes the client's body the decode leg's; `None` where the KV cache cannot be handed over.
fn edit_with<B: AsRef<[u8]>>(
    parsed: &ParsedRequest,
    handover: &Handover,
    body: impl FnOnce() -> Option<B>,
) -> Option<HeadEdit> {
    let (members, drop) = match handover {
        Handover::Missing => return None,
        Handover::Nothing => return Some(parsed.plain_edit()),
        Handover::Insert { members, drop } => (members, *drop),
    };
    let replanned = if drop.is_empty() { None } else { body() }.and_then(|body| {
        let body = ScannedBody::read(body.as_ref()).ok()?;
        Some(legs::decode_plan(body.bytes, &body.scan, drop, parsed.served.rewrite.as_deref()))
    });
    let plan = replanned.as_ref().unwrap_or(&parsed.plan);
    // Envoy does not survive a paused body that an edit makes larger than the buffer filter's limit.
    let fits = plan.edited_bytes(members, parsed.body_bytes) <= parsed.head.config.max_body_bytes;
    fits.then(|| plan.with_insert(members))
}

/// Applies the pool's policy to a request that no prefill endpoint served.
fn give_up(
    worker: &mut Worker,
    parsed: &ParsedRequest,
    reason: &'static str,
    now: Monotonic,
) -> Result<Step, Rejection> {
    worker.counts.count(Metric::PrefillGivenUp);
    let picked = match parsed.pool().on_prefill_failure {
        OnPrefillFailure::Fail => None,
        OnPrefillFailure::DecodeOnly => {
            parsed.scheduler(worker, now).pick_decode(&parsed.served.candidates.whole, &parsed.prompt, &[])
        }
    };
    let (pick, alternates) = picked.ok_or(Rejection::PrefillFailed)?;
    let decision = Metric::RequestsDecodeOnly;
    let route = Route { decision, reason, pick, alternates, prefill: Prefill::Own, edit: parsed.plain_edit() };
    forward(worker, parsed, route, now)
}
