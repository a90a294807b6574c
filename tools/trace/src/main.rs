//! `pd-trace-sim`: pd-core's choices on a trace, beside the field's rules and bounds.

mod report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use pd_bench::trace::{self, Entry, Spread};
use pd_sim::Timing;
use pd_trace::filter::Brains;
use pd_trace::generate::Shape;
use pd_trace::late::Classes;
use pd_trace::load::{BATCH_TOKENS, Load, Pods};
use pd_trace::rules::Policy;
use pd_trace::sim::{self, DecodeBy, Other, Setup};
use rayon::prelude::*;

use report::{Case, Row};

/// Simulates prefill and decode servers on a trace, with pd-core and other policies choosing the servers.
///
/// The load is made of copies of the trace with disjoint users, shifted in time; the first quarter warms the caches.
#[derive(Clone, Debug, Parser)]
#[command(name = "pd-trace-sim", version, max_term_width = 120)]
struct Args {
    /// Traces: JSON lines with timestamp (ms), input_length, output_length and hash_ids per 512 tokens
    #[arg(long, value_name = "FILE")]
    trace: Vec<PathBuf>,
    /// Synthetic loads to simulate [default: all, without a trace]
    #[arg(long, value_enum, value_name = "SHAPE")]
    generate: Vec<Shape>,
    /// Numbers of prefill and decode servers, such as 8x8; one table for each value
    #[arg(long, value_name = "PxD", value_delimiter = ',', default_value = "8x8")]
    pods: Vec<Fleet>,
    /// Tokens that each prefill server's cache holds, both tiers
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "2000000")]
    cache_tokens: Vec<u64>,
    /// Of these, tokens in the fast tier
    #[arg(long, value_name = "TOKENS", default_value_t = 400_000)]
    fast_tokens: u64,
    /// Tokens that each decode server's cache holds [default: as many as a prefill server's]
    #[arg(long, value_name = "TOKENS")]
    decode_cache_tokens: Option<u64>,
    /// Tokens that a prefill server computes in one step, as vLLM's max_num_batched_tokens; 0: one prompt after another
    #[arg(long, value_name = "TOKENS", default_value_t = BATCH_TOKENS)]
    batch_tokens: u64,
    /// Criterion for the decode server, where pd-core's choice is simulated
    #[arg(long, value_enum, default_value = "cost")]
    decode_by: DecodeBy,
    /// Load, as a share of what the prefill servers could do with one queue and one cache; one table for each value
    #[arg(long, value_name = "SHARE", value_delimiter = ',', default_value = "0.7")]
    load: Vec<f64>,
    /// Send a turn of a session when the one before is answered, after the trace's pause
    #[arg(long)]
    closed_loop: bool,
    /// Share of the requests that have a higher priority, for the policies that hold requests
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    high: f64,
    /// Number of fairness ids, with equal shares of the requests, for the policies that hold requests
    #[arg(long, value_name = "N", default_value_t = 1)]
    fairness_ids: u64,
    /// Share of the requests that come through a gateway of another make; only the others are measured
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    other: f64,
    /// Number of prefill and of decode servers that the other gateway takes, in turn [default: all]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    other_servers: usize,
    /// Milliseconds between two reports of what servers have, to gateways that exchange [default: they never report]
    #[arg(long, value_name = "MS", requires = "exchange_ms")]
    report_ms: Option<f64>,
    /// Runs, each with other shifts of the trace's copies
    #[arg(long, value_name = "N", default_value_t = 3)]
    seeds: u64,
    /// Policies that choose the servers [default: all]
    #[arg(long, value_enum, value_name = "POLICY", value_delimiter = ',')]
    policies: Vec<Policy>,
    /// Target for the time to the first token, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0)]
    slo: f64,
    /// Gateways, each deciding for a share of the requests
    #[arg(long, value_name = "N", default_value_t = 1)]
    gateways: usize,
    /// Workers of each gateway, which share events as Envoy's workers do
    #[arg(long, value_name = "N", default_value_t = 1)]
    workers: usize,
    /// Milliseconds between two exchanges of the gateways, 50 in Envoy [default: they never exchange]
    #[arg(long, value_name = "MS")]
    exchange_ms: Option<f64>,
    /// Members that replace those of pd-core's configuration, as {"pools":{"default":{"affinity_weight":2}}}. There a
    /// token is half a byte and a block 64 bytes, in place of 4 and 512
    #[arg(long, value_name = "JSON", default_value = "{}", value_parser = json)]
    config: serde_json::Value,
    /// Only the first N requests of a trace
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Folder for the CSV and the picture
    #[arg(long, default_value = "target/sim")]
    out: PathBuf,
}

#[derive(Clone, Copy, Debug)]
struct Fleet {
    prefill: usize,
    decode: usize,
}

impl FromStr for Fleet {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (prefill, decode) = text.split_once('x').context("write 8x8")?;
        let this = Self { prefill: prefill.parse()?, decode: decode.parse()? };
        ensure!(this.prefill > 0 && this.decode > 0, "at least one of each");
        Ok(this)
    }
}

fn json(text: &str) -> serde_json::Result<serde_json::Value> {
    serde_json::from_str(text)
}

