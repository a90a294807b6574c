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
use std::borrow::Cow;
use std::sync::Arc;

use crate::body::{Api, Key, Scan, scan};
use crate::config::{Config, OnPrefillFailure, PHASE_HEADER, PREFILLER_HEADER, Pool};
use crate::engine::{self, Handover};
use crate::hash::prompt_hash;
use crate::headers::Headers;
use crate::index::EndpointIndex;
use crate::metrics::Metric;
use crate::reply::{Rejection, Reply};
use crate::schedule::{Decision, Pick, Prompt, Scheduler};
use crate::splice::{HeadEdit, HeadPlan};
use crate::table::{Candidates, EndpointRef, NoCandidates};
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
/// Every filter state that a request may get.
pub const STATES: &[&str] = &[DESTINATION, DECISION, REASON, PREFILL, DECODE, MATCHED_TOKENS, PREFILL_MS];

/// Output tokens that a request is expected to add to its KV cache, unless it allows fewer. The traces' mean is 149 to 343.
const EXPECTED_OUTPUT_TOKENS: u64 = 256;

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
    /// The host refused to start it, or it ended without an answer.
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

/// What the headers said.
#[derive(Debug)]
struct Intake {
    config: Arc<Config>,
    headers: Headers,
    /// `None`: a path whose body is only freed of what no client may send.
    api: Option<Api>,
    phase: Option<Phase>,
    /// Prefill endpoint that a trusted peer names.
    prefiller: Option<Vec<EndpointId>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Prefill,
    Decode,
}

/// What the body said, and who may serve it.
#[derive(Debug)]
struct Work {
    config: Arc<Config>,
    headers: Headers,
    api: Api,
    candidates: Arc<Candidates>,
    prompt: Prompt,
    output_tokens: u64,
    /// How the body becomes an engine's, when it is known what to put in front.
    plan: HeadPlan,
}

