//! What the filter costs: CPU, latency and memory of Envoy with it, beside plain Envoy in the same run.

mod rig;
mod rounds;
mod variant;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Parser;
use pd_bench::client::{self, Until};
use pd_bench::engine::{LEG_HEADER, TOKEN_INTERVAL, TOKENS_HEADER};
use pd_bench::envoy::Envoy;
use pd_bench::figures::{Sample, table};
use pd_bench::process;
use pd_bench::prompt::{Sharing, Template};
use pd_support::places;
use serde_json::Value;

use rig::Rig;
use rounds::{Round, Rounds};
use variant::Variant;

/// Measures the cost of the filter, beside plain Envoy in the same run.
///
/// Each round measures all variants one after the other; ratios are taken within a round. Figures are medians over
/// rounds, with the smallest and the largest behind them. CPU is that of the Envoy process (one worker).
#[derive(Parser)]
#[command(name = "pd-bench", version, max_term_width = 120)]
struct Args {
    /// Rounds
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Seconds of load per round and variant
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Parts of a round: each measures all variants in turn, so that other load of the machine affects all of them
    #[arg(long, default_value_t = 5)]
    slices: u32,
    /// Keep-alive connections, each with one request at a time
    #[arg(long, default_value_t = 32)]
    connections: usize,
    /// A smoke run of some twenty seconds; do not use its figures
    #[arg(long)]
    quick: bool,
    /// Bytes of the request bodies
    #[arg(long = "size", alias = "only", value_delimiter = ',', default_values_t = [200, 4_000, 16_000, 220_000])]
    sizes: Vec<usize>,
    /// Variants (pd-bench also runs the floor that a ratio needs)
    #[arg(long = "variant", value_enum, value_delimiter = ',')]
    variants: Vec<Variant>,
    /// Place where prompts begin to differ
    #[arg(long, value_enum, default_value = "none")]
    sharing: Sharing,
    /// Tokens of a stream
    #[arg(long, default_value_t = 512)]
    tokens: usize,
    /// Requests of the memory test; 0 leaves it out
    #[arg(long, default_value_t = 20_000)]
    memory_requests: u64,
    /// Seconds for which Envoys with many workers do nothing; 0 leaves them out
    #[arg(long, default_value_t = 10)]
    idle_seconds: u64,
    /// Workers of each of these Envoys
    #[arg(long, default_value_t = 16)]
    idle_workers: u32,
    /// Leave out the streams
    #[arg(long)]
    no_stream: bool,
    /// The plain Envoy has no retry policy either
    #[arg(long)]
    floor_without_retries: bool,
    /// The filter's module
    #[arg(long, default_value_os_t = places::wasm_path())]
    wasm: PathBuf,
    /// Another build of the filter's module, measured beside it
    #[arg(long)]
    beside: Option<PathBuf>,
    /// The smallest module that runs two legs: the floor of every such filter
    #[arg(long)]
    least: Option<PathBuf>,
    /// JSON to merge into the filter's configuration, such as {"prefix":{"block_bytes":1024}}
    #[arg(long, value_name = "JSON", value_parser = |text: &str| serde_json::from_str::<Value>(text))]
    filter: Option<Value>,
    /// Envoy
    #[arg(long, default_value_os_t = places::envoy_path())]
    envoy: PathBuf,
    /// Folder for the CSV
    #[arg(long, default_value_os_t = places::root().join("target/bench"))]
    out: PathBuf,
}