fn milliseconds(ms: f64) -> Duration {
    Duration::try_from_secs_f64(ms * 1e-3).unwrap_or(Duration::MAX)
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pd-trace-sim: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Names and requests.
fn loads(args: &Args) -> Result<Vec<(String, Vec<Entry>)>> {
    let mut loads = Vec::new();
    let limit = args.limit.unwrap_or(usize::MAX);
    for path in &args.trace {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let entries: Vec<Entry> = Spread::new(trace::read(path)?).take(limit).collect::<Result<_>>()?;
        ensure!(!entries.is_empty(), "{name}: no requests");
        loads.push((name, entries));
    }
    let shapes =
        if args.trace.is_empty() && args.generate.is_empty() { Shape::value_variants() } else { &args.generate };
    loads.extend(shapes.iter().map(|shape| {
        let mut entries = shape.entries(1);
        entries.truncate(limit);
        (shape.name().to_owned(), entries)
    }));
    Ok(loads)
}

fn run(args: &Args) -> Result<()> {
    ensure!(args.load.iter().all(|load| (0.01..=3.0).contains(load)), "--load must be between 0.01 and 3");
    ensure!((0.0..=1.0).contains(&args.high), "--high must be between 0 and 1");
    ensure!((0.0..1.0).contains(&args.other), "--other must be at least 0 and below 1");
    ensure!(args.seeds > 0, "--seeds must be at least 1");
    let timing = Timing::new(&pd_sim::Config { speed: 1.0, ..pd_sim::Config::default() });
    let mut policies = if args.policies.is_empty() { Policy::value_variants().to_vec() } else { args.policies.clone() };
    // The bounds have no answers that a turn could follow, and no servers that others could take.
    let has_servers = args.closed_loop || args.other > 0.0;
    policies.retain(|policy| !has_servers || !policy.is_pooled());
    let classes = Classes { high: args.high, fairness_ids: args.fairness_ids };
    let brains = Brains {
        count: args.gateways,
        workers: args.workers,
        exchange: args.exchange_ms.map(milliseconds),
        config: args.config.clone(),
    };
    let traces = loads(args)?;
    let cases = cases(args, &traces, classes);
    let bar = ProgressBar::new(0).with_style(
        ProgressStyle::with_template("{bar:40} {human_pos} of {human_len} requests, {eta} left")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    let jobs: Vec<_> = (0..cases.len()).flat_map(|case| (0..args.seeds).map(move |seed| (case, seed))).collect();
    let mut rows: Vec<(usize, Row)> = jobs
        .par_iter()
        .map(|(index, seed)| {
            let (case, entries) = &cases[*index];
            let load = Load::new(entries, &case.pods, &timing, case.share, *seed);
            let setup = Setup {
                pods: &case.pods,
                timing: &timing,
                brains: &brains,
                classes,
                decode_by: args.decode_by,
                closed_loop: args.closed_loop,
                other: Other {
                    share: args.other,
                    servers: args.other_servers,
                    reports: args.report_ms.map(milliseconds),
                },
                seed: *seed,
            };
            bar.inc_length((load.len() * policies.len()) as u64);
            let runs = policies.par_iter().map(|policy| Ok((*index, simulate(&load, *policy, &setup, &bar)?)));
            runs.collect::<Result<Vec<_>>>()
        })
        .collect::<Result<Vec<_>>>()?
        .into_iter()
        .flatten()
        .collect();
    bar.finish_and_clear();
    rows.sort_by_key(|(index, row)| (*index, row.policy, row.seed));
    let cases: Vec<Case> = cases.into_iter().map(|(case, _)| case).collect();
    report::print(&cases, &rows, args.slo);
    report::save(&args.out, &cases, &rows, args.slo)
}

/// Every load on every fleet: one case each.
fn cases<'a>(args: &Args, traces: &'a [(String, Vec<Entry>)], classes: Classes) -> Vec<(Case, &'a Vec<Entry>)> {
    let mut cases = Vec::new();
    for (name, entries) in traces {
        for fleet in &args.pods {
            for cache_tokens in &args.cache_tokens {
                let pods = Pods {
                    prefill: fleet.prefill,
                    decode: fleet.decode,
                    cache_tokens: *cache_tokens,
                    fast_tokens: args.fast_tokens,
                    decode_cache_tokens: args.decode_cache_tokens.unwrap_or(*cache_tokens),
                    batch_tokens: args.batch_tokens,
                };
                let case = |share: &f64| (Case { load: name.clone(), pods, share: *share, classes }, entries);
                cases.extend(args.load.iter().map(case));
            }
        }
    }
    cases
}

/// One policy on one load. The progress bar moves with it.
fn simulate(load: &Load, policy: Policy, setup: &Setup<'_>, bar: &ProgressBar) -> Result<Row> {
    let mut sent = 0;
    let outcome = sim::run(load, policy, setup, || {
        sent += 1;
        if sent % 1_000 == 0 {
            bar.inc(1_000);
        }
    })?;
    bar.inc(sent % 1_000);
    Ok(Row { policy, seed: setup.seed, outcome })
}
