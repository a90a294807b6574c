//! The workers' log: through it every worker of an Envoy reads the events of the others before each of its decisions.
//!
//! Each worker holds a [worker slot](crate::workers::slots). In its slot a worker writes a log of
//! [events](crate::workers::event) to shared data, and a gauge with the length of that log. At each tick the worker renews
//! its slot and writes its ledger as a whole. Before each decision a worker reads the gauges of the others (90 ns each)
//! and the events that it has not read.
//!
//! A worker that does not renew its slot is gone: its VM was reloaded, or its thread died. The other workers retract its
//! ledger. A worker's ledger holds what that worker has in flight, so nothing of another worker is retracted with it.
//!
//! ```text
//! key                   value                                                   writer
//! pd/1/seats            for each slot: worker id, time of the last renewal      all workers, by compare-and-swap
//! pd/1/log/S/N          segment n of the log of slot S, N = n modulo RING       the worker in slot S
//! pd/1/ledger/S         the worker's ledger, and the position it belongs to     the worker in slot S
//! pd/1/index/I          blocks that the endpoint at place I holds               the worker in the first slot
//! pd/1/who/S            build and configuration of the worker                   the worker in slot S
//! pd/1/recent/S         some of the worker's latest decisions                   the worker in slot S
//! pd/1/parked/S         the worker's parked requests: number, oldest arrival    the worker in slot S
//! gauge of slot S       position: segment · 2¹⁶ + bytes of that segment         the worker in slot S
//! ```
//! A reader that is behind by more than the ring reads the worker ledger as a whole and goes on from the ledger's position.
//! It loses index entries and nothing else. During a roll-out each thread runs two workers, one of each generation. Each of
//! them holds a slot.

use core::time::Duration;

use hashbrown::HashMap;

use crate::codec::{Reader, Writer};
use crate::time::Monotonic;
use crate::workers::event::Event;
use crate::workers::inheritance::Inheritance;
use crate::workers::ledger::WorkerLedger;
use crate::workers::other_worker::{HEAD_BYTES, OtherWorker, ledger_key, log_key};
use crate::workers::recent::{DecisionRecord, Generation, MAX_DECISIONS};
use crate::workers::served::{Reported, Served, Sums};
use crate::workers::shared::Shared;
use crate::workers::slots::{SLOTS_KEY, WorkerSlot, slots, to_bytes};
use crate::workers::waits::Parked;
use crate::workers::worker::Worker;

/// Age of the last renewal at which a worker renews its slot before it writes: half of the slot's life.
const RENEWAL: Duration = Duration::from_millis(350);
/// Bytes of a segment beyond which the next one begins.
const SEGMENT_BYTES: usize = 4_096;
/// How long the end of a request, or the choice of its decode endpoint, waits, so that it can be written together with a
/// decision.
const PATIENCE: Duration = Duration::from_millis(10);

/// One worker's end of the workers' log: it writes its own segments and reads those of the others.
#[derive(Debug, Default)]
pub struct WorkersLog {
    worker_id: u64,
    who: Generation,
    /// This worker's hash scheme. The worker leaves out blocks of workers with another one.
    hash_scheme: u64,
    slot: Option<usize>,
    segment: u64,
    /// The open segment, its head included, and its key.
    open: Vec<u8>,
    key: String,
    published_at: Monotonic,
    renewed: Monotonic,
    announced: Option<u64>,
    /// The worker's parked requests, as in shared data.
    parked: Parked,
    others: Vec<OtherWorker>,
    inheritance: Inheritance,
    /// What the last reports of this worker, as the leader, said of endpoints.
    reported: Reported,
}

impl WorkersLog {
    /// Sets what this worker runs: release, source revision and configuration revision. Call it before
    /// [`configure`](Self::configure), which writes them to shared data.
    pub fn introduce(&mut self, version: &str, build: &str, revision: &str) {
        let (version, build, revision) = (version.to_owned(), build.to_owned(), revision.to_owned());
        self.who = Generation { version, build, revision, workers: 1 };
    }

    /// The slot that this worker holds; `None` where it holds none.
    #[must_use]
    pub fn slot(&self) -> Option<usize> {
        self.slot
    }

    /// The slot of another worker; `None` where this worker does not know that worker.
    #[must_use]
    pub fn slot_of(&self, worker_id: u64) -> Option<usize> {
        self.others.iter().find(|other| other.worker_id == worker_id).map(|other| other.slot)
    }