/// A request whose prefill leg is in flight.
#[derive(Debug)]
struct Prefilling {
    work: Work,
    tried: Vec<EndpointIndex>,
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
            let edit = scanned.map(|scan| engine::decode_plan(body, &scan).with_insert(b"")).unwrap_or_default();
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
        let engine = worker.table.resolve(state.endpoint).map(|slot| {
            slot.prefill.remove(state.leg, now);
            match answer.fault() {
                Some(Fault::Unreachable) => slot.health.failed(now),
                Some(Fault::ServerError) | None => slot.health.answered(),
            }
            slot.engine
        });
        let Some(fault) = answer.fault() else {
            return match answer {
                PrefillAnswer::Answered { status: 200, body, .. } => {
                    worker.counts.count(Metric::PrefillOk);
                    // An endpoint that has left the list meanwhile answered all the same: its pool's engine reads it.
                    let engine = engine.unwrap_or(state.work.pool().engine);
                    self.prefilled(worker, &state, &engine::handover(engine, body), now)
                }
                PrefillAnswer::Answered { status, content_type, body } => {
                    worker.counts.count(Metric::PrefillClientError);
                    self.pass_on(worker, status, content_type, body)
                }
                PrefillAnswer::None => Outcome { flow: Flow::Pause, effects: Vec::new() },
            };
        };
        worker.counts.count(match fault {
            Fault::Unreachable => Metric::PrefillRefused,
            Fault::ServerError => Metric::PrefillServerError,
        });
        state.tried.push(state.endpoint.index);
        let pool = state.work.pool();
        let next = (state.tried.len() < pool.prefill_attempts as usize)
            .then(|| {
                let scheduler = Scheduler { table: &worker.table, index: &worker.index, pool, now };
                scheduler.pick_by_cost(&state.work.candidates.prefill, &state.work.prompt, &state.tried)
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
        tried: Vec<EndpointIndex>,
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
        let destination = destination(worker, pick.endpoint, alternates.into_iter().filter(|at| !tried.contains(at)));
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
        worker.index.insert(pick.endpoint, &work.prompt.hash.blocks);
        worker.counts.add(Metric::PrefillInFlight, 1);
        self.state = State::Prefilling(Box::new(Prefilling { work, tried, pick, endpoint, leg, started }));
        Outcome { flow: Flow::Pause, effects: vec![Effect::Call(call)] }
    }

    /// The prompt is computed: on to a decode endpoint.
    fn prefilled(&mut self, worker: &mut Worker, state: &Prefilling, handover: &Handover, now: Duration) -> Outcome {
        let (reason, insert): (_, &[u8]) = match handover {
            Handover::Insert(members) => ("prefilled", members),
            Handover::Nothing => ("prefilled", b""),
            Handover::Missing => {
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
        let destination = destination(worker, pick.endpoint, alternates.iter().copied());
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
        worker.index.insert(pick.endpoint, &work.prompt.hash.blocks);
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

impl Work {
    fn pool(&self) -> &Pool {
        self.config.pool(&self.candidates.pool)
    }
}

/// Why a prefill leg is worth another try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The endpoint did not answer: it is out for its next requests.
    Unreachable,
    /// It answered that it cannot now. Overload is no reason to stay away from it.
    ServerError,
}

impl PrefillAnswer<'_> {
    fn fault(&self) -> Option<Fault> {
        match self {
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

/// Headers that name an endpoint or steer this filter. None of them reaches an engine, whoever set it.
const OURS: &[&[u8]] = &[
    PREFILLER_HEADER.as_bytes(),
    b"x-gateway-destination-endpoint",
    b"x-gateway-destination-endpoint-served",
    b"x-gateway-destination-endpoint-subset",
    b"test-epp-endpoint-selection",
    b"x-data-parallel-rank",
    b"x-data-parallel-host-port",
    b"target-pod",
    b"prefill-target-pod",
];

fn is_ours(name: &[u8], config: &Config) -> bool {
    name.starts_with(b"x-pd-") || OURS.contains(&name) || name == config.destination_header.as_bytes()
}

/// Headers of the client's request that do not belong on another one, beside pseudo-headers.
const NOT_FORWARDED: &[&[u8]] = &[
    b"accept-encoding", // the answer must be readable
    b"connection",
    b"content-length",
    b"expect",
    b"keep-alive",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
];

/// Headers of the prefill leg: the client's, and the destination.
fn leg_headers(headers: &Headers, config: &Config, destination: &[u8]) -> Headers {
    const PSEUDO: &[&[u8]] = &[b":method", b":path", b":authority", b":scheme"];
    let forwarded = |name: &[u8]| {
        PSEUDO.contains(&name)
            || !(name.starts_with(b":")
                || name.starts_with(b"x-envoy-")
                || NOT_FORWARDED.contains(&name)
                || is_ours(name, config))
    };
    let own = (config.destination_header.as_bytes(), destination);
    Headers::from_pairs(headers.iter().filter(|(name, _)| forwarded(name)).chain([own]))
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

/// The path as a server understands it: percent-encoding undone, so that no spelling of a path gets past the scan.
fn decoded_path(path: &[u8]) -> Cow<'_, [u8]> {
    let path = path.split(|byte| *byte == b'?').next().unwrap_or_default();
    if !path.contains(&b'%') {
        return Cow::Borrowed(path);
    }
    let mut decoded = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((first, tail)) = rest.split_first() {
        let hex = tail.get(..2).and_then(|two| u8::from_str_radix(core::str::from_utf8(two).ok()?, 16).ok());
        let (byte, next) = match (first, hex, tail.get(2..)) {
            (b'%', Some(byte), Some(next)) => (byte, next),
            _ => (*first, tail),
        };
        decoded.push(byte);
        rest = next;
    }
    Cow::Owned(decoded)
}

fn endpoint_ids(value: &[u8]) -> Vec<EndpointId> {
    let text = core::str::from_utf8(value).unwrap_or_default();
    text.split(',').filter_map(|id| id.trim().parse().ok()).collect()
}

/// The prefill endpoint that a trusted peer names, if it is one of the candidates.
fn hinted(worker: &Worker, ids: &[EndpointId], candidates: &Candidates) -> Option<EndpointIndex> {
    ids.iter().filter_map(|id| worker.table.find(*id)).find(|at| candidates.prefill.contains(at))
}

fn read_body(
    worker: &mut Worker,
    config: Arc<Config>,
    headers: Headers,
    api: Api,
    body: &[u8],
    scan: &Scan,
) -> Result<Work, Rejection> {
    let model = scan.str(body, Key::Model).ok_or(Rejection::MissingModel)?;
    let candidates = worker.table.candidates(&model).map_err(|none| match none {
        NoCandidates::NoEndpoint => Rejection::NoEndpoint,
        NoCandidates::UnknownModel => Rejection::UnknownModel {
            model: model.clone().into_owned(),
            known: worker.table.model_names().into_iter().map(str::to_owned).collect(),
        },
    })?;
    let pool = config.pool(&candidates.pool);
    let parts = prompt_parts(api, body, scan);
    let bytes = parts.iter().fold(0_usize, |sum, part| sum.saturating_add(part.len()));
    let salt = scan.raw(body, Key::CacheSalt).unwrap_or_default();
    let hash = prompt_hash(model.as_bytes(), salt, &parts, config.prefix.block_bytes);
    let distinctive = worker.index.distinctive(&hash.blocks, config.prefix.hot_share);
    let prompt = Prompt {
        tokens: bytes as f64 / pool.bytes_per_token,
        block_tokens: config.prefix.block_bytes as f64 / pool.bytes_per_token,
        key: distinctive.map_or(hash.head, |block| block.0),
        is_unseen: distinctive.is_some_and(|block| !worker.index.knows(block)),
        hash,
    };
    worker.counts.add(Metric::PromptTokens, prompt.tokens as i64);
    let limits = [Key::MaxCompletionTokens, Key::MaxTokens, Key::MaxOutputTokens];
    let limit = limits.into_iter().find_map(|key| scan.u64(body, key));
    let output_tokens = limit.unwrap_or(EXPECTED_OUTPUT_TOKENS).min(EXPECTED_OUTPUT_TOKENS);
    let plan = engine::decode_plan(body, scan);
    Ok(Work { config, headers, api, candidates, prompt, output_tokens, plan })
}

/// What the engine puts in front of the model, in the order in which chat templates do.
fn prompt_parts<'a>(api: Api, body: &'a [u8], scan: &Scan) -> Vec<&'a [u8]> {
    let keys: &[Key] = match api {
        Api::Chat => &[Key::Tools, Key::Messages],
        Api::Completions => &[Key::Prompt],
        Api::Responses => &[Key::Tools, Key::Instructions, Key::Input],
        Api::Messages => &[Key::Tools, Key::System, Key::Messages],
        Api::Generate => &[Key::TokenIds, Key::PromptTokenIds],
    };
    keys.iter().filter_map(|key| scan.raw(body, *key)).collect()
}

fn decision_name(decision: Metric) -> &'static str {
    decision.name().rsplit('=').next().unwrap_or_default()
}

fn to_i64(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
