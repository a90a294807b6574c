//! Time under the test's control.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// 2026-01-01T00:00:00Z: a plausible date, so that code which takes zero for "never" is not flattered.
const START_WALL_NS: u64 = 1_767_225_600_000_000_000;
/// One hour of uptime.
const START_MONOTONIC_NS: u64 = 3_600_000_000_000;

/// The clock of one Envoy process, shared by its workers. Clones show the same time.
///
/// The module sees wall time through `proxy_get_current_time_nanoseconds` and WASI's real-time clock, and monotonic time
/// through WASI's monotonic clock. Neither moves by itself.
#[derive(Clone, Debug)]
pub struct Clock {
    wall_ns: Arc<AtomicU64>,
    monotonic_ns: Arc<AtomicU64>,
}

impl Default for Clock {
    fn default() -> Self {
        Self {
            wall_ns: Arc::new(AtomicU64::new(START_WALL_NS)),
            monotonic_ns: Arc::new(AtomicU64::new(START_MONOTONIC_NS)),
        }
    }
}

impl Clock {
    /// A clock at the start of 2026.
    pub fn new() -> Self {
        Self::default()
    }

    /// Wall time, ns since the epoch.
    pub fn now_ns(&self) -> u64 {
        self.wall_ns.load(Ordering::SeqCst)
    }

    /// Monotonic time, ns since an arbitrary start.
    pub fn monotonic_ns(&self) -> u64 {
        self.monotonic_ns.load(Ordering::SeqCst)
    }

    /// Moves both clocks forward.
    pub fn advance(&self, by: Duration) {
        let ns = u64::try_from(by.as_nanos()).unwrap_or(u64::MAX);
        self.wall_ns.fetch_add(ns, Ordering::SeqCst);
        self.monotonic_ns.fetch_add(ns, Ordering::SeqCst);
    }

    /// Sets wall time only, also backwards: what an NTP step does.
    pub fn set_wall(&self, ns: u64) {
        self.wall_ns.store(ns, Ordering::SeqCst);
    }
}
