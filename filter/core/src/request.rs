//! One request's life: events in, effects out.
//!
//! ```text
//! New ─headers─▶ Reading ─body─▶ Prefilling ─answer─▶ Sent ─done─▶ Over
//!  │                │                │  └─ failed: the next prefill endpoint, else the pool's policy
//!  │                └─ served whole ─┴──────────────▶ Sent
//!  └─ nothing to read ──────────────────────────────▶ Sent            anywhere: Reply ─▶ Over
//! ```
//! The shell calls one method per Envoy callback and carries out the [`Outcome`]. Events that do not fit the state (late
//! answers, callbacks after a reply) change nothing.

use core::time::Duration;
use std::sync::Arc;

use crate::body::{Api, Scan, scan};
use crate::config::{Config, EXPLAIN_HEADER, OnPrefillFailure, PHASE_HEADER, PREFILLER_HEADER, Split};
use crate::engine::{self, Handover};
use crate::fit::Usage;
use crate::headers::Headers;
use crate::index::EndpointIndex;
use crate::intake::{Intake, Phase, Work, decoded_path, endpoint_ids, is_ours, leg_headers, read_body};
use crate::metrics::Metric;
use crate::reply::{Rejection, Reply};
use crate::schedule::{Decision, Pick, Prompt, Scheduler};
use crate::splice::HeadEdit;
use crate::table::{Candidates, EndpointRef};
use crate::wire::EndpointId;
use crate::worker::Worker;

/// Filter state that the route copies into the destination header: `ip:port[,ip:port…]`.
pub const DESTINATION: &str = "pd.destination";
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
pub const STATES: &[&str] = &[DESTINATION, DECISION, REASON, PREFILL, DECODE, MATCHED_TOKENS, PREFILL_MS, EXPLAIN];

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
    /// Run a prefill leg; its end comes back as [`Request::prefill_answer`].
    Call(Call),
    /// Answer the client.
    Reply(Reply),
}

/// A prefill leg.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// Envoy cluster.
    pub cluster: String,
    /// Headers, pseudo-headers included.
    pub headers: Headers,
    /// Body.
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
}

#[derive(Debug, Default)]
enum State {
    #[default]
    New,
    Reading(Box<Intake>),
    Prefilling(Box<Prefilling>),
    Sent(Box<Sent>),
    Over,
}

/// A request whose prefill leg is in flight.
#[derive(Debug)]
struct Prefilling {
    work: Work,
    tried: Vec<EndpointRef>,
    pick: Pick,
    endpoint: EndpointRef,
    leg: u64,
    started: Duration,
}

/// A request that an engine endpoint serves.
#[derive(Debug)]
struct Sent {
    endpoint: EndpointRef,
    alternates: Vec<EndpointRef>,
    tokens: u64,
    /// The prompt's own work, counted until the first byte, where this endpoint computes the prompt.
    leg: Option<u64>,
    answered: bool,
}

