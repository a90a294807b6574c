//! One simulated server: what all its requests share, and its states. What becomes of one request is in [`run`](crate::run).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{Notify, Semaphore, watch};

use crate::cache::Cache;
use crate::config::Config;
use crate::fault::Faults;
use crate::histogram::Histogram;
use crate::nixl::{Leases, Puller};
use crate::record::Recorder;
use crate::rooms::Rooms;
use crate::stats::{Counters, Stats};
use crate::stored::Stored;
use crate::timing::Timing;
use crate::tokens::splitmix;

/// What the listeners do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Serve,
    /// The API refuses connections.
    Refuse,
    Stop,
    /// The process would be gone.
    Crashed,
}

/// Totals that `POST /stats/reset` does not touch: a Prometheus counter never falls.
#[derive(Default)]
pub(crate) struct Lifetime {
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) cached_tokens: AtomicU64,
    pub(crate) computed_tokens: AtomicU64,
    pub(crate) external_tokens: AtomicU64,
    pub(crate) generated_tokens: AtomicU64,
    pub(crate) finished_stop: AtomicU64,
    pub(crate) finished_length: AtomicU64,
    pub(crate) expired_leases: AtomicU64,
    pub(crate) late_pulls: AtomicU64,
}

/// One simulated server.
pub(crate) struct Pod {
    pub(crate) config: Config,
    pub(crate) engine_id: String,
    pub(crate) stats: Counters,
    pub(crate) lifetime: Lifetime,
    pub(crate) ttft: Histogram,
    /// Times of KV transfers from other servers.
    pub(crate) transfers: Histogram,
    pub(crate) cache: Arc<Cache>,
    pub(crate) faults: Faults,
    pub(crate) recorder: Recorder,
    pub(crate) mode: watch::Sender<Mode>,
    pub(crate) running: AtomicU64,
    pub(crate) waiting: AtomicU64,
    pub(crate) leases: Leases,
    pub(crate) rooms: Rooms,
    pub(crate) stored: Stored,
    /// Wakes the task that ends leases.
    pub(crate) lease_opened: Notify,
    /// Host and port that parameters name.
    pub(crate) side_channel: OnceLock<(String, u16)>,
    pub(crate) timing: Timing,
    pub(crate) puller: Puller,
    pub(crate) sequence_permits: Semaphore,
    pub(crate) prefill: Semaphore,
    pub(crate) decoding: AtomicUsize,
    pub(crate) adapters: Mutex<BTreeMap<String, (u64, u64)>>,
    /// Adapters that were loaded at run time.
    loaded: Mutex<Vec<String>>,
    tickets: AtomicU64,
    started: SystemTime,
}

impl Pod {
    pub(crate) fn new(config: Config, random: u64) -> Self {
        let blocks = (config.cache_tokens / u64::from(config.block_tokens)) as usize;
        let (high, low) = (splitmix(random), splitmix(!random));
        Self {
            engine_id: format!(
                "{:08x}-{:04x}-4{:03x}-a{:03x}-{:012x}",
                high >> 32,
                high >> 16 & 0xffff,
                high & 0xfff,
                low >> 52,
                low & 0xffff_ffff_ffff
            ),
            stats: Counters::default(),
            lifetime: Lifetime::default(),
            ttft: Histogram::default(),
            transfers: Histogram::default(),
            cache: Cache::new(blocks),
            faults: Faults::new(config.faults.clone(), config.seed),
            recorder: Recorder::new(config.record),
            mode: watch::Sender::new(Mode::Serve),
            running: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            leases: Leases::new(config.rebuilt_params),
            rooms: Rooms::default(),
            stored: Stored::default(),
            lease_opened: Notify::new(),
            side_channel: OnceLock::new(),
            timing: Timing::new(&config),
            puller: Puller::new(config.revision.clone()),
            sequence_permits: Semaphore::new(config.max_num_seqs),
            prefill: Semaphore::new(1),
            decoding: AtomicUsize::new(0),
            adapters: Mutex::default(),
            loaded: Mutex::default(),
            tickets: AtomicU64::new(random),
            started: SystemTime::now(),
            config,
        }
    }

    /// When the process started, in seconds of Unix time.
    pub(crate) fn started_seconds(&self) -> f64 {
        self.started.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
    }

    pub(crate) fn snapshot(&self) -> Stats {
        self.end_leases(false);
        let mut stats = self.stats.snapshot();
        stats.role = self.config.role.name().to_owned();
        stats.crashed = *self.mode.borrow() == Mode::Crashed;
        (stats.leases_open, stats.pinned_tokens) = self.leases.gauges();
        stats
    }

    /// The process would exit here.
    pub(crate) fn crash(&self) {
        self.mode.send_replace(Mode::Crashed);
        self.stats.touch();
    }

    /// Moves between serving and refusing; a stopped or crashed server stays so.
    pub(crate) fn set_refuse(&self, refuse: bool) {
        self.mode.send_if_modified(|mode| {
            let next = match *mode {
                Mode::Serve if refuse => Mode::Refuse,
                Mode::Refuse if !refuse => Mode::Serve,
                _ => return false,
            };
            *mode = next;
            true
        });
    }

    pub(crate) fn refuse_for(self: &Arc<Self>, time: Duration) {
        self.set_refuse(true);
        let pod = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(time).await;
            pod.set_refuse(false);
        });
    }

    pub(crate) fn end_leases(&self, all: bool) {
        let ended = self.leases.expire(all);
        if ended > 0 {
            self.stats.add(&self.stats.leases_expired, ended);
            self.lifetime.expired_leases.fetch_add(ended, Relaxed);
        }
    }

    /// Ends leases on time, so that their blocks become free without anybody asking.
    pub(crate) async fn sweep(self: Arc<Self>) {
        loop {
            self.end_leases(false);
            match self.leases.next_expiry() {
                Some(expiry) => tokio::time::sleep_until(expiry).await,
                None => self.lease_opened.notified().await,
            }
        }
    }

    /// Loads an adapter, as vLLM does at `/v1/load_lora_adapter`.
    pub(crate) fn load_lora(&self, name: &str) {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner).push(name.to_owned());
    }

    /// Names of all adapters.
    pub(crate) fn loras(&self) -> Vec<String> {
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        self.config.loras.iter().chain(loaded.iter()).cloned().collect()
    }

    /// Names of running and of waiting adapters, as the metric lists them.
    pub(crate) fn adapters(&self) -> (String, String) {
        let adapters = self.adapters.lock().unwrap_or_else(PoisonError::into_inner);
        let names = |pick: fn(&(u64, u64)) -> u64| {
            let names: Vec<&str> =
                adapters.iter().filter(|(_, counts)| pick(counts) > 0).map(|(name, _)| name.as_str()).collect();
            names.join(",")
        };
        (names(|counts| counts.0), names(|counts| counts.1))
    }

    pub(crate) fn ticket(&self) -> u64 {
        splitmix(self.tickets.fetch_add(1, Relaxed))
    }
}
