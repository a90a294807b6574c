//! The state Forwarded: an endpoint has the request. Its answer comes, and a prefill leg may run beside it.

use core::net::SocketAddr;
use std::sync::Arc;

use super::effect::{Effect, Flow, KV_HEADER, Outcome, SERVED_HEADER};
use super::kv_lease::{self, KvLease, Part};
use super::leg::{PrefillAnswer, abandon, engines_reply, leg_ended, refused_alone};
use super::route::{JUDGED_TOKENS, millis, prefill_ms};
use super::state::{ConcurrentPrefill, DecodeLeg, Forwarded, Response, State};
use super::step::Step;
use crate::body::json::Object;
use crate::body::splice::HeadEdit;
use crate::endpoints::health::Cause;
use crate::endpoints::outliers::{ErrorClass, Leg};
use crate::endpoints::table::EndpointRef;
use crate::endpoints::usage::Usage;
use crate::metrics::Metric;
use crate::prefix::hash::response_hash;
use crate::request::reply::Rejection;
use crate::request::upstream::Answerer;
use crate::time::Monotonic;
use crate::wire::Role;
use crate::workers::worker::Worker;

/// What follows from the host that gave an answer.
#[derive(Debug, Default)]
struct AnsweredBy {
    /// Warnings for the operator.
    warnings: Vec<String>,
    /// Whether the client must not get the answer.
    may_not_answer: bool,
}

impl Forwarded {
    /// The prefill leg beside the decode leg ended. The decode leg waits for a KV cache that a failed prefill leg never
    /// sends: the client gets an error at once.
    pub(super) fn prefill_answered(
        mut self: Box<Self>,
        worker: &mut Worker,
        answer: PrefillAnswer<'_>,
        now: Monotonic,
    ) -> Step {
        if self.kv_lease.as_ref().is_some_and(KvLease::is_asking) {
            return self.kv_lease_answered(worker, &answer, now);
        }
        let Some(concurrent) = self.concurrent_prefill.take() else { return self.stay(Vec::new()) };
        let mut warning =
            leg_ended(worker, concurrent.endpoint, (concurrent.leg, concurrent.started), &answer, now).warning;
        if let PrefillAnswer::Answered { status: 401 | 403 | 404, .. } = answer {
            // The filter cannot ask another endpoint. An error that all endpoints answer is the client's and ejects
            // none.
            warning = refused_alone(worker, concurrent.endpoint, now);
        } else if answer.is_refusal() {
            worker.answered(concurrent.endpoint);
        }
        if answer.is_refusal() {
            worker.lacks(concurrent.endpoint, &concurrent.new_blocks);
        }
        if let PrefillAnswer::Answered { status: 200, body, .. } = answer {
            let mut effects = vec![prefill_ms(worker, concurrent.started, now)];
            let usage = Object::read(body).ok().and_then(|body| Usage::of_answer(&body));
            let cached = usage.and_then(|usage| usage.cached_tokens);
            if let Some(editor) = &mut self.editor {
                editor.cached_tokens = cached;
            }
            if let Some(cached) = cached {
                worker.judge_belief(concurrent.endpoint, concurrent.belief, cached);
            }
            if self.response == Response::Held {
                self.response = Response::Passed;
                effects.push(Effect::ResumeResponse);
            }
            return self.stay(effects);
        }
        worker.counts.count(Metric::PrefillGivenUp);
        if self.response == Response::Passed {
            // The decode endpoint did not wait: the client has its answer.
            return self.stay(Vec::from_iter(warning));
        }
        self.assignment.end(worker, now);
        // The decision was counted when the request was forwarded.
        match answer {
            PrefillAnswer::Answered { status, content_type, body } if answer.fault().is_none() => {
                Step::answer(engines_reply(status, content_type, body))
            }
            _ => Step::refuse(Rejection::PrefillFailed),
        }
        .after(warning)
    }

