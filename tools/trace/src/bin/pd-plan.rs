//! `pd-plan`: how many prefill and decode servers a trace needs to meet an objective, at the lowest price.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use pd_bench::figures::table;
use pd_bench::trace::{self, Entry, Spread};
use pd_sim::Timing;
use pd_trace::filter::Brains;
use pd_trace::generate::Shape;
use pd_trace::late::Classes;
use pd_trace::load::{Load, Pods};
use pd_trace::plan::{self, Measured, Plans, Prices, Servers};
use pd_trace::rules::Policy;
use pd_trace::sim::{self, DecodeBy, Other, Setup};

/// Plans prefill and decode servers for a trace: the cheapest numbers that meet an objective, by simulation.
///
/// The service times are those of your servers: measure them with one server of each kind.
#[derive(Clone, Debug, Parser)]
#[command(name = "pd-plan", version, max_term_width = 120)]
struct Args {
    /// Trace: JSON lines with timestamp (ms), input_length, output_length and hash_ids per 512 tokens
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Made-up load in place of a trace
    #[arg(long, value_enum, value_name = "SHAPE", default_value = "agents")]
    generate: Shape,
    /// Requests a second [default: the trace's own]
    #[arg(long, value_name = "RATE")]
    rate: Option<f64>,
    /// Objective: seconds to the first token
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0)]
    ttft: f64,
    /// Objective: milliseconds per further token
    #[arg(long, value_name = "MS", default_value_t = 50.0)]
    tpot_ms: f64,
    /// Share of the requests that must meet each of both, 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.9)]
    share: f64,
    /// Price of a prefill server for an hour
    #[arg(long, value_name = "PRICE", default_value_t = 1.0)]
    prefill_price: f64,
    /// Price of a decode server for an hour
    #[arg(long, value_name = "PRICE", default_value_t = 1.0)]
    decode_price: f64,
    /// Most servers of a role
    #[arg(long, value_name = "N", default_value_t = 64)]
    most: usize,
    /// Tokens of KV cache of a prefill server, for prefixes
    #[arg(long, value_name = "TOKENS", default_value_t = 2_000_000)]
    cache_tokens: u64,
    /// Tokens of KV cache of a decode server. At least as many decode servers as the tokens in use fill to 85 %
    #[arg(long, value_name = "TOKENS", default_value_t = 1_000_000)]
    decode_kv_tokens: u64,
    /// Prefill: milliseconds of every prompt
    #[arg(long, value_name = "MS")]
    a_ms: Option<f64>,
    /// Prefill: microseconds per uncached token
    #[arg(long, value_name = "US")]
    b_us: Option<f64>,
    /// Prefill: nanoseconds per squared token
    #[arg(long, value_name = "NS")]
    c_ns: Option<f64>,
    /// Decode: milliseconds per token of a request that decodes alone
    #[arg(long, value_name = "MS")]
    token_ms: Option<f64>,
    /// Decode: microseconds that every other request adds to a token
    #[arg(long, value_name = "US")]
    token_batch_us: Option<f64>,
    /// Transfer: microseconds per token
    #[arg(long, value_name = "US")]
    transfer_us: Option<f64>,
    /// Only the first N requests of the trace
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Runs of each plan, each with other shifts of the trace's copies; the worst counts
    #[arg(long, value_name = "N", default_value_t = 1)]
    seeds: u64,
    /// Folder for the CSV
    #[arg(long, default_value = "target/plan")]
    out: PathBuf,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(is_met) => {
            if is_met {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => {
            eprintln!("pd-plan: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn entries(args: &Args) -> Result<Vec<Entry>> {
    let limit = args.limit.unwrap_or(usize::MAX);
    let mut entries: Vec<Entry> = match &args.trace {
        Some(path) => Spread::new(trace::read(path)?).take(limit).collect::<Result<_>>()?,
        None => args.generate.entries(1),
    };
    entries.truncate(limit);
    ensure!(entries.len() > 1, "the trace has fewer than two requests");
    Ok(entries)
}

fn timing(args: &Args) -> Timing {
    let default = pd_sim::Config { speed: 1.0, ..pd_sim::Config::default() };
    Timing::new(&pd_sim::Config {
        a_ms: args.a_ms.unwrap_or(default.a_ms),
        b_us: args.b_us.unwrap_or(default.b_us),
        c_ns: args.c_ns.unwrap_or(default.c_ns),
        tpot_ms: args.token_ms.unwrap_or(default.tpot_ms),
        tpot_batch_us: args.token_batch_us.unwrap_or(default.tpot_batch_us),
        transfer_us: args.transfer_us.unwrap_or(default.transfer_us),
        ..default
    })
}

fn run(args: &Args) -> Result<bool> {
    ensure!((0.0..=1.0).contains(&args.share), "--share must be between 0 and 1");
    ensure!(args.seeds > 0, "--seeds must be at least 1");
    let (entries, timing) = (entries(args)?, timing(args));
    let rate = args.rate.unwrap_or_else(|| plan::rate(&entries));
    ensure!(rate > 0.0, "--rate must be above 0; the trace has no rate of its own");
    let kv_tokens = plan::kv_tokens(&entries, rate, args.tpot_ms);
    let uncached = plan::prefill_seconds(&entries, rate, &timing);
    println!(
        "{} requests of the trace at {rate:.2} a second. Without any cache they are {uncached:.1} seconds of prefill a second; \
         they have {kv_tokens:.0} tokens in KV caches of decode servers.",
        entries.len()
    );
    // How much of the work the caches save is what the simulation shows.
    let from = plan::least(0.0, kv_tokens, 0.85 * args.decode_kv_tokens as f64);
    let most = Servers { prefill: args.most, decode: args.most };
    let loads: Vec<Load<'_>> = (0..args.seeds).map(|seed| Load::at_rate(&entries, rate, seed)).collect();
    let prices = Prices { prefill: args.prefill_price, decode: args.decode_price };
    let plans = plan::cheapest(from, most, prices, |servers| {
        eprint!("\rtries {} prefill and {} decode servers   ", servers.prefill, servers.decode);
        measure(args, &loads, &timing, servers)
    })?;
    eprint!("\r{:60}\r", "");
    report(args, &plans, prices)?;
    Ok(plans.cheapest.is_some())
}

/// The worst of all loads.
fn measure(args: &Args, loads: &[Load<'_>], timing: &Timing, servers: Servers) -> Result<Measured> {
    let pods = Pods {
        decode_cache_tokens: args.decode_kv_tokens,
        ..Pods::new(servers.prefill, servers.decode, args.cache_tokens)
    };
    let brains = Brains { count: 1, workers: 1, exchange: None, config: serde_json::json!({}) };
    let mut worst = Measured { ttft: 0.0, tpot_ms: 0.0, prefill_busy: 0.0, is_met: true };
    for (seed, load) in loads.iter().enumerate() {
        let setup = Setup {
            pods: &pods,
            timing,
            brains: &brains,
            classes: Classes { high: 0.0, fairness_ids: 1 },
            decode_by: DecodeBy::Cost,
            closed_loop: false,
            other: Other::default(),
            seed: seed as u64,
        };
        let outcome = sim::run(load, Policy::PdCore, &setup, || {})?;
        let measured = load.measured_seconds().max(1e-9);
        worst.ttft = worst.ttft.max(outcome.ttft(args.share));
        worst.tpot_ms = worst.tpot_ms.max(outcome.tpot_ms(args.share));
        let busy = outcome.busy.iter().sum::<f64>() / outcome.busy.len().max(1) as f64 / measured;
        worst.prefill_busy = worst.prefill_busy.max(busy);
    }
    worst.is_met = worst.ttft <= args.ttft && worst.tpot_ms <= args.tpot_ms;
    Ok(worst)
}

fn report(args: &Args, plans: &Plans, prices: Prices) -> Result<()> {
    let percent = args.share * 100.0;
    let heads =
        ["plan", "price/h", &format!("TTFT p{percent:.0} s"), &format!("TPOT p{percent:.0} ms"), "prefill busy", ""];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    let mut csv = "prefill,decode,price,ttft_s,tpot_ms,prefill_busy,is_met\n".to_owned();
    for (servers, it) in &plans.tried {
        let Servers { prefill, decode } = *servers;
        let price = prices.of(*servers);
        let mark = if plans.cheapest == Some(*servers) {
            "cheapest"
        } else if it.is_met {
            ""
        } else {
            "too slow"
        };
        rows.push(vec![
            format!("{prefill}P{decode}D"),
            format!("{price:.2}"),
            format!("{:.2}", it.ttft),
            format!("{:.1}", it.tpot_ms),
            format!("{:.0} %", it.prefill_busy * 100.0),
            mark.to_owned(),
        ]);
        let Measured { ttft, tpot_ms, prefill_busy, is_met } = it;
        // Writing to a string cannot fail.
        let _ = writeln!(csv, "{prefill},{decode},{price},{ttft},{tpot_ms},{prefill_busy},{is_met}");
    }
    print!("{}", table(&rows));
    match plans.cheapest {
        Some(servers) => println!(
            "\n{} prefill and {} decode servers are the cheapest that meet the objective: {:.2} an hour.",
            servers.prefill,
            servers.decode,
            prices.of(servers)
        ),
        None => println!("\nNo plan of up to {} servers of a role meets the objective.", args.most),
    }
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let path = args.out.join("plan.csv");
    std::fs::write(&path, csv).with_context(|| path.display().to_string())
}
