//! The middle of the exchange: takes what gateways tell and has it for the others. `pd-control` serves it, the trace
//! simulator runs it.
//!
//! Loads are states: the newest record of a gateway counts, so an answer that is lost or late does no harm, and a
//! gateway that is silent for [`GATEWAY_LIFE`] has nothing in flight. Block events are a log per gateway; what a hub
//! lacks of it the gateway tells again, as far as it still has it. So hubs may come and go.

use core::time::Duration;
use std::collections::BTreeMap;

use hashbrown::HashMap;

use super::message::{Batch, Heard, MAX_BLOCKS_BYTES, MAX_MESSAGE_BYTES, Record, Told};
use super::report::MAX_REPORT_BYTES;
use crate::endpoints::elsewhere::Totals;
use crate::prefix::block_log::{BlockLog, split_events};
use crate::time::Monotonic;

/// Silence after which a gateway counts as gone.
pub const GATEWAY_LIFE: Duration = Duration::from_secs(3);
/// Gateways that are remembered, with those that are gone but for their blocks.
const MAX_GATEWAYS: usize = 1_024;
/// Bytes of block events that are kept of all gateways together.
const MAX_LOG_BYTES: usize = 32 << 20;
/// Bytes of records in a message to another hub; a single record may be longer.
const RELAY_BYTES: usize = MAX_MESSAGE_BYTES / 4;
/// Endpoints that one record may speak of.
const MAX_LOADS: usize = crate::wire::MAX_ENDPOINTS;

/// What the hub knows of the gateways.
#[derive(Debug)]
pub struct Hub {
    id: u64,
    /// In order: the same messages have the same answers.
    gateways: BTreeMap<u64, Gateway>,
    /// Changes of loads.
    changes: u64,
    /// Loads of all gateways together.
    sums: HashMap<u64, Totals>,
}

#[derive(Debug, Default)]
struct Gateway {
    replaces: u64,
    turn: u64,
    epoch: u64,
    /// When it was last heard of, by itself or by another hub.
    heard: Monotonic,
    /// When it was last heard itself.
    asked: Option<Monotonic>,
    is_gone: bool,
    loads: Vec<(u64, Totals)>,
    changes: u64,
    log: BlockLog,
    report: Vec<u8>,
}

impl Gateway {
    fn leave(&mut self, sums: &mut HashMap<u64, Totals>) {
        self.is_gone = true;
        self.load(sums, Vec::new());
        self.report.clear();
    }

    /// Changes what is in flight from here, and the sums with it.
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

impl Hub {
    /// A hub that knows nothing; `id` is not that of any other.
    #[must_use]
    pub fn new(id: u64) -> Self {
        Self { id, gateways: BTreeMap::new(), changes: 0, sums: HashMap::new() }
    }

    /// [`Heard::hub`].
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Takes what somebody told; whether it matters to others.
    pub fn take(&mut self, told: &Told, now: Monotonic) -> bool {
        let before = (self.changes, self.total_next());
        for record in &told.records {
            self.take_record(record, told.from == record.gateway, now);
        }
        // A gateway that only listens is there as well.
        if let Some(gateway) = self.gateways.get_mut(&told.from) {
            gateway.heard = now;
            gateway.asked = Some(now);
        }
        before != (self.changes, self.total_next())
    }

    fn total_next(&self) -> u64 {
        self.gateways.values().fold(0, |sum, gateway| sum.wrapping_add(gateway.log.next()))
    }

    fn take_record(&mut self, record: &Record, is_own: bool, now: Monotonic) {
        if record.gateway == 0 || !self.make_room(record.gateway) {
            return;
        }
        if record.replaces != 0
            && let Some(before) = self.gateways.get_mut(&record.replaces).filter(|before| !before.is_gone)
        {
            before.leave(&mut self.sums);
            self.changes = self.changes.wrapping_add(1);
        }
        let gateway = self.gateways.entry(record.gateway).or_default();
        gateway.replaces = record.replaces;
        if is_own {
            gateway.asked = Some(now);
        }
        gateway.heard = now;
        gateway.is_gone = false;
        if record.turn > gateway.turn {
            gateway.turn = record.turn;
            gateway.epoch = record.epoch;
            if gateway.loads != record.loads {
                let loads = record.loads.iter().take(MAX_LOADS).copied().collect();
                gateway.load(&mut self.sums, loads);
                gateway.changes = gateway.changes.wrapping_add(1);
                self.changes = self.changes.wrapping_add(1);
            }
            if !record.report.is_empty() && record.report.len() <= MAX_REPORT_BYTES {
                gateway.report.clone_from(&record.report);
            }
        }
        // What is missing in front comes with the next record, unless nobody has it any more.
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
        self.shorten_logs();
    }

    /// Forgets the gateway that was heard of longest ago, where there are too many; whether there is room.
    fn make_room(&mut self, gateway: u64) -> bool {
        if self.gateways.len() < MAX_GATEWAYS || self.gateways.contains_key(&gateway) {
            return true;
        }
        let gone = self.gateways.iter().filter(|(_, gateway)| gateway.is_gone);
        let Some((oldest, _)) = gone.min_by_key(|(_, gateway)| gateway.heard).map(|(id, of)| (*id, of.heard)) else {
            return false;
        };
        self.gateways.remove(&oldest).is_some()
    }

