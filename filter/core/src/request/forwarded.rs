//! A request that an engine endpoint has: the endpoint that answers, and the prefill leg that may run beside it.

use super::effect::{Effect, Flow, KV_HEADER, Outcome, SERVED_HEADER};
use super::leg::{PrefillAnswer, abandon, engines_reply, leg_ended, refused_alone};
use super::route::{JUDGED_TOKENS, prefill_ms};
use super::state::{ConcurrentPrefill, Forwarded, Response, State};
use super::step::Step;
use crate::body::json::Object;
use crate::body::splice::HeadEdit;
use crate::endpoints::outliers::{ErrorKind, Leg};
use crate::endpoints::table::EndpointRef;
use crate::endpoints::usage::Usage;
use crate::metrics::Metric;
use crate::request::reply::Rejection;
use crate::time::Monotonic;
use crate::workers::worker::Worker;

impl Forwarded {
    /// The prefill leg beside the decode leg ended. The decode leg waits for a KV cache that a failed prefill leg never
    /// sends: the client gets an error at once.
    pub(super) fn prefill_answered(
        mut self: Box<Self>,
        worker: &mut Worker,
        answer: PrefillAnswer<'_>,
        now: Monotonic,
    ) -> Step {
        let Some(concurrent) = self.concurrent_prefill.take() else { return self.stay(Vec::new()) };
        let mut warning = leg_ended(worker, concurrent.endpoint, concurrent.leg, &answer, now).warning;
        if let PrefillAnswer::Answered { status: 401 | 403 | 404, .. } = answer {
            // No other endpoint can be asked. What all of them answer is the client's error, and ejects none.
            warning = refused_alone(worker, concurrent.endpoint, now);
        } else if answer.is_refusal() {
            worker.answered(concurrent.endpoint);
        }
        if let PrefillAnswer::Answered { status: 200, body, .. } = answer {
            let mut effects = vec![prefill_ms(worker, concurrent.started, now)];
            if let Some(editor) = &mut self.editor {
                let usage = Object::read(body).ok().and_then(|body| Usage::of_answer(&body));
                editor.cached_tokens = usage.and_then(|usage| usage.cached_tokens);
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

    fn stay(self: Box<Self>, effects: Vec<Effect>) -> Step {
        Step::new(State::Forwarded(self), Flow::Pause, effects)
    }

    /// Response headers are there.
    pub(super) fn response_headers(
        &mut self,
        worker: &mut Worker,
        upstream: Option<&[u8]>,
        status: Option<u16>,
        now: Monotonic,
    ) -> Outcome {
        let mut effects: Vec<_> =
            self.answered_by(worker, upstream, status, now).map(Effect::Warn).into_iter().collect();
        if self.is_restricted {
            effects.extend(served_by(upstream));
        }
        if self.is_kv_missing {
            effects.push(Effect::AddResponseHeader(KV_HEADER, "missing".to_owned()));
        }
        if self.editor.as_ref().is_some_and(|editor| editor.changes_length()) {
            effects.push(Effect::RemoveResponseHeader("content-length"));
        }
        // A refusal does not wait for the KV cache.
        let is_held = self.concurrent_prefill.is_some() && upstream.is_some() && status == Some(200);
        self.response = if is_held { Response::Held } else { Response::Passed };
        Outcome { flow: if is_held { Flow::Pause } else { Flow::Continue }, effects }
    }

    /// Notes who answered: the endpoint that was chosen, the alternate that Envoy went on to, or nobody. A warning where
    /// the answer ejects the endpoint.
    fn answered_by(
        &mut self,
        worker: &mut Worker,
        upstream: Option<&[u8]>,
        status: Option<u16>,
        now: Monotonic,
    ) -> Option<String> {
        let mut warning = None;
        let mut answers = |reference: &EndpointRef| {
            let state =
                worker.state.table.resolve(*reference).filter(|state| Some(state.address.as_bytes()) == upstream);
            let is_it = state.is_some();
            if is_it {
                match status {
                    // An error of the client: the endpoint works, and may still fail with what others accept.
                    Some(400..=428 | 430..=499) => worker.answered(*reference),
                    _ => {
                        let error = status.and_then(ErrorKind::of_status);
                        warning = worker.judge_answer(*reference, Leg::Decode, error, now);
                    }
                }
            }
            is_it
        };
        if answers(&self.assignment.endpoint) {
            return warning;
        }
        // Envoy went on to an alternate, or gave up: either way the first choice could not be reached.
        let moved = self.alternates.iter().copied().find(answers);
        if moved.is_none() && upstream.is_some() {
            return None;
        }
        worker.failed(self.assignment.endpoint, now);
        let Some(alternate) = moved else {
            worker.counts.count(Metric::DecodeUnanswered);
            return warning;
        };
        worker.counts.count(Metric::DecodeMoved);
        self.assignment.move_to(worker, alternate, now);
        warning
    }

    /// The first byte of the response's body is there: the prompt has been computed.
    pub(super) fn first_byte(&mut self, worker: &mut Worker, now: Monotonic) {
        self.has_first_byte = true;
        self.assignment.end_own_prefill(worker, now);
    }

    /// A part of the response's body is there.
    pub(super) fn response_part(&mut self, worker: &mut Worker, part: &[u8], is_last: bool) -> Outcome {
        let Some(editor) = &mut self.editor else { return Outcome::GO_ON };
        let edited = editor.part(part, is_last);
        let drain = u32::try_from(part.len()).unwrap_or(u32::MAX);
        let mut effects: Vec<_> =
            edited.map(|head| Effect::EditResponse(HeadEdit { drain, head })).into_iter().collect();
        if is_last {
            let usage = editor.usage();
            self.editor = None;
            if let Some(usage) = usage.filter(|_| self.is_judged) {
                effects.extend(judge(worker, self.assignment.endpoint, usage));
            }
        }
        Outcome { flow: Flow::Continue, effects }
    }

    /// The stream ended.
    pub(super) fn end(&mut self, worker: &mut Worker, now: Monotonic) {
        self.assignment.end(worker, now);
        if let Some(ConcurrentPrefill { endpoint, leg, .. }) = self.concurrent_prefill {
            abandon(worker, endpoint, leg, now);
        }
    }
}

/// The header that says who served the request.
pub(super) fn served_by(upstream: Option<&[u8]>) -> Option<Effect> {
    let upstream = core::str::from_utf8(upstream?).ok()?;
    Some(Effect::AddResponseHeader(SERVED_HEADER, upstream.to_owned()))
}

/// Responses in a row that must show a KV cache that came, before the next one without it is worth a warning again.
const KV_DOUBTS: u8 = 32;

/// Counts a split prompt of which the decode endpoint had less than half cached; a warning where that begins.
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
