//! Binding: when an endpoint has room for one of this worker's waiting requests, and which request that is.
//!
//! Every worker has the same [waiting requests](super::waiting), and each worker binds only its own. A worker that sees room
//! for a request of another worker wakes that worker. If the other worker does not bind the request soon, its requests are
//! passed over for a while: that worker may be gone, or may know of events that this one has not read.

use core::time::Duration;
use std::sync::Arc;

use crate::choose::admission::pool_key;
use crate::choose::queue::{Binding, Held, PrefillEndpoint, Room};
use crate::choose::room::DecodeRoom;
use crate::choose::scheduler::Scheduler;
use crate::endpoints::candidates::Candidates;
use crate::metrics::{WAIT_BY_POOL, WAITING_GAUGES, tag_value};
use crate::prefix::index::EndpointIndex;
use crate::time::Monotonic;
use crate::workers::event::Event;
use crate::workers::turns::WAKE;
use crate::workers::waiting::HeldByKey;
use crate::workers::worker::Worker;

/// Least time to the next look at the endpoints: the shortest tick of the host.
const LEAST_PAUSE: Duration = Duration::from_millis(1);
/// Most requests for which the worker looks up again what endpoints hold, after a request with the same prefix was bound.
const REFRESHED: usize = 128;

/// The turn of a waiting request of this worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// The request's number.
    pub id: u64,
    /// What the request does.
    pub act: Act,
}

/// What a waiting request does at its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// The request goes to this endpoint, which has room for it.
    Bind(EndpointIndex),
    /// The endpoints for which the request waited are gone: it is scheduled as if it had just come.
    Reschedule,
    /// The request has waited as long as it may.
    GiveUp,
    /// No endpoint can compute the prompt by the client's deadline any more.
    MissDeadline,
}

/// Name of the queue for these endpoints, which are sorted by key.
pub(super) fn queue_name(worker: &Worker, candidates: &Candidates) -> u64 {
    let keys = candidates.prefill.iter().filter_map(|index| worker.state.table.get(*index));
    let bytes: Vec<u8> = keys.flat_map(|state| state.key.to_le_bytes()).collect();
    xxhash_rust::xxh3::xxh3_64(&bytes)
}

/// What the shell calls.
impl Worker {
    /// Whether requests of this worker wait.
    #[must_use]
    pub fn has_waiting(&self) -> bool {
        !self.turns.own.is_empty() || !self.turns.parked.is_empty()
    }

    /// The next turn of one of this worker's requests; `None` where none has its turn.
    ///
    /// The caller passes the turn to the request. Where it has no such request, it calls
    /// [`forget_waiting`](Self::forget_waiting).
    pub fn next_turn(&mut self, now: Monotonic) -> Option<Turn> {
        if !self.has_waiting() {
            return None;
        }
        let changes = self.state.table.changes();
        if let Some((id, _)) = self.turns.parked.iter().find(|(_, parked)| parked.changes != changes) {
            return Some(Turn { id: *id, act: Act::Reschedule });
        }
        if let Some(id) = self.file_anew() {
            return Some(Turn { id, act: Act::Reschedule });
        }
        if let Some((_, id)) = self.turns.ends.first().copied().filter(|(end, _)| *end <= now) {
            let has_deadline = self.turns.own.get(&id).is_some_and(|own| own.has_deadline);
            return Some(Turn { id, act: if has_deadline { Act::MissDeadline } else { Act::GiveUp } });
        }
        let names: Vec<u64> = self.turns.queues.keys().copied().collect();
        names.into_iter().find_map(|name| {
            let binding = self.next_own(name, now)?;
            Some(Turn { id: binding.id, act: Act::Bind(binding.endpoint) })
        })
    }

    /// Drops a waiting request whose stream is gone. An unknown id changes nothing.
    pub fn forget_waiting(&mut self, id: u64) {
        self.unpark(id);
        self.stop_waiting(id);
    }

    /// Numbers of the workers to wake, this one included; each is returned once. Call it after every event. A woken worker
    /// asks for its [turns](Self::next_turn).
    pub fn workers_to_wake(&mut self) -> impl Iterator<Item = u64> {
        if core::mem::take(&mut self.turns.may_bind) {
            if self.has_waiting() {
                self.turns.wakes.insert(self.turns.worker_id);
            } else {
                self.turns.wakes.extend(self.state.waiting.workers());
            }
        }
        if self.state.waiting.is_empty() {
            self.turns.woken.clear();
        }
        core::mem::take(&mut self.turns.wakes).into_iter()
    }