    /// Generations of this Envoy's live workers, sorted. A worker that has not written what it runs counts in a generation
    /// with empty texts.
    pub fn generations(&self, shared: &impl Shared) -> Vec<Generation> {
        let of_other = |other: &OtherWorker| {
            let (bytes, _) = shared.get(&who_key(other.slot))?;
            let mut rest = Reader(&bytes);
            (rest.word()? == other.worker_id).then(|| Generation::read(&mut rest)).flatten()
        };
        let mut generations = vec![self.who.clone()];
        for who in self.others.iter().map(|other| of_other(other).unwrap_or_default()) {
            let same = |of: &&mut Generation| {
                (&of.version, &of.build, &of.revision) == (&who.version, &who.build, &who.revision)
            };
            match generations.iter_mut().find(same) {
                Some(same) => same.workers = same.workers.saturating_add(1),
                None => generations.push(Generation { workers: 1, ..who }),
            }
        }
        generations.sort_unstable();
        generations
    }

    /// The latest decisions of all workers that recorded any, with their times, newest first, at most [`MAX_DECISIONS`].
    pub fn decisions(&self, worker: &Worker, shared: &impl Shared) -> Vec<(Monotonic, DecisionRecord)> {
        let mut decisions: Vec<_> = worker.recent.iter().cloned().collect();
        for other in &self.others {
            let Some((bytes, _)) = shared.get(&recent_key(other.slot)) else { continue };
            let mut rest = Reader(&bytes);
            if rest.word() == Some(other.worker_id) {
                decisions.extend(core::iter::from_fn(|| DecisionRecord::read(&mut rest)));
            }
        }
        decisions.sort_unstable_by_key(|(at, _)| core::cmp::Reverse(*at));
        decisions.truncate(MAX_DECISIONS);
        decisions
    }

    /// Parked requests of all workers.
    pub fn parked(&self, worker: &Worker, shared: &impl Shared) -> Parked {
        let of_other = |other: &OtherWorker| {
            let (bytes, _) = shared.get(&parked_key(other.slot))?;
            let mut rest = Reader(&bytes);
            (rest.word()? == other.worker_id).then(|| Parked::read(&mut rest)).flatten()
        };
        self.others.iter().filter_map(of_other).fold(worker.parked(), Parked::with)
    }

    /// What endpoints served, by all workers, for the next report: by key, those whose sums have changed lately.
    pub fn served(&mut self, worker: &Worker, shared: &impl Shared) -> Vec<(u64, Sums)> {
        let mut all = HashMap::new();
        worker.served.add_to(&mut all);
        for other in &self.others {
            let Some((bytes, _)) = shared.get(&served_key(other.slot)) else { continue };
            let mut rest = Reader(&bytes);
            if rest.word() == Some(other.worker_id) {
                Served::read(&mut rest, &mut all);
            }
        }
        self.reported.next(&all)
    }

    /// Starts over with the configuration that `worker` has in force: takes a slot, announces the worker, and reads the logs
    /// and ledgers of the others.
    ///
    /// - `worker_id` is [`Push::worker_id`](crate::workers::push::Push::worker_id), above 0.
    /// - Where all slots are taken, the worker decides alone.
    pub fn configure(&mut self, worker: &mut Worker, shared: &impl Shared, worker_id: u64, now: Monotonic) {
        let block_bytes = worker.config.as_ref().map_or(0, |config| config.prefix.block_bytes);
        let (slot, who) = (self.slot, core::mem::take(&mut self.who));
        let hash_scheme = block_bytes as u64;
        let inheritance = Inheritance::new(hash_scheme, now);
        *self = Self { worker_id, who, hash_scheme, inheritance, slot, ..Self::default() };
        worker.start_log(worker_id);
        self.renew(worker, shared, now);
        self.catch_up(worker, shared, shared.announced(), now);
    }

    /// Applies to `worker` the events of the other workers. `announced` is [`Shared::announced`]. Call it before every
    /// decision.
    pub fn catch_up(&mut self, worker: &mut Worker, shared: &impl Shared, announced: u64, now: Monotonic) {
        if self.announced != Some(announced) {
            self.announced = Some(announced);
            let (slots, _) = slots(shared);
            self.meet(worker, shared, &slots, now);
            self.inheritance.inherit(worker, shared, now);
        }
        for other in &mut self.others {
            let position = shared.position(other.slot);
            if position != other.position && !other.is_behind {
                other.read(worker, shared, self.hash_scheme, position);
            }
        }
    }

