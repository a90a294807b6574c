//! What one Envoy worker knows: configuration, endpoints, index, counts.

use std::sync::Arc;

use crate::choose::admission::{Ask, Shed, pool_key};
use crate::config::{Config, ConfigError, Limits};
use crate::endpoints::elsewhere::{Fleet, Totals};
use crate::endpoints::retry_budget::RetryBudget;
use crate::endpoints::table::{Applied, EndpointRef};
use crate::engine::pair_id;
use crate::metrics::{Counts, Metric};
use crate::prefix::block_log::{BlockLog, block_event};
use crate::prefix::hash::BlockHash;
use crate::prefix::index::PrefixIndex;
use crate::time::Monotonic;
use crate::wire::{Snapshot, WireError};
use crate::workers::event::Event;
use crate::workers::ledger::Log;
use crate::workers::recent::{Decision, Recent};
use crate::workers::state::State;

/// Name of the gauge of the prefix index's bytes, in the worker that told last.
pub const INDEX_BYTES: &str = "pd_index_bytes";

/// Bytes of block events that are kept to be told to other Envoys again.
const OUTBOX_BYTES: usize = 1 << 20;

/// State of one worker. All of it may be lost and built again.
#[derive(Debug)]
pub struct Worker {
    /// Configuration in force; the error that refused the newest one, when there was none before it.
    pub config: Result<Arc<Config>, ConfigError>,
    /// Endpoints, prefixes and admission, by the events of all workers.
    pub state: State,
    /// Counts that wait for the tick.
    pub counts: Counts,
    /// What to tell the other workers.
    pub(crate) log: Log,
    /// What to tell the other Envoys, where this worker is its Envoy's voice.
    pub(crate) outbox: Option<Box<BlockLog>>,
    /// What to report of its decisions.
    pub(crate) recent: Recent,
    /// Prefill legs that may be run again.
    pub retries: RetryBudget,
    legs: u64,
}

impl Default for Worker {
    fn default() -> Self {
        Self {
            config: Err(ConfigError::none_yet()),
            state: State::default(),
            counts: Counts::default(),
            log: Log::default(),
            outbox: None,
            recent: Recent::default(),
            retries: RetryBudget::default(),
            legs: 0,
        }
    }
}

/// A request that was let in.
#[derive(Debug)]
pub(crate) struct Ticket {
    pool: u64,
    fairness: u64,
    tokens: u64,
}

