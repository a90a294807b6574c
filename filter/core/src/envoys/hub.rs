//! The hub of the exchange: collects the Envoys' loads and blocks, and answers each Envoy with those of the others.
//! `pd-control` and the trace simulator run the hub.
//!
//! - Loads are states. The newest record of an Envoy counts, so a lost or late message does no harm. An Envoy that is
//!   silent for [`GATEWAY_LIFE`] has nothing in flight.
//! - Blocks are a numbered log for each Envoy. The hub's answer has the number that it expects next, and the Envoy sends the
//!   blocks from that number on that it still has. So a new, empty hub may replace a hub.
//! - The number of an Envoy is its secret: a client that knows the number can change what the Envoy has in flight. So
//!   answers name other Envoys by [public names](Hub::with_public_names).
//! - The memory of the hub has bounds. Beyond a bound, the hosts whose Envoys have the most lose records.

mod bounds;

use core::fmt;
use core::time::Duration;
use std::collections::BTreeMap;

use hashbrown::{HashMap, HashSet};

use super::message::{Batch, ExchangeRequest, ExchangeResponse, MAX_BLOCKS_BYTES, MAX_MESSAGE_BYTES, Record};
use super::outside::{EngineReport, Outside};
use super::report::MAX_REPORT_BYTES;
use crate::endpoints::elsewhere::Totals;
use crate::prefix::block_log::{BlockLog, split_events};
use crate::time::Monotonic;
use crate::wire::Role;

/// Silence after which an Envoy counts as gone.
pub const GATEWAY_LIFE: Duration = Duration::from_secs(3);
/// Most bytes of records in a message to another hub. A single record may be longer.
const RELAY_BYTES: usize = MAX_MESSAGE_BYTES / 4;
/// Bytes of block events in one round of messages to another hub, shared by all Envoys.
const RELAY_BLOCKS_BYTES: usize = 8 << 20;
/// Least bytes of block events of one Envoy in such a round.
const LEAST_RELAY_BLOCKS_BYTES: usize = 16 << 10;
/// Most endpoints of one record; the hub ignores further ones.
const MAX_LOADS: usize = crate::wire::MAX_ENDPOINTS;
/// Cap of what one Envoy has in flight at one endpoint. A false claim above it would keep all other Envoys away from the
/// endpoint or, by its legs, at what the endpoint holds.
const MOST_IN_FLIGHT: Totals =
    Totals { work: 1_000_000_000_000, tokens: 10_000_000_000, requests: 1_000_000, legs: 10_000 };

/// What one replica of pd-control knows of all Envoys: their loads, their block logs, their reports.
#[derive(Debug)]
pub struct Hub {
    id: u64,
    /// Envoys by number, sorted, so that equal messages get equal answers.
    gateways: BTreeMap<u64, Gateway>,
    /// Number of changes of loads.
    changes: u64,
    /// Sums of the loads of all Envoys, by endpoint.
    sums: HashMap<u64, Totals>,
    /// Keys of the endpoints whose loads count; `None`: all.
    endpoints: Option<HashSet<u64>>,
    /// What engines have of others than Envoys of the exchange.
    outside: Outside,
    public_name: PublicName,
}

/// Makes the number by which other Envoys know an Envoy.
struct PublicName(Box<dyn Fn(u64) -> u64 + Send>);

impl fmt::Debug for PublicName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PublicName(…)")
    }
}

/// What the hub knows of one Envoy.
#[derive(Debug, Default)]
struct Gateway {
    /// [`Record::gateway`] for others.
    public_name: u64,
    /// Host that it sends from; 0: unknown.
    origin: u64,
    replaces: u64,
    turn: u64,
    hash_scheme: u64,
    /// Time of the last message with the Envoy's record, from the Envoy or from another hub.
    last_seen: Monotonic,
    /// Time of the last request from the Envoy itself; `None`: other hubs relay its records.
    last_request: Option<Monotonic>,
    is_gone: bool,
    loads: Vec<(u64, Totals)>,
    changes: u64,
    log: BlockLog,
    report: Vec<u8>,
}

impl Gateway {
    /// Takes back what the Envoy had in flight; its blocks stay.
    fn retract(&mut self, sums: &mut HashMap<u64, Totals>) {
        self.is_gone = true;
        self.load(sums, Vec::new());
        self.report.clear();
    }