    /// The prefill server answered the question for its metrics, or did not, while the answer's headers were held.
    fn kv_lease_answered(mut self: Box<Self>, worker: &mut Worker, answer: &PrefillAnswer<'_>, now: Monotonic) -> Step {
        let metrics: &[u8] = if let PrefillAnswer::Answered { status: 200, body, .. } = answer { body } else { b"" };
        let is_kept = self.kv_lease.take().is_some_and(|lease| lease.is_kept(worker, metrics));
        if is_kept {
            worker.counts.count(Metric::LatePassed);
            self.response = Response::Passed;
            return self.stay(vec![Effect::ResumeResponse]);
        }
        self.refuse_late(worker, Vec::new(), now)
    }

    /// Replies with an error in place of an answer that may be wrong. The client has no part of the answer yet.
    fn refuse_late(mut self: Box<Self>, worker: &mut Worker, mut effects: Vec<Effect>, now: Monotonic) -> Step {
        effects.extend(worker.answered_late(self.assignment.endpoint).map(Effect::Warn));
        self.end(worker, now);
        Step::refuse(Rejection::KvLeaseOver).after(effects)
    }

    fn stay(self: Box<Self>, effects: Vec<Effect>) -> Step {
        Step::new(State::Forwarded(self), Flow::Pause, effects)
    }

    /// Response headers are there.
    pub(super) fn response_headers(
        mut self: Box<Self>,
        worker: &mut Worker,
        answerer: Answerer<'_>,
        status: Option<u16>,
        now: Monotonic,
    ) -> Step {
        if let Some(number) = self.decode_leg.recorded {
            worker.recent.amend(number, |it| it.status = status.map_or(0, u64::from));
        }
        let by = self.answered_by(worker, answerer, status, now);
        let mut effects: Vec<_> = by.warnings.into_iter().map(Effect::Warn).collect();
        if by.may_not_answer {
            self.end(worker, now);
            return Step::refuse(Rejection::WrongEndpoint).after(effects);
        }
        let is_accepted = answerer.host().is_some() && status == Some(200);
        let mut question = None;
        match self.kv_lease.as_mut().filter(|_| is_accepted).map(|lease| lease.headers(worker, now)) {
            Some(kv_lease::Headers::Late) => return self.refuse_late(worker, effects, now),
            Some(kv_lease::Headers::Ask(call)) => question = Some(Effect::Call(call)),
            Some(kv_lease::Headers::Stream) => {}
            Some(kv_lease::Headers::InTime) => {
                worker.answered_in_time(self.assignment.endpoint);
                self.kv_lease = None;
            }
            None => self.kv_lease = None,
        }
        if self.is_restricted {
            effects.extend(served_by(answerer));
        }
        if self.is_kv_missing {
            effects.push(Effect::AddResponseHeader(KV_HEADER, "missing".to_owned()));
        }
        if self.editor.as_ref().is_some_and(|editor| editor.changes_length()) {
            effects.push(Effect::RemoveResponseHeader("content-length"));
        }
        self.is_accepted = is_accepted;
        let is_refusal = answerer.host().is_some() && matches!(status, Some(400..=428 | 430..=499));
        self.assignment.answered(worker, is_refusal);
        if is_refusal && self.strands_if_refused {
            worker.counts.count(Metric::KvStrandedRefused);
        }
        // A refusal does not wait for the KV cache.
        let is_held = (self.concurrent_prefill.is_some() && is_accepted) || question.is_some();
        effects.extend(question);
        self.response = if is_held { Response::Held } else { Response::Passed };
        let flow = if is_held { Flow::Pause } else { Flow::Continue };
        Step::new(State::Forwarded(self), flow, effects)
    }

