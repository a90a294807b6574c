//! One worker: its configuration, its state, the events it has to publish and its counts.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::choose::admission::{Ask, Shed, pool_key};
use crate::config::{Config, ConfigError, Limits};
use crate::endpoints::elsewhere::{Fleet, Totals};
use crate::endpoints::retry_budget::RetryBudget;
use crate::endpoints::table::{Applied, EndpointRef};
use crate::engine::pair_id;
use crate::metrics::{Counts, INDEX_BYTES, Metric};
use crate::prefix::block_log::{BlockLog, block_event};
use crate::prefix::hash::BlockHash;
use crate::prefix::index::PrefixIndex;
use crate::time::Monotonic;
use crate::wire::{Snapshot, WireError};
use crate::workers::event::Event;
use crate::workers::pending::PendingEvents;
use crate::workers::recent::{DecisionRecord, Recent};
use crate::workers::served::Served;
use crate::workers::shared::Shared;
use crate::workers::state::State;
use crate::workers::turns::Turns;
use crate::workers::waiting::Waiting;

/// Key of the last configuration that a worker of this Envoy put in force. Workers of two releases share it.
const LAST_GOOD_CONFIG_KEY: &str = "pd/config";

/// Bytes of block events that the leader keeps for the other Envoys.
const OUTBOX_BYTES: usize = 1 << 20;

/// One worker. The host can drop it at any time; a new one builds everything again.
#[derive(Debug)]
pub struct Worker {
    /// Configuration in force. Before the first accepted configuration it is the error of the latest refused one, and
    /// requests get 503.
    pub config: Result<Arc<Config>, ConfigError>,
    /// Endpoints, index and admission, as the events of all workers made them.
    pub state: State,
    /// Counts that the shell flushes to Envoy at the tick.
    pub counts: Counts,
    /// Events for the other workers.
    pub(crate) pending: PendingEvents,
    /// Blocks for the other Envoys; `None` where this worker is not its Envoy's leader.
    pub(crate) outbox: Option<Box<BlockLog>>,
    /// Latest decisions, for the report.
    pub(crate) recent: Recent,
    /// What endpoints served, for the report.
    pub(crate) served: Served,
    /// Prefill legs that this worker may run again.
    pub retries: RetryBudget,
    /// This worker's waiting requests.
    pub(crate) turns: Turns,
    /// Name of the Envoy, for the report; empty where it has none.
    pub name: String,
    /// Environment variables of the Envoy process that the filter sees. Set it before the configuration.
    pub environment: BTreeMap<String, String>,
    legs: u64,
}

impl Default for Worker {
    fn default() -> Self {
        Self {
            config: Err(ConfigError::none_yet()),
            state: State::default(),
            counts: Counts::default(),
            pending: PendingEvents::default(),
            outbox: None,
            recent: Recent::default(),
            served: Served::default(),
            retries: RetryBudget::default(),
            turns: Turns::default(),
            name: String::new(),
            environment: BTreeMap::new(),
            legs: 0,
        }
    }
}

/// Result of a new configuration.
#[derive(Clone, Debug, PartialEq)]
pub enum Configured {
    /// The configuration is in force.
    New(Arc<Config>),
    /// The configuration was refused. The last good one, named first, is in force.
    LastGood(Arc<Config>, ConfigError),
    /// The configuration was refused, and no worker of this Envoy had a good one.
    Refused(ConfigError),
}

/// A request that a pool with limits let in; [`Worker::release`] takes it back.
#[derive(Debug)]
pub(crate) struct Ticket {
    pool: u64,
    fairness: u64,
    tokens: u64,
}

impl Worker {
    /// Puts a configuration in force. `text` is JSON; an empty text stands for all defaults. The state starts anew, with the
    /// endpoints that the configuration names.
    ///
    /// # Errors
    /// Why the configuration is refused. The configuration before it stays in force. Without one, requests get 503.
    pub fn configure(&mut self, text: &[u8]) -> Result<Arc<Config>, ConfigError> {
        let parsed = Config::parse(text).and_then(|mut config| {
            config.legs.resolve(|name| self.environment.get(name).cloned())?;
            Ok(config)
        });
        match parsed {
            Ok(config) => {
                let config = Arc::new(config);
                self.counts.count(Metric::ConfigAccepted);
                let index = PrefixIndex::new(config.prefix.index_bytes);
                let table = self.state.table.successor();
                self.state = State { index, table, waiting: Waiting::new(&config), ..State::default() };
                self.turns.forget_queues();
                self.state.table.apply(&config.static_snapshot(), &config, &mut self.state.index);
                self.config = Ok(Arc::clone(&config));
                Ok(config)
            }
            Err(error) => {
                self.counts.count(Metric::ConfigRefused);
                if self.config.is_err() {
                    self.config = Err(error.clone());
                }
                Err(error)
            }
        }
    }

