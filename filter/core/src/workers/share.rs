//! One brain per Envoy: what a worker decides is in every other worker's ledger and index before those decide.
//!
//! Each worker has a seat: a log of [events](crate::workers::event) in shared data that only it writes, a gauge that says how far
//! the log goes, and, renewed at each tick, its part of the ledger as a whole. Before a worker decides it looks at the
//! gauges (90 ns each) and reads what is new. All that a worker has in flight is known to be its own, so when it stops
//! renewing its seat (its VM was reloaded, its thread died) the others take that part out.
//!
//! ```text
//! pd/1/seats            per seat: worker id, time of the last renewal          compare-and-swap
//! pd/1/log/S/N          segment n of seat S's log, N = n modulo RING           written by the seat's worker only
//! pd/1/ledger/S         seat S's part of the ledger, and the position it is of  written by the seat's worker only
//! pd/1/index/I          what one endpoint holds, for workers that begin         written by the worker in the first seat
//! pd/1/who/S            build and configuration of seat S's worker              written by the seat's worker only
//! pd/1/recent/S         some of its latest decisions                            written by the seat's worker only
//! gauge of seat S       position: segment · 2¹⁶ + bytes of it
//! ```
//! A reader that fell behind by more than the ring holds takes the part as a whole and goes on from there; it lost
//! nothing but index entries. Two generations of the filter side by side are two workers per thread with a seat each.

use core::time::Duration;

use hashbrown::{HashMap, HashSet};

use crate::codec::{Reader, Writer};
use crate::prefix::hash::BlockHash;
use crate::time::Monotonic;
use crate::workers::event::Event;
use crate::workers::ledger::Part;
use crate::workers::recent::{Decision, Generation, MAX_DECISIONS};
use crate::workers::worker::Worker;

/// Data that the workers of one Envoy share.
pub trait Shared {
    /// Value and version of a key.
    fn get(&self, key: &str) -> Option<(Vec<u8>, u32)>;
    /// Writes a key, when its version is still `version` (`None`: whatever is there) or it is not there; whether it did.
    fn set(&self, key: &str, value: &[u8], version: Option<u32>) -> bool;
    /// How often something was announced.
    fn announced(&self) -> u64;
    /// Announces a list of endpoints or a worker.
    fn announce(&self);
    /// How far the log of a seat goes.
    fn position(&self, seat: usize) -> u64;
    /// Says how far it goes.
    fn set_position(&self, seat: usize, position: u64);
}

/// Version to write a key with that is not there yet. Envoy looks at the version of a key that is there only, so of two
/// workers that write such a key at the same time the second fails. No key has this version before 2³² − 1 writes.
pub(crate) const ABSENT: u32 = u32::MAX;

/// Workers of one Envoy that share; more decide for themselves alone. Two generations of 31 and the main thread's.
pub const SEATS: usize = 64;
/// Time without renewal after which a seat is free and its part of the ledger gone.
const SEAT_LIFE: Duration = Duration::from_millis(700);
/// Time without renewal after which a worker makes sure of its seat before it writes.
const RENEWAL: Duration = Duration::from_millis(350);
/// Bytes of a segment beyond which the next one begins.
const SEGMENT_BYTES: usize = 4_096;
/// Segments of a log that are kept: 100 kB and more, which is what a busy worker tells in a tenth of a second.
const RING: u64 = 32;
/// Bytes before a segment's events: worker, segment, [`Share::epoch`].
const HEAD_BYTES: usize = 24;
/// How long the end of a request may wait for a decision to be told with.
const PATIENCE: Duration = Duration::from_millis(10);
/// How long a new worker looks for what its endpoints held before it.
const INHERITANCE: Duration = Duration::from_secs(10);
/// Blocks of one endpoint that a new worker inherits at most.
const MAX_INHERITED: usize = 65_536;

const SEATS_KEY: &str = "pd/1/seats";

/// One worker's part in the sharing.
#[derive(Debug, Default)]
pub struct Share {
    worker_id: u64,
    who: Generation,
    /// What block hashes depend on besides the prompt; index entries of others are of no use.
    epoch: u64,
    seat: Option<usize>,
    segment: u64,
    /// The segment's bytes so far, its head included, and its key.
    open: Vec<u8>,
    key: String,
    told: Monotonic,
    renewed: Monotonic,
    began: Monotonic,
    announced: Option<u64>,
    peers: Vec<Peer>,
    /// Endpoint whose blocks are written next, and what each looked like when it was.
    next_saved: usize,
    saved: HashMap<u32, (u64, u64)>,
    inherited: HashSet<u64>,
}

