//! What the workers of one Envoy process share: data, queues, metrics.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Status;

/// A metric's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MetricKind {
    /// Only grows.
    Counter,
    /// Set, raised and lowered.
    Gauge,
    /// Samples; cannot be read back by the module.
    Histogram,
}

/// The process-wide state behind all workers. Its methods are also the test's own view of it.
#[derive(Debug, Default)]
pub struct SharedStore {
    data: Mutex<Data>,
    queues: Mutex<Queues>,
    metrics: Mutex<BTreeMap<(MetricKind, String), Arc<Metric>>>,
    next_worker: AtomicU32,
}

/// Values with their compare-and-swap tokens.
type Keys = BTreeMap<Vec<u8>, (Vec<u8>, u32)>;

#[derive(Debug, Default)]
struct Data {
    by_vm: HashMap<String, Keys>,
    last_cas: u32,
}

#[derive(Debug, Default)]
struct Queues {
    tokens: HashMap<(String, Vec<u8>), u32>,
    queues: HashMap<u32, Queue>,
    last_token: u32,
    /// Posted to the owner's thread, not yet run.
    posted: VecDeque<Posted>,
}

#[derive(Debug)]
struct Queue {
    owner: (u32, u32),
    items: VecDeque<Vec<u8>>,
}

#[derive(Clone, Copy, Debug)]
struct Posted {
    worker: u32,
    context: u32,
    token: u32,
}

#[derive(Debug, Default)]
pub(crate) struct Metric {
    value: AtomicU64,
    samples: Mutex<Vec<u64>>,
}

impl SharedStore {
    /// An empty store.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Value and compare-and-swap token of a key.
    pub fn get(&self, vm_id: &str, key: &[u8]) -> Option<(Vec<u8>, u32)> {
        lock(&self.data).by_vm.get(vm_id)?.get(key).cloned()
    }

    /// Writes a key. `cas` 0 writes always; another value must be the key's token, unless the key is absent: then Envoy
    /// ignores it.
    pub fn set(&self, vm_id: &str, key: &[u8], value: &[u8], cas: u32) -> Status {
        let mut data = lock(&self.data);
        let next = data.last_cas.wrapping_add(1).max(1);
        let keys = data.by_vm.entry(vm_id.to_owned()).or_default();
        match keys.get_mut(key) {
            Some((_, current)) if cas != 0 && cas != *current => return Status::CasMismatch,
            Some(entry) => *entry = (value.to_vec(), next),
            None => drop(keys.insert(key.to_vec(), (value.to_vec(), next))),
        }
        data.last_cas = next;
        Status::Ok
    }

    /// All keys of a VM id, sorted.
    pub fn keys(&self, vm_id: &str) -> Vec<Vec<u8>> {
        lock(&self.data).by_vm.get(vm_id).map(|keys| keys.keys().cloned().collect()).unwrap_or_default()
    }

    /// Bytes of all keys and values of a VM id.
    pub fn bytes(&self, vm_id: &str) -> usize {
        let data = lock(&self.data);
        data.by_vm.get(vm_id).map_or(0, |keys| keys.iter().map(|(k, (v, _))| k.len() + v.len()).sum())
    }

    /// Value of a counter, 0 if nobody defined it.
    pub fn counter(&self, name: &str) -> u64 {
        self.value(MetricKind::Counter, name)
    }

    /// Value of a gauge, 0 if nobody defined it.
    pub fn gauge(&self, name: &str) -> u64 {
        self.value(MetricKind::Gauge, name)
    }

    /// Samples of a histogram in order.
    pub fn histogram(&self, name: &str) -> Vec<u64> {
        let metric = lock(&self.metrics).get(&(MetricKind::Histogram, name.to_owned())).cloned();
        metric.map(|m| lock(&m.samples).clone()).unwrap_or_default()
    }

    /// Every metric with its value (for a histogram: how many samples), sorted.
    pub fn metrics(&self) -> Vec<(MetricKind, String, u64)> {
        let metrics = lock(&self.metrics);
        metrics.iter().map(|((kind, name), m)| (*kind, name.clone(), m.read(*kind))).collect()
    }

    /// Adds a worker to the process.
    pub(crate) fn join(&self) -> u32 {
        self.next_worker.fetch_add(1, Ordering::SeqCst)
    }

    pub(crate) fn metric(&self, kind: MetricKind, name: &str) -> Arc<Metric> {
        lock(&self.metrics).entry((kind, name.to_owned())).or_default().clone()
    }

