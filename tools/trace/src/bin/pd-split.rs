//! `pd-split`: time to the first token and time per token of the modes of `pools.NAME.split.mode`, at every load.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Parser;
use pd_bench::figures::table;
use pd_bench::trace::{self, Entry, Spread};
use pd_sim::Timing;
use pd_trace::filter::Brains;
use pd_trace::load::{BATCH_TOKENS, Load, Pods};
use pd_trace::split::{SplitOutcome, run};
use pd_trace::split_loads::Use;
use rayon::prelude::*;

/// Simulates prefill servers, and decode servers that compute prompts too, with pd-core choosing between split and whole.
#[derive(Clone, Debug, Parser)]
#[command(name = "pd-split", version, max_term_width = 120)]
struct Args {
    /// Traces: JSON lines with timestamp (ms), input_length, output_length and hash_ids per 512 tokens
    #[arg(long, value_name = "FILE")]
    trace: Vec<PathBuf>,
    /// Made-up loads to simulate [default: all, without a trace]
    #[arg(long, value_enum, value_name = "USE", value_delimiter = ',')]
    generate: Vec<Use>,
    /// Loads, as shares of what the prefill servers could do with one queue and one cache
    #[arg(long, value_name = "SHARE", value_delimiter = ',', default_value = "0.1,0.3,0.5,0.7,0.9,1.2")]
    load: Vec<f64>,
    /// Values of split.mode; each is compared with the best of the others
    #[arg(long, value_name = "MODE", value_delimiter = ',', default_value = "always,never,threshold,cost")]
    modes: Vec<String>,
    /// Prefill servers, and as many decode servers
    #[arg(long, value_name = "N", default_value_t = 8)]
    servers: usize,
    /// Tokens that each server's cache holds
    #[arg(long, value_name = "TOKENS", default_value_t = 2_000_000)]
    cache_tokens: u64,
    /// Tokens that a server computes in one step, as vLLM's max_num_batched_tokens
    #[arg(long, value_name = "TOKENS", default_value_t = BATCH_TOKENS)]
    batch_tokens: u64,
    /// Only the first N requests of a trace
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Runs, each with other shifts of the trace's copies
    #[arg(long, value_name = "N", default_value_t = 1)]
    seeds: u64,
    /// Members that replace those of pd-core's pool
    #[arg(long, value_name = "JSON", default_value = "{}")]
    pool: String,
}

fn main() -> ExitCode {
    match simulate(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pd-split: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn loads(args: &Args) -> Result<Vec<(String, Vec<Entry>)>> {
    let mut loads = Vec::new();
    for path in &args.trace {
        let limit = args.limit.unwrap_or(usize::MAX);
        let entries: Vec<Entry> = Spread::new(trace::read(path)?).take(limit).collect::<Result<_>>()?;
        loads.push((path.file_stem().unwrap_or_default().to_string_lossy().into_owned(), entries));
    }
    let all = args.trace.is_empty() && args.generate.is_empty();
    let uses = if all { <Use as clap::ValueEnum>::value_variants() } else { &args.generate };
    loads.extend(uses.iter().map(|of| (of.name().to_owned(), of.entries(1))));
    Ok(loads)
}

fn simulate(args: &Args) -> Result<()> {
    ensure!(args.load.iter().all(|load| (0.01..=3.0).contains(load)), "--load must be between 0.01 and 3");
    let pool: serde_json::Value = serde_json::from_str(&args.pool)?;
    let timing = Timing::new(&pd_sim::Config { speed: 1.0, ..pd_sim::Config::default() });
    let pods = Pods { batch_tokens: args.batch_tokens, ..Pods::new(args.servers, args.servers, args.cache_tokens) };
    for (name, entries) in &loads(args)? {
        let mut lines = vec![
            [
                "load",
                "mode",
                "whole %",
                "TTFT mean s",
                "p90 s",
                "TPOT mean ms",
                "p99 ms",
                "TTFT ×",
                "TPOT × its",
                "TPOT × least",
            ]
            .map(str::to_owned)
            .to_vec(),
        ];
        for share in &args.load {
            let one = |mode: &String| -> Result<[f64; 5]> {
                let runs = (0..args.seeds).map(|seed| {
                    let load = Load::new(entries, &pods, &timing, *share, seed);
                    let mut own = pool.clone();
                    own["split"]["mode"] = mode.as_str().into();
                    let config = serde_json::json!({"pools": {"default": own}});
                    let brains = Brains { count: 1, workers: 1, exchange: None, config };
                    Ok(figures(&run(&load, &pods, &timing, &brains, seed)?))
                });
                let runs = runs.collect::<Result<Vec<_>>>()?;
                Ok(std::array::from_fn(|of| runs.iter().map(|run| run[of]).sum::<f64>() / runs.len() as f64))
            };
            let rows = args.modes.par_iter().map(one).collect::<Result<Vec<_>>>()?;
            for (mode, row) in args.modes.iter().zip(&rows) {
                let others = || args.modes.iter().zip(&rows).filter(|(other, _)| *other != mode).map(|(_, row)| row);
                let best = others().min_by(|a, b| a[1].total_cmp(&b[1])).copied().unwrap_or(*row);
                let least = others().map(|row| row[3]).fold(f64::INFINITY, f64::min);
                let [whole, ttft, p90, tpot, p99] = *row;
                let ratios = [ttft / best[1], tpot / best[3], tpot / least];
                let mut line = vec![format!("{:.0} %", share * 100.0), mode.clone(), format!("{whole:.1}")];
                line.extend([ttft, p90, tpot, p99].map(|value| format!("{value:.3}")));
                line.extend(ratios.map(|value| format!("{value:.2}")));
                lines.push(line);
            }
        }
        println!("{name}, {} + {} servers, {} runs\n{}", pods.prefill, pods.decode, args.seeds, table(&lines));
    }
    Ok(())
}

fn figures(of: &SplitOutcome) -> [f64; 5] {
    let outcome = &of.outcome;
    [of.whole_percent(), outcome.mean_ttft(), outcome.ttft(0.9), of.mean_tpot_ms(), outcome.tpot_ms(0.99)]
}