    /// Notes which endpoint answered: the chosen one, the alternate that Envoy went on to, another one, or none.
    fn answered_by(
        &mut self,
        worker: &mut Worker,
        answerer: Answerer<'_>,
        status: Option<u16>,
        now: Monotonic,
    ) -> AnsweredBy {
        match answerer {
            Answerer::Host(address) => {
                let Some(endpoint) = self.reached(worker, address) else {
                    return self.answered_by_other(worker, address, now);
                };
                if endpoint != self.assignment.endpoint {
                    self.fail_before(worker, endpoint, now);
                    worker.counts.count(Metric::DecodeMoved);
                    self.belief = None;
                    self.assignment.move_to(worker, endpoint, now);
                }
                if let Some(state) = worker.state.table.resolve(endpoint) {
                    state.answered_at = state.answered_at.max(now);
                }
                if let Some(status @ (400..=428 | 430..=499)) = status {
                    let warnings = refused(worker, endpoint, status, now).into_iter().collect();
                    return AnsweredBy { warnings, may_not_answer: false };
                }
                let error = status.and_then(ErrorClass::of_status);
                let of_handover = self.judge_handover(worker, endpoint, error, now);
                let of_answer = worker.judge_answer(endpoint, Leg::Decode, error, now);
                AnsweredBy { warnings: of_answer.into_iter().chain(of_handover).collect(), may_not_answer: false }
            }
            Answerer::FailedConnect(Some(address)) if self.is_port_wrong(worker, address) => {
                let warnings = self.named_are_absent(worker, &String::from_utf8_lossy(address), now);
                AnsweredBy { warnings, may_not_answer: true }
            }
            Answerer::FailedAttempt(address) | Answerer::FailedConnect(address) => {
                worker.counts.count(Metric::DecodeUnanswered);
                let last = address.and_then(|address| self.reached(worker, address));
                let last = last.unwrap_or(self.assignment.endpoint);
                self.fail_before(worker, last, now);
                match answerer {
                    Answerer::FailedConnect(_) => worker.failed_to_connect(last, now),
                    _ => worker.failed(last, now),
                }
                AnsweredBy::default()
            }
            Answerer::Envoy => {
                worker.counts.count(Metric::AnsweredByEnvoy);
                self.judge_silence(worker, now);
                AnsweredBy::default()
            }
        }
    }

    /// Judges the endpoint of a request that ended without a byte of an answer, by a limit of Envoy's or because the client left.
    /// The endpoint counts as failed if
    /// - it has answered nothing since the request came, for as long as a prefill leg may take,
    /// - its peers have answered in that time,
    /// - and no prefill leg runs beside this one, for which the endpoint may have waited.
    fn judge_silence(&self, worker: &mut Worker, now: Monotonic) {
        let endpoint = self.assignment.endpoint;
        let DecodeLeg { started, silent_after, .. } = self.decode_leg;
        let table = &mut worker.state.table;
        let is_silent = table.resolve(endpoint).is_some_and(|state| state.answered_at <= started)
            && now.saturating_sub(started) >= silent_after
            && self.concurrent_prefill.is_none()
            && table.have_peers_answered(endpoint.index, started);
        if is_silent {
            worker.counts.count(Metric::DecodeUnanswered);
            worker.failed(endpoint, now);
        }
    }

    /// Notes whether a decode endpoint failed at a prompt that another one computed, or at a whole request. Overload is
    /// neither.
    fn judge_handover(
        &self,
        worker: &mut Worker,
        decode: EndpointRef,
        error: Option<ErrorClass>,
        now: Monotonic,
    ) -> Option<String> {
        let failed = match error {
            None => false,
            Some(ErrorClass::Server) => true,
            Some(ErrorClass::Overload | ErrorClass::Refusal) => return None,
        };
        match self.handed_over_by {
            Some(prefill) => worker.judge_handover(prefill, decode, failed, now),
            None => {
                worker.state.table.resolve(decode)?.fails_whole = failed;
                None
            }
        }
    }

    /// A host answered that the filter did not name. If the host is in the list, Envoy's cluster lacks all endpoints that the
    /// filter named. A host outside of the list may be an endpoint that left the list.
    fn answered_by_other(&mut self, worker: &mut Worker, address: &[u8], now: Monotonic) -> AnsweredBy {
        if !self.are_named_listed(worker) {
            return AnsweredBy::default();
        }
        let table = &worker.state.table;
        let Some((other, state)) = table.iter().find(|(_, state)| state.address.as_bytes() == address) else {
            worker.counts.count(Metric::AnsweredByOther);
            return AnsweredBy::default();
        };
        let instead = Arc::clone(&state.address);
        let (role, pool) = (state.endpoint.role, &state.endpoint.pool);
        let own = table.get(self.assignment.endpoint.index).map(|state| &state.endpoint);
        let may_not_answer =
            own.is_some_and(|own| (role == Role::Prefill && own.role != Role::Prefill) || *pool != own.pool);
        let other = table.refer(other);
        let warnings = self.named_are_absent(worker, &instead, now);
        if let Some(other) = other {
            self.assignment.move_to(worker, other, now);
        }
        AnsweredBy { warnings, may_not_answer }
    }

