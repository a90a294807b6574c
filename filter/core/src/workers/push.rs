//! The push: how the endpoint list reaches every worker of an Envoy.
//!
//! One worker, the leader, holds a lease in shared data and keeps one long poll at `pd-control` open. It applies the list
//! that it receives, writes it to shared data and announces it by a counter that all workers see. Every worker reads the
//! counter before each decision (90 ns), and the list when the counter has moved. So a change is in force for the next
//! request on any worker.

use core::time::Duration;

use crate::config::Control;
use crate::endpoints::table::Applied;
use crate::metrics::{Level, Metric};
use crate::time::Monotonic;
use crate::wire::{Snapshot, WATCH_PATH, WireError};
use crate::workers::shared::{ABSENT, Shared};
use crate::workers::worker::Worker;

/// Time between two calls of [`Push::tick`]: a fifth of a lease.
pub const TICK: Duration = Duration::from_millis(200);
/// How long a lease lasts without renewal: five ticks, so that another worker replaces a dead leader within two seconds.
const LEASE: Duration = Duration::from_millis(1_000);
/// Pause after a failed poll. Each further failure doubles it, up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause between polls: the leader finds a restarted `pd-control` within it.
const MAX_PAUSE: Duration = Duration::from_secs(1);
/// Time limit of a poll beyond the time for which `pd-control` may hold it.
const GRACE: Duration = Duration::from_secs(5);

/// Keys of the lease, of the list and of the number of workers so far. Workers of two releases share them.
const LEASE_KEY: &str = "pd/lease";
const LIST_KEY: &str = "pd/list";
const WORKERS_KEY: &str = "pd/workers";

/// A long poll to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Poll {
    /// Envoy cluster of `pd-control`.
    pub cluster: String,
    /// `:authority`.
    pub authority: String,
    /// `:path`.
    pub path: String,
    /// Time limit.
    pub timeout: Duration,
}

/// What an operator should know of the push.
#[derive(Clone, Debug, PartialEq)]
pub enum News {
    /// A new list is in force.
    Applied,
    /// The worker refused a list; the last good one stays in force.
    Refused(WireError),
    /// `pd-control` sent an empty list; the last good one stays in force.
    Empty,
    /// `pd-control` does not answer. Reported once, until it answers again.
    Lost,
    /// `pd-control` answers again.
    Found,
}

/// The push at one worker.
#[derive(Debug, Default)]
pub struct Push {
    id: u64,
    control: Option<Control>,
    /// Announcements that the worker has seen; `None` before its first look.
    seen: Option<u64>,
    /// Epoch and version of the list in the last answer. The next poll asks for the changes since.
    list: (String, u64),
    polling: bool,
    holds_lease: bool,
    failures: u32,
    next_poll: Monotonic,
    last_answer: Monotonic,
}

impl Push {
    /// Starts over with a configuration's `control`. With `None` the worker sends no polls and takes no lists. The first
    /// call gives the worker its id.
    pub fn configure(&mut self, control: Option<Control>, shared: &impl Shared, now: Monotonic) {
        let id = if self.id == 0 { next_worker_id(shared) } else { self.id };
        let polling = self.polling;
        *self = Self { id, control, polling, last_answer: now, ..Self::default() };
    }

    /// Number of this worker among all workers that this Envoy has had, from 1 on; 0 before the first
    /// [`configure`](Self::configure).
    #[must_use]
    pub fn worker_id(&self) -> u64 {
        self.id
    }

    /// Whether this worker is the leader, by the last [`tick`](Self::tick).
    #[must_use]
    pub fn holds_lease(&self) -> bool {
        self.holds_lease
    }

    /// Applies the list that another worker announced; `None` where there is nothing new. `announced` is
    /// [`Shared::announced`]. Call it before every decision.
    pub fn catch_up(&mut self, worker: &mut Worker, shared: &impl Shared, announced: u64) -> Option<News> {
        if self.control.is_none() || self.seen == Some(announced) {
            return None;
        }
        self.seen = Some(announced);
        let (listed, _) = shared.get(LIST_KEY)?;
        match worker.apply(&listed) {
            Ok(Applied::Changed) => Some(News::Applied),
            Ok(_) => None,
            Err(error) => Some(News::Refused(error)),
        }
    }

    /// Takes or renews the lease. Returns the poll that the shell should start, if this worker is the leader and no poll is
    /// open. Call it every [`TICK`].
    pub fn tick(&mut self, shared: &impl Shared, now: Monotonic) -> Option<Poll> {
        self.holds_lease = self.control.is_some() && self.take_lease(shared, now);
        self.next_poll(now)
    }

    /// Levels to set at a tick. Only the leader sets [`Level::ListAgeMs`].
    #[must_use]
    pub fn levels(&self, worker: &Worker, now: Monotonic) -> Vec<(Level, u64)> {
        let mut levels = vec![
            (Level::Endpoints, worker.state.table.len() as u64),
            (Level::ListVersion, worker.state.table.version().1),
        ];
        if self.holds_lease {
            let age = now.saturating_sub(self.last_answer).as_millis();
            levels.push((Level::ListAgeMs, u64::try_from(age).unwrap_or(u64::MAX)));
        }
        levels
    }

    /// The host could not start the poll.
    pub fn not_started(&mut self, worker: &mut Worker, now: Monotonic) -> Option<News> {
        self.polling = false;
        self.failed(worker, now)
    }