/// Where a request goes, and why.
struct Route<'a> {
    decision: Metric,
    reason: &'static str,
    pick: Pick,
    alternates: Vec<EndpointIndex>,
    /// The leg that computed the prompt, if there was one.
    prefilled: Option<&'a Prefilling>,
    /// Members to put in front of the body.
    insert: &'a [u8],
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
        if api.is_none() && (end_of_stream || multipart) {
            return self.pass(worker, &config, effects, now);
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
        self.state = State::Reading(Box::new(Intake { config, headers, api, phase, prefiller }));
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
            State::New | State::Sent(_) | State::Over => GO_ON,
        }
    }

    /// Whether the body is wanted once it is complete.
    #[must_use]
    pub fn wants_body(&self) -> bool {
        matches!(self.state, State::Reading(_))
    }

    /// Whether a prefill leg is in flight.
    #[must_use]
    pub fn is_prefilling(&self) -> bool {
        matches!(self.state, State::Prefilling(_))
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
                Ok(scan) => engine::decode_plan(body, &scan).with_insert(b""),
                Err(error) if intake.may_be_object(body) => {
                    return self.reject(worker, Vec::new(), &Rejection::InvalidJson(error.to_string()));
                }
                Err(_) => Default::default(),
            };
            let effects = if edit.is_none() { Vec::new() } else { vec![Effect::EditBody(edit)] };
            return self.pass(worker, &intake.config, effects, now);
        };
        match scanned.map_err(|error| Rejection::InvalidJson(error.to_string())) {
            Ok(scan) => {
                let Intake { config, headers, phase, prefiller, .. } = intake;
                match read_body(worker, config, headers, api, body, &scan) {
                    Ok(work) => self.decide(worker, work, phase, prefiller.as_deref(), (body, &scan), now),
                    Err(rejection) => self.reject(worker, Vec::new(), &rejection),
                }
            }
            Err(rejection) => self.reject(worker, Vec::new(), &rejection),
        }
    }

    /// A prefill leg ended. `body` is the client's body, read again if another leg needs it.
    pub fn prefill_answer<B: AsRef<[u8]>>(
        &mut self,
        worker: &mut Worker,
        answer: PrefillAnswer<'_>,
        body: impl FnOnce() -> Option<B>,
        now: Duration,
    ) -> Outcome {
        let mut state = match core::mem::take(&mut self.state) {
            State::Prefilling(state) => *state,
            other => {
                self.state = other;
                return Outcome { flow: Flow::Pause, effects: Vec::new() };
            }
        };
        worker.counts.add(Metric::PrefillInFlight, -1);
        let mut seconds = None;
        let engine = worker.table.resolve(state.endpoint).map(|slot| {
            seconds = slot.prefill.service_seconds(state.leg, now);
            slot.prefill.remove(state.leg, now);
            match answer.fault() {
                Some(Fault::Unreachable) => slot.health.failed(now),
                Some(Fault::NotStarted) => {}
                Some(Fault::ServerError) | None => slot.health.answered(),
            }
            slot.engine
        });
        // The list may have changed since the leg began: its places may be other endpoints' now.
        state.work.candidates = worker.table.candidates(&state.work.model).unwrap_or_else(|_| {
            Arc::new(Candidates { pool: Arc::clone(&state.work.candidates.pool), ..Candidates::default() })
        });
        let Some(fault) = answer.fault() else {
            return match answer {
                PrefillAnswer::Answered { status: 200, body, .. } => {
                    worker.counts.count(Metric::PrefillOk);
                    let Prompt { bytes, tokens, .. } = state.work.prompt;
                    let thought = (bytes as f64, tokens, state.pick.matched_tokens);
                    worker.table.saw_prefill(state.endpoint, thought, seconds, Usage::of_answer(body));
                    // An endpoint that has left the list meanwhile answered all the same: its pool's engine reads it.
                    let engine = engine.unwrap_or(state.work.pool().engine);
                    self.prefilled(worker, &state, &engine::handover(engine, body), now)
                }
                PrefillAnswer::Answered { status, content_type, body } => {
                    worker.counts.count(Metric::PrefillClientError);
                    self.pass_on(worker, status, content_type, body)
                }
                PrefillAnswer::NotStarted | PrefillAnswer::None => Outcome { flow: Flow::Pause, effects: Vec::new() },
            };
        };
        worker.counts.count(match fault {
            Fault::NotStarted | Fault::Unreachable => Metric::PrefillRefused,
            Fault::ServerError => Metric::PrefillServerError,
        });
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
            && let Some(body) = body()
            && let Ok(scan) = scan(body.as_ref())
        {
            worker.counts.count(Metric::PrefillRetries);
            let Prefilling { work, tried, started, .. } = state;
            return self.prefill(worker, work, tried, pick, (body.as_ref(), &scan), started, now);
        }
        worker.counts.count(Metric::PrefillGivenUp);
        match pool.on_prefill_failure {
            OnPrefillFailure::Fail => self.reject(worker, Vec::new(), &Rejection::PrefillFailed),
            OnPrefillFailure::DecodeOnly => {
                self.send_to_decode(worker, &state.work, Metric::RequestsDecodeOnly, "prefill_failed", None, b"", now)
            }
        }
    }

    /// Whether an engine endpoint has the request.
    #[must_use]
    pub fn is_sent(&self) -> bool {
        matches!(self.state, State::Sent(_))
    }

    /// Response headers are there; `upstream` is the address of the endpoint that answered, if one did.
    pub fn response_headers(&mut self, worker: &mut Worker, upstream: Option<&[u8]>, now: Duration) {
        let State::Sent(sent) = &mut self.state else { return };
        let mut answers = |reference: &EndpointRef| {
            let slot = worker.table.resolve(*reference).filter(|slot| Some(slot.address.as_bytes()) == upstream);
            slot.map(|slot| slot.health.answered()).is_some()
        };
        if answers(&sent.endpoint) {
            return;
        }
        // Envoy went on to an alternate, or gave up: either way the first choice could not be reached.
        let moved = sent.alternates.iter().copied().find(answers);
        if moved.is_none() && upstream.is_some() {
            return;
        }
        if let Some(slot) = worker.table.resolve(sent.endpoint) {
            slot.health.failed(now);
        }
        let Some(alternate) = moved else {
            worker.counts.count(Metric::DecodeUnanswered);
            return;
        };
        worker.counts.count(Metric::DecodeMoved);
        sent.release(worker, now);
        if let Some(slot) = worker.table.resolve(alternate) {
            slot.decode.add(sent.tokens);
        }
        sent.endpoint = alternate;
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
        if let Some(leg) = sent.leg.take()
            && let Some(slot) = worker.table.resolve(sent.endpoint)
        {
            slot.prefill.remove(leg, now);
        }
    }

    /// The stream is over, whatever way it ended. Everything that was counted for it is taken back.
    pub fn done(&mut self, worker: &mut Worker, now: Duration) {
        match core::mem::replace(&mut self.state, State::Over) {
            State::Sent(mut sent) => {
                worker.counts.add(Metric::DecodeInFlight, -1);
                worker.counts.add(Metric::DecodeTokensInFlight, to_i64(sent.tokens).saturating_neg());
                sent.release(worker, now);
            }
            State::Prefilling(state) => {
                worker.counts.add(Metric::PrefillInFlight, -1);
                worker.counts.count(Metric::KvStranded);
                if let Some(slot) = worker.table.resolve(state.endpoint) {
                    slot.prefill.abandon(state.leg, now);
                }
            }
            State::New | State::Reading(_) | State::Over => {}
        }
    }

    fn decide(
        &mut self,
        worker: &mut Worker,
        work: Work,
        phase: Option<Phase>,
        prefiller: Option<&[EndpointId]>,
        body: (&[u8], &Scan),
        now: Duration,
    ) -> Outcome {
        let Work { candidates, prompt, .. } = &work;
        let hint = prefiller.and_then(|ids| hinted(worker, ids, candidates));
        let scheduler = Scheduler { table: &worker.table, index: &worker.index, pool: work.pool(), now };
        let is_asked = work.config.trusts(EXPLAIN_HEADER) && work.headers.get(EXPLAIN_HEADER).is_some();
        let explained = is_asked.then(|| scheduler.explain(candidates, prompt));
        let mut outcome = self.decided(worker, work, phase, (prefiller, hint), body, now);
        if let Some(explained) = explained {
            outcome.effects.insert(0, Effect::SetState(EXPLAIN, explained.into_bytes()));
        }
        outcome
    }

    fn decided(
        &mut self,
        worker: &mut Worker,
        work: Work,
        phase: Option<Phase>,
        (prefiller, hint): (Option<&[EndpointId]>, Option<EndpointIndex>),
        body: (&[u8], &Scan),
        now: Duration,
    ) -> Outcome {
        let Work { candidates, prompt, .. } = &work;
        let scheduler = Scheduler { table: &worker.table, index: &worker.index, pool: work.pool(), now };
        let decision = match phase {
            Some(Phase::Prefill) => {
                let Some(pick) = scheduler.pick_by_cost(&candidates.prefill, prompt, &[]) else {
                    return self.reject(worker, Vec::new(), &Rejection::NoEndpoint);
                };
                let alternates = scheduler.alternates(&candidates.prefill, prompt, pick.endpoint);
                let (decision, reason) = (Metric::RequestsPrefillOnly, "phase_header");
                let route = Route { decision, reason, pick, alternates, prefilled: None, insert: b"" };
                return self.send(worker, &work, route, now);
            }
            Some(Phase::Decode) => {
                let (decision, reason) = (Metric::RequestsDecodeOnly, "phase_header");
                return self.send_to_decode(worker, &work, decision, reason, None, b"", now);
            }
            None => match hint.and_then(|endpoint| scheduler.pick_by_cost(&[endpoint], prompt, &[])) {
                Some(pick) => Decision::Split(pick),
                None => scheduler.decide(candidates, prompt),
            },
        };
        if prefiller.is_some() && hint.is_none() {
            worker.counts.count(Metric::HintsIgnored);
        }
        match decision {
            Decision::Nobody => self.reject(worker, Vec::new(), &Rejection::NoEndpoint),
            Decision::Whole(pick, reason) => {
                let scheduler = Scheduler { table: &worker.table, index: &worker.index, pool: work.pool(), now };
                let alternates = scheduler.alternates(&candidates.decode, prompt, pick.endpoint);
                let (decision, reason) = (Metric::RequestsDecodeOnly, reason.code());
                let route = Route { decision, reason, pick, alternates, prefilled: None, insert: b"" };
                self.send(worker, &work, route, now)
            }
            Decision::Split(pick) => self.prefill(worker, work, Vec::new(), pick, body, now, now),
        }
    }

    /// Starts a prefill leg.
    #[expect(clippy::too_many_arguments, reason = "the parts of one leg; a struct for them would be used once")]
    fn prefill(
        &mut self,
        worker: &mut Worker,
        work: Work,
        tried: Vec<EndpointRef>,
        pick: Pick,
        (body, scan): (&[u8], &Scan),
        started: Duration,
        now: Duration,
    ) -> Outcome {
        let leg = worker.next_leg();
        let pool = work.pool();
        let scheduler = Scheduler { table: &worker.table, index: &worker.index, pool, now };
        // A host that Envoy does not know yet is skipped: the next one must be a prefill endpoint too.
        let alternates = scheduler.alternates(&work.candidates.prefill, &work.prompt, pick.endpoint);
        let untried = |at: &EndpointIndex| worker.table.refer(*at).is_some_and(|at| !tried.contains(&at));
        let destination = destination(worker, pick.endpoint, alternates.into_iter().filter(untried));
        let (Some(endpoint), Some(slot)) = (worker.table.refer(pick.endpoint), worker.table.get_mut(pick.endpoint))
        else {
            return self.reject(worker, Vec::new(), &Rejection::NoEndpoint);
        };
        let timeout = pool.prefill_timeout;
        slot.prefill.add(leg, pick.seconds, now, now.saturating_add(timeout));
        slot.health.sent(now);
        let call = Call {
            cluster: work.config.cluster.clone(),
            headers: leg_headers(&work.headers, &work.config, destination.as_bytes()),
            body: engine::prefill_body(slot.engine, work.api, body, scan),
            timeout,
        };
        enter(worker, pick.endpoint, &work.prompt);
        worker.counts.add(Metric::PrefillInFlight, 1);
        self.state = State::Prefilling(Box::new(Prefilling { work, tried, pick, endpoint, leg, started }));
        Outcome { flow: Flow::Pause, effects: vec![Effect::Call(call)] }
    }

    /// The prompt is computed: on to a decode endpoint.
    fn prefilled(&mut self, worker: &mut Worker, state: &Prefilling, handover: &Handover, now: Duration) -> Outcome {
        let fits = |members: &[u8]| {
            let Work { plan, body_bytes, config, .. } = &state.work;
            plan.with_insert(members).edited_bytes(*body_bytes) <= config.max_body_bytes
        };
        let (reason, insert): (_, &[u8]) = match handover {
            // Envoy does not survive a paused body that an edit makes larger than the buffer filter's limit.
            Handover::Insert(members) if fits(members) => ("prefilled", members),
            Handover::Nothing => ("prefilled", b""),
            Handover::Insert(_) | Handover::Missing => {
                worker.counts.count(Metric::KvMissing);
                ("kv_missing", b"")
            }
        };
        self.send_to_decode(worker, &state.work, Metric::RequestsSplit, reason, Some(state), insert, now)
    }

    /// Sends the request to the decode endpoint with the least to do.
    #[expect(clippy::too_many_arguments, reason = "the parts of one route")]
    fn send_to_decode(
        &mut self,
        worker: &mut Worker,
        work: &Work,
        decision: Metric,
        reason: &'static str,
        prefilled: Option<&Prefilling>,
        insert: &[u8],
        now: Duration,
    ) -> Outcome {
        let scheduler = Scheduler { table: &worker.table, index: &worker.index, pool: work.pool(), now };
        let group = prefilled.and_then(|state| worker.table.get(state.pick.endpoint)?.endpoint.group.as_deref());
        let picked = scheduler.pick_decode(&work.candidates.decode, &work.prompt, &[], group);
        match picked {
            Some((pick, alternates)) => {
                self.send(worker, work, Route { decision, reason, pick, alternates, prefilled, insert }, now)
            }
            None => self.reject(worker, Vec::new(), &Rejection::NoEndpoint),
        }
    }

    /// Sends the request to an engine endpoint.
    fn send(&mut self, worker: &mut Worker, work: &Work, route: Route<'_>, now: Duration) -> Outcome {
        let Route { decision, reason, pick, alternates, prefilled, insert } = route;
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
        slot.decode.add(tokens);
        slot.health.sent(now);
        let decode = Arc::clone(&slot.address);
        let leg = prefilled.is_none().then(|| {
            slot.prefill.add(leg, pick.seconds, now, now.saturating_add(work.pool().prefill_timeout));
            leg
        });
        if prefilled.is_none() || work.pool().split != Split::Always {
            // Where everything is split, nobody asks what decode endpoints hold.
            enter(worker, pick.endpoint, &work.prompt);
        }
        worker.counts.count(decision);
        worker.counts.add(Metric::DecodeInFlight, 1);
        worker.counts.add(Metric::DecodeTokensInFlight, to_i64(tokens));

        let matched_tokens = prefilled.map_or(pick, |state| state.pick).matched_tokens;
        worker.counts.add(Metric::MatchedTokens, matched_tokens as i64);
        let mut effects = vec![
            Effect::SetState(DESTINATION, destination.into_bytes()),
            Effect::SetState(DECISION, decision_name(decision).into()),
            Effect::SetState(REASON, reason.into()),
            Effect::SetState(DECODE, decode.as_bytes().to_vec()),
            Effect::SetState(MATCHED_TOKENS, (matched_tokens as u64).to_string().into_bytes()),
        ];
        if let Some(state) = prefilled {
            let ms = u64::try_from(now.saturating_sub(state.started).as_millis()).unwrap_or(u64::MAX);
            worker.counts.record(Metric::PrefillMs, ms);
            effects.push(Effect::SetState(PREFILL_MS, ms.to_string().into_bytes()));
            if let Some(slot) = worker.table.resolve(state.endpoint) {
                effects.push(Effect::SetState(PREFILL, slot.address.as_bytes().to_vec()));
            }
        }
        let edit = work.plan.with_insert(insert);
        if !edit.is_none() {
            effects.push(Effect::EditBody(edit));
        }
        self.state = State::Sent(Box::new(Sent { endpoint, alternates, tokens, leg, answered: false }));
        Outcome { flow: Flow::Continue, effects }
    }

    /// Sends a request without a prompt to whoever has the least to do.
    fn pass(&mut self, worker: &mut Worker, config: &Config, mut effects: Vec<Effect>, now: Duration) -> Outcome {
        let key = worker.next_leg();
        let prompt = Prompt { key: key.wrapping_mul(0x9e37_79b9_7f4a_7c15), ..Prompt::default() };
        let scheduler = Scheduler { table: &worker.table, index: &worker.index, pool: config.pool("default"), now };
        let Some((pick, alternates)) = scheduler.pick_decode(worker.table.all_ready(), &prompt, &[], None) else {
            return self.reject(worker, effects, &Rejection::NoEndpoint);
        };
        let destination = destination(worker, pick.endpoint, alternates.iter().copied());
        effects.push(Effect::SetState(DESTINATION, destination.into_bytes()));
        effects.push(Effect::SetState(DECISION, decision_name(Metric::RequestsPassed).into()));
        worker.counts.count(Metric::RequestsPassed);
        self.state = State::Over;
        Outcome { flow: Flow::Continue, effects }
    }

    /// Passes an engine's own refusal on.
    fn pass_on(&mut self, worker: &mut Worker, status: u16, content_type: Option<&[u8]>, body: &[u8]) -> Outcome {
        worker.counts.count(Metric::RequestsRejected);
        let content_type = content_type.and_then(|value| core::str::from_utf8(value).ok());
        let headers = vec![("content-type", content_type.unwrap_or("application/json").to_owned())];
        let reply = Reply { status, headers, body: body.to_vec(), reason: "prefill_answer" };
        self.answer(reply, Vec::new())
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

impl Sent {
    /// Takes back what was counted at the endpoint.
    fn release(&mut self, worker: &mut Worker, now: Duration) {
        let leg = self.leg.take();
        let Some(slot) = worker.table.resolve(self.endpoint) else { return };
        slot.decode.remove(self.tokens);
        if let Some(leg) = leg {
            slot.prefill.remove(leg, now);
        }
    }
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
    worker.index.insert(endpoint, &prompt.hash.blocks);
    worker.index.insert(endpoint, prompt.session.as_slice());
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

/// The prefill endpoint that a trusted peer names, if it is one of the candidates.
fn hinted(worker: &Worker, ids: &[EndpointId], candidates: &Candidates) -> Option<EndpointIndex> {
    ids.iter().filter_map(|id| worker.table.find(*id)).find(|at| candidates.prefill.contains(at))
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
            [("GET", "/v1/models", true), ("POST", "/v1/unknown", true), ("GET", "/v1/chat/completions", true)]
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
        t.request.response_headers(&mut t.worker, Some(addresses[1].as_bytes()), t.now);
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
}