fn main() -> ExitCode {
    // Looks at the sockets often although there is always something to do, see `stay_awake`.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().event_interval(8).build();
    match runtime {
        Ok(runtime) => runtime.block_on(supervise()),
        Err(error) => {
            eprintln!("pd-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Keeps this thread from sleeping. Waking a sleeping thread costs time in the thread that wakes it: on a virtual machine
/// more than a request. Envoy's figures would then contain the sleeps of this program.
async fn stay_awake() {
    loop {
        tokio::task::yield_now().await;
    }
}

async fn supervise() -> ExitCode {
    let mut args = Args::parse();
    if args.quick {
        args.rounds = args.rounds.min(2);
        args.seconds = args.seconds.min(0.3);
        args.memory_requests = args.memory_requests.min(1_000);
        args.idle_seconds = args.idle_seconds.min(2);
    }
    let tasks = tokio::task::LocalSet::new();
    let run = tasks.run_until(async move {
        tokio::task::spawn_local(stay_awake());
        run(&args).await
    });
    let Ok(mut terminate) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) else {
        return ExitCode::FAILURE;
    };
    let done = tokio::select! {
        done = run => done,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        _ = terminate.recv() => Err(anyhow::anyhow!("terminated")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pd-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<()> {
    let variants = chosen(args);
    println!("machine  {}", process::machine());
    println!("envoy    {}", args.envoy.display());
    println!("module   {} ({} bytes)", args.wasm.display(), std::fs::metadata(&args.wasm)?.len());
    println!(
        "load     {} connections, {} rounds of {} s per variant; prompts share {:?}\n",
        args.connections, args.rounds, args.seconds, args.sharing
    );
    let rig = Rig::start(args, &variants).await?;
    let mut measured = Rounds::new();
    for &size in &args.sizes {
        measure(args, &rig, &variants, size, &mut measured).await?;
        let sizes = [size];
        println!("{}", table(&rounds::rows(&measured, &sizes, &variants)));
    }
    println!("against the floor:\n{}", table(&rounds::summary(&measured, &args.sizes, &variants)));
    if !args.no_stream && variants.contains(&Variant::OneLeg) {
        streams(args, &rig).await?;
    }
    drop(rig);
    if args.memory_requests > 0 && variants.contains(&Variant::TwoLegs) {
        memory(args).await?;
    }
    if args.idle_seconds > 0 && variants.contains(&Variant::TwoLegs) {
        idle(args).await?;
    }
    let path = args.out.join("bench.csv");
    std::fs::write(&path, rounds::csv(&measured)).with_context(|| path.display().to_string())?;
    println!("rounds   {}", path.display());
    let path = args.out.join("cpu.svg");
    rounds::draw(&path, &measured, &args.sizes, &variants)?;
    println!("picture  {}", path.display());
    println!("machine  {} (at the end)", process::machine());
    Ok(())
}

impl Args {
    /// The module of a variant with a filter, if it is named.
    fn module(&self, variant: Variant) -> Option<&Path> {
        match variant {
            Variant::OneLegBeside | Variant::TwoLegsBeside => self.beside.as_deref(),
            Variant::Least => self.least.as_deref(),
            Variant::Plain | Variant::PlainTwice | Variant::OneLeg | Variant::TwoLegs => Some(&self.wasm),
        }
    }
}

fn chosen(args: &Args) -> Vec<Variant> {
    let wanted = |variant: Variant| {
        let is_named = args.variants.contains(&variant);
        is_named || args.variants.is_empty() && args.module(variant).is_some()
    };
    let all = Variant::ALL.into_iter();
    all.filter(|variant| wanted(*variant) || Variant::ALL.into_iter().any(|v| wanted(v) && v.floor() == *variant))
        .collect()
}

async fn measure(args: &Args, rig: &Rig, variants: &[Variant], size: usize, rounds: &mut Rounds) -> Result<()> {
    let seconds = Duration::from_secs_f64(args.seconds);
    for &variant in variants {
        rig.load(args, variant, size, args.connections, Until::Elapsed(seconds / 2)).await?;
    }
    for _ in 0..args.rounds {
        let mut round: BTreeMap<Variant, Round> = BTreeMap::new();
        for _ in 0..args.slices {
            for &variant in variants {
                let pid = rig.envoy(variant)?.pid();
                let part = round.entry(variant).or_default();
                let before = process::usage(pid)?;
                let time = seconds / args.slices;
                part.loaded.add(rig.load(args, variant, size, args.connections, Until::Elapsed(time)).await?);
                part.envoy.add(process::usage(pid)?.since(before));
                part.alone.add(rig.load(args, variant, size, 1, Until::Elapsed(time / 4)).await?);
            }
        }
        for (variant, round) in round {
            rounds.entry((size, variant)).or_default().push(round);
        }
    }
    Ok(())
}

async fn streams(args: &Args, rig: &Rig) -> Result<()> {
    let headers = format!("{LEG_HEADER}: decode\r\n{TOKENS_HEADER}: {}\r\n", args.tokens);
    let step = Template::chat(200, args.sharing, true, &headers);
    let half = (args.connections / 2).max(1);
    let (plain_envoy, filter_envoy) = (rig.envoy(Variant::Plain)?, rig.envoy(Variant::OneLeg)?);
    let (mut plain, mut filter, mut ratio, mut apart) = (Sample::default(), Sample::default(), Sample::default(), 0.0);
    for _ in 0..=args.rounds {
        let figure = async |envoy: &Envoy| {
            let before = process::usage(envoy.pid())?;
            let until = Until::Requests(2 * half as u64);
            let run = client::run(envoy.gateway, std::slice::from_ref(&step), half, until, &rig.mark).await?;
            let tokens = run.requests as f64 * args.tokens as f64;
            let cpu = process::usage(envoy.pid())?.since(before).cpu;
            anyhow::Ok((cpu.as_secs_f64() * 1e6 / tokens, run.reads as f64 / tokens))
        };
        // Tokens come at their own pace, so both can run at once and meet the same noise.
        let ((plain_us, _), (filter_us, reads)) = tokio::try_join!(figure(plain_envoy), figure(filter_envoy))?;
        plain.push(plain_us);
        filter.push(filter_us);
        ratio.push(filter_us / plain_us);
        apart = reads;
    }
    println!(
        "streams of {} tokens, one per {TOKEN_INTERVAL:?}, {} at once: CPU µs per token, requests included: \
         plain {}, filter {}, ratio {} (target ≤ 1.05); {apart:.2} client reads per token\n",
        args.tokens,
        2 * half,
        plain.show(2),
        filter.show(2),
        ratio.show(3)
    );
    Ok(())
}

/// A new Envoy with two legs; its index is filled first, for that grows up to its bound.
async fn memory(args: &Args) -> Result<()> {
    let rig = Rig::start(args, &[Variant::TwoLegs]).await?;
    let pid = rig.envoy(Variant::TwoLegs)?.pid();
    let fresh = process::resident_kb(pid)?;
    let begun = Instant::now();
    rig.load(args, Variant::TwoLegs, 220_000, args.connections, Until::Requests(args.memory_requests / 4)).await?;
    rig.load(args, Variant::TwoLegs, 4_000, args.connections, Until::Requests(args.memory_requests / 4)).await?;
    let warm = process::resident_kb(pid)?;
    let mut marks = Vec::new();
    for _ in 0..4 {
        rig.load(args, Variant::TwoLegs, 4_000, args.connections, Until::Requests(args.memory_requests / 4)).await?;
        marks.push(process::resident_kb(pid)?.to_string());
    }
    println!(
        "memory of Envoy, kB resident: {fresh} at start, {warm} with a full index, then {} over {} requests ({:.0?})\n",
        marks.join(", "),
        args.memory_requests,
        begun.elapsed()
    );
    Ok(())
}

/// Many workers that have nothing to do but to renew their worker slots, beside plain Envoy's at the same time.
async fn idle(args: &Args) -> Result<()> {
    let (_engines, filter, plain) = rig::idle(args).await?;
    // They meet each other first.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let pids = [filter.pid(), plain.pid()];
    let before = pids.map(process::usage);
    tokio::time::sleep(Duration::from_secs(args.idle_seconds)).await;
    let mut percent = Vec::new();
    for (pid, before) in pids.into_iter().zip(before) {
        let cpu = process::usage(pid)?.since(before?).cpu;
        percent.push(100.0 * cpu.as_secs_f64() / args.idle_seconds as f64);
    }
    let [filter, plain] = percent[..] else { return Ok(()) };
    println!(
        "idle for {} s with {} workers: {filter:.2} % of a core, plain {plain:.2} %, the filter's share {:.2} % (target < 2 %)\n",
        args.idle_seconds,
        args.idle_workers,
        filter - plain
    );
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
