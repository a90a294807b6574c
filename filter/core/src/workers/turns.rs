//! The waiting requests of one worker: when they give up, in which queues they are, and which other workers were woken.

use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hashbrown::HashMap;

use crate::choose::prompt::Prompt;
use crate::endpoints::candidates::Candidates;
use crate::time::Monotonic;
use crate::workers::waiting::{WaitingRequest, worker_of};

/// Time within which a woken worker must bind the request that it was woken for.
pub(super) const WAKE: Duration = Duration::from_millis(5);
/// How long a worker is passed over that did not bind the request in time.
const PASSED_OVER: Duration = Duration::from_millis(100);

/// This worker's waiting requests.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    pub(super) worker_id: u64,
    pub(super) own: BTreeMap<u64, Own>,
    /// When requests give up.
    pub(super) ends: BTreeSet<(Monotonic, u64)>,
    /// Queues in which own requests wait, by name.
    pub(super) queues: HashMap<u64, OwnQueue>,
    /// [`Table::changes`](crate::endpoints::table::Table::changes) when the requests were put into the queues.
    pub(super) changes: u64,
    /// Workers to wake.
    pub(super) wakes: BTreeSet<u64>,
    /// Whether an endpoint may have got room since the last look.
    pub(super) may_bind: bool,
    pub(super) woken: BTreeMap<u64, Woken>,
    /// Requests that wait until an endpoint is ready.
    pub(super) parked: BTreeMap<u64, ParkedRequest>,
    pub(super) parked_bytes: usize,
    /// Pools in which requests of this worker have waited: key and name.
    pub(super) pools: BTreeMap<u64, String>,
    /// Waits that the shell has not taken yet: name and tags of the histogram, and milliseconds.
    pub(super) waited: Vec<(String, u64)>,
}

#[derive(Debug)]
pub(super) struct Own {
    pub(super) prompt: Prompt,
    pub(super) model: String,
    /// Key of the pairing for whose endpoints the request waits, where shares count.
    pub(super) pairing: Option<u64>,
    pub(super) request: WaitingRequest,
    pub(super) queue: u64,
    pub(super) end: Monotonic,
    pub(super) has_deadline: bool,
}

#[derive(Debug)]
pub(super) struct ParkedRequest {
    /// [`Table::changes`](crate::endpoints::table::Table::changes) when no endpoint was found for the request.
    pub(super) changes: u64,
    pub(super) arrival: Monotonic,
    pub(super) end: Monotonic,
    pub(super) bytes: usize,
}

#[derive(Debug)]
pub(super) struct OwnQueue {
    pub(super) candidates: Arc<Candidates>,
    pub(super) requests: usize,
}

/// A worker that was woken.
#[derive(Clone, Copy, Debug)]
pub(super) struct Woken {
    id: u64,
    pub(super) since: Monotonic,
    passed_over_until: Monotonic,
}

impl Turns {
    pub(crate) fn start(&mut self, worker_id: u64) {
        self.worker_id = worker_id;
    }

    /// Has the worker put its requests into queues anew at the next turn, because the configuration or the list may have
    /// changed.
    pub(crate) fn forget_queues(&mut self) {
        self.changes = u64::MAX;
        self.may_bind = true;
    }

    pub(super) fn enter_queue(&mut self, name: u64, candidates: &Arc<Candidates>) {
        let queue =
            self.queues.entry(name).or_insert_with(|| OwnQueue { candidates: Arc::clone(candidates), requests: 0 });
        // Endpoints may have other indices since the queue began.
        queue.candidates = Arc::clone(candidates);
        queue.requests = queue.requests.saturating_add(1);
    }

    pub(super) fn leave_queue(&mut self, name: u64) {
        if let Some(queue) = self.queues.get_mut(&name) {
            queue.requests = queue.requests.saturating_sub(1);
            if queue.requests == 0 {
                self.queues.remove(&name);
            }
        }
    }

    pub(super) fn take(&mut self, id: u64) -> Option<Own> {
        let own = self.own.remove(&id)?;
        self.ends.remove(&(own.end, id));
        self.leave_queue(own.queue);
        Some(own)
    }

    /// Notes that a request of another worker should be bound now.
    pub(super) fn wake_for(&mut self, id: u64, now: Monotonic) {
        let worker = worker_of(id);
        let woken = self.woken.get(&worker).copied();
        match woken {
            Some(woken) if woken.id == id && now < woken.since.saturating_add(WAKE) => {}
            Some(woken) if woken.id == id && woken.passed_over_until == Monotonic::ZERO => {
                let passed_over_until = now.saturating_add(PASSED_OVER);
                self.woken.insert(worker, Woken { id, since: now, passed_over_until });
            }
            _ => {
                self.wakes.insert(worker);
                self.woken.insert(worker, Woken { id, since: now, passed_over_until: Monotonic::ZERO });
            }
        }
    }

    pub(super) fn is_passed_over(&self, id: u64, now: Monotonic) -> bool {
        !self.own.contains_key(&id) && self.woken.get(&worker_of(id)).is_some_and(|woken| now < woken.passed_over_until)
    }
}