    /// As [`configure`](Self::configure). Where the configuration is refused, it puts the last good configuration of any
    /// worker of this Envoy in force. So a worker that starts with a bad configuration serves with the one before it.
    pub fn configure_or_last_good(&mut self, text: &[u8], shared: &impl Shared) -> Configured {
        match self.configure(text) {
            Ok(config) => {
                if !shared.set(LAST_GOOD_CONFIG_KEY, text, None) {
                    self.counts.count(Metric::HostErrors);
                }
                Configured::New(config)
            }
            Err(refusal) => {
                let last_good = shared.get(LAST_GOOD_CONFIG_KEY);
                match last_good.and_then(|(last_good, _)| self.configure(&last_good).ok()) {
                    Some(config) => Configured::LastGood(config, refusal),
                    None => Configured::Refused(refusal),
                }
            }
        }
    }

    /// Applies a snapshot in JSON, whole or not at all. Without a configuration in force nothing changes.
    ///
    /// # Errors
    /// Why the snapshot is refused. The list before it stays in force.
    pub fn apply(&mut self, bytes: &[u8]) -> Result<Applied, WireError> {
        let Ok(config) = self.config.clone() else { return Ok(Applied::Unchanged) };
        let applied =
            Snapshot::parse(bytes).map(|snapshot| self.state.table.apply(&snapshot, &config, &mut self.state.index));
        match applied {
            Ok(Applied::Changed) => {
                self.counts.count(Metric::SnapshotsApplied);
                self.room_changed();
            }
            Ok(Applied::Unchanged | Applied::OutOfStep) => {}
            Ok(Applied::Empty) | Err(_) => self.counts.count(Metric::SnapshotsRefused),
        }
        applied
    }

    /// Drops ledger entries that expired without an end, and fits the caches to the learnt bytes per token. Call it a few
    /// times a second.
    pub fn prune(&mut self, now: Monotonic) {
        self.state.table.prune(now);
        self.pending.own_ledger.prune(now);
        self.room_changed();
        if let Ok(config) = &self.config {
            self.state.table.resize_caches(config, &mut self.state.index);
        }
    }

    /// Gauges that change now and then, by name and tags, each with its value: [`INDEX_BYTES`], and of each pool the
    /// [`FITTED_GAUGES`](crate::metrics::FITTED_GAUGES) and the [`WAITING_GAUGES`](crate::metrics::WAITING_GAUGES).
    pub fn gauges(&self) -> impl Iterator<Item = (String, u64)> {
        core::iter::once((INDEX_BYTES.to_owned(), self.state.index.bytes() as u64))
            .chain(self.state.table.fitted_gauges())
            .chain(self.waiting_gauges())
    }

    /// Keeps events for the other workers from now on, and numbers legs apart from theirs.
    pub(crate) fn start_log(&mut self, worker_id: u64) {
        self.pending.unpublished.get_or_insert_default();
        self.turns.start(worker_id);
        self.legs = self.legs.max(worker_id.wrapping_shl(40));
    }

    /// Lets a request into a pool with limits. Call [`release`](Self::release) with the ticket at the request's end.
    ///
    /// # Errors
    /// [`Shed`]: why the pool does not let the request in.
    pub(crate) fn admit(&mut self, pool: &str, limits: Limits, ask: Ask) -> Result<Ticket, Shed> {
        let ticket = Ticket { pool: pool_key(pool), fairness: ask.fairness, tokens: ask.tokens };
        self.state.admission.check(ticket.pool, limits, ask)?;
        self.happens_at(ticket.pool, &Event::Admitted { fairness: ticket.fairness, tokens: ticket.tokens });
        Ok(ticket)
    }

    /// Takes back a request that was let in.
    pub(crate) fn release(&mut self, Ticket { pool, fairness, tokens }: Ticket) {
        self.happens_at(pool, &Event::Released { fairness, tokens });
    }

    /// Applies an event of this worker at an endpoint, and keeps it for the other workers. The endpoint may have left the
    /// list, and may have returned: the ledger matches the end of a leg with its start in both cases.
    pub(super) fn happens(&mut self, endpoint: EndpointRef, event: &Event<'_>) {
        if self.state.table.resolve(endpoint).is_some() {
            event.apply_at(endpoint.index, &mut self.state);
        } else if self.state.table.issued(endpoint) {
            event.apply_at_absent(endpoint.key, &mut self.state.table);
        }
        self.pending.push(endpoint.key, event);
    }

    /// A prefill leg starts at an endpoint, which needs `seconds` for it. It counts until its end, or until `expires`.
    pub(crate) fn prefill_started(
        &mut self,
        endpoint: EndpointRef,
        leg: u64,
        seconds: f64,
        at: Monotonic,
        expires: Monotonic,
    ) {
        self.happens(endpoint, &Event::PrefillStarted { leg, seconds, at, expires });
    }

