//! Autoscaling of each role over a load that changes, in virtual time: pd-control's own demand, windows and targets, the
//! HorizontalPodAutoscaler's algorithm, and servers that take a minute to start. Beside it an oracle that knows the load.
//!
//! It leaves out which endpoint a request gets (the one with the least work) and failures.

pub mod hpa;
pub mod servers;

use std::collections::{BTreeMap, HashMap as Metadata};
use std::time::Duration;

use anyhow::{Result, anyhow};
use hashbrown::HashMap;
use pd_control::scaling::demand::demand;
use pd_control::scaling::history::{Busy, History, LOOKS, Sample};
use pd_control::scaling::scaler::answers;
use pd_core::wire::Role;
use pd_sim::{Config, Timing};
use tokio::time::Instant;

use hpa::{Behaviour, Hpa};
use servers::{Request, STEP, Served, Servers};

/// Roles, in the order of all pairs here.
pub const ROLES: [&str; 2] = ["prefill", "decode"];
/// Servers of each role that the oracle and the autoscaler begin with at the least.
const FEWEST: usize = 1;

/// A stretch of the load. Between two stretches, the load turns within [`TURN`].
#[derive(Clone, Copy, Debug)]
pub struct Phase {
    /// How long it lasts.
    pub length: Duration,
    /// Requests per second.
    pub rate: f64,
    /// Prompt tokens.
    pub prompt: u64,
    /// Share of the prompt that decode servers hold, 0 to 1.
    pub cached: f64,
    /// Output tokens.
    pub output: u64,
}

/// Time within which one phase's requests replace the other's.
pub const TURN: Duration = Duration::from_secs(300);

/// Long prompts with short answers, then short prompts with long answers, then as before.
#[must_use]
pub fn there_and_back(length: Duration) -> [Phase; 3] {
    let prompts = Phase { length, rate: 10.0, prompt: 12_000, cached: 0.0, output: 100 };
    let answers = Phase { length, rate: 10.0, prompt: 1_000, cached: 0.0, output: 3_000 };
    [prompts, answers, prompts]
}

/// New prompts, then the same prompt again and again.
#[must_use]
pub fn repeated(length: Duration) -> [Phase; 2] {
    let new = Phase { length, rate: 4.0, prompt: 8_000, cached: 0.0, output: 500 };
    [new, Phase { rate: 16.0, cached: 1.0, ..new }]
}

/// Requests of the phases at random times (exponential pauses).
#[must_use]
pub fn load(phases: &[Phase], seed: u64) -> Vec<Request> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let (mut at, mut requests) = (Duration::ZERO, Vec::new());
    let mut end = Duration::ZERO;
    for (index, phase) in phases.iter().enumerate() {
        let begin = end;
        end += phase.length;
        while at < end {
            // At the begin of a phase some requests are still those of the one before.
            let turned = (at - begin).as_secs_f64() / TURN.as_secs_f64();
            let of = if index > 0 && rng.f64() > turned { &phases[index - 1] } else { phase };
            let vary = |rng: &mut fastrand::Rng, tokens: u64| ((tokens as f64) * (0.5 + rng.f64())) as u64;
            let prompt = vary(&mut rng, of.prompt);
            let cached = (prompt as f64 * of.cached) as u64;
            requests.push(Request { at, prompt, cached, output: vary(&mut rng, of.output).max(2) });
            at += Duration::from_secs_f64(-(1.0 - rng.f64()).ln() / of.rate);
        }
    }
    requests
}

/// What a run is about, besides the load.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The servers' times, and the size of their KV caches.
    pub servers: Config,
    /// Time that a new server takes until it is ready.
    pub start: Duration,
    /// How the autoscaler behaves.
    pub behaviour: Behaviour,
    /// Metadata of the triggers of both roles, besides `role`.
    pub metadata: [Metadata<String, String>; 2],
    /// Longest time to first token, and per output token, of a request that counts as served well.
    pub slo: (Duration, Duration),
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            servers: Config { speed: 1.0, cache_tokens: 200_000, tpot_batch_us: 100.0, ..Config::default() },
            start: Duration::from_secs(60),
            behaviour: Behaviour::default(),
            metadata: Default::default(),
            slo: (Duration::from_secs(3), Duration::from_millis(30)),
        }
    }
}