    /// The [gauges](WAITING_GAUGES) of the pools in which requests of this worker have waited: each gauge's name with the
    /// pool as a tag, and its value.
    pub(crate) fn waiting_gauges(&self) -> impl Iterator<Item = (String, u64)> {
        self.turns.pools.iter().flat_map(|(key, name)| {
            let (requests, _, seconds) = self.state.waiting.of_pool(*key);
            let values = [requests as u64, (seconds * 1e3) as u64];
            let tag = tag_value(name);
            WAITING_GAUGES.into_iter().zip(values).map(move |(gauge, value)| (format!("{gauge};pool={tag}"), value))
        })
    }

    /// Notes for how long a request of a pool waited.
    pub(crate) fn record_wait(&mut self, pool: &str, ms: u64) {
        self.turns.waited.push((format!("{WAIT_BY_POOL};pool={}", tag_value(pool)), ms));
    }

    /// Times that requests have waited since the last call, in milliseconds, each with the name and the tags of its
    /// histogram.
    pub fn take_waits(&mut self) -> Vec<(String, u64)> {
        core::mem::take(&mut self.turns.waited)
    }

    /// Time until an endpoint has room for one of this worker's requests, by the ledger, or until one of them gives up; at
    /// least 1 ms. `None` where no request of this worker waits.
    #[must_use]
    pub fn next_look(&self, now: Monotonic) -> Option<Duration> {
        let (end, _) = self.turns.ends.first()?;
        let mut next = end.saturating_sub(now);
        for (name, queue) in &self.turns.queues {
            let (room, endpoints) = self.room_and_endpoints(*name, &queue.candidates, now);
            // The worker has looked at the endpoints with room already.
            let busy = endpoints.into_iter().filter(|endpoint| endpoint.work() >= room.lead);
            next = busy.map(|endpoint| duration(room.seconds_until(&endpoint))).fold(next, Duration::min);
        }
        let woken = self.turns.woken.values().map(|woken| woken.since.saturating_add(WAKE));
        let woken = woken.filter(|end| *end > now).map(|end| end.saturating_sub(now));
        Some(woken.fold(next, Duration::min).max(LEAST_PAUSE))
    }
}

impl Worker {
    /// When endpoints have room in a queue, and its endpoints.
    fn room_and_endpoints(&self, name: u64, candidates: &Candidates, now: Monotonic) -> (Room, Vec<PrefillEndpoint>) {
        let Ok(config) = &self.config else { return (Room { lead: 0.0, batch_tokens: 0.0 }, Vec::new()) };
        let pool = config.pool(&candidates.pool);
        let oldest = self.state.waiting.queue(name).and_then(|queue| queue.oldest());
        let waited = oldest.map_or(Duration::ZERO, |arrival| now.since_zero().saturating_sub(arrival));
        let scheduler = Scheduler { table: &self.state.table, index: &self.state.index, pool, now };
        (Room::of(&pool.queue), scheduler.prefill_endpoints(&candidates.prefill, waited))
    }

    /// Room for KV caches at the decode endpoints.
    fn decode_room(&self, candidates: &Candidates, now: Monotonic) -> DecodeRoom {
        let Ok(config) = &self.config else { return DecodeRoom::default() };
        let pool = config.pool(&candidates.pool);
        let scheduler = Scheduler { table: &self.state.table, index: &self.state.index, pool, now };
        scheduler.decode_room(&candidates.decode, &candidates.prefill)
    }

    /// Whether the decode endpoints have room for the oldest request, if that has waited for so long that no other may
    /// overtake it. Otherwise smaller requests could take the room for ever.
    fn has_room_for_oldest(&self, name: u64, room: DecodeRoom, now: Monotonic) -> bool {
        let Some(queue) = self.state.waiting.queue(name) else { return true };
        let overdue = queue.overdue(now.since_zero()).and_then(|id| queue.get(id));
        overdue.is_none_or(|request| room.fits(request.tokens))
    }

