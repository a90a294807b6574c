//! A request that an engine endpoint serves: who answers, and the prefill leg that may run beside it.

use core::time::Duration;

use super::leg::{engines_reply, leg_ended, prefill_ms};
use super::{Effect, Flow, GO_ON, KV_HEADER, Outcome, PrefillAnswer, Request, SERVED_HEADER, State, WAIT, to_i64};
use crate::body::json::Object;
use crate::body::splice::HeadEdit;
use crate::endpoints::table::EndpointRef;
use crate::endpoints::usage::Usage;
use crate::metrics::Metric;
use crate::request::answer::Passage;
use crate::request::reply::Rejection;
use crate::workers::worker::Worker;

/// A request that an engine endpoint serves.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) endpoint: EndpointRef,
    pub(super) alternates: Vec<EndpointRef>,
    pub(super) tokens: u64,
    /// The prompt's own work and where it is done, counted until the first byte; none where a leg of ours does it.
    pub(super) own: Option<(EndpointRef, u64)>,
    /// The prefill leg, where it goes out with this one.
    pub(super) companion: Option<Companion>,
    /// Whether the prompt is computed a second time.
    pub(super) is_kv_missing: bool,
    /// What to look for in the answer.
    pub(super) passage: Option<Box<Passage>>,
    /// Whether the answer's usage tells that the KV cache came.
    pub(super) is_judged: bool,
    /// Whether a peer restricted the endpoints, and wants to know who served.
    pub(super) is_restricted: bool,
    pub(super) response: Response,
    pub(super) answered: bool,
}

/// A prefill leg in flight beside its decode leg.
#[derive(Clone, Copy, Debug)]
pub(super) struct Companion {
    pub(super) endpoint: EndpointRef,
    pub(super) leg: u64,
    pub(super) started: Duration,
}

/// How far the response's headers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Response {
    Awaited,
    /// They wait for the prefill leg.
    Held,
    /// The client has them.
    Passed,
}

impl Request {
    /// The prefill leg beside the decode leg ended. The decode leg waits for a KV cache that a failed one never sends:
    /// the client gets an error at once.
    pub(super) fn companion_ended(
        &mut self,
        worker: &mut Worker,
        sent: &mut Sent,
        answer: PrefillAnswer<'_>,
        now: Duration,
    ) -> Outcome {
        let Some(companion) = sent.companion.take() else { return WAIT };
        leg_ended(worker, companion.endpoint, companion.leg, &answer, now);
        if let PrefillAnswer::Answered { status: 200, .. } = answer {
            let mut effects = vec![prefill_ms(worker, companion.started, now)];
            if let (Some(passage), PrefillAnswer::Answered { body, .. }) = (&mut sent.passage, answer) {
                passage.cached_tokens = Object::read(body)
                    .ok()
                    .and_then(|body| Usage::of_answer(&body))
                    .and_then(|usage| usage.cached_tokens);
            }
            if sent.response == Response::Held {
                sent.response = Response::Passed;
                effects.push(Effect::ResumeResponse);
            }
            return Outcome { flow: Flow::Pause, effects };
        }
        worker.counts.count(Metric::PrefillGivenUp);
        if sent.response == Response::Passed {
            // The decode endpoint did not wait: the client has its answer.
            return WAIT;
        }
        sent.release(worker, now);
        sent.uncount(worker);
        // It was counted when it was sent.
        let reply = match answer {
            PrefillAnswer::Answered { status, content_type, body } if answer.fault().is_none() => {
                engines_reply(status, content_type, body)
            }
            _ => Rejection::PrefillFailed.reply(),
        };
        self.answer(reply, Vec::new())
    }

    /// Whether an engine endpoint has the request.
    #[must_use]
    pub fn is_sent(&self) -> bool {
        matches!(self.state, State::Sent(_) | State::Watched)
    }

    /// Response headers are there; `upstream` is the address of the endpoint that answered, if one did, `status` what
    /// the answer says.
    pub fn response_headers(
        &mut self,
        worker: &mut Worker,
        upstream: Option<&[u8]>,
        status: Option<u16>,
        now: Duration,
    ) -> Outcome {
        let served = || {
            let upstream = core::str::from_utf8(upstream?).ok()?;
            Some(Effect::AddResponseHeader(SERVED_HEADER, upstream.to_owned()))
        };
        let sent = match &mut self.state {
            State::Sent(sent) => sent,
            State::Watched => {
                self.state = State::Over;
                return Outcome { flow: Flow::Continue, effects: served().into_iter().collect() };
            }
            _ => return GO_ON,
        };
        sent.answered_by(worker, upstream, now);
        let mut effects = Vec::new();
        if sent.is_restricted {
            effects.extend(served());
        }
        if sent.is_kv_missing {
            effects.push(Effect::AddResponseHeader(KV_HEADER, "missing".to_owned()));
        }
        if sent.passage.as_ref().is_some_and(|passage| passage.changes_length()) {
            effects.push(Effect::RemoveResponseHeader("content-length"));
        }
        // A refusal does not wait for the KV cache.
        let is_held = sent.companion.is_some() && upstream.is_some() && status == Some(200);
        sent.response = if is_held { Response::Held } else { Response::Passed };
        Outcome { flow: if is_held { Flow::Pause } else { Flow::Continue }, effects }
    }

