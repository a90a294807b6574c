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

use crate::body::form::Encoding;
use crate::body::splice::HeadEdit;
use crate::body::{Api, Scan, scan};
use crate::choose::admission::{Ask, Shed};
use crate::choose::scheduler::{Decision, Scheduler};
use crate::config::{Config, EXPLAIN_HEADER, Limits, PHASE_HEADER, PREFILLER_HEADER, STATIC_EPOCH};
use crate::headers::Headers;
use crate::metrics::Metric;
use crate::prefix::index::EndpointIndex;
use crate::request::intake::{Claims, Intake, Phase, Subset, Work, decoded_path, endpoint_ids, is_ours, read_body};
use crate::request::models::{Served, known};
use crate::request::reply::{REASON_HEADER, Rejection, Reply};
use crate::wire::EndpointId;
use crate::workers::worker::{Ticket, Worker};

use leg::{abandon, engines_reply};
use prefill::{Prefilling, hinted};
use route::{Prefill, Route};
use sent::{Companion, Sent};

pub(crate) mod answer;
pub(crate) mod intake;
mod leg;
pub(crate) mod models;
mod prefill;
pub mod reply;
mod route;
mod sent;
pub mod upstream;

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
    /// Remove a header of the response whose headers are told.
    RemoveResponseHeader(&'static str),
    /// Edit the part of the response's body that is told.
    EditResponse(HeadEdit),
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
        let (method, path) = (headers.get(":method"), headers.get(":path").unwrap_or_default());
        let subset = Subset::read(&headers, &config);
        if method == Some(b"GET") && path == READY_PATH {
            self.state = State::Over;
            return Outcome { flow: Flow::Pause, effects: vec![Effect::Reply(readiness(worker, &config))] };
        }
        let path = decoded_path(path);
        if !config.allows(&path) {
            return self.reject(worker, effects, &Rejection::UnknownPath);
        }
        if method == Some(b"GET") && worker.state.table.names_all_models() && path == MODELS_PATH {
            worker.counts.count(Metric::RequestsPassed);
            return self.answer_models(worker, &config, effects);
        }
        let api = Api::of_path(&path).filter(|_| method == Some(b"POST"));
        if api.is_none() && end_of_stream {
            return self.pass(worker, &config, subset.as_ref(), effects, now);
        }
        let form = match Encoding::of(headers.get("content-type").unwrap_or_default()) {
            Ok(form) => form.filter(|_| api.is_none()),
            Err(error) if api.is_none() => return self.reject(worker, effects, &Rejection::InvalidForm(error)),
            Err(_) => None,
        };
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
        if headers.get("content-encoding").is_some_and(|value| value != b"identity") {
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
        self.state = State::Reading(Box::new(Intake { config, headers, api, form, phase, prefiller, claims, subset }));
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
        let Some(api) = intake.api else {
            let edit = match intake.cleaned(body) {
                Ok(edit) => edit,
                Err(rejection) => return self.reject(worker, Vec::new(), &rejection),
            };
            let effects = if edit.is_none() { Vec::new() } else { vec![Effect::EditBody(edit)] };
            return self.pass(worker, &intake.config, intake.subset.as_ref(), effects, now);
        };
        match scan(body).map_err(|error| Rejection::InvalidJson(error.to_string())) {
            Ok(scan) => {
                let Intake { config, headers, phase, prefiller, claims, subset, .. } = intake;
                match read_body(worker, config, headers, api, subset, body, &scan, now) {
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

    /// The stream is over, whatever way it ended. Everything that was counted for it is taken back.
    pub fn done(&mut self, worker: &mut Worker, now: Duration) {
        if let Some(ticket) = self.ticket.take() {
            worker.release(ticket);
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
            self.ticket = Some(worker.admit(&work.served.candidates.pool, limits, ask)?);
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
        let Work { served: Served { candidates, .. }, prompt, .. } = &work;
        let hint = prefiller.and_then(|ids| hinted(worker, ids, candidates));
        if prefiller.is_some() && hint.is_none() && phase.is_none() {
            worker.counts.count(Metric::HintsIgnored);
        }
        let scheduler = Scheduler { table: &worker.state.table, index: &worker.state.index, pool: work.pool(), now };
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
        let Work { served: Served { candidates, .. }, prompt, plan, .. } = &work;
        let scheduler = Scheduler { table: &worker.state.table, index: &worker.state.index, pool: work.pool(), now };
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
                scheduler.pick_decode(among, prompt, &[]).map(|(pick, alternates)| Route {
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
                    && let Some(slot) = worker.state.table.get(pick.endpoint)
                    && slot.work(now) + pick.seconds > deadline.as_secs_f64()
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

    /// Lists the models of all endpoints and their aliases, where each says which it serves: no single engine knows them all.
    fn answer_models(&mut self, worker: &Worker, config: &Config, mut effects: Vec<Effect>) -> Outcome {
        let card =
            |name: String| serde_json::json!({"id": name, "object": "model", "created": 0, "owned_by": "envoy-pd"});
        let data: Vec<_> = known(config, &worker.state.table).into_iter().map(card).collect();
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

/// Path that probes ask whether this Envoy may get requests.
pub const READY_PATH: &[u8] = b"/.pd-ready";

/// 200 once there is a list of endpoints, if an empty one: a filter that did not start or was told no list answers
/// 503, so Envoys that serve are not replaced by such.
fn readiness(worker: &Worker, config: &Config) -> Reply {
    let is_told =
        config.control.is_none() || !worker.state.table.is_empty() || worker.state.table.version().0 != STATIC_EPOCH;
    let (status, reason) = if is_told { (200, "ready") } else { (503, "no_list") };
    let headers = vec![("content-type", "application/json".to_owned()), (REASON_HEADER, reason.to_owned())];
    let body = serde_json::json!({"ready": is_told, "endpoints": worker.state.table.len()}).to_string().into_bytes();
    Reply { status, headers, body, reason }
}

/// Path that lists models, and the reason code of the filter's own list.
const MODELS_PATH: &[u8] = b"/v1/models";
const MODELS: &str = "models";
/// Reason code of a split whose KV cache could not be handed over.
const KV_MISSING: &str = "kv_missing";

/// How long a bootstrap server may take to tell an engine's id, which it has in memory.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(2);

fn decision_name(decision: Metric) -> &'static str {
    decision.name().rsplit('=').next().unwrap_or_default()
}

fn to_i64(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