    /// Whether Envoy's cluster has the pods of the list at another port. Envoy could not connect to `address`, which is neither a
    /// named endpoint nor in the list, but the list has its IP address.
    fn is_port_wrong(&self, worker: &mut Worker, address: &[u8]) -> bool {
        let tried = core::str::from_utf8(address).ok().and_then(|text| text.parse::<SocketAddr>().ok());
        let Some(tried) = tried.filter(|_| self.are_named_listed(worker)) else { return false };
        let addresses = || worker.state.table.iter().map(|(_, state)| state.endpoint.address);
        addresses().any(|listed| listed.ip() == tried.ip()) && !addresses().any(|listed| listed == tried)
    }

    /// Whether all endpoints that the filter named are in the list still.
    fn are_named_listed(&self, worker: &mut Worker) -> bool {
        self.order().all(|endpoint| worker.state.table.resolve(endpoint).is_some())
    }

    /// Ejects the endpoints that the filter named, because Envoy's cluster lacks them: it went to `instead`. Returns warnings.
    fn named_are_absent(&self, worker: &mut Worker, instead: &str, now: Monotonic) -> Vec<String> {
        worker.counts.count(Metric::AnsweredByOther);
        self.order().filter_map(|endpoint| worker.absent(endpoint, instead, now)).collect()
    }

    /// Endpoints in the order in which Envoy tries them.
    fn order(&self) -> impl Iterator<Item = EndpointRef> {
        core::iter::once(self.assignment.endpoint).chain(self.alternates.iter().copied())
    }

    /// The endpoint of that address, of those that Envoy may try.
    fn reached(&self, worker: &mut Worker, address: &[u8]) -> Option<EndpointRef> {
        self.order().find(|reference| {
            worker.state.table.resolve(*reference).is_some_and(|state| state.address.as_bytes() == address)
        })
    }

    /// Envoy went on to `reached`. So the endpoints before `reached` failed: Envoy could not connect, or, where it may repeat
    /// the request, the endpoint ended the connection. Envoy does not say which. Most such endpoints have ended, too.
    fn fail_before(&self, worker: &mut Worker, reached: EndpointRef, now: Monotonic) {
        for endpoint in self.order().take_while(|endpoint| *endpoint != reached) {
            worker.failed_to_connect(endpoint, now);
        }
    }

    /// The first byte of the response's body is there: the prompt has been computed.
    pub(super) fn first_byte(&mut self, worker: &mut Worker, now: Monotonic) {
        self.has_first_byte = true;
        self.assignment.own_prefill_answered(worker, now);
        let first_ms = millis(now.saturating_sub(self.decode_leg.chosen));
        if self.is_accepted {
            worker.served.note(self.assignment.endpoint.key, |sums| sums.answered(first_ms));
        }
        if let Some(number) = self.decode_leg.recorded {
            worker.recent.amend(number, |it| it.first_ms = first_ms.max(1));
        }
    }

    /// A part of the response's body is there.
    pub(super) fn response_part(&mut self, worker: &mut Worker, part: &[u8], is_last: bool, now: Monotonic) -> Outcome {
        match self.kv_lease.as_mut().map(|lease| lease.part(part, is_last, now)) {
            Some(Part::Ended(outcome)) => return outcome,
            Some(Part::Late(error)) => {
                self.editor = None;
                let warning = worker.answered_late(self.assignment.endpoint).map(Effect::Warn);
                return Outcome { flow: Flow::Continue, effects: warning.into_iter().chain([error]).collect() };
            }
            Some(Part::InTime) => {
                worker.answered_in_time(self.assignment.endpoint);
                self.kv_lease = None;
            }
            Some(Part::Preface) | None => {}
        }
        let Some(editor) = &mut self.editor else { return Outcome::GO_ON };
        let edited = editor.part(part, is_last);
        let drain = u32::try_from(part.len()).unwrap_or(u32::MAX);
        let mut effects: Vec<_> =
            edited.map(|head| Effect::EditResponse(HeadEdit { drain, head })).into_iter().collect();
        if let Some(id) = editor.take_id().filter(|_| self.is_accepted) {
            worker.holds(self.assignment.endpoint, &[response_hash(&id)]);
        }
        if is_last || editor.is_done() {
            if let Some(usage) = editor.usage().filter(|_| self.is_judged) {
                effects.extend(judge(worker, self.assignment.endpoint, usage));
            }
            self.end_to_read(worker);
        }
        Outcome { flow: Flow::Continue, effects }
    }

