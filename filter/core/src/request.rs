//! One request's life: events in, effects out.
//!
//! ```text
//! New ─headers─▶ Reading ─body─▶ Prefilling ─answer─▶ Sent ─done─▶ Over
//!  │                │                │  └─ failed: the next prefill endpoint, else the pool's policy
//!  │                └─ served whole ─┴──────────────▶ Sent
//!  └─ nothing to read ──────────────────────────────▶ Sent            anywhere: Reply ─▶ Over
//! ```
//! Where an engine wants both legs at once, the request is Sent while its prefill leg is in flight, and the answer's
//! headers are held back until that leg has ended well: until then a failure can still become an error answer.
//!
//! The shell calls one method per Envoy callback and carries out the [`Outcome`]. Events that do not fit the state (late
//! answers, callbacks after a reply) change nothing.

use core::time::Duration;
use std::sync::Arc;

use crate::admission::{Ask, Limits, Shed, Ticket};
use crate::body::{Api, KeySet, Scan, scan};
use crate::config::{Config, EXPLAIN_HEADER, OnPrefillFailure, PHASE_HEADER, PREFILLER_HEADER, Split};
use crate::engine::{self, Handover, Pair, Shape};
use crate::fit::Usage;
use crate::headers::Headers;
use crate::index::EndpointIndex;
use crate::intake::{
    Claims, Intake, Phase, Subset, Work, candidates, decoded_path, endpoint_ids, is_ours, leg_headers,
    question_headers, read_body,
};
use crate::metrics::Metric;
use crate::reply::{Rejection, Reply};
use crate::schedule::{Decision, Partner, Pick, Prompt, Scheduler};
use crate::splice::{HeadEdit, HeadPlan};
use crate::table::{Candidates, EndpointRef};
use crate::wire::EndpointId;
use crate::worker::Worker;

/// Filter state that the route copies into the destination header: `ip:port[,ip:port…]`.
pub const DESTINATION: &str = "pd.destination";
/// Filter state that the route copies into `x-data-parallel-rank`: the rank behind the destination, if it has one.
pub const RANK: &str = "pd.rank";
/// Filter state that the route copies into `x-prefiller-host-port`, for a routing sidecar that runs the prefill leg.
pub const PREFILLER: &str = "pd.prefiller";
/// Filter state for the access log: `split`, `decode_only`, `prefill_only`, `passed` or `rejected`.
pub const DECISION: &str = "pd.decision";
/// Filter state for the access log: why, as a reason code.
pub const REASON: &str = "pd.reason";
/// Filter state for the access log: prefill endpoint.
pub const PREFILL: &str = "pd.prefill";
/// Filter state for the access log: decode endpoint that was chosen first.
pub const DECODE: &str = "pd.decode";
/// Filter state for the access log: prompt tokens thought to be cached where the prompt was computed.
pub const MATCHED_TOKENS: &str = "pd.matched_tokens";
/// Filter state for the access log: milliseconds from the first prefill leg to the decode leg.
pub const PREFILL_MS: &str = "pd.prefill_ms";
/// Filter state for an answer header: the candidates and why one of them was chosen, where a caller who is trusted to
/// asked by [`EXPLAIN_HEADER`].
pub const EXPLAIN: &str = "pd.explain";
/// Every filter state that a request may get.
pub const STATES: &[&str] =
    &[DESTINATION, RANK, PREFILLER, DECISION, REASON, PREFILL, DECODE, MATCHED_TOKENS, PREFILL_MS, EXPLAIN];

/// Answer header of a request whose prompt was computed twice, because the prefill leg's KV cache could not be handed
/// over: `missing`.
pub const KV_HEADER: &str = "x-pd-kv";
/// Answer header of a request whose endpoints a peer restricted: who served it.
pub const SERVED_HEADER: &str = "x-gateway-destination-endpoint-served";

/// How often Envoy tries to connect: once, and the route's `num_retries`. With fewer names in [`DESTINATION`] the last
/// tries would go to hosts of other pools.
const TRIES: usize = 3;

/// What becomes of the callback that an event came with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// The stream goes on.
    Continue,
    /// The stream waits: for more of the body, for an answer, or for its end after a reply.
    Pause,
}

/// Something for the shell to do, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Remove a request header. Headers phase only.
    RemoveHeader(Vec<u8>),
    /// Set a filter state.
    SetState(&'static str, Vec<u8>),
    /// Edit the front of the buffered request body.
    EditBody(HeadEdit),
    /// Run a prefill leg, or ask what one needs to know; its end comes back as [`Request::prefill_answer`].
    Call(Call),
    /// Add a header to the response whose headers are told.
    AddResponseHeader(&'static str, String),
    /// Tell the operator that something is degraded: once per change.
    Warn(String),
    /// Let the response go on that [`Request::response_headers`] held back.
    ResumeResponse,
    /// Answer the client.
    Reply(Reply),
}

/// A prefill leg, or the question before it.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// Envoy cluster.
    pub cluster: String,
    /// Headers, pseudo-headers included.
    pub headers: Headers,
    /// Body; empty: none.
    pub body: Vec<u8>,
    /// Time limit.
    pub timeout: Duration,
}

/// What an event leads to.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// What becomes of the callback. In an answer's callback `Continue` means: resume the request.
    pub flow: Flow,
    /// What to do first.
    pub effects: Vec<Effect>,
}

/// How a prefill leg ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefillAnswer<'a> {
    /// The host refused to start it, which says nothing about the endpoint.
    NotStarted,
    /// It ended without an answer.
    None,
    /// An answer came, from the engine or from Envoy.
    Answered {
        /// HTTP status.
        status: u16,
        /// `content-type`, if there is one.
        content_type: Option<&'a [u8]>,
        /// Body.
        body: &'a [u8],
    },
}

/// One request.
#[derive(Debug, Default)]
pub struct Request {
    state: State,
    /// Given back at the end, whatever way the stream ended.
    ticket: Option<Ticket>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    New,
    Reading(Box<Intake>),
    Prefilling(Box<Prefilling>),
    Sent(Box<Sent>),
    /// Nothing is counted, but the answer is to say who served it.
    Watched,
    Over,
}

/// A request that waits for its prefill leg.
#[derive(Debug)]
struct Prefilling {
    work: Work,
    tried: Vec<EndpointRef>,
    pick: Pick,
    endpoint: EndpointRef,
    partner: Partner,
    /// The leg; none yet while the endpoint's bootstrap server is asked for the engine's id.
    leg: Option<u64>,
    started: Duration,
}

/// A request that an engine endpoint serves.
#[derive(Debug)]
struct Sent {
    endpoint: EndpointRef,
    alternates: Vec<EndpointRef>,
    tokens: u64,
    /// The prompt's own work and where it is done, counted until the first byte; none where a leg of ours does it.
    own: Option<(EndpointRef, u64)>,
    /// The prefill leg, where it goes out with this one.
    companion: Option<Companion>,
    /// Whether the prompt is computed a second time.
    is_kv_missing: bool,
    /// Whether a peer restricted the endpoints, and wants to know who served.
    is_restricted: bool,
    response: Response,
    answered: bool,
}

/// A prefill leg in flight beside its decode leg.
#[derive(Clone, Copy, Debug)]
struct Companion {
    endpoint: EndpointRef,
    leg: u64,
    started: Duration,
}

/// How far the response's headers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Response {
    Awaited,
    /// They wait for the prefill leg.
    Held,
    /// The client has them.
    Passed,
}

/// Where a request goes, and why.
struct Route<'a> {
    decision: Metric,
    reason: &'static str,
    pick: Pick,
    alternates: Vec<EndpointIndex>,
    /// Who computes the prompt.
    prefill: Prefill,
    /// How the body becomes this leg's, and the members to put in front.
    plan: &'a HeadPlan,
    insert: &'a [u8],
}

/// Who computes a prompt.
enum Prefill {
    /// Whoever generates.
    Own,
    /// A leg that is through.
    Done(Pick, EndpointRef, Duration),
    /// A leg that goes out now.
    Beside(Pick, Companion),
    /// A sidecar sees to it.
    Sidecar(Pick, EndpointRef),
}

impl Prefill {
    fn endpoint(&self) -> Option<(Pick, EndpointRef)> {
        match self {
            Self::Own => None,
            Self::Done(pick, endpoint, _) | Self::Sidecar(pick, endpoint) => Some((*pick, *endpoint)),
            Self::Beside(pick, companion) => Some((*pick, companion.endpoint)),
        }
    }
}

impl Request {
    /// Request headers are there.
    pub fn headers(&mut self, worker: &mut Worker, headers: Headers, end_of_stream: bool, now: Duration) -> Outcome {
        let config = match &worker.config {
            Ok(config) => Arc::clone(config),
            Err(error) => {
                let rejection = Rejection::NotConfigured(error.to_string());
                return self.reject(worker, Vec::new(), &rejection);
            }
        };
        let mut effects = Vec::new();
        for (name, _) in headers.iter().filter(|(name, _)| is_ours(name, &config)) {
            worker.counts.count(Metric::HeadersStripped);
            effects.push(Effect::RemoveHeader(name.to_vec()));
        }
        let is_post = headers.get(":method") == Some(b"POST");
        let api = headers.get(":path").and_then(|path| Api::of_path(&decoded_path(path))).filter(|_| is_post);
        let multipart = headers.get("content-type").is_some_and(|value| value.starts_with(b"multipart/"));
        let subset = Subset::read(&headers, &config);
        let is_get = headers.get(":method") == Some(b"GET");
        if is_get
            && worker.table.names_all_models()
            && headers.get(":path").is_some_and(|path| decoded_path(path) == MODELS_PATH)
        {
            worker.counts.count(Metric::RequestsPassed);
            return self.answer_models(worker, effects);
        }
        if api.is_none() && (end_of_stream || multipart) {
            return self.pass(worker, &config, subset.as_ref(), effects, now);
        }
        let phase = match headers.get(PHASE_HEADER).filter(|_| config.trusts(PHASE_HEADER)) {
            None => None,
            Some(b"prefill") => Some(Phase::Prefill),
            Some(b"decode") => Some(Phase::Decode),
            Some(_) => return self.reject(worker, effects, &Rejection::InvalidPhase),
        };
        if api.is_some() && end_of_stream {
            return self.reject(
                worker,
                effects,
                &Rejection::InvalidJson("invalid JSON: the request has no body".to_owned()),
            );
        }
        if api.is_some() && headers.get("content-encoding").is_some_and(|value| value != b"identity") {
            return self.reject(worker, effects, &Rejection::ContentEncoding);
        }
        if let Some(declared) = headers.get("content-length") {
            let bytes = core::str::from_utf8(declared).ok().and_then(|text| text.parse::<u64>().ok());
            if bytes.is_some_and(|bytes| bytes > config.max_body_bytes as u64) {
                return self.reject(worker, effects, &Rejection::TooLarge(config.max_body_bytes));
            }
            // The body may change; the buffer filter puts the right length back.
            effects.push(Effect::RemoveHeader(b"content-length".to_vec()));
        }
        let prefiller = headers.get(PREFILLER_HEADER).filter(|_| config.trusts(PREFILLER_HEADER)).map(endpoint_ids);
        let claims = Claims::read(&headers, &config);
        self.state = State::Reading(Box::new(Intake { config, headers, api, phase, prefiller, claims, subset }));
        Outcome { flow: Flow::Continue, effects }
    }