/// Another worker.
#[derive(Debug)]
struct Peer {
    seat: usize,
    worker_id: u64,
    position: u64,
    part: Part,
    /// Whether something was missed.
    is_behind: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Seat {
    worker_id: u64,
    renewed: Monotonic,
}

impl Seat {
    fn is_taken(&self, now: Monotonic) -> bool {
        self.worker_id != 0 && now.saturating_sub(self.renewed) <= SEAT_LIFE
    }
}

impl Share {
    /// Says what this worker runs; call it before [`configure`](Self::configure).
    pub fn introduce(&mut self, version: &str, build: &str, revision: &str) {
        let (version, build, revision) = (version.to_owned(), build.to_owned(), revision.to_owned());
        self.who = Generation { version, build, revision, workers: 1 };
    }

    /// What the workers run that are alive, a line per build and configuration.
    pub fn generations(&self, shared: &impl Shared) -> Vec<Generation> {
        let of_peer = |peer: &Peer| {
            let (bytes, _) = shared.get(&who_key(peer.seat))?;
            let mut rest = Reader(&bytes);
            (rest.word()? == peer.worker_id).then(|| Generation::read(&mut rest)).flatten()
        };
        let mut generations = vec![self.who.clone()];
        for who in self.peers.iter().map(|peer| of_peer(peer).unwrap_or_default()) {
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

    /// Some of the workers' latest decisions with their times, newest first.
    pub fn decisions(&self, worker: &Worker, shared: &impl Shared) -> Vec<(Monotonic, Decision)> {
        let mut decisions: Vec<_> = worker.recent.iter().cloned().collect();
        for peer in &self.peers {
            let Some((bytes, _)) = shared.get(&recent_key(peer.seat)) else { continue };
            let mut rest = Reader(&bytes);
            if rest.word() == Some(peer.worker_id) {
                decisions.extend(core::iter::from_fn(|| Decision::read(&mut rest)));
            }
        }
        decisions.sort_unstable_by_key(|(at, _)| core::cmp::Reverse(*at));
        decisions.truncate(MAX_DECISIONS);
        decisions
    }

    /// Starts over with a configuration.
    pub fn configure(&mut self, worker: &mut Worker, shared: &impl Shared, worker_id: u64, now: Monotonic) {
        let block_bytes = worker.config.as_ref().map_or(0, |config| config.prefix.block_bytes);
        let (seat, who) = (self.seat, core::mem::take(&mut self.who));
        *self = Self { worker_id, who, epoch: block_bytes as u64, began: now, seat, ..Self::default() };
        worker.tell_others(worker_id);
        self.renew(worker, shared, now);
        self.catch_up(worker, shared, shared.announced(), now);
    }

    /// Takes over what the other workers did; `announced` is [`Shared::announced`]. Call it before every decision.
    pub fn catch_up(&mut self, worker: &mut Worker, shared: &impl Shared, announced: u64, now: Monotonic) {
        if self.announced != Some(announced) {
            self.announced = Some(announced);
            let (seats, _) = seats(shared);
            self.meet(worker, shared, &seats, now);
            self.inherit(worker, shared, now);
        }
        for peer in &mut self.peers {
            let position = shared.position(peer.seat);
            if position != peer.position && !peer.is_behind {
                peer.read(worker, shared, self.epoch, position);
            }
        }
    }

    /// Tells the others what this worker did. Call it after every event.
    pub fn publish(&mut self, worker: &mut Worker, shared: &impl Shared, now: Monotonic) {
        let may_wait = !worker.log.is_pressing && now.saturating_sub(self.told) < PATIENCE;
        if !worker.log.is_told() && !may_wait {
            self.tell(worker, shared, now);
        }
    }

    fn tell(&mut self, worker: &mut Worker, shared: &impl Shared, now: Monotonic) {
        // A worker that stood still may have lost its seat, and the log there is somebody else's.
        if now.saturating_sub(self.renewed) > RENEWAL {
            self.renew(worker, shared, now);
        }
        self.told = now;
        match self.seat {
            Some(seat) => self.write_untold(worker, shared, seat),
            None => drop(worker.log.take()),
        }
    }

    fn write_untold(&mut self, worker: &mut Worker, shared: &impl Shared, seat: usize) {
        if worker.log.is_told() {
            return;
        }
        let untold = worker.log.take();
        let mut rest = untold.as_slice();
        while let Some((event, behind)) = Event::split_first(rest) {
            rest = behind;
            if self.open.len() > HEAD_BYTES && self.open.len().saturating_add(event.len()) > SEGMENT_BYTES {
                shared.set(&self.key, &self.open, None);
                self.begin_segment(seat, self.segment.wrapping_add(1));
            }
            self.open.extend_from_slice(event);
        }
        shared.set(&self.key, &self.open, None);
        shared.set_position(seat, self.position());
        worker.log.reuse(untold);
    }

    /// Call it a few times a second, more often than [`SEAT_LIFE`].
    pub fn tick(&mut self, worker: &mut Worker, shared: &impl Shared, now: Monotonic) {
        self.tell(worker, shared, now);
        self.renew(worker, shared, now);
        self.save_part(worker, shared);
        self.save_decisions(worker, shared);
        for peer in &mut self.peers {
            peer.part.prune(now);
            if peer.is_behind {
                peer.part.retract(&mut worker.state, now);
                peer.join(worker, shared);
            }
        }
        self.catch_up(worker, shared, shared.announced(), now);
        self.inherit(worker, shared, now);
        self.save_index(worker, shared);
    }

    fn position(&self) -> u64 {
        self.segment.wrapping_shl(16) | self.open.len() as u64
    }

    fn begin_segment(&mut self, seat: usize, segment: u64) {
        let mut head = Writer::default();
        [self.worker_id, segment, self.epoch].into_iter().for_each(|word| head.word(word));
        self.segment = segment;
        self.open = head.0;
        self.key = log_key(seat, segment);
    }

    /// Keeps the seat, or takes one that is free.
    fn renew(&mut self, worker: &mut Worker, shared: &impl Shared, now: Monotonic) {
        for _ in 0..8 {
            let (mut seats, version) = seats(shared);
            let mine = |seat: &Seat| seat.worker_id == self.worker_id;
            let held = self.seat.filter(|at| seats.get(*at).is_some_and(mine));
            let Some(at) = held.or_else(|| seats.iter().position(|seat| !seat.is_taken(now))) else {
                self.seat = None;
                self.renewed = now;
                return;
            };
            if let Some(seat) = seats.get_mut(at) {
                *seat = Seat { worker_id: self.worker_id, renewed: now };
            }
            if !shared.set(SEATS_KEY, &to_bytes(&seats), Some(version)) {
                continue;
            }
            if held.is_none() || self.open.is_empty() {
                self.seat = Some(at);
                self.renewed = now;
                // Beyond what the seat's last worker wrote.
                self.begin_segment(at, shared.position(at).wrapping_shr(16).wrapping_add(1));
                // What is not told yet is in the part as well: the part must be of a position behind it.
                self.write_untold(worker, shared, at);
                worker.log.is_own_new = true;
                self.save_part(worker, shared);
                let mut who = Writer::default();
                who.word(self.worker_id);
                self.who.write(&mut who);
                shared.set(&who_key(at), &who.0, None);
                shared.announce();
            }
            self.renewed = now;
            self.meet(worker, shared, &seats, now);
            return;
        }
    }

    /// Parts from workers that are gone and joins those that are new.
    fn meet(&mut self, worker: &mut Worker, shared: &impl Shared, seats: &[Seat], now: Monotonic) {
        let is_here = |peer: &Peer| {
            seats.get(peer.seat).is_some_and(|seat| seat.worker_id == peer.worker_id && seat.is_taken(now))
        };
        for gone in self.peers.extract_if(.., |peer| !is_here(peer)) {
            gone.part.retract(&mut worker.state, now);
        }
        for (at, seat) in seats.iter().enumerate() {
            let is_known = self.peers.iter().any(|peer| peer.seat == at);
            if seat.is_taken(now) && seat.worker_id != self.worker_id && !is_known {
                let mut peer =
                    Peer { seat: at, worker_id: seat.worker_id, position: 0, part: Part::default(), is_behind: false };
                peer.join(worker, shared);
                self.peers.push(peer);
            }
        }
    }

    /// Writes this worker's part of the ledger, where it has changed.
    fn save_part(&self, worker: &mut Worker, shared: &impl Shared) {
        let Some(seat) = self.seat.filter(|_| core::mem::take(&mut worker.log.is_own_new)) else { return };
        let mut out = Writer::default();
        [self.worker_id, self.position()].into_iter().for_each(|word| out.word(word));
        out.0.extend(worker.log.own.to_bytes());
        shared.set(&ledger_key(seat), &out.0, None);
    }

    /// Writes down what this worker decided, where that is new.
    fn save_decisions(&self, worker: &mut Worker, shared: &impl Shared) {
        let Some(seat) = self.seat.filter(|_| core::mem::take(&mut worker.recent.is_new)) else { return };
        let mut out = Writer::default();
        out.word(self.worker_id);
        worker.recent.write(&mut out);
        shared.set(&recent_key(seat), &out.0, None);
    }

    /// The first worker writes down what one endpoint after the other holds.
    fn save_index(&mut self, worker: &Worker, shared: &impl Shared) {
        if self.seat.is_none_or(|mine| self.peers.iter().any(|peer| peer.seat < mine)) {
            return;
        }
        let places = worker.state.table.places();
        let at = self.next_saved.checked_rem(places).unwrap_or(0);
        self.next_saved = at.wrapping_add(1);
        let Ok(index) = u32::try_from(at) else { return };
        // An empty place is written too: what stood there before is nobody's any more.
        let key = worker.state.table.get(index).map_or(0, |slot| slot.key);
        let looks = (key, worker.state.index.touches(index));
        if self.saved.insert(index, looks) == Some(looks) {
            return;
        }
        let mut out = Writer::default();
        [self.epoch, key, places as u64].into_iter().for_each(|word| out.word(word));
        for (hash, units) in worker.state.index.newest(index, MAX_INHERITED) {
            out.word(hash.0);
            out.word(units as u64);
        }
        shared.set(&index_key(at), &out.0, None);
    }

    /// A worker that begins takes over what the ones before it knew of its endpoints.
    fn inherit(&mut self, worker: &mut Worker, shared: &impl Shared, now: Monotonic) {
        let is_new = |key: &u64| !self.inherited.contains(key);
        let is_young = now.saturating_sub(self.began) < INHERITANCE;
        if !is_young || !worker.state.table.iter().any(|(_, slot)| is_new(&slot.key)) {
            return;
        }
        let (mut at, mut places) = (0, 1);
        while at < places {
            let Some((bytes, _)) = shared.get(&index_key(at)) else { break };
            let mut rest = Reader(&bytes);
            let (epoch, key, count) = (rest.word(), rest.word(), rest.word());
            places = count.and_then(|count| usize::try_from(count).ok()).unwrap_or(0);
            at = at.wrapping_add(1);
            let Some((index, key)) = key.and_then(|key| Some((worker.state.table.index_of_key(key)?, key))) else {
                continue;
            };
            if epoch != Some(self.epoch) || !self.inherited.insert(key) {
                continue;
            }
            let blocks = core::iter::from_fn(|| Some((BlockHash(rest.word()?), usize::try_from(rest.word()?).ok()?)));
            worker.state.index.restore(index, blocks);
        }
        self.inherited.extend(worker.state.table.iter().map(|(_, slot)| slot.key));
    }
}

impl Peer {
    /// Takes the worker's part of the ledger as a whole; the log goes on from there.
    fn join(&mut self, worker: &mut Worker, shared: &impl Shared) {
        self.part = Part::default();
        self.position = shared.position(self.seat);
        self.is_behind = false;
        let Some((bytes, _)) = shared.get(&ledger_key(self.seat)) else { return };
        let mut rest = Reader(&bytes);
        if rest.word() != Some(self.worker_id) {
            // Its seat is taken, its part not written yet.
            self.is_behind = true;
            return;
        }
        if let (Some(position), Some(part)) = (rest.word(), Part::from_bytes(rest.0)) {
            self.position = position;
            part.apply(&mut worker.state);
            self.part = part;
        }
    }

    /// Reads the log up to a position, or as far as it goes.
    fn read(&mut self, worker: &mut Worker, shared: &impl Shared, epoch: u64, position: u64) {
        let last = position.wrapping_shr(16);
        let mut segment = self.position.wrapping_shr(16);
        let mut from = usize::try_from(self.position & 0xffff).unwrap_or(HEAD_BYTES).max(HEAD_BYTES);
        while segment <= last {
            let value = shared.get(&log_key(self.seat, segment));
            let bytes = value.as_ref().map_or(&[][..], |(bytes, _)| bytes);
            let mut head = Reader(bytes);
            let (worker_id, number, of) = (head.word(), head.word(), head.word());
            let Some(events) =
                bytes.get(from..).filter(|_| worker_id == Some(self.worker_id) && number == Some(segment))
            else {
                self.is_behind = true;
                return;
            };
            for (endpoint, event) in Event::read(events) {
                let is_blocks = matches!(event, Event::Holds { .. } | Event::HoldsByOthers { .. });
                if !is_blocks || of == Some(epoch) {
                    event.apply(endpoint, &mut worker.state);
                    if let Event::Holds { blocks } = &event {
                        worker.tell_gateways(endpoint, blocks);
                    }
                }
                self.part.note(endpoint, &event);
            }
            self.position = segment.wrapping_shl(16) | bytes.len() as u64;
            segment = segment.wrapping_add(1);
            from = HEAD_BYTES;
        }
    }
}

fn log_key(seat: usize, segment: u64) -> String {
    format!("pd/1/log/{seat}/{}", segment % RING)
}

fn ledger_key(seat: usize) -> String {
    format!("pd/1/ledger/{seat}")
}

fn who_key(seat: usize) -> String {
    format!("pd/1/who/{seat}")
}

fn recent_key(seat: usize) -> String {
    format!("pd/1/recent/{seat}")
}

fn index_key(place: usize) -> String {
    format!("pd/1/index/{place}")
}

/// The seats, and the version to write them with.
fn seats(shared: &impl Shared) -> (Vec<Seat>, u32) {
    let value = shared.get(SEATS_KEY);
    let mut seats = vec![Seat::default(); SEATS];
    let mut rest = Reader(value.as_ref().map_or(&[], |(bytes, _)| bytes));
    for seat in &mut seats {
        if let (Some(worker_id), Some(renewed)) = (rest.word(), rest.word()) {
            *seat = Seat { worker_id, renewed: Monotonic::from_millis(renewed) };
        }
    }
    (seats, value.map_or(ABSENT, |(_, version)| version))
}

fn to_bytes(seats: &[Seat]) -> Vec<u8> {
    let mut out = Writer::default();
    for seat in seats {
        out.word(seat.worker_id);
        out.word(seat.renewed.as_millis());
    }
    out.0
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use hashbrown::HashMap;
    use std::cell::{Cell, RefCell};

    /// Envoy's shared data: versions start at 1, a write without a version or of a new key always succeeds.
    #[derive(Default)]
    pub(crate) struct Store {
        pub(crate) data: RefCell<HashMap<String, (Vec<u8>, u32)>>,
        pub(crate) announced: Cell<u64>,
        positions: RefCell<HashMap<usize, u64>>,
    }

    impl Shared for Store {
        fn get(&self, key: &str) -> Option<(Vec<u8>, u32)> {
            self.data.borrow().get(key).cloned()
        }
        fn set(&self, key: &str, value: &[u8], version: Option<u32>) -> bool {
            let mut data = self.data.borrow_mut();
            let current = data.get(key).map(|(_, version)| *version);
            if current.is_some_and(|current| version.is_some_and(|version| version != current)) {
                return false;
            }
            data.insert(key.to_owned(), (value.to_vec(), current.unwrap_or(0) + 1));
            true
        }
        fn announced(&self) -> u64 {
            self.announced.get()
        }
        fn announce(&self) {
            self.announced.set(self.announced.get() + 1);
        }
        fn position(&self, seat: usize) -> u64 {
            self.positions.borrow().get(&seat).copied().unwrap_or(0)
        }
        fn set_position(&self, seat: usize, position: u64) {
            self.positions.borrow_mut().insert(seat, position);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::Store;
    use super::*;
    use crate::endpoints::table::EndpointRef;
    use proptest::prelude::*;

    const CONFIG: &[u8] = br#"{"endpoints":[{"address":"10.0.0.1:1","role":"prefill"},{"address":"10.0.0.1:2","role":"prefill"},{"address":"10.0.0.2:1","role":"decode"}]}"#;
    const TICK: Duration = Duration::from_millis(200);
    const FAR: Monotonic = Monotonic::from_secs(3_600);

    struct Node {
        worker: Worker,
        share: Share,
    }

    impl Node {
        fn new(store: &Store, id: u64, now: Monotonic) -> Self {
            let mut worker = Worker::default();
            worker.configure(CONFIG).unwrap();
            let mut share = Share::default();
            share.configure(&mut worker, store, id, now);
            Self { worker, share }
        }

        fn at(&self, place: usize) -> EndpointRef {
            let mut all: Vec<_> = self.worker.state.table.iter().map(|(at, slot)| (slot.address.clone(), at)).collect();
            all.sort();
            self.worker.state.table.refer(all[place % all.len()].1).unwrap()
        }

        fn tick(&mut self, store: &Store, now: Monotonic) {
            self.share.tick(&mut self.worker, store, now);
        }

        fn publish(&mut self, store: &Store, now: Monotonic) {
            self.share.publish(&mut self.worker, store, now);
        }

        fn catch_up(&mut self, store: &Store, now: Monotonic) {
            self.share.catch_up(&mut self.worker, store, store.announced(), now);
        }

        /// Per endpoint: legs, seconds of prefill work, decode tokens and requests.
        fn ledger(&self, now: Monotonic) -> Vec<(usize, u64, u64, u32)> {
            let slots = self.worker.state.table.iter().map(|(_, slot)| {
                let work = (slot.prefill.work(now) * 1e6).round() as u64;
                (slot.prefill.len(), work, slot.decode.tokens, slot.decode.requests)
            });
            slots.collect()
        }

        fn is_idle(&self) -> bool {
            self.ledger(FAR).iter().all(|(legs, _, tokens, requests)| (*legs, *tokens, *requests) == (0, 0, 0))
        }
    }

    fn fleet(store: &Store, count: u64, now: Monotonic) -> Vec<Node> {
        (1..=count).map(|id| Node::new(store, id, now)).collect()
    }

    fn blocks(id: u64, len: u64) -> Vec<BlockHash> {
        (0..len).map(|i| BlockHash((id * 1_000_003 + i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect()
    }

    #[test]
    fn a_decision_is_seen_before_the_next_one_of_any_worker() {
        for count in [2, 4, 16] {
            let (store, now) = (Store::default(), Monotonic::from_secs(1));
            let mut nodes = fleet(&store, count, now);
            for i in 0..count as usize {
                let leg = nodes[i].worker.next_leg();
                let (prefill, decode) = (nodes[i].at(i % 2), nodes[i].at(2));
                nodes[i].worker.prefill_started(prefill, leg, 0.5, now, FAR);
                nodes[i].worker.holds(prefill, &blocks(i as u64, 9));
                nodes[i].worker.decode_started(decode, 100);
                nodes[i].publish(&store, now);
                for other in &mut nodes {
                    other.catch_up(&store, now);
                    let place = other.at(i % 2).index;
                    assert_eq!(other.worker.state.index.matched(place, &blocks(i as u64, 9)), 9);
                }
                let expected = nodes[i].ledger(now);
                assert!(nodes.iter().all(|node| node.ledger(now) == expected), "{count} workers");
                assert_eq!(expected.iter().map(|of| of.3).sum::<u32>() as usize, i + 1);
            }
        }
    }

    #[test]
    fn a_worker_that_died_is_out_of_the_ledger_within_a_second() {
        let (store, mut now) = (Store::default(), Monotonic::from_secs(1));
        let mut nodes = fleet(&store, 3, now);
        let leg = nodes[2].worker.next_leg();
        let (prefill, decode) = (nodes[2].at(0), nodes[2].at(2));
        nodes[2].worker.prefill_started(prefill, leg, 9.0, now, FAR);
        nodes[2].worker.decode_started(decode, 7_000);
        nodes[2].publish(&store, now);
        nodes.truncate(2);
        nodes.iter_mut().for_each(|node| node.catch_up(&store, now));
        assert!(nodes.iter().all(|node| !node.is_idle()));
        for _ in 0..5 {
            now += TICK;
            nodes.iter_mut().for_each(|node| node.tick(&store, now));
        }
        assert!(nodes.iter().all(|node| node.is_idle() && node.share.peers.len() == 1));
        // Its seat is given to the next one.
        let mut next = Node::new(&store, 9, now);
        assert_eq!(next.share.seat, Some(2));
        let decode = next.at(2);
        next.worker.decode_started(decode, 5);
        next.publish(&store, now);
        nodes.iter_mut().for_each(|node| node.catch_up(&store, now));
        assert!(nodes.iter().all(|node| node.ledger(now) == next.ledger(now)));
    }

    #[test]
    fn a_worker_that_was_only_slow_is_back_with_all_it_has() {
        let (store, mut now) = (Store::default(), Monotonic::from_secs(1));
        let mut nodes = fleet(&store, 2, now);
        let decode = nodes[1].at(2);
        nodes[1].worker.decode_started(decode, 50);
        nodes[1].tick(&store, now);
        for _ in 0..10 {
            now += TICK;
            nodes[0].tick(&store, now);
        }
        assert!(nodes[0].is_idle());
        nodes[1].tick(&store, now);
        nodes[0].tick(&store, now);
        assert_eq!(nodes[0].ledger(now), nodes[1].ledger(now));
        assert!(!nodes[0].is_idle());
    }

    #[test]
    fn a_reader_that_fell_far_behind_catches_up_with_the_next_tick() {
        let (store, mut now) = (Store::default(), Monotonic::from_secs(1));
        let mut nodes = fleet(&store, 2, now);
        let (prefill, decode) = (nodes[0].at(0), nodes[0].at(2));
        for id in 0..5_000 {
            nodes[0].worker.decode_started(decode, 10);
            nodes[0].worker.holds(prefill, &blocks(id, 20));
            nodes[0].publish(&store, now);
        }
        now += TICK;
        nodes[1].catch_up(&store, now);
        nodes[0].tick(&store, now);
        nodes[1].tick(&store, now);
        assert_eq!(nodes[1].ledger(now), nodes[0].ledger(now));
        assert_eq!(nodes[1].ledger(now).iter().map(|of| of.3).sum::<u32>(), 5_000);
        let store = store.data.borrow();
        assert!(store.values().map(|(value, _)| value.len()).sum::<usize>() < 400_000, "what is shared is bounded");
    }

    #[test]
    fn a_new_generation_begins_with_what_the_old_one_knew() {
        let (store, mut now) = (Store::default(), Monotonic::from_secs(1));
        let mut old = fleet(&store, 2, now);
        for id in 0..40 {
            let held = old[1].at(id as usize % 3);
            old[1].worker.holds(held, &blocks(id, 12));
            let decode = old[1].at(2);
            old[1].worker.decode_started(decode, 10);
            old[1].publish(&store, now);
        }
        for _ in 0..4 {
            now += TICK;
            old.iter_mut().for_each(|node| node.tick(&store, now));
        }
        let mut new = Node::new(&store, 3, now);
        for id in 0..40 {
            assert_eq!(new.worker.state.index.matched(new.at(id as usize % 3).index, &blocks(id, 12)), 12, "{id}");
        }
        assert_eq!(new.ledger(now), old[0].ledger(now), "the old generation's work counts once");
        // The old one drains: its work ends, and the new one hears of it.
        for _ in 0..40 {
            let decode = old[1].at(2);
            old[1].worker.decode_ended(decode, 10);
        }
        now += PATIENCE;
        old[1].publish(&store, now);
        new.catch_up(&store, now);
        assert!(new.is_idle());
    }

    #[test]
    fn ends_of_requests_wait_for_company_but_not_for_long() {
        let (store, now) = (Store::default(), Monotonic::from_secs(1));
        let mut nodes = fleet(&store, 2, now);
        let decode = nodes[0].at(2);
        nodes[0].worker.decode_started(decode, 10);
        nodes[0].publish(&store, now);
        nodes[0].worker.decode_ended(decode, 10);
        let node = &mut nodes[0];
        node.share.publish(&mut node.worker, &store, now + Duration::from_millis(3));
        nodes[1].catch_up(&store, now);
        assert!(!nodes[1].is_idle());
        let node = &mut nodes[0];
        node.share.publish(&mut node.worker, &store, now + PATIENCE);
        nodes[1].catch_up(&store, now);
        assert!(nodes[1].is_idle());
    }

    #[test]
    fn a_worker_without_a_seat_decides_for_itself_and_keeps_nothing() {
        let (store, now) = (Store::default(), Monotonic::from_secs(1));
        let mut nodes = fleet(&store, SEATS as u64 + 1, now);
        let last = nodes.last_mut().unwrap();
        assert_eq!(last.share.seat, None);
        let decode = last.at(2);
        last.worker.decode_started(decode, 10);
        last.publish(&store, now);
        assert_eq!(last.worker.log.untold.as_ref().map(Vec::len), Some(0));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Start { node: usize, place: usize, tokens: u64 },
        End { node: usize },
        Hold { node: usize, place: usize, id: u64 },
        Publish { node: usize },
        CatchUp { node: usize },
        Tick { node: usize },
        Kill { node: usize },
        Join,
        Wait { ms: u64 },
    }

    fn step() -> impl Strategy<Value = Step> {
        let node = || 0_usize..6;
        prop_oneof![
            4 => (node(), 0_usize..3, 1_u64..99).prop_map(|(node, place, tokens)| Step::Start { node, place, tokens }),
            4 => node().prop_map(|node| Step::End { node }),
            2 => (node(), 0_usize..3, 0_u64..9).prop_map(|(node, place, id)| Step::Hold { node, place, id }),
            4 => node().prop_map(|node| Step::Publish { node }),
            4 => node().prop_map(|node| Step::CatchUp { node }),
            2 => node().prop_map(|node| Step::Tick { node }),
            1 => node().prop_map(|node| Step::Kill { node }),
            1 => Just(Step::Join),
            1 => (1_u64..400).prop_map(|ms| Step::Wait { ms }),
        ]
    }

    proptest! {
        /// Whatever the order: once everybody has told and heard everything, all ledgers are equal, and once everything
        /// has ended they are empty.
        #[test]
        fn all_ledgers_become_equal_and_then_empty(steps in prop::collection::vec(step(), 1..120)) {
            let (store, mut now) = (Store::default(), Monotonic::from_secs(1));
            let mut nodes = fleet(&store, 3, now);
            let mut open: Vec<Vec<(usize, u64, u64)>> = vec![Vec::new(); 3];
            let mut next_id = 4;
            for step in steps {
                let count = nodes.len();
                match step {
                    Step::Start { node, place, tokens } => {
                        let node = node % count;
                        let leg = nodes[node].worker.next_leg();
                        let at = nodes[node].at(place);
                        nodes[node].worker.prefill_started(at, leg, tokens as f64, now, FAR);
                        nodes[node].worker.decode_started(at, tokens);
                        open[node].push((place, tokens, leg));
                    }
                    Step::End { node } => {
                        let node = node % count;
                        if let Some((place, tokens, leg)) = open[node].pop() {
                            let at = nodes[node].at(place);
                            nodes[node].worker.prefill_ended(at, leg, now);
                            nodes[node].worker.decode_ended(at, tokens);
                        }
                    }
                    Step::Hold { node, place, id } => {
                        let at = nodes[node % count].at(place);
                        nodes[node % count].worker.holds(at, &blocks(id, 30));
                    }
                    Step::Publish { node } => nodes[node % count].publish(&store, now),
                    Step::CatchUp { node } => nodes[node % count].catch_up(&store, now),
                    Step::Tick { node } => nodes[node % count].tick(&store, now),
                    Step::Kill { node } if count > 1 => {
                        nodes.remove(node % count);
                        open.remove(node % count);
                    }
                    Step::Kill { .. } => {}
                    Step::Join => {
                        nodes.push(Node::new(&store, next_id, now));
                        open.push(Vec::new());
                        next_id += 1;
                    }
                    Step::Wait { ms } => now += Duration::from_millis(ms),
                }
            }
            let settle = |nodes: &mut Vec<Node>, now: &mut Monotonic| {
                for _ in 0..6 {
                    *now += TICK;
                    nodes.iter_mut().for_each(|node| node.tick(&store, *now));
                }
            };
            settle(&mut nodes, &mut now);
            let totals = |node: &Node| {
                node.ledger(FAR).iter().map(|(legs, _, tokens, requests)| (*legs, *tokens, *requests)).collect::<Vec<_>>()
            };
            let expected = totals(&nodes[0]);
            prop_assert_eq!(expected.iter().map(|of| of.2 as usize).sum::<usize>(), open.iter().map(Vec::len).sum::<usize>());
            for node in &nodes {
                prop_assert_eq!(totals(node), expected.clone());
            }
            for (node, open) in nodes.iter_mut().zip(&open) {
                for (place, tokens, leg) in open {
                    let at = node.at(*place);
                    node.worker.prefill_ended(at, *leg, now);
                    node.worker.decode_ended(at, *tokens);
                }
            }
            settle(&mut nodes, &mut now);
            for node in &nodes {
                prop_assert!(node.is_idle());
                prop_assert_eq!(node.share.peers.len(), nodes.len() - 1);
            }
        }
    }
}
