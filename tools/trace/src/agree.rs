//! Agreement with reality: the same requests through a real Envoy with engine simulators and through the simulation.
//!
//! Time is taken out, so that only decisions are compared: prompts are computed at once and requests come one after
//! another, so no prefill work waits when one is decided (`W` = 0 on both sides), and nothing is fitted. Generation never
//! ends by itself: the oldest request is cancelled when so many are open, so decode servers differ in what they have.
//! With `W` = 0 a prompt goes where most of it is cached, so a system prompt that all share draws all to one server.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use pd_bench::blocks::chat_body;
use pd_bench::drive::{Answer, Gateway};
use pd_bench::envoy::{self, Envoy};
use pd_bench::trace::{BLOCK_TOKENS, Entry};
use pd_sim::{Handle, Role};
use pd_support::config::merge;
use serde_json::json;
use tokio::task::JoinHandle;

use crate::filter::{Brains, Filter, Places, configuration};
use crate::load::{Job, Pods};
use crate::prefill::Prefill;

const MODEL: &str = "sim";
const PATH: &str = "/v1/chat/completions";
/// Longest time that a request may take to reach a decode server, or to leave it.
const LIMIT: Duration = Duration::from_secs(20);
/// How often servers are looked at meanwhile.
const LOOK_EVERY: Duration = Duration::from_micros(200);
/// Between two requests in the simulation.
const STEP: Duration = Duration::from_millis(10);

/// What to compare.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Servers.
    pub pods: Pods,
    /// Requests that are generating when the next one comes.
    pub open: usize,
    /// Envoy's workers.
    pub workers: u32,
    /// Envoy.
    pub envoy: PathBuf,
    /// The filter's module.
    pub wasm: PathBuf,
    /// Where Envoy's files go.
    pub out: PathBuf,
}

/// How far both sides agree.
#[derive(Clone, Debug, Default)]
pub struct Agreement {
    /// Requests.
    pub requests: usize,
    /// Of these, those with the same prefill server.
    pub prefill: usize,
    /// Those with the same decode server.
    pub decode: usize,
    /// Those with both.
    pub both: usize,
    /// The first other decision: number of the request, prefill and decode server in the simulation, and in Envoy.
    pub first_other: Option<(usize, [(usize, usize); 2])>,
    /// Requests of each prefill server, by Envoy.
    pub loads: Vec<usize>,
    /// Tokens of all prompts.
    pub tokens: u64,
    /// Of these, tokens that the engine simulators found in their caches.
    pub cached_there: u64,
    /// Tokens that the simulation's servers found in theirs.
    pub cached_here: u64,
}

impl Agreement {
    /// Percent of the requests with the same servers.
    #[must_use]
    pub fn percent(&self) -> f64 {
        100.0 * self.both as f64 / self.requests.max(1) as f64
    }
}

/// Envoy and the engine simulators.
struct Reality {
    gateway: Gateway,
    prefill: Vec<Handle>,
    decode: Vec<Handle>,
    open: VecDeque<(usize, JoinHandle<Answer>)>,
    _envoy: Envoy,
}

/// Sends requests through both, in their order; it calls `progress` for each.
///
/// # Errors
/// When a request fails, or something does not start.
pub async fn run(entries: &[Entry], setup: &Setup, mut progress: impl FnMut()) -> Result<Agreement> {
    let over = json!({"prefix": {"block_bytes": 512}, "pools": {"default": {"bytes_per_token": 4, "fit": false}}});
    let brains = Brains { config: over, ..Brains::default() };
    let config = configuration(&setup.pods, &brains);
    let mut reality = Reality::start(setup, &config).await?;
    let mut filter = Filter::with_places(reality.places(), &config, &brains, 0)?;
    let pods = Pods { fast_tokens: setup.pods.cache_tokens, ..setup.pods };
    let mut caches = vec![Prefill::new(&pods); pods.prefill];
    let timing = pd_sim::Timing::new(&pd_sim::Config { speed: 0.0, ..pd_sim::Config::default() });
    let mut agreement = Agreement { loads: vec![0; pods.prefill], ..Agreement::default() };
    for (number, entry) in entries.iter().enumerate() {
        let now = STEP * number as u32;
        // An answer of one token would be over with the prompt.
        let entry = &Entry { output_tokens: entry.output_tokens.max(2), ..entry.clone() };
        let body = chat_body(MODEL, entry, true);
        let prefill = filter.ask(number, PATH, &body, entry.input_tokens, now)?;
        let decode = filter.prefilled(number, now)?;
        let (tokens, output) = (entry.input_tokens, entry.output_tokens);
        let job = Job { at: now, tokens, output, blocks: entry.blocks.clone() };
        let held = caches[prefill].enqueue(&timing, number, &job, false);
        caches[prefill].begin(&pods, &timing, job.at);
        caches[prefill].end();
        agreement.cached_here += held.blocks as u64 * BLOCK_TOKENS;
        agreement.tokens += tokens;

        let there = reality.send(number, body).await.with_context(|| format!("request {number}"))?;
        agreement.requests += 1;
        agreement.loads[there.0] += 1;
        agreement.prefill += usize::from(there.0 == prefill);
        agreement.decode += usize::from(there.1 == decode);
        let here = (prefill, decode);
        agreement.both += usize::from(there == here);
        if there != here {
            agreement.first_other.get_or_insert((number, [here, there]));
        }
        if reality.open.len() > setup.open {
            reality.cancel_oldest().await?;
            filter.done(number - setup.open, now);
        }
        progress();
    }
    agreement.cached_there = reality.prefill.iter().map(|engine| engine.stats().cached_tokens).sum();
    Ok(agreement)
}