    /// The next binding in a queue that is of a request of this worker. Where requests of other workers come first, those
    /// workers are noted for a wake.
    pub(super) fn next_own(&mut self, name: u64, now: Monotonic) -> Option<Binding> {
        self.refresh();
        let candidates = Arc::clone(&self.turns.queues.get(&name)?.candidates);
        let (room, mut endpoints) = self.room_and_endpoints(name, &candidates, now);
        let decode_room = self.decode_room(&candidates, now);
        if !self.has_room_for_oldest(name, decode_room, now) {
            return None;
        }
        loop {
            let turns = &self.turns;
            let tokens =
                |id| self.state.waiting.queue(name).and_then(|queue| queue.get(id)).map(|request| request.tokens);
            let fits = |id| tokens(id).is_none_or(|tokens| decode_room.fits(tokens));
            let passed_over = |id| turns.is_passed_over(id, now) || !fits(id);
            let binding = self.state.waiting.next(name, &endpoints, now, &passed_over)?;
            if self.turns.own.contains_key(&binding.id) {
                if self.find_held(binding.id) {
                    continue;
                }
                return Some(binding);
            }
            self.turns.wake_for(binding.id, now);
            if self.turns.is_passed_over(binding.id, now) {
                continue;
            }
            // The endpoint is for the request of the other worker.
            if let Some(endpoint) = endpoints.iter_mut().find(|endpoint| endpoint.index == binding.endpoint) {
                endpoint.take_room(&room);
            }
        }
    }

    /// Looks up again how much of their prompts the endpoints hold, for the waiting requests that share a prefix with a
    /// bound request.
    fn refresh(&mut self) {
        for (name, key) in self.state.waiting.take_bound() {
            let Some(queue) = self.state.waiting.queue(name) else { continue };
            let own: Vec<u64> =
                queue.sharing(key).filter(|id| self.turns.own.contains_key(id)).take(REFRESHED).collect();
            for id in own {
                self.find_held(id);
            }
        }
    }

    /// Looks up what endpoints hold of one of this worker's requests. Returns whether that has changed.
    fn find_held(&mut self, id: u64) -> bool {
        let Ok(config) = &self.config else { return false };
        let Some(own) = self.turns.own.get(&id) else { return false };
        let Some(queue) = self.turns.queues.get(&own.queue) else { return false };
        let pool = config.pool(&queue.candidates.pool);
        let scheduler = Scheduler { table: &self.state.table, index: &self.state.index, pool, now: Monotonic::ZERO };
        let held = scheduler.held(&queue.candidates.prefill, &own.prompt);
        let before = self.state.waiting.held(id).map(<[Held]>::to_vec);
        let held = HeldByKey::new(&held, &self.state.table);
        self.state.waiting.set_held(id, &held, &self.state.table);
        let has_changed = self.state.waiting.held(id).map(<[Held]>::to_vec) != before;
        if has_changed {
            let name = own.queue;
            if let Some(own) = self.turns.own.get_mut(&id) {
                own.request.held.clone_from(&held);
            }
            self.pending.push(name, &Event::HeldChanged { id, held: std::borrow::Cow::Owned(held) });
        }
        has_changed
    }

    /// After a change of the list or of the configuration, puts this worker's requests into the queues of the new
    /// candidates. Returns the id of a request that has no candidates any more.
    fn file_anew(&mut self) -> Option<u64> {
        let changes = self.state.table.changes();
        if self.turns.changes == changes {
            return None;
        }
        let ids: Vec<u64> = self.turns.own.keys().copied().collect();
        for id in ids {
            let Some(own) = self.turns.own.get(&id) else { continue };
            let candidates = self.state.table.candidates(&own.model).ok();
            let candidates = candidates.map(|all| self.state.table.with_room(all, own.prompt.tokens));
            let suited =
                candidates.filter(|candidates| !candidates.prefill.is_empty() && !candidates.decode.is_empty());
            let suited = suited.and_then(|all| match own.pairing {
                Some(key) => all.of_pairing(key),
                None => all.pairings.is_empty().then_some(all),
            });
            let Some(candidates) = suited else { return Some(id) };
            let name = queue_name(self, &candidates);
            let (before, mut request) = (own.queue, own.request.clone());
            self.turns.leave_queue(before);
            self.turns.enter_queue(name, &candidates);
            request.pool = pool_key(&candidates.pool);
            if let Some(own) = self.turns.own.get_mut(&id) {
                own.queue = name;
                own.request = request.clone();
            }
            if name != before || self.state.waiting.held(id).is_none() {
                self.happens_at(name, &Event::Waits { request: std::borrow::Cow::Owned(request) });
            }
            self.find_held(id);
        }
        self.turns.changes = changes;
        None
    }
}

/// The length of so many seconds. Negative seconds are 0; too many are the longest length.
pub(super) fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests;