    /// The response's body is read no longer: what it said of the endpoint's cache is judged.
    fn end_to_read(&mut self, worker: &mut Worker) {
        let cached = self.editor.take().and_then(|editor| editor.cached());
        if let Some((belief, cached)) = self.belief.take().zip(cached).filter(|_| self.is_accepted) {
            worker.judge_belief(self.assignment.endpoint, belief, cached);
        }
        if let Some(endpoint) = self.reads_stream_of.take() {
            worker.end_to_read(endpoint);
        }
    }

    /// The stream ended. Where there was no answer the client left: of an answer that is no stream, the first byte comes with
    /// the last one, so only a stream shows that the endpoint hangs.
    pub(super) fn end(&mut self, worker: &mut Worker, now: Monotonic) {
        // A client may have left, or the body may have ended with trailers.
        self.end_to_read(worker);
        if let Some(number) = self.decode_leg.recorded {
            let total_ms = millis(now.saturating_sub(self.decode_leg.chosen)).max(1);
            worker.recent.amend(number, |it| it.total_ms = total_ms);
        }
        if self.response == Response::Awaited && self.decode_leg.is_stream {
            self.judge_silence(worker, now);
        }
        self.assignment.end(worker, now);
        if let Some(ConcurrentPrefill { endpoint, leg, .. }) = self.concurrent_prefill {
            abandon(worker, endpoint, leg, now);
        }
    }
}

/// The header that names the endpoint that served the request.
pub(super) fn served_by(answerer: Answerer<'_>) -> Option<Effect> {
    let upstream = core::str::from_utf8(answerer.host()?).ok()?;
    Some(Effect::AddResponseHeader(SERVED_HEADER, upstream.to_owned()))
}

/// Judges a refusal of a decode endpoint. Most refusals are errors of the client. An endpoint that refuses all clients
/// while its peers do not is an outlier, such as one that lacks an API key or a model. Returns a warning when that
/// begins.
fn refused(worker: &mut Worker, endpoint: EndpointRef, status: u16, now: Monotonic) -> Option<String> {
    let ejection = worker.state.table.resolve(endpoint)?.health.ejection();
    let is_other = ejection.is_some_and(|(cause, _)| cause != Cause::Outlier(ErrorClass::Refusal));
    if !matches!(status, 401 | 403 | 404) || is_other {
        worker.answered(endpoint);
        return None;
    }
    worker.judge_answer(endpoint, Leg::Decode, Some(ErrorClass::Refusal), now)
}

/// Number of responses in a row with a KV cache that arrived, after which a response without one causes a warning
/// again.
const KV_DOUBTS: u8 = 32;

/// Counts a split request if the decode endpoint had less than half of its prompt cached. Returns a warning when that
/// begins.
fn judge(worker: &mut Worker, endpoint: EndpointRef, usage: Usage) -> Option<Effect> {
    let cached = usage.cached_tokens.filter(|_| usage.prompt_tokens >= JUDGED_TOKENS)?;
    let is_moved = cached >= usage.prompt_tokens / 2;
    if !is_moved {
        worker.counts.count(Metric::KvNotMoved);
    }
    let state = worker.state.table.resolve(endpoint)?;
    let is_news = !is_moved && state.kv_doubts == 0;
    state.kv_doubts = if is_moved { state.kv_doubts.saturating_sub(1) } else { KV_DOUBTS };
    is_news.then(|| {
        let Usage { prompt_tokens, .. } = usage;
        Effect::Warn(format!(
            "{} had {cached} of the {prompt_tokens} tokens of a split prompt: KV caches do not reach it, prompts are \
             computed twice",
            state.address
        ))
    })
}
