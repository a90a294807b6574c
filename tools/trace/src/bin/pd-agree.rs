//! `pd-agree`: whether a real Envoy takes the decisions that the simulation takes.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use pd_bench::figures::table;
use pd_bench::trace::{self, Entry, Spread};
use pd_support::places;
use pd_trace::agree::{self, Setup};
use pd_trace::generate::Shape;
use pd_trace::load::Pods;
use pd_trace::timed;

/// Sends a trace, one request after another, through Envoy with engine simulators and through the trace simulator.
#[derive(Clone, Debug, Parser)]
#[command(name = "pd-agree", version, max_term_width = 120)]
struct Args {
    /// The trace: JSON lines with timestamp (ms), input_length, output_length and hash_ids per 512 tokens
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// A synthetic load in place of a trace
    #[arg(long, value_enum, default_value = "agents", conflicts_with = "trace")]
    generate: Shape,
    /// Only the first N requests
    #[arg(long, value_name = "N", default_value_t = 2_000)]
    limit: usize,
    /// Longest prompt in tokens; pd-agree cuts longer ones
    #[arg(long, value_name = "TOKENS", default_value_t = 130_000)]
    max_input: u64,
    /// Prefill servers
    #[arg(long, value_name = "N", default_value_t = 8)]
    prefill: usize,
    /// Decode servers
    #[arg(long, value_name = "N", default_value_t = 8)]
    decode: usize,
    /// Tokens that each prefill server's cache holds
    #[arg(long, value_name = "TOKENS", default_value_t = 2_000_000)]
    cache_tokens: u64,
    /// Requests that generate when pd-agree sends the next one
    #[arg(long, value_name = "N", default_value_t = 20)]
    open: usize,
    /// Envoy's workers
    #[arg(long, value_name = "N", default_value_t = 1)]
    workers: u32,
    /// Compare the time to the first token in place of the decisions: each request at its time, through Envoy's queue, with
    /// this load, as a share of what the prefill servers could do
    #[arg(long, value_name = "SHARE")]
    load: Option<f64>,
    /// With --load, largest difference of the two distributions, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 5.0)]
    apart: f64,
    /// Smallest share of equal decisions, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 99.0)]
    least: f64,
    /// The filter's module
    #[arg(long, default_value_os_t = places::wasm_path())]
    wasm: PathBuf,
    /// Envoy
    #[arg(long, default_value_os_t = places::envoy_path())]
    envoy: PathBuf,
    /// Folder for Envoy's files
    #[arg(long, default_value_os_t = places::root().join("target/agree"))]
    out: PathBuf,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(&Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pd-agree: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<()> {
    ensure!(args.prefill > 0 && args.decode > 0 && args.limit > 0, "nothing to run");
    let mut entries: Vec<Entry> = match &args.trace {
        Some(path) => Spread::new(trace::read(path)?).take(args.limit).collect::<Result<_>>()?,
        None => args.generate.entries(1).into_iter().take(args.limit).collect(),
    };
    for entry in &mut entries {
        entry.cut(args.max_input);
    }
    let (prefill, decode, cache_tokens) = (args.prefill, args.decode, args.cache_tokens);
    if let Some(share) = args.load {
        return compare_times(args, &entries, share).await;
    }
    let setup = Setup {
        pods: Pods { decode_cache_tokens: 0, batch_tokens: 0, ..Pods::new(prefill, decode, cache_tokens) },
        open: args.open,
        workers: args.workers,
        envoy: args.envoy.clone(),
        wasm: args.wasm.clone(),
        out: args.out.clone(),
    };
    let bar = ProgressBar::new(entries.len() as u64).with_style(
        ProgressStyle::with_template("{bar:40} {human_pos} of {human_len} requests, {eta} left")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    let found = agree::run(&entries, &setup, || bar.inc(1)).await?;
    bar.finish_and_clear();
    let percent = |count: usize| 100.0 * count as f64 / found.requests.max(1) as f64;
    println!(
        "{} requests, {prefill}P{decode}D, {} open: the same servers for {:.2} % (prefill {:.2} %, decode {:.2} %)",
        found.requests,
        args.open,
        found.percent(),
        percent(found.prefill),
        percent(found.decode)
    );
    let hits = |tokens: u64| 100.0 * tokens as f64 / found.tokens.max(1) as f64;
    println!(
        "prompt tokens in caches: {:.2} % in the engines, {:.2} % in the simulation; requests per prefill server: {:?}",
        hits(found.cached_there),
        hits(found.cached_here),
        found.loads
    );
    if let Some((number, [here, there])) = found.first_other {
        println!("the first other decision is request {number}: {here:?} in the simulation, {there:?} in Envoy");
    }
    ensure!(found.percent() >= args.least, "fewer than {} % of the decisions are the same", args.least);
    Ok(())
}

async fn compare_times(args: &Args, entries: &[Entry], share: f64) -> Result<()> {
    let (prefill, decode, cache_tokens) = (args.prefill, args.decode, args.cache_tokens);
    let setup = timed::Setup {
        pods: Pods { batch_tokens: 0, ..Pods::new(prefill, decode, cache_tokens) },
        share,
        workers: args.workers,
        envoy: args.envoy.clone(),
        wasm: args.wasm.clone(),
        out: args.out.clone(),
    };
    let (requests, time) = timed::extent(entries, &setup);
    eprintln!("{requests} requests in {:.0} s", time.as_secs_f64());
    let bar = ProgressBar::new(requests as u64);
    let times = timed::run(entries, &setup, || bar.inc(1)).await?;
    bar.finish_and_clear();
    let mut lines = vec![["time to the first token", "Envoy s", "simulation s", "apart %"].map(str::to_owned).to_vec()];
    lines.extend(times.rows().into_iter().map(|(name, there, here)| {
        vec![name, format!("{there:.3}"), format!("{here:.3}"), format!("{:+.1}", 100.0 * (there / here - 1.0))]
    }));
    println!("{}", table(&lines));
    println!("{} requests counted, {prefill}P{decode}D, {:.0} % load", times.here.requests, share * 100.0);
    ensure!(times.apart() <= args.apart / 100.0, "the two distributions are more than {} % apart", args.apart);
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }
}