    /// Writes this worker's events for the others, unless they may wait. Call it after every event.
    pub fn publish(&mut self, worker: &mut Worker, shared: &impl Shared, now: Monotonic) {
        let is_small = worker.pending.bytes() < SEGMENT_BYTES / 4;
        let is_patient = !worker.pending.is_urgent && now.saturating_sub(self.published_at) < PATIENCE;
        let may_wait = is_small && (is_patient || self.serves_alone());
        if !worker.pending.is_empty() && !may_wait {
            self.write_now(worker, shared, now);
        }
    }

    /// Whether no other worker of this Envoy can get a request. Envoy runs a VM on each worker thread and one on its main
    /// thread, which no request reaches: with one worker thread there are two VMs. Events then wait for the tick.
    fn serves_alone(&self) -> bool {
        self.others.len() <= 1
    }

    fn write_now(&mut self, worker: &mut Worker, shared: &impl Shared, now: Monotonic) {
        // A worker that stood still may have lost its slot, and the log in that slot is another worker's.
        if now.saturating_sub(self.renewed) > RENEWAL {
            self.renew(worker, shared, now);
        }
        self.published_at = now;
        match self.slot {
            Some(slot) => self.write_pending(worker, shared, slot),
            None => drop(worker.pending.take()),
        }
    }

    fn write_pending(&mut self, worker: &mut Worker, shared: &impl Shared, slot: usize) {
        if worker.pending.is_empty() {
            return;
        }
        let unpublished = worker.pending.take();
        let mut rest = unpublished.as_slice();
        while let Some((event, behind)) = Event::split_first(rest) {
            rest = behind;
            if self.open.len() > HEAD_BYTES && self.open.len().saturating_add(event.len()) > SEGMENT_BYTES {
                shared.set(&self.key, &self.open, None);
                self.begin_segment(slot, self.segment.wrapping_add(1));
            }
            self.open.extend_from_slice(event);
        }
        shared.set(&self.key, &self.open, None);
        shared.set_position(slot, self.position());
        worker.pending.reuse(unpublished);
    }

    /// Renews the slot, and writes and reads the worker ledgers, decisions and blocks for new workers. Call it every
    /// [`TICK`](crate::workers::push::TICK): a slot that is not renewed for 700 ms is free.
    pub fn tick(&mut self, worker: &mut Worker, shared: &impl Shared, now: Monotonic) {
        self.write_now(worker, shared, now);
        self.renew(worker, shared, now);
        self.save_ledger(worker, shared);
        self.save_decisions(worker, shared);
        self.save_parked(worker, shared);
        self.save_served(worker, shared);
        for other in &mut self.others {
            other.ledger.prune(now);
            if other.is_behind {
                other.ledger.retract(&mut worker.state, now);
                other.join(worker, shared);
            }
        }
        self.catch_up(worker, shared, shared.announced(), now);
        self.inheritance.inherit(worker, shared, now);
        if self.slot.is_some_and(|mine| self.others.iter().all(|other| other.slot > mine)) {
            self.inheritance.save(worker, shared);
        }
    }

    fn position(&self) -> u64 {
        self.segment.wrapping_shl(16) | self.open.len() as u64
    }

    fn begin_segment(&mut self, slot: usize, segment: u64) {
        let mut head = Writer::default();
        [self.worker_id, segment, self.hash_scheme].into_iter().for_each(|word| head.word(word));
        self.segment = segment;
        self.open = head.0;
        self.key = log_key(slot, segment);
    }