    /// Replaces what the Envoy has in flight, and changes the sums accordingly.
    fn load(&mut self, sums: &mut HashMap<u64, Totals>, loads: Vec<(u64, Totals)>) {
        for (endpoint, totals) in &self.loads {
            if let Some(sum) = sums.get_mut(endpoint) {
                *sum = sum.minus(*totals);
            }
        }
        for (endpoint, totals) in &loads {
            let sum = sums.entry(*endpoint).or_default();
            *sum = sum.plus(*totals);
        }
        for (endpoint, _) in &self.loads {
            if sums.get(endpoint) == Some(&Totals::default()) {
                sums.remove(endpoint);
            }
        }
        self.loads = loads;
    }
}

/// The loads at endpoints that count, each capped.
fn counted(endpoints: &Option<HashSet<u64>>, loads: &[(u64, Totals)]) -> Vec<(u64, Totals)> {
    let counts = |endpoint: &u64| endpoints.as_ref().is_none_or(|known| known.contains(endpoint));
    let loads = loads.iter().filter(|(endpoint, _)| counts(endpoint)).take(MAX_LOADS);
    loads.map(|(endpoint, totals)| (*endpoint, totals.at_most(MOST_IN_FLIGHT))).collect()
}

impl Hub {
    /// A hub that knows nothing. `id` must differ from that of any other hub.
    #[must_use]
    pub fn new(id: u64) -> Self {
        Self {
            id,
            gateways: BTreeMap::new(),
            changes: 0,
            sums: HashMap::new(),
            endpoints: None,
            outside: Outside::default(),
            public_name: PublicName(Box::new(|gateway| gateway)),
        }
    }

    /// Has the hub name Envoys to each other by `name` of their number. All hubs of a fleet need the same function. The
    /// number must not be computable from the name.
    #[must_use]
    pub fn with_public_names(self, name: impl Fn(u64) -> u64 + Send + 'static) -> Self {
        Self { public_name: PublicName(Box::new(name)), ..self }
    }

    /// Counts only the loads of the endpoints with these keys from now on, and forgets the others; `None`: of all endpoints.
    pub fn count_only(&mut self, endpoints: Option<HashSet<u64>>) {
        self.endpoints = endpoints;
        for gateway in self.gateways.values_mut() {
            let counted = counted(&self.endpoints, &gateway.loads);
            if counted.len() != gateway.loads.len() {
                gateway.load(&mut self.sums, counted);
                gateway.changes = gateway.changes.wrapping_add(1);
                self.changes = self.changes.wrapping_add(1);
            }
        }
    }

    /// Number of this hub, for [`ExchangeResponse::hub`].
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Takes the records of a request. Returns whether requests that wait should be answered now.
    ///
    /// `origin` is a number of the host that sends the request; 0: unknown. A request of another hub has the origins of its
    /// records.
    pub fn take(&mut self, request: &ExchangeRequest, origin: u64, now: Monotonic) -> bool {
        let before = (self.changes, self.total_next());
        for (index, record) in request.records.iter().enumerate() {
            let is_own = request.from == record.gateway;
            let origin = if is_own { origin } else { request.origins.get(index).copied().unwrap_or(0) };
            self.take_record(record, is_own, origin, now);
        }
        // A receiving call has no record, and shows that the Envoy is alive.
        if request.records.is_empty()
            && let Some(gateway) = self.gateways.get_mut(&request.from)
        {
            gateway.last_seen = now;
            gateway.last_request = Some(now);
        }
        before != (self.changes, self.total_next())
    }

    fn total_next(&self) -> u64 {
        self.gateways.values().fold(0, |sum, gateway| sum.wrapping_add(gateway.log.next()))
    }

    fn take_record(&mut self, record: &Record, is_own: bool, origin: u64, now: Monotonic) {
        if record.gateway == 0 || !self.make_room(record.gateway, origin) {
            return;
        }
        let public_name = (self.public_name.0)(record.gateway);
        let gateway = self.gateways.entry(record.gateway).or_default();
        gateway.public_name = public_name;
        // A record that came before changes nothing, nor does it show that the Envoy is alive.
        if record.turn > gateway.turn {
            if is_own || gateway.origin == 0 {
                gateway.origin = origin;
            }
            if is_own {
                gateway.last_request = Some(now);
            }
            self.take_state(record, now);
        }
        self.take_blocks(record);
        self.shorten();
    }