impl Worker {
    /// Puts a configuration in force. A refused one changes nothing but the counts and, when no configuration was in
    /// force before, the answer that requests get.
    ///
    /// # Errors
    /// The refusal, for the log.
    pub fn configure(&mut self, text: &[u8]) -> Result<Arc<Config>, ConfigError> {
        match Config::parse(text) {
            Ok(config) => {
                let config = Arc::new(config);
                self.counts.count(Metric::ConfigAccepted);
                let index = PrefixIndex::new(config.prefix.index_bytes);
                self.state = State { index, ..State::default() };
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

    /// Applies pushed bytes; anything but a good snapshot leaves the list as it is.
    ///
    /// # Errors
    /// The refusal, for the log.
    pub fn apply(&mut self, bytes: &[u8]) -> Result<Applied, WireError> {
        let Ok(config) = self.config.clone() else { return Ok(Applied::Unchanged) };
        let applied =
            Snapshot::parse(bytes).map(|snapshot| self.state.table.apply(&snapshot, &config, &mut self.state.index));
        match applied {
            Ok(Applied::Changed) => self.counts.count(Metric::SnapshotsApplied),
            Ok(Applied::Unchanged | Applied::OutOfStep) => {}
            Ok(Applied::Empty) | Err(_) => self.counts.count(Metric::SnapshotsRefused),
        }
        applied
    }

    /// Drops ledger entries whose end was never told. Call it a few times a second.
    pub fn prune(&mut self, now: Monotonic) {
        self.state.table.prune(now);
        self.log.own.prune(now);
        if let Ok(config) = &self.config {
            self.state.table.resize_caches(config, &mut self.state.index);
        }
    }

    /// Gauges that change now and then, by name and tags: [`INDEX_BYTES`] and what was [fitted](crate::endpoints::fitted_cost::GAUGES).
    pub fn gauges(&self) -> impl Iterator<Item = (String, u64)> {
        core::iter::once((INDEX_BYTES.to_owned(), self.state.index.bytes() as u64))
            .chain(self.state.table.fitted_gauges())
    }

    /// Tells the other workers from now on what happens; legs are numbered apart from theirs.
    pub(crate) fn tell_others(&mut self, worker_id: u64) {
        self.log.untold.get_or_insert_default();
        self.legs = self.legs.max(worker_id.wrapping_shl(40));
    }

    /// Lets a request into a pool with limits, or says why not; [`release`](Self::release) the ticket.
    ///
    /// # Errors
    /// [`Shed`]
    pub(crate) fn admit(&mut self, pool: &str, limits: Limits, ask: Ask) -> Result<Ticket, Shed> {
        let ticket = Ticket { pool: pool_key(pool), fairness: ask.fairness, tokens: ask.tokens };
        self.state.admission.check(ticket.pool, limits, ask)?;
        self.happens_at(ticket.pool, &Event::Admitted { fairness: ticket.fairness, tokens: ticket.tokens });
        Ok(ticket)
    }

    /// A request that was let in is over.
    pub(crate) fn release(&mut self, Ticket { pool, fairness, tokens }: Ticket) {
        self.happens_at(pool, &Event::Released { fairness, tokens });
    }

    /// Something happens at an endpoint, by this worker's doing.
    fn happens(&mut self, endpoint: EndpointRef, event: &Event<'_>) {
        if self.state.table.resolve(endpoint).is_some() {
            event.apply_at(endpoint.index, &mut self.state);
        }
        self.log.push(endpoint.key, event);
    }

    /// A prefill leg of an endpoint starts: `seconds` of its time, told to have ended until `expires`.
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

    /// It ended.
    pub(crate) fn prefill_ended(&mut self, endpoint: EndpointRef, leg: u64, at: Monotonic) {
        self.happens(endpoint, &Event::PrefillEnded { leg, at });
    }

    /// Nobody waits for its end any more.
    pub(crate) fn prefill_abandoned(&mut self, endpoint: EndpointRef, leg: u64, at: Monotonic) {
        self.happens(endpoint, &Event::PrefillAbandoned { leg, at });
    }

    /// An endpoint gets a request of so many KV tokens.
    pub(crate) fn decode_started(&mut self, endpoint: EndpointRef, tokens: u64) {
        self.happens(endpoint, &Event::DecodeStarted { tokens });
    }

    /// That request ended.
    pub(crate) fn decode_ended(&mut self, endpoint: EndpointRef, tokens: u64) {
        self.happens(endpoint, &Event::DecodeEnded { tokens });
    }

    /// An endpoint will hold a prompt's KV cache.
    pub(crate) fn holds(&mut self, endpoint: EndpointRef, blocks: &[BlockHash]) {
        self.happens(endpoint, &Event::Holds { blocks: blocks.into() });
        self.tell_gateways(endpoint.key, blocks);
    }

    /// Other Envoys shall hear which blocks a worker of this one sent to the endpoint of that key.
    pub(crate) fn tell_gateways(&mut self, endpoint: u64, blocks: &[BlockHash]) {
        if let Some(outbox) = self.outbox.as_mut().filter(|_| !blocks.is_empty()) {
            outbox.push(block_event(endpoint, blocks));
            while outbox.bytes() > OUTBOX_BYTES && outbox.forget_oldest() {}
        }
    }

    /// Another Envoy sent these blocks to the endpoint of that key.
    pub(crate) fn holds_by_others(&mut self, endpoint: u64, blocks: &[BlockHash]) {
        self.happens_at(endpoint, &Event::HoldsByOthers { blocks: blocks.into() });
    }

    /// Other Envoys have so much more in flight there.
    pub(crate) fn busy_elsewhere(&mut self, endpoint: u64, by: Totals) {
        self.happens_at(endpoint, &Event::BusyElsewhere { by });
    }

    /// The Envoys that there are.
    pub(crate) fn fleet_is(&mut self, fleet: Fleet) {
        self.happens_at(0, &Event::FleetIs { fleet });
    }

    /// The same at the endpoint, or pool, of that key, which may not be in the list.
    fn happens_at(&mut self, key: u64, event: &Event<'_>) {
        event.apply(key, &mut self.state);
        self.log.push(key, event);
    }

    /// An endpoint could not be reached.
    pub(crate) fn failed(&mut self, endpoint: EndpointRef, at: Monotonic) {
        self.happens(endpoint, &Event::Failed { at });
    }

    /// An endpoint answered. The others hear of it when they hold it for broken.
    pub(crate) fn answered(&mut self, endpoint: EndpointRef) {
        if self.state.table.resolve(endpoint).is_some_and(|slot| slot.health.is_failing()) {
            self.happens(endpoint, &Event::Healed);
        }
    }

    /// Notes a decision for the next report, where there are reports and it has not just noted another.
    pub(crate) fn decided(&mut self, now: Monotonic, decision: impl FnOnce(&Self) -> Decision) {
        let is_reported = || {
            let control = self.config.as_ref().ok().and_then(|config| config.control.as_ref());
            control.is_some_and(|control| control.exchange)
        };
        if self.recent.is_due(now) && is_reported() {
            let decision = decision(self);
            self.recent.push(now, decision);
        }
    }

    /// A number for a prefill leg, unique among the workers of this Envoy.
    pub(crate) fn next_leg(&mut self) -> u64 {
        self.legs = self.legs.wrapping_add(1);
        self.legs
    }

    /// A name for a pair of legs that no other pair in flight has, at any gateway: Envoy's random request id, this
    /// worker's clock and count.
    pub(crate) fn pair_id(&mut self, request_id: &[u8], now: Monotonic) -> u64 {
        let now = now.since_zero();
        let ours = [self.next_leg().to_le_bytes(), now.as_secs().to_le_bytes()].concat();
        let bits = [request_id, &ours, &now.subsec_nanos().to_le_bytes()].concat();
        pair_id(xxhash_rust::xxh3::xxh3_64(&bits))
    }
}
