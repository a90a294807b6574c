//! What the server did, counted, so that a test can prove it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

/// `GET /stats`. Counters run since the start or the last reset; the gauges say so.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Role of the server.
    pub role: String,
    /// Requests on every path but the simulator's own.
    pub requests: u64,
    /// The same by path; unknown ones are `other`.
    pub by_path: BTreeMap<String, u64>,
    /// Answers by status, on the same paths.
    pub by_status: BTreeMap<String, u64>,
    /// Requests with `do_remote_decode`.
    pub prefill_legs: u64,
    /// Prompts whose KV came from another server and was the right one.
    pub decode_legs: u64,
    /// Prompts computed for a request that was no prefill leg.
    pub local_prefills: u64,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Prompt tokens found in the own cache.
    pub cached_tokens: u64,
    /// Prompt tokens computed here.
    pub computed_tokens: u64,
    /// Prompt tokens whose KV came from another server.
    pub external_tokens: u64,
    /// Tokens generated, prefill legs' included.
    pub generated_tokens: u64,
    /// Answers with wrong text: 200, as a real server would.
    pub wrong_text: u64,
    /// The same by reason: `reused`, `expired`, `unknown` (never issued, or altered), `other_prompt`.
    pub wrong_text_by: BTreeMap<String, u64>,
    /// Requests left without an answer because their parameters lack something, as a real server does.
    pub hung: u64,
    /// Requests whose KV could not be fetched: 500, or an error event in a stream.
    pub failed_pulls: u64,
    /// The process would be gone.
    pub crashed: bool,
    /// Requests whose client left before the end of the answer.
    pub client_disconnects: u64,
    /// Answers given as streams.
    pub streams: u64,
    /// Gauge: generation requests under way.
    pub in_flight: u64,
    /// Gauge: prompt tokens whose blocks wait for their decode leg.
    pub pinned_tokens: u64,
    /// Gauge: leases that wait for their decode leg.
    pub leases_open: u64,
    /// Leases issued.
    pub leases_issued: u64,
    /// Leases pulled in time.
    pub leases_pulled: u64,
    /// Leases that ended without a decode leg.
    pub leases_expired: u64,
    /// Faults by kind.
    pub faults_injected: BTreeMap<String, u64>,
    /// TCP connections accepted.
    pub connections: u64,
    /// Connections closed because they were without a request for too long.
    pub idle_closed: u64,
}

macro_rules! counters {
    ($($name:ident),* $(,)?) => {
        /// The live counters behind [`Stats`].
        #[derive(Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: AtomicU64,)*
            pub(crate) in_flight: AtomicU64,
            maps: Mutex<Maps>,
            changed: Notify,
        }

        impl Counters {
            fn fill(&self, stats: &mut Stats) {
                $(stats.$name = self.$name.load(Relaxed);)*
            }

            /// Sets counters, not gauges, to zero.
            pub(crate) fn reset(&self) {
                $(self.$name.store(0, Relaxed);)*
                *self.maps() = Maps::default();
                self.touch();
            }
        }
    };
}

counters!(
    requests,
    prefill_legs,
    decode_legs,
    local_prefills,
    prompt_tokens,
    cached_tokens,
    computed_tokens,
    external_tokens,
    generated_tokens,
    wrong_text,
    hung,
    failed_pulls,
    client_disconnects,
    streams,
    leases_issued,
    leases_pulled,
    leases_expired,
    connections,
    idle_closed,
);

#[derive(Default)]
struct Maps {
    by_path: BTreeMap<String, u64>,
    by_status: BTreeMap<String, u64>,
    wrong_text_by: BTreeMap<String, u64>,
    faults_injected: BTreeMap<String, u64>,
}

fn bump(map: &mut BTreeMap<String, u64>, key: &str) {
    match map.get_mut(key) {
        Some(count) => *count += 1,
        None => {
            map.insert(key.to_owned(), 1);
        }
    }
}

impl Counters {
    fn maps(&self) -> std::sync::MutexGuard<'_, Maps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds to a counter and wakes the tasks that wait for a change.
    pub(crate) fn add(&self, counter: &AtomicU64, amount: u64) {
        counter.fetch_add(amount, Relaxed);
        self.touch();
    }

    pub(crate) fn touch(&self) {
        self.changed.notify_waiters();
    }

    pub(crate) fn changed(&self) -> tokio::sync::futures::Notified<'_> {
        self.changed.notified()
    }

    pub(crate) fn request(&self, path: &str) {
        bump(&mut self.maps().by_path, path);
        self.add(&self.requests, 1);
    }

    pub(crate) fn status(&self, status: u16) {
        // A three-digit number on the stack: this runs for every request of a bench.
        let digits = [status / 100 % 10, status / 10 % 10, status % 10].map(|digit| b'0' + digit as u8);
        bump(&mut self.maps().by_status, std::str::from_utf8(&digits).unwrap_or("0"));
        self.touch();
    }

    pub(crate) fn wrong(&self, reason: &str) {
        bump(&mut self.maps().wrong_text_by, reason);
        self.add(&self.wrong_text, 1);
    }

    pub(crate) fn fault(&self, name: &str) {
        bump(&mut self.maps().faults_injected, name);
        self.touch();
    }

    /// Everything but what the caller knows: role, crash, leases.
    pub(crate) fn snapshot(&self) -> Stats {
        let mut stats = Stats { in_flight: self.in_flight.load(Relaxed), ..Stats::default() };
        self.fill(&mut stats);
        let maps = self.maps();
        stats.by_path.clone_from(&maps.by_path);
        stats.by_status.clone_from(&maps.by_status);
        stats.wrong_text_by.clone_from(&maps.wrong_text_by);
        stats.faults_injected.clone_from(&maps.faults_injected);
        stats
    }
}