/// Who decides how many servers there are.
#[derive(Clone, Copy, Debug)]
pub enum Scaling {
    /// pd-control's signals and the HorizontalPodAutoscaler.
    Autoscaler,
    /// One that knows the load, and loads the servers of both roles up to these shares.
    Oracle([f64; 2]),
}

/// A second of a run.
#[derive(Clone, Copy, Debug)]
pub struct Second {
    /// Servers of both roles, starting ones included and leaving ones not.
    pub servers: [usize; 2],
    /// Servers that the load needs at full use.
    pub needed: [f64; 2],
    /// Requests that wait for a server.
    pub waiting: [usize; 2],
}

/// What came of a run.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Of each second.
    pub seconds: Vec<Second>,
    /// Seconds for which servers of both roles existed.
    pub server_seconds: [f64; 2],
    /// Requests that were served well.
    pub good: usize,
    /// All requests.
    pub requests: usize,
}

impl Outcome {
    /// Share of the requests that were served well.
    #[must_use]
    pub fn goodput(&self) -> f64 {
        self.good as f64 / self.requests.max(1) as f64
    }

    /// How often the number of servers of both roles began to fall after it had risen, or to rise after it had fallen.
    #[must_use]
    pub fn turns(&self) -> [usize; 2] {
        [0, 1].map(|role| {
            let changes = self.seconds.windows(2).map(|pair| pair[1].servers[role].cmp(&pair[0].servers[role]));
            let mut directions: Vec<_> = changes.filter(|change| change.is_ne()).collect();
            directions.dedup();
            directions.len().saturating_sub(1)
        })
    }
}

/// Servers that the requests need at full use, for each second: prefill by their seconds, decode by KV tokens over time.
#[must_use]
pub fn needed(load: &[Request], setup: &Setup) -> Vec<[f64; 2]> {
    let timing = Timing::new(&setup.servers);
    let seconds = load.last().map_or(0, |request| request.at.as_secs() as usize) + 1;
    let mut needed = vec![[0.0; 2]; seconds];
    // The batch that fills the cache decides how long a token takes.
    for request in load {
        let second = request.at.as_secs() as usize;
        // An answer grows, so on average a request holds half of it.
        let tokens = (request.prompt + request.output / 2) as f64;
        let batch = (setup.servers.cache_tokens as f64 / tokens) as usize;
        let decodes = timing.token(batch.max(1)).as_secs_f64() * request.output as f64;
        if !request.skips_prefill() {
            needed[second][0] += timing.prefill(request.prompt, request.cached).as_secs_f64();
        }
        for later in needed.iter_mut().skip(second).take(decodes.ceil() as usize) {
            later[1] += tokens / setup.servers.cache_tokens as f64 * (decodes / decodes.ceil());
        }
    }
    needed
}

/// Mean of the needed servers from a second on.
fn mean(needed: &[[f64; 2]], from: usize, length: usize) -> [f64; 2] {
    let window = &needed[from.min(needed.len())..(from + length).min(needed.len())];
    [0, 1].map(|role| window.iter().map(|second| second[role]).sum::<f64>() / window.len().max(1) as f64)
}