    /// The host notifies the last worker that registered a queue of the queue's items.
    pub(crate) fn register_queue(&self, vm_id: &str, name: &[u8], owner: (u32, u32)) -> u32 {
        let mut state = lock(&self.queues);
        let next = state.last_token + 1;
        let token = *state.tokens.entry((vm_id.to_owned(), name.to_vec())).or_insert(next);
        state.last_token = state.last_token.max(token);
        state.queues.entry(token).or_insert_with(|| Queue { owner, items: VecDeque::new() }).owner = owner;
        token
    }

    pub(crate) fn resolve_queue(&self, vm_id: &str, name: &[u8]) -> Option<u32> {
        lock(&self.queues).tokens.get(&(vm_id.to_owned(), name.to_vec())).copied()
    }

    pub(crate) fn enqueue(&self, token: u32, value: &[u8]) -> Status {
        let mut state = lock(&self.queues);
        let Some(queue) = state.queues.get_mut(&token) else { return Status::NotFound };
        queue.items.push_back(value.to_vec());
        let (worker, context) = queue.owner;
        state.posted.push_back(Posted { worker, context, token });
        Status::Ok
    }

    pub(crate) fn dequeue(&self, token: u32) -> Result<Vec<u8>, Status> {
        let mut state = lock(&self.queues);
        let queue = state.queues.get_mut(&token).ok_or(Status::NotFound)?;
        queue.items.pop_front().ok_or(Status::Empty)
    }

    /// Takes what was posted to a worker's thread: context and queue token.
    pub(crate) fn take_posted(&self, worker: u32) -> Vec<(u32, u32)> {
        let mut state = lock(&self.queues);
        let (mine, rest) = state.posted.drain(..).partition::<Vec<_>, _>(|p| p.worker == worker);
        state.posted = rest.into();
        mine.into_iter().map(|p| (p.context, p.token)).collect()
    }

    fn value(&self, kind: MetricKind, name: &str) -> u64 {
        lock(&self.metrics).get(&(kind, name.to_owned())).map_or(0, |m| m.get())
    }
}

impl Metric {
    pub(crate) fn get(&self) -> u64 {
        self.value.load(Ordering::SeqCst)
    }

    pub(crate) fn set(&self, value: u64) {
        self.value.store(value, Ordering::SeqCst);
    }

    pub(crate) fn add(&self, by: u64) {
        self.value.fetch_add(by, Ordering::SeqCst);
    }

    /// Returns whether the gauge fell below zero; Envoy lets it wrap.
    pub(crate) fn sub(&self, by: u64) -> bool {
        self.value.fetch_sub(by, Ordering::SeqCst) < by
    }

    pub(crate) fn sample(&self, value: u64) {
        lock(&self.samples).push(value);
    }

    fn read(&self, kind: MetricKind) -> u64 {
        match kind {
            MetricKind::Histogram => lock(&self.samples).len() as u64,
            MetricKind::Counter | MetricKind::Gauge => self.get(),
        }
    }
}

/// A panic in another test thread leaves plain data behind, so poisoning says nothing here.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cas_is_checked_only_on_present_keys() {
        let store = SharedStore::new();
        assert_eq!(store.set("vm", b"k", b"1", 77), Status::Ok);
        let (_, cas) = store.get("vm", b"k").unwrap();
        assert_eq!(store.set("vm", b"k", b"2", cas + 1), Status::CasMismatch);
        assert_eq!(store.set("vm", b"k", b"2", cas), Status::Ok);
        assert_eq!(store.set("vm", b"k", b"3", cas), Status::CasMismatch);
        assert_eq!(store.set("vm", b"k", b"4", 0), Status::Ok);
        assert_eq!(store.get("other", b"k"), None);
    }

    #[test]
    fn queue_items_go_to_the_last_registrar() {
        let store = SharedStore::new();
        let token = store.register_queue("vm", b"q", (0, 1));
        assert_eq!(store.register_queue("vm", b"q", (1, 1)), token);
        assert_eq!(store.enqueue(token, b"x"), Status::Ok);
        assert!(store.take_posted(0).is_empty());
        assert_eq!(store.take_posted(1), [(1, token)]);
        assert_eq!(store.dequeue(token), Ok(b"x".to_vec()));
        assert_eq!(store.dequeue(token), Err(Status::Empty));
        assert_eq!(store.dequeue(99), Err(Status::NotFound));
    }
}
