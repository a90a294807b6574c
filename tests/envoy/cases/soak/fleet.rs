//! Simulated engines that come, go and start anew while requests flow.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pd_sim::{Computed, Config, Handle, Role, Stats};
use pd_support::port::Port;
use serde_json::{Value, json};

/// How long KV waits for its decode leg: short, so that nothing is left soon after the end.
const LEASE: Duration = Duration::from_secs(2);
/// uvicorn closes idle connections after that time.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// One server, at one address for as long as it lives.
pub struct Server {
    pub role: Role,
    /// Revision of its engine: servers refuse KV caches of another one.
    pub revision: String,
    pub address: SocketAddr,
    config: Config,
    /// Its addresses, which nobody else gets while no process listens there.
    _ports: [Port; 2],
    handle: tokio::sync::Mutex<Option<Handle>>,
    /// What its earlier processes did.
    before: Mutex<Done>,
}

/// What servers did, and what they have left.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    pub requests: u64,
    pub wrong: u64,
    pub prefills: u64,
    pub handovers: u64,
    pub whole: u64,
    pub faults: u64,
    /// Requests under way, and leases that wait.
    pub left: u64,
    pub processes: u64,
}

impl Done {
    fn of(stats: &Stats) -> Self {
        Self {
            requests: stats.requests,
            wrong: stats.wrong_text,
            prefills: stats.prefill_legs,
            handovers: stats.decode_legs,
            whole: stats.local_prefills,
            faults: stats.faults_injected.values().sum(),
            left: stats.in_flight + stats.leases_open,
            processes: 1,
        }
    }

    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.wrong += other.wrong;
        self.prefills += other.prefills;
        self.handovers += other.handovers;
        self.whole += other.whole;
        self.faults += other.faults;
        self.left += other.left;
        self.processes += other.processes;
    }
}

impl Server {
    pub async fn start(role: Role, revision: &str, seed: u64, computed: &Arc<Computed>) -> Self {
        let ports = [Port::reserve(), Port::reserve()];
        let config = Config {
            listen: ports[0].address(),
            side_channel: Some(ports[1].address()),
            speed: 0.05,
            record: 0,
            lease: LEASE,
            keep_alive: Some(KEEP_ALIVE),
            revision: Some(revision.to_owned()),
            seed,
            computed: Some(Arc::clone(computed)),
            ..Config::of(role)
        };
        let handle = pd_sim::start(config.clone()).await.unwrap_or_else(|error| panic!("{error}"));
        let address = handle.addr();
        let handle = tokio::sync::Mutex::new(Some(handle));
        Self { role, revision: revision.to_owned(), address, config, _ports: ports, handle, before: Mutex::default() }
    }

    /// Its entry in the list.
    pub fn entry(&self) -> Value {
        json!({"address": self.address.to_string(), "role": self.role.name(), "revision": self.revision})
    }

    pub async fn set_faults(&self, faults: &str) {
        if let Some(handle) = &*self.handle.lock().await {
            handle.set_faults(faults).unwrap_or_else(|error| panic!("{error}"));
        }
    }

    /// Ends the process, with what it has under way.
    pub async fn stop(&self) {
        let mut handle = self.handle.lock().await;
        let Some(running) = handle.take() else { return };
        let done = Done { left: 0, ..Done::of(&running.stats()) };
        running.stop().await;
        self.before.lock().unwrap_or_else(PoisonError::into_inner).add(done);
    }

    /// Starts a process where there is none: at the same address, with another engine id and an empty cache.
    pub async fn start_again(&self) {
        let mut handle = self.handle.lock().await;
        if handle.is_none() {
            let started = pd_sim::start(self.config.clone()).await;
            *handle = Some(started.unwrap_or_else(|error| panic!("{error}")));
        }
    }

    /// Adds the counters of another server, which is gone, to this server's.
    pub fn adopt(&self, done: Done) {
        self.before.lock().unwrap_or_else(PoisonError::into_inner).add(done);
    }

    pub async fn done(&self) -> Done {
        let mut done = *self.before.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handle) = &*self.handle.lock().await {
            done.add(Done::of(&handle.stats()));
        }
        done
    }
}

/// What several servers did.
pub async fn total(servers: impl IntoIterator<Item = &Arc<Server>>) -> Done {
    let mut total = Done::default();
    for server in servers {
        total.add(server.done().await);
    }
    total
}