    fn shorten_logs(&mut self) {
        while self.gateways.values().map(|gateway| gateway.log.bytes()).sum::<usize>() > MAX_LOG_BYTES {
            let longest = self.gateways.values_mut().max_by_key(|gateway| gateway.log.bytes());
            if !longest.is_some_and(|gateway| gateway.log.forget_oldest()) {
                return;
            }
        }
    }

    /// Lets go of gateways that are silent; whether that matters to the others. Call it a few times a second.
    pub fn prune(&mut self, now: Monotonic) -> bool {
        let mut has_changed = false;
        for gateway in self.gateways.values_mut() {
            if !gateway.is_gone && now.saturating_sub(gateway.heard) > GATEWAY_LIFE {
                gateway.leave(&mut self.sums);
                has_changed = true;
            }
        }
        if has_changed {
            self.changes = self.changes.wrapping_add(1);
        }
        has_changed
    }

    /// Counts changes of what others than `from` have in flight.
    fn state(&self, from: u64) -> u64 {
        let own = self.gateways.get(&from).map_or(0, |gateway| gateway.changes);
        self.changes.wrapping_sub(own)
    }

    /// Whether there is something that the asker has not heard.
    #[must_use]
    pub fn has_news(&self, told: &Told) -> bool {
        let is_new = |id: &u64, gateway: &Gateway| {
            let known = told.known.binary_search_by_key(id, |(known, _)| *known).ok();
            let known = known.and_then(|at| told.known.get(at)).map_or(0, |(_, next)| *next);
            *id != told.from && gateway.log.next() > known.max(gateway.log.oldest())
        };
        told.wants
            && (told.at != (self.id, self.state(told.from)) || self.gateways.iter().any(|(id, of)| is_new(id, of)))
    }

    /// The answer to somebody; `watching` is the number of Envoys that are known to follow the endpoint list.
    #[must_use]
    pub fn answer(&self, told: &Told, watching: u64) -> Heard {
        let have = |record: &Record| (record.gateway, self.gateways.get(&record.gateway).map_or(0, |of| of.log.next()));
        let state = self.state(told.from);
        let exchanging = self.gateways.values().filter(|gateway| !gateway.is_gone).count() as u64;
        Heard {
            hub: self.id,
            state,
            have: told.records.iter().map(have).collect(),
            gateways: watching.max(exchanging),
            exchanging,
            loads: (told.wants && told.at != (self.id, state)).then(|| self.loads_but(told.from)),
            batches: if told.wants { self.batches(told) } else { Vec::new() },
        }
    }

    fn loads_but(&self, from: u64) -> Vec<(u64, Totals)> {
        let mut others = self.sums.clone();
        for (endpoint, totals) in self.gateways.get(&from).map_or(&[][..], |gateway| &gateway.loads) {
            if let Some(sum) = others.get_mut(endpoint) {
                *sum = sum.minus(*totals);
            }
        }
        let mut others: Vec<_> = others.into_iter().filter(|(_, sum)| *sum != Totals::default()).collect();
        others.sort_unstable_by_key(|(endpoint, _)| *endpoint);
        others
    }

    fn batches(&self, told: &Told) -> Vec<Batch> {
        let known: HashMap<u64, u64> = told.known.iter().copied().collect();
        let mut room = MAX_BLOCKS_BYTES;
        let mut batches = Vec::new();
        for (id, gateway) in &self.gateways {
            let first = known.get(id).copied().unwrap_or(0).max(gateway.log.oldest());
            let blocks = if *id == told.from { Vec::new() } else { gateway.log.from(first, room) };
            if blocks.is_empty() {
                continue;
            }
            room = room.saturating_sub(blocks.len());
            batches.push(Batch { gateway: *id, epoch: gateway.epoch, first, blocks });
        }
        batches
    }

    /// What another hub is told, in messages that it takes: the gateways that were heard here lately, with the block
    /// events that it does not `have`.
    #[must_use]
    pub fn relay(&self, have: &HashMap<u64, u64>, now: Monotonic) -> Vec<Told> {
        let is_heard = |gateway: &Gateway| gateway.asked.is_some_and(|at| now.saturating_sub(at) <= GATEWAY_LIFE);
        let mut messages: Vec<Told> = Vec::new();
        let mut room = 0;
        for (id, gateway) in self.gateways.iter().filter(|(_, gateway)| !gateway.is_gone && is_heard(gateway)) {
            let first = have.get(id).copied().unwrap_or(0).clamp(gateway.log.oldest(), gateway.log.next());
            let record = Record {
                gateway: *id,
                replaces: gateway.replaces,
                turn: gateway.turn,
                epoch: gateway.epoch,
                loads: gateway.loads.clone(),
                oldest: gateway.log.oldest(),
                first,
                blocks: gateway.log.from(first, MAX_BLOCKS_BYTES),
                report: gateway.report.clone(),
            };
            let length = record.byte_len();
            match messages.last_mut().filter(|_| length <= room) {
                Some(message) => message.records.push(record),
                None => {
                    room = RELAY_BYTES;
                    messages.push(Told { from: self.id, records: vec![record], ..Told::default() });
                }
            }
            room = room.saturating_sub(length);
        }
        messages
    }

    /// Reports of the gateways that are there: number, how long ago it was heard of, the report.
    pub fn reports(&self, now: Monotonic) -> impl Iterator<Item = (u64, Duration, &[u8])> {
        let here = self.gateways.iter().filter(|(_, gateway)| !gateway.is_gone);
        here.map(move |(id, gateway)| (*id, now.saturating_sub(gateway.heard), gateway.report.as_slice()))
    }
}