    /// Takes the loads and the report of a record in place of those of the records before it.
    fn take_state(&mut self, record: &Record, now: Monotonic) {
        if record.replaces != 0
            && record.replaces != record.gateway
            && let Some(before) = self.gateways.get_mut(&record.replaces).filter(|before| !before.is_gone)
        {
            before.retract(&mut self.sums);
            self.changes = self.changes.wrapping_add(1);
        }
        let Some(gateway) = self.gateways.get_mut(&record.gateway) else { return };
        gateway.replaces = record.replaces;
        gateway.last_seen = now;
        gateway.is_gone = false;
        gateway.turn = record.turn;
        gateway.hash_scheme = record.hash_scheme;
        let loads = counted(&self.endpoints, &record.loads);
        if gateway.loads != loads {
            gateway.load(&mut self.sums, loads);
            gateway.changes = gateway.changes.wrapping_add(1);
            self.changes = self.changes.wrapping_add(1);
        }
        if !record.report.is_empty() && record.report.len() <= MAX_REPORT_BYTES {
            gateway.report.clone_from(&record.report);
        }
    }

    fn take_blocks(&mut self, record: &Record) {
        let Some(gateway) = self.gateways.get_mut(&record.gateway) else { return };
        // The Envoy sends missing events next. It no longer has events before its oldest one.
        if record.first > gateway.log.next() && record.first == record.oldest {
            gateway.log.restart(record.first);
        }
        let mut number = record.first;
        for event in split_events(&record.blocks) {
            if number == gateway.log.next() {
                gateway.log.push(event.into());
            }
            number = number.saturating_add(1);
        }
    }

    /// Takes what the engine of these endpoints, all those at its address, reports of now; see
    /// [`outside`](super::outside). Returns whether requests that wait should be answered now.
    pub fn engine_reports(&mut self, endpoints: &[(u64, Role)], report: EngineReport, now: Monotonic) -> bool {
        let has_changed = self.outside.take(endpoints, report, &self.sums, now);
        if has_changed {
            self.changes = self.changes.wrapping_add(1);
        }
        has_changed
    }

    /// Takes back what silent Envoys had in flight, and what silent engines reported. Returns whether that changed anything. Call
    /// it a few times a second.
    pub fn prune(&mut self, now: Monotonic) -> bool {
        let mut has_changed = self.outside.prune(now);
        for gateway in self.gateways.values_mut() {
            if !gateway.is_gone && now.saturating_sub(gateway.last_seen) > GATEWAY_LIFE {
                gateway.retract(&mut self.sums);
                has_changed = true;
            }
        }
        if has_changed {
            self.changes = self.changes.wrapping_add(1);
        }
        has_changed
    }

    /// Number of changes of what Envoys other than `from` have in flight.
    fn state(&self, from: u64) -> u64 {
        let own = self.gateways.get(&from).map_or(0, |gateway| gateway.changes);
        self.changes.wrapping_sub(own)
    }

    /// Whether the answer to a request would have anything that the sender lacks.
    #[must_use]
    pub fn has_news(&self, request: &ExchangeRequest) -> bool {
        let is_new = |id: &u64, gateway: &Gateway| {
            let known = request.known.binary_search_by_key(&gateway.public_name, |(known, _)| *known).ok();
            let known = known.and_then(|index| request.known.get(index)).map_or(0, |(_, next)| *next);
            *id != request.from && gateway.log.next() > known.max(gateway.log.oldest())
        };
        request.wants
            && (request.known_state != (self.id, self.state(request.from))
                || self.gateways.iter().any(|(id, of)| is_new(id, of)))
    }

    /// The answer to a request. `watching` is the number of Envoys that follow the endpoint list; 0: unknown.
    #[must_use]
    pub fn answer(&self, request: &ExchangeRequest, watching: u64) -> ExchangeResponse {
        let have = |record: &Record| (record.gateway, self.gateways.get(&record.gateway).map_or(0, |of| of.log.next()));
        let state = self.state(request.from);
        let exchanging = self.gateways.values().filter(|gateway| !gateway.is_gone).count() as u64;
        ExchangeResponse {
            hub: self.id,
            state,
            have: request.records.iter().map(have).collect(),
            gateways: watching.max(exchanging),
            exchanging,
            loads: (request.wants && request.known_state != (self.id, state)).then(|| self.loads_but(request.from)),
            batches: if request.wants { self.batches(request) } else { Vec::new() },
        }
    }

