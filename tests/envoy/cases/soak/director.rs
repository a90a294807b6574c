//! What goes wrong while requests flow, and when: three lanes at a time, one for the prefill servers, one for the decode
//! servers, one for the list. A lane takes its disturbances in an order that the seed decides, each for so many requests.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pd_sim::{Computed, Role};
use pd_support::file::replace;
use pd_tests::rig::{Rig, endpoints_file};
use serde_json::Value;
use tokio::time::sleep;

use super::fleet::Server;

/// Revision of the servers that stay.
const STAYING: &str = "stays";
/// A look at how far the requests are.
const LOOK: Duration = Duration::from_millis(5);

/// Everything that the lanes change, and how far the requests are.
pub struct World {
    pub prefill: Vec<Arc<Server>>,
    pub decode: Vec<Arc<Server>>,
    /// Servers of the revision that is rolled out, and those that it replaces.
    pub rolled: Mutex<Vec<Arc<Server>>>,
    pub computed: Arc<Computed>,
    /// Requests that have ended.
    pub ended: AtomicU64,
    pub total: u64,
    pub is_over: AtomicBool,
    now: [Mutex<Option<&'static str>>; 3],
    seed: u64,
}

/// What the prefill lane does.
const PREFILL: [(&str, Fault); 10] = [
    ("prefill: one 500", Fault::One("500")),
    ("prefill: one 503", Fault::One("503")),
    ("prefill: one 429", Fault::One("429")),
    ("prefill: one 404", Fault::One("404")),
    ("prefill: one 401", Fault::One("401")),
    ("prefill: 429 storm", Fault::All("429:0.7")),
    ("prefill: one slow", Fault::One("delay=400")),
    ("prefill: one hangs", Fault::One("hang:0.1")),
    ("prefill: resets", Fault::All("reset:0.05")),
    ("prefill: restarts", Fault::Restart),
];
/// What the decode lane does.
const DECODE: [(&str, Fault); 9] = [
    ("decode: one 500", Fault::One("500")),
    ("decode: one 503", Fault::One("503")),
    ("decode: one 429", Fault::One("429")),
    ("decode: 429 storm", Fault::All("429:0.7")),
    ("decode: one slow", Fault::One("delay=200")),
    ("decode: one hangs", Fault::One("hang:0.1")),
    ("decode: streams die", Fault::All("die=2:0.05")),
    ("decode: error events", Fault::All("error_event=2:0.05")),
    ("decode: restarts", Fault::Restart),
];
/// What the lane of the list does.
const LIST: [(&str, Change); 4] = [
    ("list: roll-out", Change::RollOut),
    ("list: readiness flaps", Change::Flaps),
    ("list: names the dead", Change::NamesTheDead),
    ("list: names too early", Change::NamesTooEarly),
];

#[derive(Clone, Copy)]
enum Fault {
    /// At one server, another one each time.
    One(&'static str),
    /// At all servers of the role.
    All(&'static str),
    /// Processes end and start anew at their addresses, one after the other.
    Restart,
}

#[derive(Clone, Copy)]
enum Change {
    /// Servers of a new revision come one after the other, and those of the old one go.
    RollOut,
    /// Servers are down and ready again, several times.
    Flaps,
    /// A server ends, and the list names it for a while yet.
    NamesTheDead,
    /// The list names a server that does not run yet.
    NamesTooEarly,
}

/// Any mixing does; this one is Vigna's.
pub fn mix(seed: u64, number: u64) -> u64 {
    let mut z = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// The numbers below `count` in an order that the seed decides.
fn shuffled(count: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<_> = (0..count).collect();
    order.sort_by_key(|index| mix(seed, *index as u64));
    order
}

impl World {
    pub async fn start(seed: u64, total: u64) -> Self {
        let computed = Arc::new(Computed::default());
        let mut number = 0;
        let mut servers = async |role, revision: &str, count| {
            let mut started = Vec::new();
            for _ in 0..count {
                number += 1;
                started.push(Arc::new(Server::start(role, revision, mix(seed, number), &computed).await));
            }
            started
        };
        let (prefill, decode) = (servers(Role::Prefill, STAYING, 4).await, servers(Role::Decode, STAYING, 4).await);
        let mut rolled = servers(Role::Prefill, "0", 2).await;
        rolled.extend(servers(Role::Decode, "0", 2).await);
        Self {
            prefill,
            decode,
            rolled: Mutex::new(rolled),
            computed,
            ended: AtomicU64::new(0),
            total,
            is_over: AtomicBool::new(false),
            now: [const { Mutex::new(None) }; 3],
            seed,
        }
    }

    /// What goes wrong now.
    pub fn disturbances(&self) -> Vec<&'static str> {
        self.now.iter().filter_map(|lane| *lane.lock().unwrap_or_else(PoisonError::into_inner)).collect()
    }

    /// Servers of the revision that is rolled out.
    fn rolled(&self) -> Vec<Arc<Server>> {
        self.rolled.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Every server that there ever was.
    pub fn all(&self) -> Vec<Arc<Server>> {
        self.prefill.iter().chain(&self.decode).cloned().chain(self.rolled()).collect()
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Relaxed)
    }

    /// Requests that one disturbance lasts for.
    fn window(&self) -> u64 {
        (self.total / 40).clamp(100, 1_000)
    }

    /// Waits until so many more requests have ended, or all have.
    async fn requests(&self, count: u64) {
        let until = self.ended.load(Relaxed) + count;
        while self.ended.load(Relaxed) < until && !self.is_over() {
            sleep(LOOK).await;
        }
    }

    /// Runs one disturbance after the other until all requests have ended, each with as long a calm before it.
    async fn lane<const N: usize>(
        &self,
        lane: usize,
        names: [&'static str; N],
        mut disturb: impl AsyncFnMut(usize, u64),
    ) {
        let set = |what| *self.now[lane].lock().unwrap_or_else(PoisonError::into_inner) = what;
        for round in 0_u64.. {
            for index in shuffled(N, mix(self.seed, 1_000 * (lane as u64 + 1) + round)) {
                // The lanes are out of step.
                self.requests(self.window() * (1 + lane as u64) / 2).await;
                if self.is_over() {
                    return;
                }
                set(Some(names[index]));
                disturb(index, round).await;
                set(None);
            }
        }
    }

    pub async fn disturb_servers(&self, lane: usize) {
        let servers = [&self.prefill, &self.decode][lane];
        let disturb = async |fault: Fault, round: u64| match fault {
            Fault::One(faults) => {
                let server = &servers[round as usize % servers.len()];
                server.set_faults(faults).await;
                self.requests(self.window()).await;
                server.set_faults("").await;
            }
            Fault::All(faults) => {
                for server in servers {
                    server.set_faults(faults).await;
                }
                self.requests(self.window()).await;
                for server in servers {
                    server.set_faults("").await;
                }
            }
            Fault::Restart => {
                for (number, server) in servers.iter().enumerate() {
                    server.stop().await;
                    // Some are back before anybody notices.
                    sleep(Duration::from_millis(if number.is_multiple_of(2) { 0 } else { 300 })).await;
                    server.start_again().await;
                    self.requests(self.window() / servers.len() as u64).await;
                }
            }
        };
        match lane {
            0 => {
                self.lane(lane, PREFILL.map(|(name, _)| name), async |index, round| {
                    disturb(PREFILL[index].1, round).await
                })
                .await
            }
            _ => {
                self.lane(lane, DECODE.map(|(name, _)| name), async |index, round| {
                    disturb(DECODE[index].1, round).await
                })
                .await
            }
        }
    }

    pub async fn change_list(&self, rigs: [&Rig; 2]) {
        let mut revision = 0;
        self.lane(2, LIST.map(|(name, _)| name), async |index, round| match LIST[index].1 {
            Change::RollOut => {
                revision += 1;
                self.roll_out(rigs, revision).await;
            }
            Change::Flaps => self.flap(rigs, round).await,
            Change::NamesTheDead => self.name_the_dead(rigs).await,
            Change::NamesTooEarly => self.name_too_early(rigs).await,
        })
        .await;
    }

    /// The list with all servers, those of `but` with another state.
    fn list(&self, but: &[(&Arc<Server>, &str)]) -> Vec<Value> {
        let entry = |server: &Arc<Server>| {
            let mut entry = server.entry();
            if let Some((_, state)) = but.iter().find(|(it, _)| Arc::ptr_eq(it, server)) {
                entry["state"] = (*state).into();
            }
            entry
        };
        self.prefill.iter().chain(&self.decode).chain(&self.rolled()).map(entry).collect()
    }

    /// Writes the list for pd-control.
    pub fn publish(&self, rigs: [&Rig; 2], but: &[(&Arc<Server>, &str)]) {
        replace(&rigs[0].endpoints_path(), &endpoints_file(&self.list(but))).expect("replaced");
    }

    /// Waits until both Envoys have the hosts of the list.
    async fn until_hosts(&self, rigs: [&Rig; 2]) {
        for rig in rigs {
            rig.until_hosts(&self.list(&[])).await;
        }
    }

    async fn roll_out(&self, rigs: [&Rig; 2], revision: u64) {
        let revision = revision.to_string();
        let old = self.rolled();
        for (number, leaving) in old.iter().enumerate() {
            let seed = mix(self.seed, 1_000_000 + number as u64);
            let comes = Arc::new(Server::start(leaving.role, &revision, seed, &self.computed).await);
            self.rolled.lock().unwrap_or_else(PoisonError::into_inner).push(comes);
            self.publish(rigs, &[(leaving, "draining")]);
            self.until_hosts(rigs).await;
            self.requests(self.window() / 4).await;
            self.rolled.lock().unwrap_or_else(PoisonError::into_inner).retain(|it| !Arc::ptr_eq(it, leaving));
            self.publish(rigs, &[]);
            self.until_hosts(rigs).await;
            // As long as a pod has to end what it does.
            sleep(Duration::from_millis(500)).await;
            leaving.stop().await;
            self.keep(leaving).await;
        }
    }

    /// Keeps the counters of a server that is gone for good.
    async fn keep(&self, gone: &Arc<Server>) {
        let done = gone.done().await;
        self.prefill[0].adopt(done);
    }

    async fn flap(&self, rigs: [&Rig; 2], round: u64) {
        let server =
            |servers: &[Arc<Server>], offset: u64| Arc::clone(&servers[(round + offset) as usize % servers.len()]);
        let flapping = [server(&self.prefill, 1), server(&self.decode, 1), server(&self.decode, 2)];
        let down: Vec<_> = flapping.iter().map(|server| (server, "down")).collect();
        for _ in 0..4 {
            self.publish(rigs, &down);
            self.requests(self.window() / 8).await;
            self.publish(rigs, &[]);
            self.requests(self.window() / 8).await;
        }
    }

    async fn name_the_dead(&self, rigs: [&Rig; 2]) {
        let rolled = self.rolled();
        let (first, last) = (&rolled[0], &rolled[rolled.len() - 1]);
        for server in [first, last] {
            server.stop().await;
        }
        self.requests(self.window()).await;
        self.publish(rigs, &[(first, "down"), (last, "down")]);
        for server in [first, last] {
            server.start_again().await;
        }
        self.publish(rigs, &[]);
    }

    async fn name_too_early(&self, rigs: [&Rig; 2]) {
        let last = self.rolled().pop().expect("a server");
        self.publish(rigs, &[(&last, "down")]);
        self.requests(self.window() / 4).await;
        last.stop().await;
        self.publish(rigs, &[]);
        self.requests(self.window() / 2).await;
        last.start_again().await;
    }

    /// Ends all faults, and lists every server.
    pub async fn calm(&self, rigs: [&Rig; 2]) {
        for server in self.all() {
            server.set_faults("").await;
            server.start_again().await;
        }
        self.publish(rigs, &[]);
        self.until_hosts(rigs).await;
    }
}
