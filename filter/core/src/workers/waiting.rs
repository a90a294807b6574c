//! Requests of all workers of this Envoy that wait for a prefill endpoint with room. [Events](super::event) change them, so
//! every worker has the same requests in the same order.
//!
//! Requests that may go to the same endpoints stand in one queue. The name of the queue is a hash of these endpoints' keys,
//! so it is the same at every worker.

use std::collections::BTreeMap;

use hashbrown::HashMap;

use crate::choose::admission::pool_key;
use crate::choose::queue::{Binding, Held, PrefillEndpoint, Queue, Request, Room, Rule};
use crate::codec::{Reader, Writer};
use crate::config::{Config, Pool};
use crate::endpoints::table::Table;
use crate::time::Monotonic;

/// Most endpoints that an event names as holding a prefix; the queue counts fewer.
const MOST_HOLDERS: usize = 8;

/// What all workers know of a waiting request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct WaitingRequest {
    /// Number, unique in this Envoy, made as the number of a leg. Its upper bits are the worker's.
    pub(crate) id: u64,
    /// Key of its pool.
    pub(crate) pool: u64,
    pub(crate) arrival: Monotonic,
    pub(crate) tokens: f64,
    /// Key that prompts with a common prefix have.
    pub(crate) key: u64,
    pub(crate) priority: i32,
    /// Hash of the fairness id.
    pub(crate) fairness: u64,
    /// Bytes of its body.
    pub(crate) bytes: u64,
    pub(crate) held: HeldByKey,
}

/// Tokens of a prompt that endpoints hold, by their keys.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct HeldByKey(pub(crate) Vec<(u64, f64)>);

impl HeldByKey {
    pub(crate) fn new(held: &[Held], table: &Table) -> Self {
        let key = |held: &Held| Some((table.get(held.endpoint)?.key, held.tokens));
        Self(held.iter().filter_map(key).take(MOST_HOLDERS).collect())
    }

    fn by_index(&self, table: &Table) -> Vec<Held> {
        let index = |(key, tokens): &(u64, f64)| Some(Held { endpoint: table.index_of_key(*key)?, tokens: *tokens });
        self.0.iter().filter_map(index).collect()
    }

    pub(crate) fn write(&self, out: &mut Writer) {
        out.word(self.0.len() as u64);
        for (key, tokens) in &self.0 {
            out.word(*key);
            out.word(tokens.to_bits());
        }
    }

    pub(crate) fn read(rest: &mut Reader<'_>) -> Option<Self> {
        let count = rest.word()?;
        let pairs = (0..count).map_while(|_| Some((rest.word()?, f64::from_bits(rest.word()?))));
        Some(Self(pairs.take(MOST_HOLDERS).collect()))
    }
}

impl WaitingRequest {
    pub(crate) fn write(&self, out: &mut Writer) {
        out.word(self.id);
        out.word(self.pool);
        out.time(self.arrival);
        out.word(self.tokens.to_bits());
        out.word(self.key);
        out.word(u64::from(self.priority.cast_unsigned()));
        out.word(self.fairness);
        out.word(self.bytes);
        self.held.write(out);
    }

    pub(crate) fn read(rest: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            id: rest.word()?,
            pool: rest.word()?,
            arrival: rest.time()?,
            tokens: f64::from_bits(rest.word()?),
            key: rest.word()?,
            priority: u32::try_from(rest.word()?).ok()?.cast_signed(),
            fairness: rest.word()?,
            bytes: rest.word()?,
            held: HeldByKey::read(rest)?,
        })
    }
}

/// Requests that wait at one Envoy.
#[derive(Debug, Default)]
pub struct Waiting {
    /// By pool key.
    rules: HashMap<u64, Rule>,
    queues: BTreeMap<u64, PoolQueue>,
    /// Name of the queue in which a request is.
    queue_of: HashMap<u64, u64>,
    /// Number of waiting requests by worker id.
    workers: BTreeMap<u64, usize>,
    /// Queue and key of each request that was bound. Its endpoint may now hold a prefix of other requests with that key.
    bound: Vec<(u64, u64)>,
}

#[derive(Debug)]
struct PoolQueue {
    pool: u64,
    queue: Queue,
}

/// Most bound keys that are remembered. For further ones a worker looks up what endpoints hold at the request's turn.
const MOST_BOUND: usize = 64;

/// The worker id in a request's number.
pub(crate) fn worker_of(id: u64) -> u64 {
    id.wrapping_shr(40)
}

/// The rule of a pool.
fn rule(pool: &Pool) -> Rule {
    Rule {
        room: Room::of(&pool.queue),
        longest_wait: pool.queue.overtaken,
        // Each worker checks the limits for all workers before it adds a request.
        most_requests: usize::MAX,
        most_bytes: usize::MAX,
        ..Rule::new(pool.cost)
    }
}

impl Waiting {
    /// No requests, with the rules of a configuration.
    pub(crate) fn new(config: &Config) -> Self {
        let rules = config.policies().map(|(name, pool)| (pool_key(name), rule(pool))).collect();
        Self { rules, ..Self::default() }
    }