    /// A prefill leg ended without an answer of its endpoint.
    pub(crate) fn prefill_ended(&mut self, endpoint: EndpointRef, leg: u64, at: Monotonic) {
        self.happens(endpoint, &Event::PrefillEnded { leg, at, answered: false });
        self.room_changed();
    }

    /// A prefill leg ended with an answer of its endpoint.
    pub(crate) fn prefill_answered(&mut self, endpoint: EndpointRef, leg: u64, at: Monotonic) {
        self.happens(endpoint, &Event::PrefillEnded { leg, at, answered: true });
        self.room_changed();
    }

    /// The client of a prefill leg is gone, and the endpoint may still compute it.
    pub(crate) fn prefill_abandoned(&mut self, endpoint: EndpointRef, leg: u64, at: Monotonic) {
        self.happens(endpoint, &Event::PrefillAbandoned { leg, at });
    }

    /// A request of so many KV tokens is assigned to an endpoint.
    pub(crate) fn decode_started(&mut self, endpoint: EndpointRef, tokens: u64) {
        self.happens(endpoint, &Event::DecodeStarted { tokens });
    }

    /// A request that was assigned with so many KV tokens ended.
    pub(crate) fn decode_ended(&mut self, endpoint: EndpointRef, tokens: u64) {
        self.happens(endpoint, &Event::DecodeEnded { tokens });
        self.room_changed();
    }

    /// Notes that an endpoint gets a prompt and will hold its blocks.
    pub(crate) fn holds(&mut self, endpoint: EndpointRef, blocks: &[BlockHash]) {
        self.happens(endpoint, &Event::Holds { blocks: blocks.into() });
        self.queue_for_gateways(endpoint.key, blocks);
    }

    /// Notes that an endpoint refused a prompt and does not hold these blocks of it. Other Envoys do not learn of it.
    pub(crate) fn lacks(&mut self, endpoint: EndpointRef, blocks: &[BlockHash]) {
        if !blocks.is_empty() {
            self.happens(endpoint, &Event::Lacks { blocks: blocks.into() });
        }
    }

    /// Keeps for the other Envoys which blocks the endpoint with that key got. At a worker that is not the leader it changes
    /// nothing.
    pub(crate) fn queue_for_gateways(&mut self, endpoint: u64, blocks: &[BlockHash]) {
        if let Some(outbox) = self.outbox.as_mut().filter(|_| !blocks.is_empty()) {
            outbox.push(block_event(endpoint, blocks));
            while outbox.bytes() > OUTBOX_BYTES && outbox.forget_oldest() {}
        }
    }

    /// Notes that another Envoy sent these blocks to the endpoint with that key.
    pub(crate) fn holds_by_others(&mut self, endpoint: u64, blocks: &[BlockHash]) {
        self.happens_at(endpoint, &Event::HoldsByOthers { blocks: blocks.into() });
    }

    /// Adds `by` to the load of other Envoys at the endpoint with that key.
    pub(crate) fn busy_elsewhere(&mut self, endpoint: u64, by: Totals) {
        self.happens_at(endpoint, &Event::BusyElsewhere { by });
    }

    /// Sets the number of Envoys in the fleet.
    pub(crate) fn fleet_is(&mut self, fleet: Fleet) {
        self.happens_at(0, &Event::FleetIs { fleet });
    }

    /// Applies an event of this worker at the endpoint, or pool, with that key, and keeps it for the other workers.
    pub(super) fn happens_at(&mut self, key: u64, event: &Event<'_>) {
        event.apply(key, &mut self.state);
        self.pending.push(key, event);
    }

    /// Records a decision for the report, and returns its number. It does nothing, and does not call `decision`, where the
    /// configuration has no exchange or where the last record is less than 200 ms old.
    pub(crate) fn record_decision(
        &mut self,
        now: Monotonic,
        decision: impl FnOnce(&Self) -> DecisionRecord,
    ) -> Option<u64> {
        let is_reported = || {
            let control = self.config.as_ref().ok().and_then(|config| config.control.as_ref());
            control.is_some_and(|control| control.exchange)
        };
        if !self.recent.is_due(now) || !is_reported() {
            return None;
        }
        let decision = decision(self);
        Some(self.recent.push(now, decision))
    }

    /// A number for a prefill leg, unique among the workers of this Envoy.
    pub(crate) fn next_leg(&mut self) -> u64 {
        self.legs = self.legs.wrapping_add(1);
        self.legs
    }

    /// A name for a pair of legs that no other pair in flight has at any Envoy. It is a hash of Envoy's random request id and
    /// of this worker's clock and count.
    pub(crate) fn pair_id(&mut self, request_id: &[u8], now: Monotonic) -> u64 {
        let now = now.since_zero();
        let ours = [self.next_leg().to_le_bytes(), now.as_secs().to_le_bytes()].concat();
        let bits = [request_id, &ours, &now.subsec_nanos().to_le_bytes()].concat();
        pair_id(xxhash_rust::xxh3::xxh3_64(&bits))
    }
}

#[cfg(test)]
mod tests;