    /// Whether [`answer_part`](Self::answer_part) wants the response's body.
    #[must_use]
    pub fn reads_answer(&self) -> bool {
        matches!(&self.state, State::Sent(sent) if sent.passage.is_some())
    }

    /// A part of the response's body is there.
    pub fn answer_part(&mut self, worker: &mut Worker, part: &[u8], is_last: bool) -> Outcome {
        let State::Sent(sent) = &mut self.state else { return GO_ON };
        let Some(passage) = &mut sent.passage else { return GO_ON };
        let edited = passage.part(part, is_last);
        let drain = u32::try_from(part.len()).unwrap_or(u32::MAX);
        let mut effects: Vec<_> =
            edited.map(|head| Effect::EditResponse(HeadEdit { drain, head })).into_iter().collect();
        if is_last {
            let usage = passage.usage();
            sent.passage = None;
            if let Some(usage) = usage.filter(|_| sent.is_judged) {
                effects.extend(judge(worker, sent.endpoint, usage));
            }
        }
        Outcome { flow: Flow::Continue, effects }
    }

    /// Whether [`first_byte`](Self::first_byte) is still to be told.
    #[must_use]
    pub fn awaits_first_byte(&self) -> bool {
        matches!(&self.state, State::Sent(sent) if !sent.answered)
    }

    /// The first byte of the response's body is there: the prompt has been computed.
    pub fn first_byte(&mut self, worker: &mut Worker, now: Duration) {
        let State::Sent(sent) = &mut self.state else { return };
        sent.answered = true;
        sent.end_own(worker, now);
    }
}

impl Sent {
    /// Notes who answered: the endpoint that was chosen, the alternate that Envoy went on to, or nobody.
    pub(super) fn answered_by(&mut self, worker: &mut Worker, upstream: Option<&[u8]>, now: Duration) {
        let mut answers = |reference: &EndpointRef| {
            let slot = worker.state.table.resolve(*reference).filter(|slot| Some(slot.address.as_bytes()) == upstream);
            let is_it = slot.is_some();
            if is_it {
                worker.answered(*reference);
            }
            is_it
        };
        if answers(&self.endpoint) {
            return;
        }
        // Envoy went on to an alternate, or gave up: either way the first choice could not be reached.
        let moved = self.alternates.iter().copied().find(answers);
        if moved.is_none() && upstream.is_some() {
            return;
        }
        worker.failed(self.endpoint, now);
        let Some(alternate) = moved else {
            worker.counts.count(Metric::DecodeUnanswered);
            return;
        };
        worker.counts.count(Metric::DecodeMoved);
        self.release(worker, now);
        worker.decode_started(alternate, self.tokens);
        self.endpoint = alternate;
    }

    /// Takes back what was counted at the endpoint.
    pub(super) fn release(&mut self, worker: &mut Worker, now: Duration) {
        self.end_own(worker, now);
        worker.decode_ended(self.endpoint, self.tokens);
    }

    /// The prompt has been computed, or never will be.
    pub(super) fn end_own(&mut self, worker: &mut Worker, now: Duration) {
        if let Some((endpoint, leg)) = self.own.take() {
            worker.prefill_ended(endpoint, leg, now);
        }
    }

    /// Takes the request out of the gauges.
    pub(super) fn uncount(&self, worker: &mut Worker) {
        worker.counts.add(Metric::DecodeInFlight, -1);
        worker.counts.add(Metric::DecodeTokensInFlight, to_i64(self.tokens).saturating_neg());
    }
}

/// Shortest prompt whose usage is judged, tokens: engines hand over whole blocks and keep the last token for themselves.
pub(super) const JUDGED_TOKENS: u64 = 256;
/// Answers in a row that show a KV cache that came before the next one that does not is news.
const KV_DOUBTS: u8 = 32;

/// Compares what the decode endpoint had of a split prompt with all of it; a warning where that is news.
fn judge(worker: &mut Worker, endpoint: EndpointRef, usage: Usage) -> Option<Effect> {
    let cached = usage.cached_tokens.filter(|_| usage.prompt_tokens >= JUDGED_TOKENS)?;
    let is_moved = cached >= usage.prompt_tokens / 2;
    if !is_moved {
        worker.counts.count(Metric::KvNotMoved);
    }
    let slot = worker.state.table.resolve(endpoint)?;
    let is_news = !is_moved && slot.kv_doubts == 0;
    slot.kv_doubts = if is_moved { slot.kv_doubts.saturating_sub(1) } else { KV_DOUBTS };
    is_news.then(|| {
        let Usage { prompt_tokens, .. } = usage;
        Effect::Warn(format!(
            "{} had {cached} of the {prompt_tokens} tokens of a split prompt: KV caches do not reach it, prompts are \
             computed twice",
            slot.address
        ))
    })
}