/// Runs a load.
///
/// # Errors
/// When pd-control refuses a trigger.
pub fn run(load: &[Request], scaling: Scaling, setup: &Setup) -> Result<Outcome> {
    let needed = needed(load, setup);
    let timing = Timing::new(&setup.servers);
    let share = if let Scaling::Oracle(shares) = scaling { shares } else { [0.8; 2] };
    let first = mean(&needed, 0, 60);
    let count = |role: usize, mean: [f64; 2]| ((mean[role] / share[role]).ceil() as usize).max(FEWEST);
    let start = setup.start;
    let servers = |role, index| Servers::new(role, timing, setup.servers.cache_tokens, start, count(index, first));
    let mut roles = [servers(Role::Prefill, 0), servers(Role::Decode, 1)];
    let mut autoscaler = Autoscaler::new(setup);
    let mut outcome = Outcome { requests: load.len(), ..Outcome::default() };
    let mut coming = load.iter().peekable();
    let mut open = load.len();
    let per_second = (Duration::from_secs(1).as_millis() / STEP.as_millis()) as usize;
    for step in 0.. {
        let now = STEP * step;
        let second = step as usize / per_second;
        while let Some(request) = coming.next_if(|request| request.at <= now) {
            roles[usize::from(request.skips_prefill())].take(*request, now);
        }
        for (request, _) in roles[0].step(now) {
            roles[1].take(request, now);
        }
        for (request, first) in roles[1].step(now) {
            open -= 1;
            let served = Served { ttft: first - request.at, tpot: (now - first) / request.output as u32 };
            outcome.good += usize::from(served.ttft <= setup.slo.0 && served.tpot <= setup.slo.1);
        }
        if (step as usize).is_multiple_of(per_second / LOOKS as usize) {
            autoscaler.look(&roles, now);
        }
        if (step as usize).is_multiple_of(per_second) && second < needed.len() {
            match scaling {
                Scaling::Oracle(_) => {
                    // Servers are ready when the load comes, and leave when it is gone.
                    let ahead = mean(&needed, second + start.as_secs() as usize, 60);
                    let here = mean(&needed, second, 60);
                    for (index, servers) in roles.iter_mut().enumerate() {
                        servers.scale(count(index, ahead).max(count(index, here)), now);
                    }
                }
                Scaling::Autoscaler => autoscaler.scale(&mut roles, now)?,
            }
            outcome.seconds.push(Second {
                servers: [roles[0].count(), roles[1].count()],
                needed: mean(&needed, second, 60),
                waiting: [roles[0].waiting(), roles[1].waiting()],
            });
        }
        if second >= needed.len() && (open == 0 || second > needed.len() + 3_600) {
            break;
        }
        if second < needed.len() {
            outcome.server_seconds = [roles[0].seconds, roles[1].seconds];
        }
    }
    Ok(outcome)
}

/// The oracle that loads servers most while its goodput is at least `goodput`: it tries shares of use for both roles.
///
/// # Errors
/// When no share is enough.
pub fn oracle(load: &[Request], goodput: f64, setup: &Setup) -> Result<([f64; 2], Outcome)> {
    const SHARES: [f64; 9] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6];
    let mut best = None;
    // The most of prefill beside enough decode servers, then the most of decode.
    let mut shares = [0.6; 2];
    for role in [0, 1] {
        for share in SHARES {
            let mut tried = shares;
            tried[role] = share;
            let outcome = run(load, Scaling::Oracle(tried), setup)?;
            if outcome.goodput() >= goodput {
                shares = tried;
                best = Some((shares, outcome));
                break;
            }
        }
    }
    best.ok_or_else(|| anyhow!("no oracle serves {goodput} of the requests well"))
}

/// pd-control and an autoscaler for each role.
struct Autoscaler<'a> {
    setup: &'a Setup,
    history: History,
    busy: Busy,
    began: Instant,
    hpas: [Hpa; 2],
    next_sync: Duration,
}

impl<'a> Autoscaler<'a> {
    fn new(setup: &'a Setup) -> Self {
        let hpas = [Hpa::new(setup.behaviour), Hpa::new(setup.behaviour)];
        let (history, busy) = (History::default(), Busy::default());
        Self { setup, history, busy, began: Instant::now(), hpas, next_sync: Duration::ZERO }
    }

    /// pd-control's look at endpoints and loads.
    fn look(&mut self, roles: &[Servers; 2], now: Duration) {
        let (mut list, mut loads) = (Vec::new(), HashMap::new());
        roles.iter().for_each(|servers| servers.report(now, &mut list, &mut loads));
        let roles = demand(&list, Some(&loads), &BTreeMap::new(), &BTreeMap::new());
        self.history.look(&mut self.busy, self.began + now, Sample { roles, ..Sample::default() });
    }

    fn scale(&mut self, roles: &mut [Servers; 2], now: Duration) -> Result<()> {
        if now < self.next_sync {
            return Ok(());
        }
        self.next_sync = now + self.setup.behaviour.sync;
        for (index, servers) in roles.iter_mut().enumerate() {
            let mut metadata = self.setup.metadata[index].clone();
            metadata.insert("role".to_owned(), ROLES[index].to_owned());
            let metrics = match answers(&self.history, &metadata, self.began + now) {
                Ok(metrics) => metrics,
                // The window is not whole yet.
                Err(status) if status.code() == tonic::Code::Unavailable => Vec::new(),
                Err(status) => return Err(anyhow!("{status}")),
            };
            let current = servers.count();
            let wanted = self.hpas[index].look(now, current, &metrics);
            servers.scale(wanted, now);
        }
        Ok(())
    }
}
