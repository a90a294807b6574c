//! The client of the exchange. Every worker has one, and only the client of the leader calls the hub.

use core::time::Duration;

use hashbrown::HashMap;

use crate::config::Control;
use crate::endpoints::elsewhere::{Fleet, Totals};
use crate::envoys::message::{EXCHANGE_PATH, ExchangeRequest, ExchangeResponse, MAX_BLOCKS_BYTES, Record};
use crate::metrics::Metric;
use crate::prefix::block_log::{read_event, split_events};
use crate::time::Monotonic;
use crate::workers::shared::Shared;
use crate::workers::worker::Worker;

/// Time between two calls of [`ExchangeClient::tick`] while [`ExchangeClient::is_busy`].
pub const TICK: Duration = Duration::from_millis(50);
/// Least time between two calls of one kind: a little less than a tick, because ticks jitter.
const PAUSE: Duration = Duration::from_millis(40);
/// Time after which an Envoy sends a request although it has nothing new. The request shows the hub that the Envoy is alive.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Time without an answer after which an Envoy uses its own view alone.
const PATIENCE: Duration = Duration::from_millis(2_500);
/// How long the hub may hold a receiving call.
const WAIT: Duration = Duration::from_secs(1);
/// Time limit of a call, beyond the time for which the hub may hold it.
const GRACE: Duration = Duration::from_millis(1_000);
/// Pause after a call that failed.
const FAILURE_PAUSE: Duration = Duration::from_millis(500);
/// Most other Envoys of which the client remembers the next block event.
const MAX_KNOWN: usize = 1_024;

/// Shared key of the number of this Envoy's latest leader. Workers of two releases share it.
const LEADER_KEY: &str = "pd/voice";

/// Kind of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallKind {
    /// Sends this Envoy's changes. The hub answers at once.
    Send,
    /// Receives the other Envoys' changes. The hub answers at the next change, or after a second.
    Receive,
}

/// A call that the shell should start: a POST to the configuration's `control`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExchangeCall {
    /// Its kind, for [`ExchangeClient::answered`] and [`ExchangeClient::failed`].
    pub kind: CallKind,
    /// `:path`.
    pub path: String,
    /// Body: an [`ExchangeRequest`].
    pub body: Vec<u8>,
    /// Time limit.
    pub timeout: Duration,
}

/// The exchange at one worker.
#[derive(Debug, Default)]
pub struct ExchangeClient {
    is_on: bool,
    /// [`Record::gateway`]; 0: this worker is not the leader.
    gateway: u64,
    replaces: u64,
    turn: u64,
    /// Number of block events of this Envoy that the hub has.
    acked: u64,
    /// For each other Envoy the number of its next block event.
    known: HashMap<u64, u64>,
    /// Hub and state of the loads in `elsewhere`.
    known_state: (u64, u64),
    sent_loads: Option<Vec<(u64, Totals)>>,
    sent_at: Monotonic,
    reported_at: Option<Monotonic>,
    received_at: Monotonic,
    answered_at: Monotonic,
    is_sending: bool,
    is_receiving: bool,
    /// End of the pause after a failed call. The client starts no call before it.
    rest_until: Monotonic,
    fleet: Fleet,
    /// What other Envoys have in flight, as the workers' log of this Envoy has it.
    elsewhere: HashMap<u64, Totals>,
}

impl ExchangeClient {
    /// Starts over with a configuration's `control`. `control.exchange` switches the exchange on; `None` leaves it off.
    pub fn configure(&mut self, worker: &mut Worker, control: Option<&Control>) {
        self.resign(worker);
        self.is_on = control.is_some_and(|control| control.exchange);
    }