    /// Keeps the slot, or takes a free one. Where none is free the worker has no slot.
    fn renew(&mut self, worker: &mut Worker, shared: &impl Shared, now: Monotonic) {
        for _ in 0..8 {
            let (mut slots, version) = slots(shared);
            let mine = |slot: &WorkerSlot| slot.worker_id == self.worker_id;
            let held = self.slot.filter(|index| slots.get(*index).is_some_and(mine));
            let Some(index) = held.or_else(|| slots.iter().position(|slot| !slot.is_taken(now))) else {
                self.slot = None;
                self.renewed = now;
                return;
            };
            if let Some(slot) = slots.get_mut(index) {
                *slot = WorkerSlot { worker_id: self.worker_id, renewed: now };
            }
            if !shared.set(SLOTS_KEY, &to_bytes(&slots), Some(version)) {
                continue;
            }
            if held.is_none() || self.open.is_empty() {
                self.slot = Some(index);
                self.renewed = now;
                // The segments follow those of the worker that had the slot before.
                self.begin_segment(index, shared.position(index).wrapping_shr(16).wrapping_add(1));
                // Events that wait are in the ledger already, so the ledger's position must lie behind them.
                self.write_pending(worker, shared, index);
                worker.pending.is_ledger_new = true;
                self.save_ledger(worker, shared);
                let mut who = Writer::default();
                who.word(self.worker_id);
                self.who.write(&mut who);
                shared.set(&who_key(index), &who.0, None);
                shared.announce();
            }
            self.renewed = now;
            self.meet(worker, shared, &slots, now);
            return;
        }
    }

    /// Retracts the ledgers of workers that are gone, and applies those of new workers.
    fn meet(&mut self, worker: &mut Worker, shared: &impl Shared, slots: &[WorkerSlot], now: Monotonic) {
        let is_here = |other: &OtherWorker| {
            slots.get(other.slot).is_some_and(|slot| slot.worker_id == other.worker_id && slot.is_taken(now))
        };
        for gone in self.others.extract_if(.., |other| !is_here(other)) {
            gone.ledger.retract(&mut worker.state, now);
        }
        for (index, slot) in slots.iter().enumerate() {
            let is_known = self.others.iter().any(|other| other.slot == index);
            if slot.is_taken(now) && slot.worker_id != self.worker_id && !is_known {
                let mut other = OtherWorker {
                    slot: index,
                    worker_id: slot.worker_id,
                    position: 0,
                    ledger: WorkerLedger::default(),
                    is_behind: false,
                };
                other.join(worker, shared);
                self.others.push(other);
            }
        }
    }

    /// Writes this worker's ledger, where it has changed.
    fn save_ledger(&self, worker: &mut Worker, shared: &impl Shared) {
        let Some(slot) = self.slot.filter(|_| core::mem::take(&mut worker.pending.is_ledger_new)) else { return };
        let mut out = Writer::default();
        [self.worker_id, self.position()].into_iter().for_each(|word| out.word(word));
        out.0.extend(worker.pending.own_ledger.to_bytes());
        shared.set(&ledger_key(slot), &out.0, None);
    }

    /// Writes this worker's latest decisions, where there are new ones.
    fn save_decisions(&self, worker: &mut Worker, shared: &impl Shared) {
        let Some(slot) = self.slot.filter(|_| core::mem::take(&mut worker.recent.is_new)) else { return };
        let mut out = Writer::default();
        out.word(self.worker_id);
        worker.recent.write(&mut out);
        shared.set(&recent_key(slot), &out.0, None);
    }

    /// Writes how many requests of this worker are parked, where that has changed.
    fn save_parked(&mut self, worker: &Worker, shared: &impl Shared) {
        let parked = worker.parked();
        let Some(slot) = self.slot.filter(|_| parked != self.parked) else { return };
        self.parked = parked;
        let mut out = Writer::default();
        out.word(self.worker_id);
        parked.write(&mut out);
        shared.set(&parked_key(slot), &out.0, None);
    }

    /// Writes what endpoints served by this worker, where it has changed.
    fn save_served(&self, worker: &mut Worker, shared: &impl Shared) {
        let Some(slot) = self.slot.filter(|_| core::mem::take(&mut worker.served.is_new)) else { return };
        let table = &worker.state.table;
        worker.served.keep(|key| table.index_of_key(key).is_some());
        let mut out = Writer::default();
        out.word(self.worker_id);
        worker.served.write(&mut out);
        shared.set(&served_key(slot), &out.0, None);
    }
}

fn who_key(slot: usize) -> String {
    format!("pd/1/who/{slot}")
}

fn recent_key(slot: usize) -> String {
    format!("pd/2/recent/{slot}")
}

fn served_key(slot: usize) -> String {
    format!("pd/1/served/{slot}")
}

fn parked_key(slot: usize) -> String {
    format!("pd/1/parked/{slot}")
}

#[cfg(test)]
mod tests;