    /// A part of the body came, `bytes` are there, more will come.
    pub fn body_part(&mut self, worker: &mut Worker, bytes: usize) -> Outcome {
        match &self.state {
            State::Reading(intake) if bytes > intake.config.max_body_bytes => {
                let rejection = Rejection::TooLarge(intake.config.max_body_bytes);
                self.reject(worker, Vec::new(), &rejection)
            }
            State::Reading(_) | State::Prefilling(_) => Outcome { flow: Flow::Pause, effects: Vec::new() },
            State::New | State::Sent(_) | State::Watched | State::Over => GO_ON,
        }
    }

    /// Whether the body is wanted once it is complete.
    #[must_use]
    pub fn wants_body(&self) -> bool {
        matches!(self.state, State::Reading(_))
    }

    /// Whether the request waits for its prefill leg.
    #[must_use]
    pub fn is_prefilling(&self) -> bool {
        matches!(self.state, State::Prefilling(_))
    }

    /// Whether the end of a call is awaited, with the request held back or under way.
    #[must_use]
    pub fn awaits_call(&self) -> bool {
        match &self.state {
            State::Prefilling(_) => true,
            State::Sent(sent) => sent.companion.is_some(),
            State::New | State::Reading(_) | State::Watched | State::Over => false,
        }
    }

    /// The body is complete.
    pub fn body(&mut self, worker: &mut Worker, body: &[u8], now: Duration) -> Outcome {
        let intake = match core::mem::take(&mut self.state) {
            State::Reading(intake) => *intake,
            other => {
                self.state = other;
                return GO_ON;
            }
        };
        if body.len() > intake.config.max_body_bytes {
            return self.reject(worker, Vec::new(), &Rejection::TooLarge(intake.config.max_body_bytes));
        }
        let scanned = scan(body);
        let Some(api) = intake.api else {
            let edit = match scanned {
                Ok(scan) => engine::decode_plan(body, &scan, KeySet::EMPTY).with_insert(b""),
                Err(error) if intake.may_be_object(body) => {
                    return self.reject(worker, Vec::new(), &Rejection::InvalidJson(error.to_string()));
                }
                Err(_) => Default::default(),
            };
            let effects = if edit.is_none() { Vec::new() } else { vec![Effect::EditBody(edit)] };
            return self.pass(worker, &intake.config, intake.subset.as_ref(), effects, now);
        };
        match scanned.map_err(|error| Rejection::InvalidJson(error.to_string())) {
            Ok(scan) => {
                let Intake { config, headers, phase, prefiller, claims, subset, .. } = intake;
                match read_body(worker, config, headers, api, subset, body, &scan) {
                    Ok(work) => match self.admit(worker, &work, claims) {
                        Ok(()) => self.decide(worker, work, phase, prefiller.as_deref(), claims, (body, &scan), now),
                        Err(shed) => self.shed(worker, shed),
                    },
                    Err(rejection) => self.reject(worker, Vec::new(), &rejection),
                }
            }
            Err(rejection) => self.reject(worker, Vec::new(), &rejection),
        }
    }

    /// A call ended: a prefill leg, or the question before one. `body` is the client's body, read again where another
    /// leg needs it.
    pub fn prefill_answer<B: AsRef<[u8]>>(
        &mut self,
        worker: &mut Worker,
        answer: PrefillAnswer<'_>,
        body: impl FnOnce() -> Option<B>,
        now: Duration,
    ) -> Outcome {
        match core::mem::take(&mut self.state) {
            State::Prefilling(state) => self.prefill_ended(worker, *state, answer, body, now),
            State::Sent(mut sent) if sent.companion.is_some() => {
                let outcome = self.companion_ended(worker, &mut sent, answer, now);
                if !matches!(self.state, State::Over) {
                    self.state = State::Sent(sent);
                }
                outcome
            }
            other => {
                self.state = other;
                WAIT
            }
        }
    }

    fn prefill_ended<B: AsRef<[u8]>>(
        &mut self,
        worker: &mut Worker,
        mut state: Prefilling,
        answer: PrefillAnswer<'_>,
        body: impl FnOnce() -> Option<B>,
        now: Duration,
    ) -> Outcome {
        let mut seconds = None;
        if let Some(leg) = state.leg {
            seconds = leg_ended(worker, state.endpoint, leg, &answer, now);
        }
        // The list may have changed since the leg began: its places may be other endpoints' now.
        let current = candidates(&worker.table, &state.work.model, state.work.subset.as_ref());
        state.work.candidates = current.unwrap_or_else(|_| {
            Arc::new(Candidates { pool: Arc::clone(&state.work.candidates.pool), ..Candidates::default() })
        });
        let mut body = Some(body);
        let mut read_again = || body.take().and_then(|body| body());
        match (&answer, answer.fault()) {
            (PrefillAnswer::Answered { status: 200, body: answer, .. }, None) if state.leg.is_some() => {
                let Prompt { bytes, tokens, .. } = state.work.prompt;
                let thought = (bytes as f64, tokens, state.pick.matched_tokens);
                worker.table.saw_prefill(state.endpoint, thought, seconds, Usage::of_answer(answer));
                let handover = engine::handover(state.partner.engine, state.work.api, answer);
                return self.prefilled(worker, &state, &handover, read_again, now);
            }
            (PrefillAnswer::Answered { status: 200, body: answer, .. }, None) => {
                let slot = worker.table.resolve(state.endpoint);
                if let Some(slot) = slot
                    && let Some(id) = engine::engine_id(answer, slot.endpoint.rank)
                {
                    slot.engine_id = Some(id.into());
                    if let Some(body) = read_again()
                        && let Ok(scan) = scan(body.as_ref())
                    {
                        let Prefilling { work, tried, pick, started, .. } = state;
                        return self.split(worker, work, tried, pick, (body.as_ref(), &scan), started, now);
                    }
                }
            }
            (PrefillAnswer::Answered { status, content_type, body }, None) if state.leg.is_some() => {
                return self.pass_on(worker, *status, *content_type, body);
            }
            _ => {
                if state.leg.is_none()
                    && answer.fault() == Some(Fault::Unreachable)
                    && let Some(slot) = worker.table.resolve(state.endpoint)
                {
                    slot.health.failed(now);
                }
            }
        }
        state.tried.push(state.endpoint);
        let pool = state.work.pool();
        let next = (state.tried.len() < pool.prefill_attempts as usize)
            .then(|| {
                let scheduler = Scheduler { table: &worker.table, index: &worker.index, pool, now };
                let is_there = |tried: &&EndpointRef| worker.table.refer(tried.index) == Some(**tried);
                let tried: Vec<_> = state.tried.iter().filter(is_there).map(|tried| tried.index).collect();
                scheduler.pick_by_cost(&state.work.candidates.prefill, &state.work.prompt, &tried)
            })
            .flatten();
        if let Some(pick) = next
            && let Some(body) = read_again()
            && let Ok(scan) = scan(body.as_ref())
        {
            if !worker.retries.spend() {
                worker.counts.count(Metric::RetriesDenied);
                return self.give_up(worker, &state.work, now);
            }
            worker.counts.count(Metric::PrefillRetries);
            let Prefilling { work, tried, started, .. } = state;
            return self.split(worker, work, tried, pick, (body.as_ref(), &scan), started, now);
        }
        self.give_up(worker, &state.work, now)
    }

    /// No prefill endpoint could be had: what the pool's policy says.
    fn give_up(&mut self, worker: &mut Worker, work: &Work, now: Duration) -> Outcome {
        worker.counts.count(Metric::PrefillGivenUp);
        let Work { candidates, prompt, plan, .. } = work;
        let pool = work.pool();
        let scheduler = Scheduler { table: &worker.table, index: &worker.index, pool, now };
        let picked = match pool.on_prefill_failure {
            OnPrefillFailure::Fail => None,
            OnPrefillFailure::DecodeOnly => scheduler.pick_decode(&candidates.whole, prompt, &[], None),
        };
        let Some((pick, alternates)) = picked else {
            return self.reject(worker, Vec::new(), &Rejection::PrefillFailed);
        };
        let (decision, reason) = (Metric::RequestsDecodeOnly, "prefill_failed");
        let route = Route { decision, reason, pick, alternates, prefill: Prefill::Own, plan, insert: b"" };
        self.send(worker, work, route, now)
    }