    /// Takes the end of a poll; `status` is `None` where no answer came. Returns the next poll, to start at once, where one
    /// is due.
    pub fn answered(
        &mut self,
        worker: &mut Worker,
        shared: &impl Shared,
        status: Option<u16>,
        body: &[u8],
        now: Monotonic,
    ) -> (Option<Poll>, Option<News>) {
        self.polling = false;
        let news = match status {
            Some(200) => self.take_list(worker, shared, body, now),
            Some(304) => {
                worker.counts.count(Metric::Polls304);
                self.succeeded(now)
            }
            _ => self.failed(worker, now),
        };
        (self.next_poll(now), news)
    }

    fn take_list(&mut self, worker: &mut Worker, shared: &impl Shared, body: &[u8], now: Monotonic) -> Option<News> {
        let applied = worker.apply(body);
        let found = match &applied {
            Ok(_) => {
                worker.counts.count(Metric::Polls200);
                self.succeeded(now)
            }
            Err(_) => {
                self.failed(worker, now);
                None
            }
        };
        match applied {
            Ok(Applied::Changed) => {
                let (epoch, version) = worker.state.table.version();
                self.list = (epoch.to_owned(), version);
                shared.set(LIST_KEY, &worker.state.table.snapshot().to_json(), None);
                shared.announce();
                self.seen = Some(shared.announced());
                Some(News::Applied)
            }
            Ok(Applied::Empty) => {
                // A poll from the same version would get the same empty list at once, again and again.
                self.list = Snapshot::parse(body).map(|empty| (empty.epoch, empty.version)).unwrap_or_default();
                Some(News::Empty)
            }
            Ok(Applied::OutOfStep) => {
                self.list = Default::default();
                self.next_poll = now.saturating_add(FIRST_PAUSE);
                found
            }
            Ok(Applied::Unchanged) => {
                let (epoch, version) = worker.state.table.version();
                self.list = (epoch.to_owned(), version);
                self.next_poll = now.saturating_add(FIRST_PAUSE);
                found
            }
            Err(error) => Some(News::Refused(error)),
        }
    }

    fn succeeded(&mut self, now: Monotonic) -> Option<News> {
        let found = (self.failures > 0).then_some(News::Found);
        self.failures = 0;
        self.last_answer = now;
        found
    }

    fn failed(&mut self, worker: &mut Worker, now: Monotonic) -> Option<News> {
        worker.counts.count(Metric::PollsFailed);
        let pause = FIRST_PAUSE.saturating_mul(1_u32.checked_shl(self.failures.min(8)).unwrap_or(1)).min(MAX_PAUSE);
        self.next_poll = now.saturating_add(pause);
        self.failures = self.failures.saturating_add(1);
        (self.failures == 1).then_some(News::Lost)
    }

    fn next_poll(&mut self, now: Monotonic) -> Option<Poll> {
        let control = self.control.as_ref().filter(|_| self.holds_lease && !self.polling && now >= self.next_poll)?;
        self.polling = true;
        let (epoch, version) = &self.list;
        // Other characters would need escapes. Without them the epoch is unknown, and the answer is the whole list.
        let plain = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let epoch: String = epoch.chars().filter(plain).collect();
        Some(Poll {
            cluster: control.cluster.clone(),
            authority: control.authority.clone(),
            path: format!("{WATCH_PATH}?epoch={epoch}&since={version}&wait_ms={}", control.wait.as_millis()),
            timeout: control.wait.saturating_add(GRACE),
        })
    }

    /// Takes or renews the lease; returns whether this worker holds it. A younger worker with another `control` takes the lease
    /// from an older worker, because the older one drains.
    fn take_lease(&self, shared: &impl Shared, now: Monotonic) -> bool {
        let until = now.saturating_add(LEASE);
        let current = shared.get(LEASE_KEY);
        let lease = current.as_ref().and_then(|(bytes, _)| Lease::from_bytes(bytes));
        let terms = self.terms();
        let free = match lease {
            None => true,
            Some(lease) => {
                lease.owner == self.id || lease.until <= now || (lease.terms != terms && lease.owner < self.id)
            }
        };
        let mine = Lease { owner: self.id, until, terms };
        free && shared.set(LEASE_KEY, &mine.to_bytes(), Some(current.map_or(ABSENT, |(_, version)| version)))
    }

    /// Hash of the cluster and the authority of `pd-control`. Workers that poll the same one have the same hash.
    fn terms(&self) -> u64 {
        let control = self.control.as_ref().map(|control| format!("{}\n{}", control.cluster, control.authority));
        xxhash_rust::xxh3::xxh3_64(control.unwrap_or_default().as_bytes())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lease {
    owner: u64,
    until: Monotonic,
    terms: u64,
}

impl Lease {
    fn to_bytes(self) -> Vec<u8> {
        let until = self.until.as_millis();
        [self.owner, until, self.terms].iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let word =
            |offset: usize| Some(u64::from_le_bytes(bytes.get(offset..offset.checked_add(8)?)?.try_into().ok()?));
        Some(Self { owner: word(0)?, until: Monotonic::from_millis(word(8)?), terms: word(16)? })
    }
}

/// The next worker id, counted in shared data. If 64 writes in a row fail, the id is 1: two workers may then hold one
/// lease, and `pd-control` gets a second poll.
fn next_worker_id(shared: &impl Shared) -> u64 {
    for _ in 0..64 {
        let current = shared.get(WORKERS_KEY);
        let count = current.as_ref().and_then(|(bytes, _)| Some(u64::from_le_bytes(bytes.as_slice().try_into().ok()?)));
        let id = count.unwrap_or(0).wrapping_add(1).max(1);
        if shared.set(WORKERS_KEY, &id.to_le_bytes(), Some(current.map_or(ABSENT, |(_, version)| version))) {
            return id;
        }
    }
    1
}

#[cfg(test)]
mod tests;
