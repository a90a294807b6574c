//! Agreement with reality in time: the same requests, each at its time, through a real Envoy with its queue and engine
//! simulators, and through the simulation.
//!
//! Where [`agree`](crate::agree) compares decisions without time, this compares what comes of them: the distribution of
//! the time to the first token. Single decisions may differ, because a request that comes a millisecond later may find
//! another server with room.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use pd_bench::blocks::chat_body;
use pd_bench::drive::{Answer, Gateway};
use pd_bench::envoy::{self, Envoy};
use pd_bench::trace::Entry;
use pd_sim::{Handle, Role, Timing};
use pd_support::config::merge;
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::filter::Brains;
use crate::late::Classes;
use crate::load::{Load, Pods};
use crate::outcome::Outcome;
use crate::rules::Policy;
use crate::sim::{self, DecodeBy, Other};

const MODEL: &str = "sim";
/// Shares of the requests at which the two distributions are compared.
pub const SHARES: [f64; 6] = [0.1, 0.25, 0.5, 0.75, 0.9, 0.95];

/// What to compare.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Servers. Their caches have one tier.
    pub pods: Pods,
    /// Load, as a share of what the prefill servers could do with one queue and one cache.
    pub share: f64,
    /// Envoy's workers.
    pub workers: u32,
    /// Envoy.
    pub envoy: PathBuf,
    /// The filter's module.
    pub wasm: PathBuf,
    /// Where Envoy's files go.
    pub out: PathBuf,
}

/// The two distributions.
#[derive(Clone, Debug, Default)]
pub struct Times {
    /// Times to the first token through Envoy.
    pub there: Outcome,
    /// Those of the simulation.
    pub here: Outcome,
}

impl Times {
    /// Name, seconds through Envoy and seconds in the simulation: the mean, and the times at [`SHARES`].
    #[must_use]
    pub fn rows(&self) -> Vec<(String, f64, f64)> {
        let at = |share: &f64| (format!("p{:.0}", share * 100.0), self.there.ttft(*share), self.here.ttft(*share));
        let mean = ("mean".to_owned(), self.there.mean_ttft(), self.here.mean_ttft());
        [mean].into_iter().chain(SHARES.iter().map(at)).collect()
    }

    /// How far the two are apart in the worst of these rows: 0.05 is 5 %.
    #[must_use]
    pub fn apart(&self) -> f64 {
        self.rows().iter().map(|(_, there, here)| (there / here.max(1e-9) - 1.0).abs()).fold(0.0, f64::max)
    }
}

/// How many requests, and how long they take.
#[must_use]
pub fn extent(entries: &[Entry], setup: &Setup) -> (usize, Duration) {
    let load = load(entries, setup);
    (load.len(), load.len().checked_sub(1).map_or(Duration::ZERO, |last| load.at(last)))
}

fn timing() -> Timing {
    Timing::new(&pd_sim::Config { speed: 1.0, ..pd_sim::Config::default() })
}

fn load<'a>(entries: &'a [Entry], setup: &Setup) -> Load<'a> {
    Load::new(entries, &setup.pods, &timing(), setup.share, 1)
}

/// Sends the requests through both; it calls `progress` for each answer. The first quarter warms the caches and does not
/// count.
///
/// # Errors
/// When a request is not answered as it should be, or something does not start.
pub async fn run(entries: &[Entry], setup: &Setup, progress: impl FnMut()) -> Result<Times> {
    let load = load(entries, setup);
    let simulated = sim::Setup {
        pods: &setup.pods,
        timing: &timing(),
        brains: &Brains::default(),
        classes: Classes::default(),
        decode_by: DecodeBy::Cost,
        closed_loop: false,
        other: Other::default(),
        seed: 1,
    };
    let here = sim::run(&load, Policy::Late, &simulated, || ())?;
    let there = through_envoy(&load, setup, progress).await?;
    ensure!(there.len() == here.requests, "{} answers in place of {}", there.len(), here.requests);
    let there = Outcome { requests: there.len(), ttft: there, ..Outcome::default() };
    Ok(Times { there: there.sorted(), here })
}

/// Seconds to the first token of the requests that count.
async fn through_envoy(load: &Load<'_>, setup: &Setup, mut progress: impl FnMut()) -> Result<Vec<f64>> {
    let base = pd_sim::Config { models: vec![MODEL.to_owned()], record: 0, speed: 1.0, ..pd_sim::Config::default() };
    let mut engines: Vec<Handle> = Vec::new();
    let mut endpoints = Vec::new();
    let Pods { prefill, decode, cache_tokens, decode_cache_tokens, .. } = setup.pods;
    for (role, count, cache_tokens) in
        [(Role::Prefill, prefill, cache_tokens), (Role::Decode, decode, decode_cache_tokens)]
    {
        for _ in 0..count {
            let max_num_seqs = usize::MAX >> 8;
            let engine = pd_sim::start(pd_sim::Config { role, cache_tokens, max_num_seqs, ..base.clone() }).await?;
            endpoints.push(json!({"address": engine.addr(), "role": role.name()}));
            engines.push(engine);
        }
    }
    let addresses: Vec<_> = engines.iter().map(Handle::addr).collect();
    let mut config = envoy::local(&setup.wasm, &addresses)?;
    envoy::edit_filter(&mut config, |filter| {
        let pool = json!({"split": {"mode": "always"}, "fit": false, "cache_tokens": cache_tokens, "queue": {"enabled": true}});
        merge(filter, &json!({"endpoints": endpoints, "pools": {"default": pool}}));
    });
    let envoy = Envoy::start(&setup.envoy, &config, &setup.out, setup.workers).await?;
    let gateway = Gateway::new(&format!("http://{}", envoy.gateway));
    let mut asked: JoinSet<(usize, Answer)> = JoinSet::new();
    let begun = Instant::now();
    let mut times = Vec::with_capacity(load.len());
    let mut take = |(number, answer): (usize, Answer)| {
        ensure!(answer.is_ok(), "request {number}: {} {}", answer.status, answer.reason);
        if number >= load.warm_up() {
            times.extend(answer.first.map(|first| first.as_secs_f64()));
        }
        progress();
        Ok(())
    };
    for number in 0..load.len() {
        let job = load.job(number);
        // An answer of one token has no further piece, and the stream begins with the text of the first.
        let output_tokens = job.output.max(2);
        let entry = Entry { at_ms: 0.0, input_tokens: job.tokens, output_tokens, blocks: job.blocks };
        let body = chat_body(MODEL, &entry, true);
        tokio::time::sleep_until(begun + job.at).await;
        let gateway = gateway.clone();
        asked.spawn(async move { (number, gateway.ask(body, number as u64).await) });
        while let Some(answered) = asked.try_join_next() {
            take(answered?)?;
        }
    }
    while let Some(answered) = asked.join_next().await {
        take(answered?)?;
    }
    Ok(times)
}