    /// The prefill leg beside the decode leg ended. The decode leg waits for a KV cache that a failed one never sends:
    /// the client gets an error at once.
    fn companion_ended(
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

    /// Whether [`response_headers`](Self::response_headers) wants to know the status.
    #[must_use]
    pub fn wants_status(&self) -> bool {
        matches!(&self.state, State::Sent(sent) if sent.companion.is_some())
    }

    /// Response headers are there; `upstream` is the address of the endpoint that answered, if one did, `status` what
    /// it said, where that is [wanted](Self::wants_status).
    pub fn response_headers(
        &mut self,
        worker: &mut Worker,
        upstream: Option<&[u8]>,
        status: Option<u16>,
        now: Duration,
    ) -> Outcome {
        let served = upstream.and_then(|upstream| core::str::from_utf8(upstream).ok());
        let served = served.map(|upstream| Effect::AddResponseHeader(SERVED_HEADER, upstream.to_owned()));
        let sent = match &mut self.state {
            State::Sent(sent) => sent,
            State::Watched => {
                self.state = State::Over;
                return Outcome { flow: Flow::Continue, effects: served.into_iter().collect() };
            }
            _ => return GO_ON,
        };
        sent.answered_by(worker, upstream, now);
        let mut effects: Vec<Effect> = served.filter(|_| sent.is_restricted).into_iter().collect();
        if sent.is_kv_missing {
            effects.push(Effect::AddResponseHeader(KV_HEADER, "missing".to_owned()));
        }
        // A refusal does not wait for the KV cache.
        let is_held = sent.companion.is_some() && upstream.is_some() && status == Some(200);
        sent.response = if is_held { Response::Held } else { Response::Passed };
        Outcome { flow: if is_held { Flow::Pause } else { Flow::Continue }, effects }
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

    /// The stream is over, whatever way it ended. Everything that was counted for it is taken back.
    pub fn done(&mut self, worker: &mut Worker, now: Duration) {
        if let Some(ticket) = self.ticket.take() {
            worker.admission.release(ticket);
        }
        match core::mem::replace(&mut self.state, State::Over) {
            State::Sent(mut sent) => {
                sent.uncount(worker);
                sent.release(worker, now);
                if let Some(Companion { endpoint, leg, .. }) = sent.companion {
                    abandon(worker, endpoint, leg, now);
                }
            }
            State::Prefilling(state) => {
                if let Some(leg) = state.leg {
                    abandon(worker, state.endpoint, leg, now);
                }
            }
            State::New | State::Reading(_) | State::Watched | State::Over => {}
        }
    }

    /// Lets the request in, where its pool has limits.
    fn admit(&mut self, worker: &mut Worker, work: &Work, claims: Claims) -> Result<(), Shed> {
        let limits = work.pool().limits;
        if limits != Limits::default() {
            let tokens = (work.prompt.tokens as u64).saturating_add(work.output_tokens);
            let ask = Ask { tokens, priority: claims.priority, fairness: claims.fairness };
            self.ticket = Some(worker.admission.admit(&work.candidates.pool, limits, ask)?);
        }
        Ok(())
    }

    fn shed(&mut self, worker: &mut Worker, shed: Shed) -> Outcome {
        worker.counts.count(shed.metric());
        self.reject(worker, Vec::new(), &Rejection::Shed(shed))
    }

    #[expect(clippy::too_many_arguments, reason = "what headers and body said")]
    fn decide(
        &mut self,
        worker: &mut Worker,
        work: Work,
        phase: Option<Phase>,
        prefiller: Option<&[EndpointId]>,
        claims: Claims,
        body: (&[u8], &Scan),
        now: Duration,
    ) -> Outcome {
        let Work { candidates, prompt, .. } = &work;
        let hint = prefiller.and_then(|ids| hinted(worker, ids, candidates));
        if prefiller.is_some() && hint.is_none() && phase.is_none() {
            worker.counts.count(Metric::HintsIgnored);
        }
        let scheduler = Scheduler { table: &worker.table, index: &worker.index, pool: work.pool(), now };
        let is_asked = work.config.trusts(EXPLAIN_HEADER) && work.headers.get(EXPLAIN_HEADER).is_some();
        let explained = is_asked.then(|| scheduler.explain(candidates, prompt));
        let mut outcome = self.decided(worker, work, phase, hint, claims, body, now);
        if let Some(explained) = explained {
            outcome.effects.insert(0, Effect::SetState(EXPLAIN, explained.into_bytes()));
        }
        outcome
    }

    #[expect(clippy::too_many_arguments, reason = "what headers and body said")]
    fn decided(
        &mut self,
        worker: &mut Worker,
        work: Work,
        phase: Option<Phase>,
        hint: Option<EndpointIndex>,
        claims: Claims,
        body: (&[u8], &Scan),
        now: Duration,
    ) -> Outcome {
        let Work { candidates, prompt, plan, .. } = &work;
        let scheduler = Scheduler { table: &worker.table, index: &worker.index, pool: work.pool(), now };
        let prefill = Prefill::Own;
        let route = match phase {
            Some(Phase::Prefill) => {
                let (decision, reason) = (Metric::RequestsPrefillOnly, "phase_header");
                scheduler.pick_by_cost(&candidates.prefill, prompt, &[]).map(|pick| {
                    let alternates = scheduler.alternates(&candidates.prefill, prompt, pick.endpoint);
                    Route { decision, reason, pick, alternates, prefill, plan, insert: b"" }
                })
            }
            Some(Phase::Decode) => {
                let (decision, reason) = (Metric::RequestsDecodeOnly, "phase_header");
                let among = if candidates.decode.is_empty() { &candidates.whole } else { &candidates.decode };
                scheduler.pick_decode(among, prompt, &[], None).map(|(pick, alternates)| Route {
                    decision,
                    reason,
                    pick,
                    alternates,
                    prefill,
                    plan,
                    insert: b"",
                })
            }
            None => {
                let hinted = hint.and_then(|endpoint| scheduler.pick_by_cost(&[endpoint], prompt, &[]));
                let decision = hinted.map_or_else(|| scheduler.decide(candidates, prompt), Decision::Split);
                if let (Some(deadline), Decision::Split(pick) | Decision::Whole(pick, _)) = (claims.deadline, decision)
                    && let Some(slot) = worker.table.get(pick.endpoint)
                    && slot.prefill.work(now) + pick.seconds > deadline.as_secs_f64()
                {
                    return self.shed(worker, Shed::Deadline);
                }
                match decision {
                    Decision::Nobody => None,
                    Decision::Whole(pick, reason) => {
                        let alternates = scheduler.alternates(&candidates.whole, prompt, pick.endpoint);
                        let (decision, reason) = (Metric::RequestsDecodeOnly, reason.code());
                        Some(Route { decision, reason, pick, alternates, prefill, plan, insert: b"" })
                    }
                    Decision::Split(pick) => return self.split(worker, work, Vec::new(), pick, body, now, now),
                }
            }
        };
        match route {
            Some(route) => self.send(worker, &work, route, now),
            None => self.reject(worker, Vec::new(), &Rejection::NoEndpoint),
        }
    }

    /// Starts the prefill leg at a chosen endpoint, in the order of legs that its engine has.
    #[expect(clippy::too_many_arguments, reason = "the parts of one leg; a struct for them would be used once")]
    fn split(
        &mut self,
        worker: &mut Worker,
        work: Work,
        tried: Vec<EndpointRef>,
        pick: Pick,
        (body, scan): (&[u8], &Scan),
        started: Duration,
        now: Duration,
    ) -> Outcome {
        let (Some(endpoint), Some(slot)) = (worker.table.refer(pick.endpoint), worker.table.get(pick.endpoint)) else {
            return self.reject(worker, Vec::new(), &Rejection::NoEndpoint);
        };
        let partner = Partner::of(slot);
        let (engine, shape) = (slot.engine, slot.engine.shape());
        if engine.lists_sequences() && work.batch.is_some_and(|batch| batch > engine::MAX_SEQUENCES) {
            return self.reject(worker, Vec::new(), &Rejection::TooManySequences(engine::MAX_SEQUENCES));
        }
        if engine.needs_engine_id() && slot.engine_id.is_none() {
            let server = slot.bootstrap.to_string();
            let call = Call {
                cluster: work.config.bootstrap_cluster.clone(),
                headers: question_headers(&work.config, engine::ENGINE_ID_PATH, &server),
                body: Vec::new(),
                timeout: QUESTION_TIMEOUT,
            };
            let state = Prefilling { work, tried, pick, endpoint, partner, leg: None, started };
            self.state = State::Prefilling(Box::new(state));
            return Outcome { flow: Flow::Pause, effects: vec![Effect::Call(call)] };
        }
        if tried.is_empty() {
            worker.retries.earn();
        }
        if shape == Shape::Sequential {
            let (call, leg) = start_leg(worker, &work, &tried, pick, None, (body, scan), now);
            let state = Prefilling { work, tried, pick, endpoint, partner, leg: Some(leg), started };
            self.state = State::Prefilling(Box::new(state));
            return Outcome { flow: Flow::Pause, effects: vec![Effect::Call(call)] };
        }
        let scheduler = Scheduler { table: &worker.table, index: &worker.index, pool: work.pool(), now };
        let Work { candidates, prompt, plan, .. } = &work;
        let Some((decode, alternates)) = scheduler.pick_decode(&candidates.decode, prompt, &[], Some(&partner)) else {
            return self.reject(worker, Vec::new(), &Rejection::NoEndpoint);
        };
        let (decision, reason) = (Metric::RequestsSplit, if shape == Shape::OneLeg { "sidecar" } else { "concurrent" });
        let mut route = Route { decision, reason, pick: decode, alternates, prefill: Prefill::Own, plan, insert: b"" };
        if shape == Shape::OneLeg {
            route.prefill = Prefill::Sidecar(pick, endpoint);
            enter(worker, pick.endpoint, prompt);
            return self.send(worker, &work, route, now);
        }
        let id = worker.pair_id(work.headers.get("x-request-id").unwrap_or_default(), now);
        let members = with_pair(worker, &work, pick, id, |pair| engine::decode_members(engine, pair));
        if plan.with_insert(&members).edited_bytes(work.body_bytes) > work.config.max_body_bytes {
            return self.reject(worker, Vec::new(), &Rejection::TooLarge(work.config.max_body_bytes));
        }
        let (call, leg) = start_leg(worker, &work, &tried, pick, Some(id), (body, scan), now);
        route.prefill = Prefill::Beside(pick, Companion { endpoint, leg, started });
        route.insert = &members;
        let mut outcome = self.send(worker, &work, route, now);
        outcome.effects.insert(0, Effect::Call(call));
        outcome
    }

    /// The prompt is computed: on to a decode endpoint.
    fn prefilled<B: AsRef<[u8]>>(
        &mut self,
        worker: &mut Worker,
        state: &Prefilling,
        handover: &Handover,
        read_again: impl FnOnce() -> Option<B>,
        now: Duration,
    ) -> Outcome {
        let Work { plan, body_bytes, config, candidates, prompt, .. } = &state.work;
        let replaced = match handover {
            Handover::Insert { drop, .. } if !drop.is_empty() => read_again().and_then(|body| {
                let scan = scan(body.as_ref()).ok()?;
                Some(engine::decode_plan(body.as_ref(), &scan, *drop))
            }),
            _ => None,
        };
        let spliced = replaced.as_ref().unwrap_or(plan);
        let fits = |members: &[u8]| spliced.with_insert(members).edited_bytes(*body_bytes) <= config.max_body_bytes;
        let mut warning = None;
        if let Some(slot) = worker.table.resolve(state.endpoint) {
            let is_missing = *handover == Handover::Missing;
            if is_missing && !slot.is_kv_missing {
                warning =
                    Some(format!("{} gives no usable KV parameters: its prompts are computed twice", slot.address));
            }
            slot.is_kv_missing = is_missing;
        }
        let (reason, plan, insert): (_, _, &[u8]) = match handover {
            // Envoy does not survive a paused body that an edit makes larger than the buffer filter's limit.
            Handover::Insert { members, .. } if fits(members) => ("prefilled", spliced, members),
            Handover::Nothing => ("prefilled", plan, b""),
            Handover::Insert { .. } | Handover::Missing => {
                worker.counts.count(Metric::KvMissing);
                (KV_MISSING, plan, b"")
            }
        };
        let scheduler = Scheduler { table: &worker.table, index: &worker.index, pool: state.work.pool(), now };
        let Some((pick, alternates)) = scheduler.pick_decode(&candidates.decode, prompt, &[], Some(&state.partner))
        else {
            return self.reject(worker, Vec::new(), &Rejection::NoEndpoint);
        };
        let prefill = Prefill::Done(state.pick, state.endpoint, state.started);
        let route = Route { decision: Metric::RequestsSplit, reason, pick, alternates, prefill, plan, insert };
        let mut outcome = self.send(worker, &state.work, route, now);
        outcome.effects.extend(warning.map(Effect::Warn));
        outcome
    }

    /// Sends the request to an engine endpoint.
    fn send(&mut self, worker: &mut Worker, work: &Work, route: Route<'_>, now: Duration) -> Outcome {
        let Route { decision, reason, pick, alternates, prefill, plan, insert } = route;
        // Named often enough for every try of Envoy's: beyond the last name it would take any host of the cluster.
        let others = core::iter::repeat_n(core::iter::once(pick.endpoint).chain(alternates.iter().copied()), TRIES);
        let others = others.flatten().skip(1).take(alternates.len().max(TRIES.saturating_sub(1)));
        let destination = destination(worker, pick.endpoint, others);
        let alternates = alternates.iter().filter_map(|at| worker.table.refer(*at)).collect();
        let tokens = (work.prompt.tokens as u64).saturating_add(work.output_tokens);
        let leg = worker.next_leg();
        let (Some(endpoint), Some(slot)) = (worker.table.refer(pick.endpoint), worker.table.get_mut(pick.endpoint))
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
        if let Prefill::Done(_, _, started) = prefill {
            effects.push(prefill_ms(worker, started, now));
        }
        if let Some((_, endpoint)) = prefill.endpoint()
            && let Some(slot) = worker.table.resolve(endpoint)
        {
            effects.push(Effect::SetState(PREFILL, slot.address.as_bytes().to_vec()));
            if matches!(prefill, Prefill::Sidecar(..)) {
                effects.push(Effect::SetState(PREFILLER, slot.address.as_bytes().to_vec()));
            }
        }
        let edit = plan.with_insert(insert);
        if !edit.is_none() {
            effects.push(Effect::EditBody(edit));
        }
        let companion = if let Prefill::Beside(_, companion) = prefill { Some(companion) } else { None };
        let (response, is_kv_missing) = (Response::Awaited, reason == KV_MISSING);
        let is_restricted = work.subset.is_some();
        let sent = Sent {
            endpoint,
            alternates,
            tokens,
            own,
            companion,
            is_kv_missing,
            is_restricted,
            response,
            answered: false,
        };
        self.state = State::Sent(Box::new(sent));
        Outcome { flow: Flow::Continue, effects }
    }

    /// Sends a request without a prompt to whoever has the least to do.
    fn pass(
        &mut self,
        worker: &mut Worker,
        config: &Config,
        subset: Option<&Subset>,
        mut effects: Vec<Effect>,
        now: Duration,
    ) -> Outcome {
        let key = worker.next_leg();
        let prompt = Prompt { key: key.wrapping_mul(0x9e37_79b9_7f4a_7c15), ..Prompt::default() };
        let scheduler = Scheduler { table: &worker.table, index: &worker.index, pool: config.pool("default"), now };
        let is_allowed = |at: &EndpointIndex| {
            worker.table.get(*at).is_some_and(|slot| subset.is_none_or(|subset| subset.allows(slot)))
        };
        let restricted: Vec<EndpointIndex>;
        let mut among = worker.table.all_ready();
        if subset.is_some() {
            restricted = among.iter().copied().filter(is_allowed).collect();
            among = &restricted;
        }
        let Some((pick, alternates)) = scheduler.pick_decode(among, &prompt, &[], None) else {
            return self.reject(worker, effects, &Rejection::NoEndpoint);
        };
        let destination = destination(worker, pick.endpoint, alternates.iter().copied());
        effects.push(Effect::SetState(DESTINATION, destination.into_bytes()));
        effects.push(Effect::SetState(DECISION, decision_name(Metric::RequestsPassed).into()));
        worker.counts.count(Metric::RequestsPassed);
        self.state = if subset.is_some() { State::Watched } else { State::Over };
        Outcome { flow: Flow::Continue, effects }
    }

    /// Lists the models of all endpoints, where each says which it serves: no single engine knows them all.
    fn answer_models(&mut self, worker: &Worker, mut effects: Vec<Effect>) -> Outcome {
        let card =
            |name: &str| serde_json::json!({"id": name, "object": "model", "created": 0, "owned_by": "envoy-pd"});
        let data: Vec<_> = worker.table.model_names().into_iter().map(card).collect();
        let body = serde_json::json!({"object": "list", "data": data}).to_string().into_bytes();
        let headers = vec![("content-type", "application/json".to_owned())];
        self.state = State::Over;
        effects.push(Effect::SetState(DECISION, decision_name(Metric::RequestsPassed).into()));
        effects.push(Effect::SetState(REASON, MODELS.into()));
        effects.push(Effect::Reply(Reply { status: 200, headers, body, reason: MODELS }));
        Outcome { flow: Flow::Pause, effects }
    }

    /// Passes an engine's own refusal on.
    fn pass_on(&mut self, worker: &mut Worker, status: u16, content_type: Option<&[u8]>, body: &[u8]) -> Outcome {
        worker.counts.count(Metric::RequestsRejected);
        self.answer(engines_reply(status, content_type, body), Vec::new())
    }

    fn reject(&mut self, worker: &mut Worker, effects: Vec<Effect>, rejection: &Rejection) -> Outcome {
        worker.counts.count(Metric::RequestsRejected);
        self.answer(rejection.reply(), effects)
    }

    fn answer(&mut self, reply: Reply, mut effects: Vec<Effect>) -> Outcome {
        self.state = State::Over;
        effects.push(Effect::SetState(DECISION, decision_name(Metric::RequestsRejected).into()));
        effects.push(Effect::SetState(REASON, reply.reason.into()));
        effects.push(Effect::Reply(reply));
        Outcome { flow: Flow::Pause, effects }
    }
}

const GO_ON: Outcome = Outcome { flow: Flow::Continue, effects: Vec::new() };
const WAIT: Outcome = Outcome { flow: Flow::Pause, effects: Vec::new() };

/// Path that lists models, and the reason code of the filter's own list.
const MODELS_PATH: &[u8] = b"/v1/models";
const MODELS: &str = "models";
/// Reason code of a split whose KV cache could not be handed over.
const KV_MISSING: &str = "kv_missing";

/// How long a bootstrap server may take to tell an engine's id, which it has in memory.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(2);

impl Sent {
    /// Notes who answered: the endpoint that was chosen, the alternate that Envoy went on to, or nobody.
    fn answered_by(&mut self, worker: &mut Worker, upstream: Option<&[u8]>, now: Duration) {
        let mut answers = |reference: &EndpointRef| {
            let slot = worker.table.resolve(*reference).filter(|slot| Some(slot.address.as_bytes()) == upstream);
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
    fn release(&mut self, worker: &mut Worker, now: Duration) {
        self.end_own(worker, now);
        worker.decode_ended(self.endpoint, self.tokens);
    }

    /// The prompt has been computed, or never will be.
    fn end_own(&mut self, worker: &mut Worker, now: Duration) {
        if let Some((endpoint, leg)) = self.own.take() {
            worker.prefill_ended(endpoint, leg, now);
        }
    }

    /// Takes the request out of the gauges.
    fn uncount(&self, worker: &mut Worker) {
        worker.counts.add(Metric::DecodeInFlight, -1);
        worker.counts.add(Metric::DecodeTokensInFlight, to_i64(self.tokens).saturating_neg());
    }
}

/// A prefill leg as a call, and its number in the ledger.
fn start_leg(
    worker: &mut Worker,
    work: &Work,
    tried: &[EndpointRef],
    pick: Pick,
    pair_id: Option<u64>,
    (body, scan): (&[u8], &Scan),
    now: Duration,
) -> (Call, u64) {
    let leg = worker.next_leg();
    let pool = work.pool();
    let mut alternates = Vec::new();
    if pair_id.is_none() {
        // A host that Envoy does not know yet is skipped: the next one must be a prefill endpoint too. Where the decode
        // leg has been told which one it is, no other will do.
        let scheduler = Scheduler { table: &worker.table, index: &worker.index, pool, now };
        alternates = scheduler.alternates(&work.candidates.prefill, &work.prompt, pick.endpoint);
        alternates.retain(|at| worker.table.refer(*at).is_some_and(|at| !tried.contains(&at)));
    }
    let destination = destination(worker, pick.endpoint, alternates.into_iter());
    let id = pair_id.unwrap_or_else(|| worker.pair_id(work.headers.get("x-request-id").unwrap_or_default(), now));
    let engine = worker.table.get(pick.endpoint).map_or(pool.engine, |slot| slot.engine);
    let body = with_pair(worker, work, pick, id, |pair| engine::prefill_body(engine, work.api, body, scan, pair));
    let mut rank = None;
    if let Some(slot) = worker.table.get_mut(pick.endpoint) {
        slot.health.sent(now);
        rank = slot.endpoint.rank;
    }
    if let Some(endpoint) = worker.table.refer(pick.endpoint) {
        worker.prefill_started(endpoint, leg, pick.seconds, now, now.saturating_add(pool.prefill_timeout));
    }
    enter(worker, pick.endpoint, &work.prompt);
    worker.counts.add(Metric::PrefillInFlight, 1);
    let headers = leg_headers(&work.headers, &work.config, destination.as_bytes(), rank);
    let timeout = pool.prefill_timeout;
    (Call { cluster: work.config.cluster.clone(), headers, body, timeout }, leg)
}

/// What is made of that which both legs are told of the prefill endpoint.
fn with_pair<T: Default>(worker: &Worker, work: &Work, pick: Pick, id: u64, make: impl FnOnce(&Pair<'_>) -> T) -> T {
    let Some(slot) = worker.table.get(pick.endpoint) else { return T::default() };
    let engine_id = slot.engine_id.as_deref().unwrap_or_default();
    make(&Pair { bootstrap: slot.bootstrap, rank: slot.endpoint.rank, engine_id, id, batch: work.batch })
}

/// Takes a prefill leg out of the ledger and notes how it went; the seconds that the endpoint spent on it, where known.
fn leg_ended(
    worker: &mut Worker,
    endpoint: EndpointRef,
    leg: u64,
    answer: &PrefillAnswer<'_>,
    now: Duration,
) -> Option<f64> {
    worker.counts.add(Metric::PrefillInFlight, -1);
    let fault = answer.fault();
    worker.counts.count(match (fault, answer) {
        (Some(Fault::NotStarted | Fault::Unreachable), _) => Metric::PrefillRefused,
        (Some(Fault::ServerError), _) => Metric::PrefillServerError,
        (None, PrefillAnswer::Answered { status: 200, .. }) => Metric::PrefillOk,
        (None, _) => Metric::PrefillClientError,
    });
    let seconds = worker.table.resolve(endpoint).and_then(|slot| slot.prefill.service_seconds(leg, now));
    worker.prefill_ended(endpoint, leg, now);
    match fault {
        Some(Fault::Unreachable) => {
            worker.failed(endpoint, now);
            if let Some(slot) = worker.table.resolve(endpoint) {
                slot.engine_id = None;
            }
        }
        Some(Fault::NotStarted) => {}
        Some(Fault::ServerError) | None => worker.answered(endpoint),
    }
    seconds
}

/// Nobody waits for a prefill leg any more.
fn abandon(worker: &mut Worker, endpoint: EndpointRef, leg: u64, now: Duration) {
    worker.counts.add(Metric::PrefillInFlight, -1);
    worker.counts.count(Metric::KvStranded);
    worker.prefill_abandoned(endpoint, leg, now);
}

/// The time that a prefill leg took, as filter state.
fn prefill_ms(worker: &mut Worker, started: Duration, now: Duration) -> Effect {
    let ms = u64::try_from(now.saturating_sub(started).as_millis()).unwrap_or(u64::MAX);
    worker.counts.record(Metric::PrefillMs, ms);
    Effect::SetState(PREFILL_MS, ms.to_string().into_bytes())
}

/// An engine's own answer to the prefill leg, for the client.
fn engines_reply(status: u16, content_type: Option<&[u8]>, body: &[u8]) -> Reply {
    let content_type = content_type.and_then(|value| core::str::from_utf8(value).ok());
    let headers = vec![("content-type", content_type.unwrap_or("application/json").to_owned())];
    Reply { status, headers, body: body.to_vec(), reason: "prefill_answer" }
}

/// Why a prefill leg is worth another try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The host would not send it: too many headers, an open circuit breaker, no cluster.
    NotStarted,
    /// The endpoint did not answer: it is out for its next requests.
    Unreachable,
    /// It answered that it cannot now. Overload is no reason to stay away from it.
    ServerError,
}

impl PrefillAnswer<'_> {
    fn fault(&self) -> Option<Fault> {
        match self {
            PrefillAnswer::NotStarted => Some(Fault::NotStarted),
            PrefillAnswer::None => Some(Fault::Unreachable),
            PrefillAnswer::Answered { status: 502..=504, body, .. } if is_envoys(body) => Some(Fault::Unreachable),
            PrefillAnswer::Answered { status: 500.. | 408 | 429, .. } => Some(Fault::ServerError),
            PrefillAnswer::Answered { .. } => None,
        }
    }
}

/// Whether an answer's body is Envoy's own: a connect failure, a reset or a time-out reaches a call-out as an answer.
fn is_envoys(body: &[u8]) -> bool {
    const OWN: [&[u8]; 3] = [b"upstream connect error", b"upstream request timeout", b"no healthy upstream"];
    body.is_empty() || OWN.iter().any(|text| body.starts_with(text))
}

/// Records that an endpoint has the prompt, and its session.
fn enter(worker: &mut Worker, endpoint: EndpointIndex, prompt: &Prompt) {
    if let Some(endpoint) = worker.table.refer(endpoint) {
        worker.holds(endpoint, &prompt.hash.blocks);
        if prompt.session.is_some() {
            worker.holds(endpoint, prompt.session.as_slice());
        }
    }
}

/// `ip:port[,ip:port…]`.
fn destination(worker: &Worker, first: EndpointIndex, others: impl Iterator<Item = EndpointIndex>) -> String {
    let mut text = String::with_capacity(64);
    for slot in core::iter::once(first).chain(others).filter_map(|at| worker.table.get(at)) {
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(&slot.address);
    }
    text
}

/// The prefill endpoint that a trusted peer names, if it is one of the candidates. A name without a rank is any rank's.
fn hinted(worker: &Worker, ids: &[EndpointId], candidates: &Candidates) -> Option<EndpointIndex> {
    let is_meant = |id: &EndpointId, at: EndpointIndex| {
        let found = worker.table.get(at).map(|slot| slot.endpoint.id());
        found.is_some_and(|found| found.address == id.address && (id.rank.is_none() || id.rank == found.rank))
    };
    ids.iter().find_map(|id| candidates.prefill.iter().copied().find(|at| is_meant(id, *at)))
}

fn decision_name(decision: Metric) -> &'static str {
    decision.name().rsplit('=').next().unwrap_or_default()
}

fn to_i64(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r#"{
        "trusted_headers": ["x-pd-phase", "x-prefiller-host-port"],
        "endpoints": [
            {"address": "10.0.0.1:1", "role": "prefill", "models": ["m"]},
            {"address": "10.0.0.1:2", "role": "prefill", "models": ["m"]},
            {"address": "10.0.0.2:1", "role": "decode", "models": ["m"]},
            {"address": "10.0.0.2:2", "role": "decode", "models": ["m"]}
        ]
    }"#;
    const PARAMS: &str =
        r#"{"do_remote_prefill":true,"remote_block_ids":[[1]],"remote_request_id":"r","n":18446744073709551617}"#;

    struct Fixture {
        worker: Worker,
        request: Request,
        now: Duration,
    }

    fn fixture() -> Fixture {
        configured(CONFIG)
    }

    fn configured(config: &str) -> Fixture {
        let mut worker = Worker::default();
        worker.configure(config.as_bytes()).unwrap();
        Fixture { worker, request: Request::default(), now: Duration::from_secs(5) }
    }

    #[test]
    fn only_a_caller_who_is_trusted_to_learns_why() {
        let explained = |config: &str| {
            let mut fixture = configured(config);
            let stripped = fixture.headers(&[("x-pd-explain", "1")]);
            assert!(stripped.effects.contains(&Effect::RemoveHeader(b"x-pd-explain".to_vec())));
            let outcome = fixture.body(&long_body());
            assert!(outcome.effects.iter().any(|effect| matches!(effect, Effect::Call(_))));
            outcome.effects.iter().any(|effect| matches!(effect, Effect::SetState(EXPLAIN, _)))
        };
        assert!(!explained(CONFIG));
        assert!(explained(&CONFIG.replace("\"x-pd-phase\"", "\"x-pd-phase\", \"x-pd-explain\"")));
    }

    fn long_body() -> String {
        format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{}"}}],"stream":true}}"#, "word ".repeat(600))
    }

    impl Fixture {
        fn headers(&mut self, extra: &[(&str, &str)]) -> Outcome {
            let pseudo =
                [(":method", "POST"), (":path", "/v1/chat/completions"), (":authority", "a"), ("content-length", "9")];
            let headers = Headers::from_pairs(pseudo.iter().chain(extra).map(|(name, value)| (*name, *value)));
            self.request.headers(&mut self.worker, headers, false, self.now)
        }

        fn body(&mut self, body: &str) -> Outcome {
            self.request.body(&mut self.worker, body.as_bytes(), self.now)
        }

        fn answer(&mut self, status: u16, body: &str) -> Outcome {
            let answer =
                PrefillAnswer::Answered { status, content_type: Some(b"application/json"), body: body.as_bytes() };
            self.request.prefill_answer(&mut self.worker, answer, || Some(long_body()), self.now)
        }

        fn done(&mut self) {
            self.request.done(&mut self.worker, self.now);
        }

        /// Whether nothing is in flight, anywhere.
        fn is_idle(&self) -> bool {
            let gauges = [Metric::PrefillInFlight, Metric::DecodeInFlight, Metric::DecodeTokensInFlight];
            gauges.iter().all(|gauge| self.worker.counts.pending(*gauge) == 0)
                && self.worker.table.iter().all(|(_, slot)| slot.prefill.is_empty() && slot.decode.requests == 0)
        }
    }

    fn state<'a>(outcome: &'a Outcome, path: &str) -> &'a str {
        let value = outcome.effects.iter().find_map(|effect| match effect {
            Effect::SetState(key, value) if *key == path => Some(value),
            _ => None,
        });
        value.map_or("", |value| core::str::from_utf8(value).unwrap())
    }

    fn call(outcome: &Outcome) -> &Call {
        let call =
            outcome.effects.iter().find_map(|effect| if let Effect::Call(call) = effect { Some(call) } else { None });
        call.unwrap_or_else(|| panic!("no call in {outcome:?}"))
    }

    fn leg_destination(outcome: &Outcome) -> String {
        String::from_utf8(call(outcome).headers.get("x-pd-destination").unwrap().to_vec()).unwrap()
    }

    fn reply(outcome: &Outcome) -> (u16, &'static str) {
        let reply = outcome
            .effects
            .iter()
            .find_map(|effect| if let Effect::Reply(reply) = effect { Some(reply) } else { None });
        let reply = reply.unwrap_or_else(|| panic!("no reply in {outcome:?}"));
        (reply.status, reply.reason)
    }

    fn edited(outcome: &Outcome, body: &str) -> String {
        let mut body = body.as_bytes().to_vec();
        for effect in &outcome.effects {
            if let Effect::EditBody(edit) = effect {
                body.splice(..edit.drain as usize, edit.head.iter().copied());
            }
        }
        String::from_utf8(body).unwrap()
    }

    #[test]
    fn a_long_prompt_runs_both_legs() {
        let mut t = fixture();
        let outcome = t.headers(&[("x-keep", "1"), ("x-pd-destination", "evil:1")]);
        assert_eq!(outcome.flow, Flow::Continue);
        let removed = |name: &str| outcome.effects.contains(&Effect::RemoveHeader(name.into()));
        assert!(removed("content-length") && removed("x-pd-destination"));
        assert_eq!(t.request.body_part(&mut t.worker, 100).flow, Flow::Pause);

        let outcome = t.body(&long_body());
        assert_eq!(outcome.flow, Flow::Pause);
        let leg = call(&outcome);
        assert_eq!(leg.cluster, "engines");
        assert_eq!(leg.headers.get("x-keep"), Some(&b"1"[..]));
        let body = String::from_utf8(leg.body.clone()).unwrap();
        assert!(body.contains(r#""do_remote_decode":true"#) && body.contains(r#""max_tokens":1,"stream":false"#));
        assert!(!body.contains(r#""stream":true"#));
        let chosen = leg_destination(&outcome).split(',').next().unwrap().to_owned();
        assert!(chosen.starts_with("10.0.0.1:"));

        t.now += Duration::from_millis(40);
        let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
        assert_eq!(outcome.flow, Flow::Continue);
        assert_eq!(edited(&outcome, &long_body()), format!(r#"{{"kv_transfer_params":{PARAMS},{}"#, &long_body()[1..]));
        assert!(state(&outcome, DESTINATION).starts_with("10.0.0.2:"));
        assert_eq!(state(&outcome, DESTINATION).split(',').count(), TRIES, "both, and the first once more");
        assert_eq!((state(&outcome, DECISION), state(&outcome, REASON)), ("split", "prefilled"));
        assert_eq!((state(&outcome, PREFILL), state(&outcome, PREFILL_MS)), (chosen.as_str(), "40"));
        assert!(!t.is_idle());
        assert!(t.request.awaits_first_byte());
        t.request.first_byte(&mut t.worker, t.now);
        t.done();
        assert!(t.is_idle());
    }

    #[test]
    fn a_short_prompt_is_served_whole_and_untouched() {
        let mut t = fixture();
        t.headers(&[]);
        let body = r#" {"model":"m","messages":[]} "#;
        let outcome = t.body(body);
        assert_eq!(
            (outcome.flow, state(&outcome, DECISION), state(&outcome, REASON)),
            (Flow::Continue, "decode_only", "cached")
        );
        assert_eq!(edited(&outcome, body), body);
        t.done();
        assert!(t.is_idle());
    }

    #[test]
    fn the_second_turn_stays_where_the_first_one_was() {
        let mut t = fixture();
        t.headers(&[]);
        t.body(&long_body());
        let first = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
        t.done();
        t.request = Request::default();
        t.headers(&[]);
        let second = t.body(&long_body().replace("\"}]", "\"},{\"role\":\"user\",\"content\":\"and then?\"}]"));
        assert_eq!((state(&second, DECISION), state(&second, REASON)), ("decode_only", "cached"));
        assert_eq!(state(&second, DECODE), state(&first, DECODE));
        assert_ne!(state(&second, MATCHED_TOKENS), "0");
    }

    #[test]
    fn a_clients_own_transfer_parameters_never_reach_an_engine() {
        let evil = r#""kv_transfer_params":{"do_remote_prefill":true},"#;
        let body = long_body().replacen('{', &format!("{{{evil}"), 1);
        let mut t = fixture();
        t.headers(&[]);
        let outcome = t.body(&body);
        assert!(!String::from_utf8_lossy(&call(&outcome).body).contains(r#""do_remote_prefill":true"#));
        let outcome = t.answer(503, "upstream connect error");
        assert!(!String::from_utf8_lossy(&call(&outcome).body).contains(r#""do_remote_prefill":true"#));
        let outcome = t.answer(500, "{}");
        assert_eq!(edited(&outcome, &body), long_body());

        for (path, phase) in [("/v1/chat/completions", "prefill"), ("/v1/completions", "decode"), ("/invocations", "")]
        {
            let mut t = fixture();
            let pairs = [(":method", "POST"), (":path", path), (PHASE_HEADER, phase)];
            let pairs = &pairs[..if phase.is_empty() { 2 } else { 3 }];
            let headers = Headers::from_pairs(pairs.iter().map(|(name, value)| (*name, *value)));
            t.request.headers(&mut t.worker, headers, false, t.now);
            let outcome = t.body(&body);
            assert_eq!(edited(&outcome, &body), long_body(), "{path}");
        }
    }

    #[test]
    fn a_phase_header_sends_one_leg_to_its_pool() {
        for (phase, network, decision) in
            [("prefill", "10.0.0.1:", "prefill_only"), ("decode", "10.0.0.2:", "decode_only")]
        {
            let mut t = fixture();
            let outcome = t.headers(&[(PHASE_HEADER, phase)]);
            assert!(outcome.effects.contains(&Effect::RemoveHeader(PHASE_HEADER.into())));
            let outcome = t.body(&long_body());
            assert!(state(&outcome, DESTINATION).split(',').all(|address| address.starts_with(network)));
            assert_eq!((state(&outcome, DECISION), state(&outcome, REASON)), (decision, "phase_header"));
            assert_eq!(edited(&outcome, &long_body()), long_body());
            t.done();
            assert!(t.is_idle());
        }
        let mut t = fixture();
        assert_eq!(reply(&t.headers(&[(PHASE_HEADER, "both")])), (400, "invalid_phase"));
    }

    #[test]
    fn a_trusted_prefiller_is_used_if_it_is_in_the_list() {
        for address in ["10.0.0.1:1", "10.0.0.1:2"] {
            let mut t = fixture();
            t.headers(&[(PREFILLER_HEADER, address)]);
            assert!(leg_destination(&t.body(&long_body())).starts_with(address));
        }
        for address in ["10.9.9.9:1", "10.0.0.2:1", "nonsense"] {
            let mut t = fixture();
            t.headers(&[(PREFILLER_HEADER, address)]);
            assert!(leg_destination(&t.body(&long_body())).starts_with("10.0.0.1:"), "{address}");
            assert_eq!(t.worker.counts.pending(Metric::HintsIgnored), 1);
        }
        let untrusting = CONFIG.replace(r#", "x-prefiller-host-port""#, "");
        let mut t = configured(&untrusting);
        t.headers(&[]);
        let by_itself = leg_destination(&t.body(&long_body())).split(',').next().unwrap().to_owned();
        for address in ["10.0.0.1:1", "10.0.0.1:2"] {
            let mut t = configured(&untrusting);
            let outcome = t.headers(&[(PREFILLER_HEADER, address)]);
            assert!(outcome.effects.contains(&Effect::RemoveHeader(PREFILLER_HEADER.into())));
            assert!(leg_destination(&t.body(&long_body())).starts_with(&by_itself));
        }
    }

    #[test]
    fn a_failed_prefill_goes_to_another_endpoint_then_to_the_pools_policy() {
        for (policy, last) in [("decode_only", None), ("fail", Some((503, "prefill_failed")))] {
            let mut t = configured(&CONFIG.replacen(
                '{',
                &format!(r#"{{"pools":{{"default":{{"on_prefill_failure":"{policy}"}}}},"#),
                1,
            ));
            t.headers(&[]);
            let first = leg_destination(&t.body(&long_body()));
            let second = t.answer(503, "upstream connect error or disconnect/reset before headers");
            assert_eq!(second.flow, Flow::Pause);
            assert_ne!(first.split(',').next(), leg_destination(&second).split(',').next());
            let third = t.answer(500, "{}");
            match last {
                Some(expected) => assert_eq!(reply(&third), expected),
                None => {
                    assert_eq!((state(&third, DECISION), state(&third, REASON)), ("decode_only", "prefill_failed"));
                    assert_eq!(edited(&third, &long_body()), long_body());
                }
            }
            t.done();
            assert!(t.is_idle());
            assert_eq!(t.worker.counts.pending(Metric::PrefillRetries), 1);
        }
    }

    #[test]
    fn an_unreachable_endpoint_is_left_out_by_the_next_request() {
        let mut t = fixture();
        t.headers(&[]);
        let dead = leg_destination(&t.body(&long_body())).split(',').next().unwrap().to_owned();
        t.answer(503, "upstream connect error");
        t.done();
        t.request = Request::default();
        t.headers(&[]);
        let next = leg_destination(&t.body(&long_body()));
        assert!(!next.split(',').any(|address| address == dead), "{next}");
    }

    #[test]
    fn an_engines_own_refusal_is_passed_on_at_once() {
        let mut t = fixture();
        t.headers(&[]);
        t.body(&long_body());
        let outcome = t.answer(400, r#"{"error":"too long"}"#);
        let Some(Effect::Reply(reply)) = outcome.effects.last() else { panic!("{outcome:?}") };
        assert_eq!((reply.status, reply.body.as_slice()), (400, &br#"{"error":"too long"}"#[..]));
        assert!(t.is_idle());
    }

    #[test]
    fn a_prefill_answer_without_usable_parameters_is_served_without_them_and_counted() {
        for answer in
            ["{}", "", r#"{"kv_transfer_params":null}"#, r#"{"kv_transfer_params":{"do_remote_prefill":true}}"#]
        {
            let mut t = fixture();
            t.headers(&[]);
            t.body(&long_body());
            let outcome = t.answer(200, answer);
            assert_eq!((outcome.flow, state(&outcome, REASON)), (Flow::Continue, "kv_missing"));
            assert_eq!(edited(&outcome, &long_body()), long_body());
            assert_eq!(t.worker.counts.pending(Metric::KvMissing), 1);
        }
    }

    #[test]
    fn a_splice_that_would_pass_the_body_limit_is_left_out() {
        for (room, reason) in [(0, "kv_missing"), (199, "kv_missing"), (200, "prefilled")] {
            let insert = format!(r#""kv_transfer_params":{PARAMS},"#).len();
            let limit = long_body().len() + insert * room / 200;
            let mut t = configured(&CONFIG.replacen('{', &format!(r#"{{"max_body_bytes":{limit},"#), 1));
            t.headers(&[]);
            t.body(&long_body());
            let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
            assert_eq!(state(&outcome, REASON), reason);
            assert!(edited(&outcome, &long_body()).len() <= limit);
        }
    }

    #[test]
    fn bad_requests_get_an_error_that_says_why() {
        for (body, expected) in [
            ("", (400, "invalid_json")),
            ("{", (400, "invalid_json")),
            ("[]", (400, "invalid_json")),
            ("\u{0}", (400, "invalid_json")),
            (r#"{"messages":[]}"#, (400, "missing_model")),
            (r#"{"model":1}"#, (400, "missing_model")),
            (r#"{"model":"x"}"#, (404, "unknown_model")),
        ] {
            let mut t = fixture();
            t.headers(&[]);
            let outcome = t.body(body);
            assert_eq!(reply(&outcome), expected, "{body}");
            assert_eq!((outcome.flow, state(&outcome, DECISION)), (Flow::Pause, "rejected"));
            assert!(t.is_idle());
        }
        let mut t = fixture();
        let outcome = t.headers(&[("content-encoding", "gzip")]);
        assert_eq!(reply(&outcome), (415, "content_encoding"));
    }

    #[test]
    fn a_body_over_the_limit_is_refused_as_soon_as_it_is_known() {
        let config = CONFIG.replacen('{', r#"{"max_body_bytes":2000,"#, 1);
        let mut t = configured(&config);
        let pseudo = [(":method", "POST"), (":path", "/v1/completions"), ("content-length", "2001")];
        let outcome = t.request.headers(&mut t.worker, Headers::from_pairs(pseudo), false, t.now);
        assert_eq!(reply(&outcome), (413, "too_large"));
        let mut t = configured(&config);
        t.headers(&[]);
        assert_eq!(t.request.body_part(&mut t.worker, 2_000).flow, Flow::Pause);
        assert_eq!(reply(&t.request.body_part(&mut t.worker, 2_001)), (413, "too_large"));
        let mut t = configured(&config);
        t.headers(&[]);
        assert_eq!(reply(&t.body(&long_body())), (413, "too_large"));
    }

    #[test]
    fn requests_without_a_prompt_reach_a_ready_endpoint_unchanged() {
        for (method, path, end) in
            [("GET", "/version", true), ("POST", "/v1/unknown", true), ("GET", "/v1/chat/completions", true)]
        {
            let mut t = fixture();
            let headers = Headers::from_pairs([(":method", method), (":path", path)]);
            let outcome = t.request.headers(&mut t.worker, headers, end, t.now);
            assert_eq!((outcome.flow, state(&outcome, DECISION)), (Flow::Continue, "passed"), "{path}");
            assert!(state(&outcome, DESTINATION).starts_with("10.0.0."));
        }
        let mut t = fixture();
        let headers = Headers::from_pairs([(":method", "POST"), (":path", "/v1/embeddings")]);
        t.request.headers(&mut t.worker, headers, false, t.now);
        for body in [r#"{"input":"a"}"#, "not json", ""] {
            let outcome = t.body(body);
            assert_eq!(edited(&outcome, body), body);
        }
    }

    #[test]
    fn without_endpoints_or_configuration_the_answer_is_503() {
        let mut t = configured("");
        t.headers(&[]);
        assert_eq!(reply(&t.body(r#"{"model":"m"}"#)), (503, "no_endpoint"));
        let mut t = configured("");
        t.worker = Worker::default();
        t.worker.configure(br#"{"clutser":1}"#).unwrap_err();
        let outcome = t.headers(&[]);
        assert_eq!(reply(&outcome), (503, "not_configured"));
        let Some(Effect::Reply(reply)) = outcome.effects.last() else { panic!() };
        assert!(String::from_utf8_lossy(&reply.body).contains("clutser"));
    }

    #[test]
    fn envoys_retry_to_an_alternate_moves_the_load() {
        let mut t = fixture();
        t.headers(&[]);
        let outcome = t.body(r#"{"model":"m","messages":[]}"#);
        let addresses: Vec<_> = state(&outcome, DESTINATION).split(',').map(str::to_owned).collect();
        t.request.response_headers(&mut t.worker, Some(addresses[1].as_bytes()), None, t.now);
        let load = |t: &Fixture, address: &str| {
            let (_, slot) = t.worker.table.iter().find(|(_, slot)| &*slot.address == address).unwrap();
            (slot.decode.requests, slot.health.is_failing())
        };
        assert_eq!(load(&t, &addresses[0]), (0, true));
        assert_eq!(load(&t, &addresses[1]), (1, false));
        assert_eq!(t.worker.counts.pending(Metric::DecodeMoved), 1);
        t.done();
        assert!(t.is_idle());
    }

    #[test]
    fn a_client_that_leaves_between_the_legs_is_counted_and_its_leg_runs_out() {
        let mut t = fixture();
        t.headers(&[]);
        t.body(&long_body());
        t.done();
        assert_eq!(t.worker.counts.pending(Metric::KvStranded), 1);
        assert_eq!(t.answer(200, "{}").effects, [], "a late answer changes nothing");
        t.worker.prune(t.now + Duration::from_secs(1));
        assert!(t.is_idle());
    }

    #[test]
    fn an_endpoint_that_leaves_the_list_in_mid_request_disturbs_nothing() {
        let mut t = fixture();
        t.headers(&[]);
        t.body(&long_body());
        let list = br#"{"wire":1,"epoch":"e","version":1,"endpoints":[{"address":"10.0.0.9:9","role":"decode"}]}"#;
        t.worker.apply(list).unwrap();
        let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
        // The candidates of the request are gone; what took their places in the table was never chosen.
        assert!(matches!(outcome.effects.last(), Some(Effect::Reply(_) | Effect::EditBody(_))), "{outcome:?}");
        t.done();
        assert!(t.is_idle());
    }

    /// A gateway of that engine, whose long prompts are split.
    fn of_engine(engine: &str) -> Fixture {
        configured(&CONFIG.replacen('{', &format!(r#"{{"pools":{{"default":{{"engine":"{engine}"}}}},"#), 1))
    }

    fn text(body: &[u8]) -> &str {
        core::str::from_utf8(body).unwrap()
    }

    /// The value of a member of a JSON object.
    fn member<'a>(body: &'a str, key: &str) -> &'a str {
        let value = crate::json::raw_member(body.as_bytes(), &[key]).unwrap();
        text(value.unwrap_or_else(|| panic!("no {key} in {body}")))
    }

    #[test]
    fn sglangs_legs_go_out_at_once_and_name_the_same_room() {
        let mut t = of_engine("sglang");
        t.headers(&[("x-request-id", "r")]);
        let outcome = t.body(&long_body());
        assert_eq!((outcome.flow, state(&outcome, REASON)), (Flow::Continue, "concurrent"));
        let prefill = text(&call(&outcome).body).to_owned();
        let decode = edited(&outcome, &long_body());
        assert_eq!(member(&prefill, "bootstrap_room"), member(&decode, "bootstrap_room"));
        assert_eq!(member(&decode, "bootstrap_host"), r#""10.0.0.1""#);
        assert_eq!((member(&prefill, "stream"), member(&decode, "stream")), ("false", "true"));
        assert!(!leg_destination(&outcome).contains(','), "the room is at one endpoint");
        assert_eq!(state(&outcome, PREFILL), leg_destination(&outcome));

        let decode = state(&outcome, DECODE).to_owned();
        let flow = t.request.response_headers(&mut t.worker, Some(decode.as_bytes()), Some(200), t.now).flow;
        assert_eq!(flow, Flow::Pause, "the prefill leg may still fail");
        t.now += Duration::from_millis(40);
        let outcome = t.answer(200, "{}");
        assert_eq!((outcome.flow, state(&outcome, PREFILL_MS)), (Flow::Pause, "40"));
        assert_eq!(outcome.effects.last(), Some(&Effect::ResumeResponse));
        t.request.first_byte(&mut t.worker, t.now);
        t.done();
        assert!(t.is_idle());
    }

    #[test]
    fn rooms_differ_and_a_short_prompt_is_split_where_decode_cannot_serve_alone() {
        let mut rooms = std::collections::BTreeSet::new();
        for _ in 0..100 {
            let mut t = of_engine("sglang");
            for _ in 0..2 {
                t.request = Request::default();
                t.now += Duration::from_nanos(1);
                t.headers(&[("x-request-id", "the same")]);
                let body = r#"{"model":"m","messages":[],"n":2}"#;
                let outcome = t.body(body);
                assert_eq!(state(&outcome, DECISION), "split");
                let decode = edited(&outcome, body);
                assert_eq!(crate::json::elements(member(&decode, "bootstrap_room").as_bytes()).count(), 2);
                rooms.insert(member(&decode, "bootstrap_room").to_owned());
            }
        }
        assert_eq!(rooms.len(), 2, "the same request at the same time has the same room, another one has another");
    }

    #[test]
    fn a_prefill_leg_that_fails_beside_its_decode_leg_ends_the_request() {
        for (status, body, expected) in [
            (503, "upstream connect error", (503, "prefill_failed")),
            (500, "{}", (503, "prefill_failed")),
            (400, r#"{"error":"too long"}"#, (400, "prefill_answer")),
        ] {
            for held in [false, true] {
                let mut t = of_engine("sglang");
                t.headers(&[]);
                let sent = t.body(&long_body());
                let decode = state(&sent, DECODE).to_owned();
                if held {
                    t.request.response_headers(&mut t.worker, Some(decode.as_bytes()), Some(200), t.now);
                }
                let outcome = t.answer(status, body);
                assert_eq!(reply(&outcome), expected);
                t.done();
                assert!(t.is_idle());
            }
        }
    }

    #[test]
    fn a_warning_comes_once_per_change_and_the_answer_says_that_kv_did_not_move() {
        let mut t = fixture();
        let mut warnings = Vec::new();
        let good = format!(r#"{{"kv_transfer_params":{PARAMS}}}"#);
        for (i, answer) in ["{}", "{}", &good, "{}", &good, &good].into_iter().enumerate() {
            t.request = Request::default();
            t.headers(&[(PREFILLER_HEADER, "10.0.0.1:1")]);
            t.body(&long_body().replace("word", &format!("w{i}")));
            let outcome = t.answer(200, answer);
            warnings.push(outcome.effects.iter().any(|effect| matches!(effect, Effect::Warn(_))));
            let upstream = state(&outcome, DECODE).to_owned();
            let outcome = t.request.response_headers(&mut t.worker, Some(upstream.as_bytes()), None, t.now);
            let says = outcome.effects.contains(&Effect::AddResponseHeader(KV_HEADER, "missing".into()));
            assert_eq!((outcome.flow, says), (Flow::Continue, answer == "{}"));
            t.done();
        }
        assert_eq!(warnings, [true, false, false, true, false, false]);
    }

    #[test]
    fn retries_end_when_their_budget_is_spent() {
        let mut t = fixture();
        for i in 0..40 {
            t.request = Request::default();
            t.headers(&[]);
            t.body(&long_body().replace("word", &format!("w{i}")));
            while t.request.is_prefilling() {
                t.answer(500, "{}");
            }
            t.done();
        }
        let retries = t.worker.counts.pending(Metric::PrefillRetries);
        assert_eq!(retries + t.worker.counts.pending(Metric::RetriesDenied), 40);
        assert!((10..=18).contains(&retries), "{retries}");
        assert!(t.is_idle());
    }

    #[test]
    fn a_decode_endpoint_that_refuses_does_not_wait_for_the_prefill_leg() {
        let mut t = of_engine("sglang");
        t.headers(&[]);
        let sent = t.body(&long_body());
        let decode = state(&sent, DECODE).to_owned();
        let flow = t.request.response_headers(&mut t.worker, Some(decode.as_bytes()), Some(503), t.now).flow;
        assert_eq!(flow, Flow::Continue);
        assert_eq!(t.answer(503, "upstream connect error").effects, [], "the client has its answer");
        t.done();
        assert!(t.is_idle());
    }

    #[test]
    fn a_client_that_leaves_while_both_legs_run_leaves_nothing_behind() {
        let mut t = of_engine("sglang");
        t.headers(&[]);
        t.body(&long_body());
        t.done();
        assert_eq!(t.worker.counts.pending(Metric::KvStranded), 1);
        assert_eq!(t.answer(200, "{}").effects, []);
        t.worker.prune(t.now + Duration::from_secs(1));
        assert!(t.is_idle());
    }

    #[test]
    fn mooncakes_engine_id_is_asked_once_and_again_after_a_failure() {
        let mut t = of_engine("mooncake");
        let request = |t: &mut Fixture, fails: bool| {
            t.request = Request::default();
            t.headers(&[(PREFILLER_HEADER, "10.0.0.1:1")]);
            let mut outcome = t.body(&long_body());
            let asked = call(&outcome).headers.get(":path") == Some(b"/query");
            if asked {
                assert_eq!((outcome.flow, leg_destination(&outcome).as_str()), (Flow::Pause, "10.0.0.1:8998"));
                outcome = t.answer(200, r#"{"0":{"engine_id":"e-1"}}"#);
            }
            assert_eq!((outcome.flow, state(&outcome, REASON)), (Flow::Continue, "concurrent"));
            let (prefill, decode) = (text(&call(&outcome).body).to_owned(), edited(&outcome, &long_body()));
            let (prefill, decode) = (member(&prefill, "kv_transfer_params"), member(&decode, "kv_transfer_params"));
            assert_eq!(member(prefill, "transfer_id"), member(decode, "transfer_id"));
            assert_eq!(member(decode, "remote_engine_id"), r#""e-1""#);
            t.answer(if fails { 503 } else { 200 }, "");
            t.done();
            asked
        };
        let asked = [false, true, false, false].map(|fails| request(&mut t, fails));
        assert_eq!(asked, [true, false, true, false]);
        assert!(t.is_idle());
    }

    #[test]
    fn without_an_engine_id_the_next_endpoint_is_asked_then_the_policy_rules() {
        for answer in ["{}", "", r#"{"0":{"engine_id":null}}"#] {
            let mut t = of_engine("mooncake");
            t.headers(&[]);
            let first = leg_destination(&t.body(&long_body()));
            assert_eq!(first, "10.0.0.1:8998");
            assert_eq!(leg_destination(&t.answer(200, answer)), "10.0.0.1:8998");
            let outcome = t.answer(404, answer);
            assert_eq!((state(&outcome, DECISION), state(&outcome, REASON)), ("decode_only", "prefill_failed"));
            assert_eq!(edited(&outcome, &long_body()), long_body());
            t.done();
            assert!(t.is_idle());
        }
    }

    #[test]
    fn a_sidecar_is_told_the_prefill_endpoint() {
        let mut t = of_engine("sidecar");
        t.headers(&[]);
        let outcome = t.body(&long_body());
        assert_eq!((outcome.flow, state(&outcome, REASON)), (Flow::Continue, "sidecar"));
        assert!(
            state(&outcome, PREFILLER).starts_with("10.0.0.1:") && state(&outcome, DECODE).starts_with("10.0.0.2:")
        );
        assert_eq!(edited(&outcome, &long_body()), long_body());
        assert!(!t.request.awaits_call());
        let work = |t: &Fixture| t.worker.table.iter().map(|(_, slot)| slot.prefill.len()).sum::<usize>();
        assert_eq!(work(&t), 1);
        t.request.first_byte(&mut t.worker, t.now);
        assert_eq!(work(&t), 0);
        t.done();
        assert!(t.is_idle());
    }

    #[test]
    fn trtllms_prompt_is_replaced_by_its_token_ids() {
        let mut t = of_engine("trtllm");
        let prompt = "word ".repeat(600);
        let body = format!(r#"{{"model":"m","prompt":"{prompt}","max_tokens":7}}"#);
        let pseudo = [(":method", "POST"), (":path", "/v1/completions")];
        t.request.headers(&mut t.worker, Headers::from_pairs(pseudo), false, t.now);
        let outcome = t.body(&body);
        let params = member(text(&call(&outcome).body), "disaggregated_params").to_owned();
        assert_eq!(member(&params, "request_type"), r#""context_only""#);
        assert!(member(&params, "disagg_request_id").parse::<u64>().unwrap() >= 1 << 42);
        let answer = r#"{"choices":[{"disaggregated_params":{"request_type":"context_only","x":1e5}}],"prompt_token_ids":[5,6]}"#;
        let answer = PrefillAnswer::Answered { status: 200, content_type: None, body: answer.as_bytes() };
        let outcome = t.request.prefill_answer(&mut t.worker, answer, || Some(body.clone()), t.now);
        assert_eq!(
            edited(&outcome, &body),
            r#"{"disaggregated_params":{"request_type":"generation_only","x":1e5},"prompt":[5,6],"model":"m","max_tokens":7}"#
        );
        t.done();
        assert!(t.is_idle());
    }

    #[test]
    fn each_leg_says_the_rank_behind_its_address() {
        let mut t = configured(
            r#"{"endpoints":[
            {"address":"10.0.0.1:1","role":"prefill","rank":4},
            {"address":"10.0.0.2:1","role":"decode","rank":0},{"address":"10.0.0.2:1","role":"decode","rank":1},
            {"address":"10.0.0.2:2","role":"decode","rank":0},{"address":"10.0.0.2:2","role":"decode","rank":1}]}"#,
        );
        t.headers(&[("x-data-parallel-rank", "9")]);
        let outcome = t.body(&long_body());
        assert_eq!(call(&outcome).headers.get("x-data-parallel-rank"), Some(&b"4"[..]));
        let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
        assert!(["0", "1"].contains(&state(&outcome, RANK)));
        let addresses: std::collections::BTreeSet<_> = state(&outcome, DESTINATION).split(',').collect();
        assert_eq!(addresses.len(), 2, "the alternate is another address with that rank");
        t.done();
        assert!(t.is_idle());
    }

    #[test]
    fn several_sequences_are_not_split_where_one_is_handed_over() {
        for (engine, decision) in [
            ("vllm-nixl", ("decode_only", "several_sequences")),
            ("trtllm", ("decode_only", "several_sequences")),
            ("vllm-shared", ("split", "prefilled")),
        ] {
            let mut t = of_engine(engine);
            t.headers(&[]);
            let mut outcome = t.body(&long_body().replacen('{', r#"{"n":2,"#, 1));
            if decision.0 == "split" {
                outcome = t.answer(200, "{}");
            }
            assert_eq!((state(&outcome, DECISION), state(&outcome, REASON)), decision, "{engine}");
        }
    }

    #[test]
    fn a_decode_endpoint_of_another_engine_is_no_partner() {
        let config = CONFIG.replace(r#""10.0.0.2:2", "role""#, r#""10.0.0.2:2", "engine": "sglang", "role""#);
        for id in 0..20 {
            let mut t = configured(&config);
            t.headers(&[]);
            t.body(&long_body().replace("word", &format!("word{id}")));
            let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
            assert_eq!(state(&outcome, DECODE), "10.0.0.2:1");
        }
    }

    #[test]
    fn aggregated_endpoints_serve_whole_requests_beside_the_others() {
        let aggregated = r#"{"address": "10.0.0.3:1", "role": "both", "models": ["m"]}"#;
        let mut t = configured(&CONFIG.replacen("\"endpoints\": [", &format!("\"endpoints\": [{aggregated},"), 1));
        let mut decisions = std::collections::BTreeSet::new();
        for id in 0..30 {
            t.request = Request::default();
            t.headers(&[]);
            let body = long_body().replace("word", &format!("w{id}"));
            let mut outcome = t.body(&body);
            if t.request.is_prefilling() {
                outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
                assert!(!state(&outcome, DESTINATION).contains("10.0.0.3"), "it takes no decode legs");
            } else {
                assert_eq!((state(&outcome, DECODE), edited(&outcome, &body)), ("10.0.0.3:1", body));
            }
            decisions.insert(state(&outcome, REASON).to_owned());
        }
        assert_eq!(decisions.into_iter().collect::<Vec<_>>(), ["aggregated", "prefilled"]);
    }

    #[test]
    fn a_pool_with_limits_answers_429_until_something_ends() {
        let mut t = configured(&CONFIG.replacen('{', r#"{"pools":{"default":{"max_requests":1}},"#, 1));
        t.headers(&[]);
        t.body(&long_body());
        let mut first = core::mem::take(&mut t.request);
        t.headers(&[]);
        let outcome = t.body(&long_body());
        assert_eq!(reply(&outcome), (429, "saturated"));
        let Some(Effect::Reply(answer)) = outcome.effects.last() else { panic!() };
        for header in ["retry-after", crate::reply::DROPPED_HEADER] {
            assert!(answer.headers.iter().any(|(name, _)| *name == header), "{header}");
        }
        t.done();
        first.done(&mut t.worker, t.now);
        assert!(t.worker.admission.is_empty());
        t.request = Request::default();
        t.headers(&[]);
        assert_eq!(t.body(&long_body()).flow, Flow::Pause);
        t.done();
        t.worker.prune(t.now + Duration::from_secs(100));
        assert!(t.is_idle() && t.worker.admission.is_empty());
    }

    #[test]
    fn objectives_have_priorities_and_deadlines_count_the_queue() {
        let top = r#"{"objectives":[{"name":"batch","priority":-5}],"pools":{"default":{"max_requests":10}},"#;
        let mut t = configured(&CONFIG.replacen('{', top, 1));
        let mut others = Vec::new();
        for i in 0..8 {
            t.headers(&[("x-llm-d-inference-fairness-id", &format!("user-{i}"))]);
            t.body(r#"{"model":"m","messages":[]}"#);
            others.push(core::mem::take(&mut t.request));
        }
        for (objective, expected) in
            [("batch", Some((429, "sheddable"))), ("-1", Some((429, "sheddable"))), ("other", None)]
        {
            t.request = Request::default();
            t.headers(&[("x-llm-d-inference-objective", objective)]);
            let outcome = t.body(r#"{"model":"m","messages":[]}"#);
            match expected {
                Some(expected) => assert_eq!(reply(&outcome), expected, "{objective}"),
                None => assert_eq!(outcome.flow, Flow::Continue),
            }
            t.done();
        }
        for (ms, expected) in [("1", Some((429, "deadline"))), ("60000", None), ("soon", None)] {
            t.request = Request::default();
            let outcome = t.headers(&[("x-pd-deadline-ms", ms)]);
            assert!(outcome.effects.contains(&Effect::RemoveHeader(b"x-pd-deadline-ms".to_vec())));
            let outcome = t.body(&long_body());
            match expected {
                Some(expected) => assert_eq!(reply(&outcome), expected),
                None => assert_eq!(outcome.flow, Flow::Pause),
            }
            t.done();
        }
        others.iter_mut().for_each(|request| request.done(&mut t.worker, t.now));
        assert!(t.worker.admission.is_empty());
    }

    #[test]
    fn a_trusted_subset_restricts_both_legs_and_the_answer_says_who_served() {
        for header in ["x-gateway-destination-endpoint-subset", "test-epp-endpoint-selection"] {
            let config = CONFIG.replace(r#""x-pd-phase","#, &format!(r#""x-pd-phase", "{header}","#));
            let mut t = configured(&config);
            for i in 0..10 {
                t.request = Request::default();
                t.headers(&[(header, "10.0.0.1:2, 10.0.0.2:1,nonsense")]);
                let outcome = t.body(&long_body().replace("word", &format!("w{i}")));
                assert_eq!(leg_destination(&outcome), "10.0.0.1:2");
                let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
                assert!(state(&outcome, DESTINATION).split(',').all(|address| address == "10.0.0.2:1"));
                let outcome = t.request.response_headers(&mut t.worker, Some(b"10.0.0.2:1"), None, t.now);
                assert_eq!(outcome.effects, [Effect::AddResponseHeader(SERVED_HEADER, "10.0.0.2:1".into())]);
                t.done();
            }
            t.request = Request::default();
            t.headers(&[(header, "10.9.9.9")]);
            assert_eq!(reply(&t.body(&long_body())), (503, "no_endpoint"));
            // Any path, by address alone.
            t.request = Request::default();
            let headers = Headers::from_pairs([(":method", "GET"), (":path", "/any"), (header, "10.0.0.2")]);
            let outcome = t.request.headers(&mut t.worker, headers, true, t.now);
            assert!(state(&outcome, DESTINATION).split(',').all(|address| address.starts_with("10.0.0.2:")));
            assert!(t.request.is_sent());
            let outcome = t.request.response_headers(&mut t.worker, Some(b"10.0.0.2:1"), None, t.now);
            assert_eq!(outcome.effects, [Effect::AddResponseHeader(SERVED_HEADER, "10.0.0.2:1".into())]);
            t.done();
            assert!(t.is_idle());
            // Untrusted, it is stripped and means nothing.
            let mut t = fixture();
            t.headers(&[(header, "10.9.9.9")]);
            assert_eq!(t.body(&long_body()).flow, Flow::Pause);
        }
    }

    #[test]
    fn the_models_of_all_endpoints_are_listed_and_a_header_may_name_one() {
        let mut t = configured(&CONFIG.replacen(r#"["m"]"#, r#"["m", "m-lora"]"#, 1));
        let headers = Headers::from_pairs([(":method", "GET"), (":path", "/v1/models?x")]);
        let outcome = t.request.headers(&mut t.worker, headers, true, t.now);
        assert_eq!(reply(&outcome), (200, "models"));
        let Some(Effect::Reply(answer)) = outcome.effects.last() else { panic!() };
        let list: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        let names: Vec<_> = list["data"].as_array().unwrap().iter().map(|card| card["id"].clone()).collect();
        assert_eq!(names, ["m", "m-lora"]);
        for (name, body, expected) in [
            ("m", r#"{"messages":[]}"#, None),
            ("x", r#"{"messages":[]}"#, Some((404, "unknown_model"))),
            ("x", r#"{"model":"m","messages":[]}"#, None),
            ("m", r#"{"model":7,"messages":[]}"#, Some((400, "missing_model"))),
        ] {
            for header in ["x-ai-eg-model", "x-gateway-model-name"] {
                t.request = Request::default();
                t.headers(&[(header, name)]);
                let outcome = t.body(body);
                match expected {
                    Some(expected) => assert_eq!(reply(&outcome), expected),
                    None => assert_eq!(outcome.flow, Flow::Continue),
                }
                t.done();
            }
        }
    }
}