impl Reality {
    async fn start(setup: &Setup, config: &serde_json::Value) -> Result<Self> {
        let base = pd_sim::Config { models: vec![MODEL.to_owned()], record: 0, ..pd_sim::Config::default() };
        let (mut prefill, mut decode) = (Vec::new(), Vec::new());
        for _ in 0..setup.pods.prefill {
            let cache_tokens = setup.pods.cache_tokens;
            prefill.push(pd_sim::start(pd_sim::Config { role: Role::Prefill, cache_tokens, ..base.clone() }).await?);
        }
        for _ in 0..setup.pods.decode {
            // Room for every request that is open, and not one token before it is cancelled.
            let still = pd_sim::Config {
                role: Role::Decode,
                speed: 1.0,
                transfer_ms: 0.0,
                transfer_us: 0.0,
                tpot_ms: 3_600_000.0,
                cache_tokens: 1 << 30,
                max_num_seqs: usize::MAX >> 8,
                ..base.clone()
            };
            decode.push(pd_sim::start(still).await?);
        }
        let engines: Vec<_> = prefill.iter().chain(&decode).map(Handle::addr).collect();
        let list = |engines: &[Handle], role: &str| -> Vec<_> {
            engines.iter().map(|engine| json!({"address": engine.addr(), "role": role})).collect()
        };
        let endpoints = [list(&prefill, "prefill"), list(&decode, "decode")].concat();
        let mut envoy_config = envoy::local(&setup.wasm, &engines)?;
        envoy::edit_filter(&mut envoy_config, |filter| {
            merge(filter, config);
            filter["endpoints"] = json!(endpoints);
        });
        let envoy = Envoy::start(&setup.envoy, &envoy_config, &setup.out, setup.workers).await?;
        let gateway = Gateway::new(&format!("http://{}", envoy.gateway));
        Ok(Self { gateway, prefill, decode, open: VecDeque::new(), _envoy: envoy })
    }

    fn places(&self) -> Places {
        let addresses = |engines: &[Handle]| engines.iter().map(Handle::addr).collect();
        Places { prefill: addresses(&self.prefill), decode: addresses(&self.decode) }
    }

    /// Sends a request and waits until a decode server has it: the prefill and the decode server.
    async fn send(&mut self, number: usize, body: Vec<u8>) -> Result<(usize, usize)> {
        let (legs, requests) = (self.prefill_legs(), self.decode_requests());
        let gateway = self.gateway.clone();
        let mut task = tokio::spawn(async move { gateway.ask(body, number as u64).await });
        let begun = Instant::now();
        let decode = loop {
            if let Some(decode) = the_one_that_grew(&requests, &self.decode_requests())? {
                break decode;
            }
            if task.is_finished() {
                let answer = (&mut task).await?;
                bail!("answered before its decode leg: {} {}", answer.status, answer.reason);
            }
            ensure!(begun.elapsed() < LIMIT, "no decode server got it");
            tokio::time::sleep(LOOK_EVERY).await;
        };
        let prefill = the_one_that_grew(&legs, &self.prefill_legs())?.context("no prefill server got it")?;
        self.open.push_back((decode, task));
        Ok((prefill, decode))
    }

    /// The client of the oldest request goes away; returns when its decode server knows, and so Envoy.
    async fn cancel_oldest(&mut self) -> Result<()> {
        let Some((decode, task)) = self.open.pop_front() else { return Ok(()) };
        ensure!(!task.is_finished(), "a request ended before it was cancelled");
        task.abort();
        let left = self.open.iter().filter(|(server, _)| *server == decode).count() as u64;
        let begun = Instant::now();
        while self.decode[decode].stats().in_flight > left {
            ensure!(begun.elapsed() < LIMIT, "a cancelled request goes on");
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    fn prefill_legs(&self) -> Vec<u64> {
        self.prefill.iter().map(|engine| engine.stats().prefill_legs).collect()
    }

    fn decode_requests(&self) -> Vec<u64> {
        self.decode.iter().map(|engine| engine.stats().requests).collect()
    }
}

fn the_one_that_grew(before: &[u64], after: &[u64]) -> Result<Option<usize>> {
    let mut grown = before.iter().zip(after).enumerate().filter(|(_, (before, after))| after > before);
    let first = grown.next().map(|(server, _)| server);
    ensure!(grown.next().is_none(), "a request went to several servers of a role");
    Ok(first)
}