    /// Puts a request into the queue with that name, and removes it from any other queue.
    pub(crate) fn push(&mut self, name: u64, request: &WaitingRequest, table: &Table) {
        self.remove(request.id);
        let default_rule = || self.rules.get(&pool_key("default")).copied();
        let Some(rule) = self.rules.get(&request.pool).copied().or_else(default_rule) else { return };
        let queue =
            self.queues.entry(name).or_insert_with(|| PoolQueue { pool: request.pool, queue: Queue::new(rule) });
        let WaitingRequest { id, arrival, tokens, key, priority, fairness, bytes, ref held, .. } = *request;
        let entry = Request {
            id,
            arrival: arrival.since_zero(),
            tokens,
            key,
            priority,
            fairness,
            deadline: None,
            bytes: usize::try_from(bytes).unwrap_or(usize::MAX),
        };
        if queue.queue.push(entry, &held.by_index(table)).is_ok() {
            self.queue_of.insert(id, name);
            let count = self.workers.entry(worker_of(id)).or_default();
            *count = count.saturating_add(1);
        }
    }

    /// Replaces what endpoints hold of a request's prompt.
    pub(crate) fn set_held(&mut self, id: u64, held: &HeldByKey, table: &Table) {
        if let Some(queue) = self.queue_with(id) {
            queue.set_held(id, &held.by_index(table));
        }
    }

    /// Removes a request. An unknown id changes nothing.
    pub(crate) fn remove(&mut self, id: u64) {
        self.take_out(id, |queue| queue.remove(id));
    }

    /// Removes a request that an endpoint got, which needs so many seconds for it.
    pub(crate) fn bind(&mut self, id: u64, seconds: f64) {
        let Some(name) = self.queue_of.get(&id).copied() else { return };
        if let Some(request) = self.take_out(id, |queue| queue.bind(id, seconds))
            && self.bound.len() < MOST_BOUND
            && !self.bound.contains(&(name, request.key))
        {
            self.bound.push((name, request.key));
        }
    }

    fn take_out(&mut self, id: u64, out: impl FnOnce(&mut Queue) -> Option<Request>) -> Option<Request> {
        let name = self.queue_of.remove(&id)?;
        let queue = &mut self.queues.get_mut(&name)?.queue;
        let request = out(queue);
        if queue.is_empty() {
            self.queues.remove(&name);
        }
        if let Some(count) = self.workers.get_mut(&worker_of(id)) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.workers.remove(&worker_of(id));
            }
        }
        request
    }

    fn queue_with(&mut self, id: u64) -> Option<&mut Queue> {
        Some(&mut self.queues.get_mut(self.queue_of.get(&id)?)?.queue)
    }

    /// Whether no request waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queue_of.is_empty()
    }

    /// Number of waiting requests.
    #[must_use]
    pub fn len(&self) -> usize {
        self.queue_of.len()
    }

    /// Number, bytes and seconds of work of the waiting requests of the pool with that key.
    #[must_use]
    pub fn of_pool(&self, pool: u64) -> (usize, usize, f64) {
        let queues = self.queues.values().filter(|queue| queue.pool == pool);
        queues.fold((0, 0, 0.0), |(requests, bytes, seconds), PoolQueue { queue, .. }| {
            let seconds = seconds + queue.seconds(i32::MIN);
            (requests.saturating_add(queue.len()), bytes.saturating_add(queue.bytes()), seconds)
        })
    }

    /// Arrival of the oldest waiting request of the pool with that key; `None` where none waits.
    #[must_use]
    pub fn oldest(&self, pool: u64) -> Option<Monotonic> {
        let queues = self.queues.values().filter(|queue| queue.pool == pool);
        queues.filter_map(|queue| queue.queue.oldest()).min().map(Monotonic::new)
    }

    /// Ids of the workers that have waiting requests.
    pub(crate) fn workers(&self) -> impl Iterator<Item = u64> {
        self.workers.keys().copied()
    }

    /// The queue of that name; `None` where it is empty.
    pub(crate) fn queue(&self, name: u64) -> Option<&Queue> {
        self.queues.get(&name).map(|queue| &queue.queue)
    }

    /// The next binding in a queue; see [`Queue::next_without`].
    pub(crate) fn next(
        &self,
        name: u64,
        endpoints: &[PrefillEndpoint],
        now: Monotonic,
        passed_over: &dyn Fn(u64) -> bool,
    ) -> Option<Binding> {
        self.queue(name)?.next_without(endpoints, now.since_zero(), passed_over)
    }

    /// What endpoints hold of a request, as the queue counts it.
    pub(crate) fn held(&self, id: u64) -> Option<&[Held]> {
        Some(self.queues.get(self.queue_of.get(&id)?)?.queue.held(id))
    }

    /// Takes the queues and keys of the requests that were bound.
    pub(crate) fn take_bound(&mut self) -> Vec<(u64, u64)> {
        core::mem::take(&mut self.bound)
    }
}