    /// Whether other Envoys exchange with this worker. Then [`tick`](Self::tick) is due every [`TICK`], otherwise at every
    /// tick of the push.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.gateway != 0 && self.fleet.exchanging > 1
    }

    /// Whether this worker should become the leader: there is an exchange, the worker holds the lease and does not lead.
    pub(super) fn should_lead(&self, holds_lease: bool) -> bool {
        self.is_on && holds_lease && self.gateway == 0
    }

    /// Makes this worker the leader, if it holds the lease and does not lead yet. The worker replaces the latest leader of
    /// its Envoy, whose number is in shared data. `random` returns a number that no other leader has; 0 counts as 1.
    pub fn take_lead(
        &mut self,
        worker: &mut Worker,
        shared: &impl Shared,
        holds_lease: bool,
        random: impl FnOnce() -> u64,
        now: Monotonic,
    ) {
        if !self.should_lead(holds_lease) {
            return;
        }
        let before = shared.get(LEADER_KEY).and_then(|(bytes, _)| Some(u64::from_le_bytes(*bytes.first_chunk()?)));
        let gateway = random().max(1);
        shared.set(LEADER_KEY, &gateway.to_le_bytes(), None);
        self.lead(worker, gateway, before.unwrap_or(0), now);
    }

    /// Makes this worker the leader with the number `gateway`, above 0. The hub drops the loads of the leader `replaces`; 0:
    /// of none.
    pub fn lead(&mut self, worker: &mut Worker, gateway: u64, replaces: u64, now: Monotonic) {
        // The fleet of the leader before this one counts until the first answer.
        let fleet = worker.state.table.fleet;
        *self = Self { is_on: self.is_on, gateway, replaces, answered_at: now, fleet, ..Self::default() };
        worker.outbox = Some(Box::default());
    }

    /// Ends the leadership of this worker, and takes the loads of other Envoys out of the workers' log.
    pub fn resign(&mut self, worker: &mut Worker) {
        self.apply_loads(worker, &[]);
        worker.outbox = None;
        *self = Self { is_on: self.is_on, ..Self::default() };
    }

    /// The calls that are due; none where this worker is not the leader. A leader without the lease resigns. `report` returns
    /// a [`Report`](super::report::Report) in JSON and is called at most once a second.
    pub fn tick(
        &mut self,
        worker: &mut Worker,
        holds_lease: bool,
        now: Monotonic,
        report: impl FnOnce(&Worker) -> Vec<u8>,
    ) -> Vec<ExchangeCall> {
        if self.gateway == 0 {
            return Vec::new();
        }
        if !holds_lease {
            self.resign(worker);
            return Vec::new();
        }
        let knows_others = self.fleet.exchanging > 1 || !self.elsewhere.is_empty();
        if knows_others && now.saturating_sub(self.answered_at) > PATIENCE {
            // The other Envoys may be alive, so the number of all Envoys stays.
            self.apply_loads(worker, &[]);
            self.apply_fleet(worker, Fleet { exchanging: 1, ..self.fleet });
            self.known_state = (0, 0);
        }
        if now < self.rest_until {
            return Vec::new();
        }
        let mut calls = Vec::new();
        if !self.is_sending {
            calls.extend(self.send(worker, now, report));
        }
        if !self.is_receiving && self.fleet.exchanging > 1 && now.saturating_sub(self.received_at) >= PAUSE {
            self.is_receiving = true;
            self.received_at = now;
            let request = ExchangeRequest {
                from: self.gateway,
                known_state: self.known_state,
                wants: true,
                known: self.known(),
                records: Vec::new(),
                origins: Vec::new(),
            };
            calls.push(ExchangeCall {
                kind: CallKind::Receive,
                path: format!("{EXCHANGE_PATH}?wait_ms={}", WAIT.as_millis()),
                body: request.to_bytes(),
                timeout: WAIT.saturating_add(GRACE),
            });
        }
        calls
    }

    fn send(
        &mut self,
        worker: &Worker,
        now: Monotonic,
        report: impl FnOnce(&Worker) -> Vec<u8>,
    ) -> Option<ExchangeCall> {
        let log = worker.outbox.as_deref()?;
        let since = now.saturating_sub(self.sent_at);
        let is_first = self.sent_loads.is_none();
        let pause = if self.fleet.exchanging > 1 { PAUSE } else { HEARTBEAT };
        if !is_first && since < pause {
            return None;
        }
        let loads = loads(worker, now);
        if self.sent_loads.as_ref() == Some(&loads) && self.acked >= log.next() && since < HEARTBEAT {
            return None;
        }
        let is_report_due = self.reported_at.is_none_or(|at| now.saturating_sub(at) >= HEARTBEAT);
        let report = if is_report_due { report(worker) } else { Vec::new() };
        if is_report_due {
            self.reported_at = Some(now);
        }
        self.is_sending = true;
        self.turn = self.turn.saturating_add(1);
        self.sent_at = now;
        self.sent_loads = Some(loads.clone());
        let first = self.acked.clamp(log.oldest(), log.next());
        let record = Record {
            gateway: self.gateway,
            replaces: self.replaces,
            turn: self.turn,
            hash_scheme: hash_scheme(worker),
            loads,
            oldest: log.oldest(),
            first,
            blocks: log.from(first, MAX_BLOCKS_BYTES),
            report,
        };
        // Where other Envoys exchange, the receiving call brings loads and blocks. This call then asks for the fleet only.
        let wants = self.fleet.exchanging <= 1;
        let request = ExchangeRequest {
            from: self.gateway,
            known_state: self.known_state,
            wants,
            known: self.known(),
            records: vec![record],
            origins: Vec::new(),
        };
        Some(ExchangeCall {
            kind: CallKind::Send,
            path: EXCHANGE_PATH.to_owned(),
            body: request.to_bytes(),
            timeout: GRACE,
        })
    }

    fn known(&self) -> Vec<(u64, u64)> {
        let mut known: Vec<_> = self.known.iter().map(|(gateway, next)| (*gateway, *next)).collect();
        known.sort_unstable();
        known
    }

    /// Takes the failure of a call: the shell could not start it, or it has no usable answer. The client calls again after a
    /// pause.
    pub fn failed(&mut self, worker: &mut Worker, kind: CallKind, now: Monotonic) {
        self.ended(kind);
        worker.counts.count(Metric::ExchangesFailed);
        self.rest_until = now.saturating_add(FAILURE_PAUSE);
        // The next answer may come from another hub, which lacks everything that was sent.
        self.sent_loads = None;
    }

    /// Takes the end of a call; `status` is `None` where no answer came. Any answer but a 200 with an [`ExchangeResponse`]
    /// counts as [`failed`](Self::failed).
    pub fn answered(&mut self, worker: &mut Worker, kind: CallKind, status: Option<u16>, body: &[u8], now: Monotonic) {
        let response = ExchangeResponse::from_bytes(body).filter(|_| status == Some(200));
        let (Some(response), true) = (response, self.gateway != 0) else {
            self.failed(worker, kind, now);
            return;
        };
        self.ended(kind);
        worker.counts.count(Metric::ExchangesOk);
        self.answered_at = now;
        if let Some((_, next)) = response.have.iter().find(|(gateway, _)| *gateway == self.gateway) {
            self.acked = *next;
        }
        self.apply_fleet(worker, Fleet { gateways: response.gateways, exchanging: response.exchanging });
        if let Some(loads) = response.loads {
            self.known_state = (response.hub, response.state);
            self.apply_loads(worker, &loads);
        }
        let hash_scheme = hash_scheme(worker);
        for batch in response.batches {
            if self.known.len() >= MAX_KNOWN && !self.known.contains_key(&batch.gateway) {
                self.known.clear();
            }
            let known = self.known.entry(batch.gateway).or_default();
            let mut number = batch.first;
            for event in split_events(&batch.blocks) {
                if number >= *known
                    && batch.hash_scheme == hash_scheme
                    && let Some((endpoint, blocks)) = read_event(event)
                {
                    worker.holds_by_others(endpoint, &blocks);
                }
                number = number.saturating_add(1);
            }
            *known = number.max(*known);
        }
    }

    fn ended(&mut self, kind: CallKind) {
        match kind {
            CallKind::Send => self.is_sending = false,
            CallKind::Receive => self.is_receiving = false,
        }
    }

    fn apply_fleet(&mut self, worker: &mut Worker, fleet: Fleet) {
        if self.fleet != fleet {
            self.fleet = fleet;
            worker.fleet_is(fleet);
        }
    }

    /// Writes the changes of other Envoys' loads to the workers' log.
    fn apply_loads(&mut self, worker: &mut Worker, loads: &[(u64, Totals)]) {
        let new: HashMap<u64, Totals> = loads.iter().copied().collect();
        let old = core::mem::replace(&mut self.elsewhere, new);
        for (endpoint, totals) in &self.elsewhere {
            let difference = totals.minus(old.get(endpoint).copied().unwrap_or_default());
            if difference != Totals::default() {
                worker.busy_elsewhere(*endpoint, difference);
            }
        }
        for (endpoint, totals) in old.iter().filter(|(endpoint, _)| !self.elsewhere.contains_key(*endpoint)) {
            worker.busy_elsewhere(*endpoint, Totals::default().minus(*totals));
        }
    }
}

/// What this Envoy has in flight at each endpoint, sorted by the endpoints' keys, without endpoints that have nothing in
/// flight.
fn loads(worker: &Worker, now: Monotonic) -> Vec<(u64, Totals)> {
    let totals = |state: &crate::endpoints::endpoint_state::EndpointState| Totals {
        work: (state.prefill.work(now) * 1e6) as u64,
        tokens: state.decode.tokens,
        requests: u64::from(state.decode.requests),
        legs: state.prefill.len() as u64,
    };
    let states = worker.state.table.iter().map(|(_, state)| (state.key, totals(state)));
    let mut loads: Vec<_> = states.filter(|(_, totals)| *totals != Totals::default()).collect();
    loads.sort_unstable_by_key(|(endpoint, _)| *endpoint);
    loads
}

/// Everything that block hashes depend on besides the prompt: the size of the first block in bytes.
fn hash_scheme(worker: &Worker) -> u64 {
    worker.config.as_ref().map_or(0, |config| config.prefix.block_bytes) as u64
}