    /// What all Envoys together have in flight, by endpoint key; `None`: no Envoy exchanges.
    #[must_use]
    pub fn in_flight(&self) -> Option<&HashMap<u64, Totals>> {
        self.gateways.values().any(|gateway| !gateway.is_gone).then_some(&self.sums)
    }

    /// What others than this Envoy have in flight, with what counts of [outside requests](super::outside).
    fn loads_but(&self, from: u64) -> Vec<(u64, Totals)> {
        let mut others = self.sums.clone();
        for (endpoint, totals) in self.gateways.get(&from).map_or(&[][..], |gateway| &gateway.loads) {
            if let Some(sum) = others.get_mut(endpoint) {
                *sum = sum.minus(*totals);
            }
        }
        for (endpoint, totals) in &self.outside.loads {
            let sum = others.entry(*endpoint).or_default();
            *sum = sum.plus(*totals);
        }
        let mut others: Vec<_> = others.into_iter().filter(|(_, sum)| *sum != Totals::default()).collect();
        others.sort_unstable_by_key(|(endpoint, _)| *endpoint);
        others
    }

    fn batches(&self, request: &ExchangeRequest) -> Vec<Batch> {
        let known: HashMap<u64, u64> = request.known.iter().copied().collect();
        let mut room = MAX_BLOCKS_BYTES;
        let mut batches = Vec::new();
        for (id, gateway) in &self.gateways {
            let first = known.get(&gateway.public_name).copied().unwrap_or(0).max(gateway.log.oldest());
            let blocks = if *id == request.from { Vec::new() } else { gateway.log.from(first, room) };
            if blocks.is_empty() {
                continue;
            }
            room = room.saturating_sub(blocks.len());
            batches.push(Batch { gateway: gateway.public_name, hash_scheme: gateway.hash_scheme, first, blocks });
        }
        batches
    }

    /// The messages for another hub: the records of the Envoys that called this hub in the last 3 s, with the block events
    /// that the other hub does not `have` by its last answer. No message exceeds [`MAX_MESSAGE_BYTES`].
    #[must_use]
    pub fn relay(&self, have: &HashMap<u64, u64>, now: Monotonic) -> Vec<ExchangeRequest> {
        let has_asked =
            |gateway: &Gateway| gateway.last_request.is_some_and(|at| now.saturating_sub(at) <= GATEWAY_LIFE);
        let own = || self.gateways.iter().filter(|(_, gateway)| !gateway.is_gone && has_asked(gateway));
        // Each Envoy has an equal share of the events of one round; the next round has what is left.
        let share = RELAY_BLOCKS_BYTES.checked_div(own().count()).unwrap_or(0);
        let share = share.clamp(LEAST_RELAY_BLOCKS_BYTES, MAX_BLOCKS_BYTES);
        let mut messages: Vec<ExchangeRequest> = Vec::new();
        let mut room = 0;
        for (id, gateway) in own() {
            let first = have.get(id).copied().unwrap_or(0).clamp(gateway.log.oldest(), gateway.log.next());
            let record = Record {
                gateway: *id,
                replaces: gateway.replaces,
                turn: gateway.turn,
                hash_scheme: gateway.hash_scheme,
                loads: gateway.loads.clone(),
                oldest: gateway.log.oldest(),
                first,
                blocks: gateway.log.from(first, share),
                report: gateway.report.clone(),
            };
            let length = record.byte_len();
            match messages.last_mut().filter(|_| length <= room) {
                Some(message) => {
                    message.records.push(record);
                    message.origins.push(gateway.origin);
                }
                None => {
                    room = RELAY_BYTES;
                    messages.push(ExchangeRequest {
                        from: self.id,
                        records: vec![record],
                        origins: vec![gateway.origin],
                        ..ExchangeRequest::default()
                    });
                }
            }
            room = room.saturating_sub(length);
        }
        messages
    }

    /// The reports of the live Envoys: public name, time since the last message, and report in JSON; empty: no report yet.
    pub fn reports(&self, now: Monotonic) -> impl Iterator<Item = (u64, Duration, &[u8])> {
        let here = self.gateways.values().filter(|gateway| !gateway.is_gone);
        here.map(move |gateway| (gateway.public_name, now.saturating_sub(gateway.last_seen), gateway.report.as_slice()))
    }
}
