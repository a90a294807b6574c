//! The filter beside other routers that run prefill and decode, on the same simulators and under the same load.

mod cells;
mod check;
mod gateways;

use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use pd_bench::client::{self, Until};
use pd_bench::figures::table;
use pd_bench::process;
use pd_bench::prompt::{Sharing, Template};
use pd_support::places;

use cells::{Cells, Load};
use gateways::{Gateway, Rig};

/// Measures the filter beside other projects' routers, each alone and behind the Envoy that a platform runs in front.
///
/// All of them send their requests to engine simulators that answer at once. Each round measures all gateways one after the
/// other. Figures are medians over rounds. CPU is that of all processes between the client and the engines; Envoy has one
/// worker, routers have as many threads as they start. Before the load, one request shows whether the KV cache moves and
/// whether the engine gets the client's body.
#[derive(Parser)]
#[command(name = "pd-bench-peers", version, max_term_width = 120)]
pub struct Args {
    /// Rounds
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of load per round and gateway
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Bytes of the request bodies
    #[arg(long = "size", value_delimiter = ',', default_values_t = [200, 16_000, 400_000])]
    sizes: Vec<usize>,
    /// Keep-alive connections, each with one request at a time
    #[arg(long, value_delimiter = ',', default_values_t = [1, 32, 256])]
    connections: Vec<usize>,
    /// Gateways to measure; the added times need `direct`
    #[arg(long = "gateway", value_enum, value_delimiter = ',', default_values_t = Gateway::ALL)]
    gateways: Vec<Gateway>,
    /// Only answers that come as a whole
    #[arg(long)]
    no_stream: bool,
    /// The filter's module
    #[arg(long, default_value_os_t = places::wasm_path())]
    wasm: PathBuf,
    /// Envoy
    #[arg(long, default_value_os_t = places::envoy_path())]
    envoy: PathBuf,
    /// Folder of the other routers, as `tools/bench/peers/install.sh` prints it
    #[arg(long)]
    peers: PathBuf,
    /// Folder for the CSV and the picture
    #[arg(long, default_value_os_t = places::root().join("target/bench-peers"))]
    out: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    // Looks at the sockets often, although there is always something to do: see `stay_awake`.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().event_interval(8).build();
    let run = |runtime: tokio::runtime::Runtime| {
        let tasks = tokio::task::LocalSet::new();
        runtime.block_on(tasks.run_until(async {
            tokio::task::spawn_local(stay_awake());
            tokio::select! {
                done = run(&args) => done,
                _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
            }
        }))
    };
    match runtime.context("start").and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pd-bench-peers: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Keeps this thread from sleeping: a gateway that wakes it would pay for that.
async fn stay_awake() {
    loop {
        tokio::task::yield_now().await;
    }
}

async fn run(args: &Args) -> Result<()> {
    let machine = process::machine();
    println!("machine  {machine}");
    println!("envoy    {}", args.envoy.display());
    println!("module   {} ({} bytes)", args.wasm.display(), gateways::existing(&args.wasm)?);
    println!("load     {} rounds of {} s per gateway\n", args.rounds, args.seconds);
    std::fs::create_dir_all(&args.out)?;
    let rig = Rig::start(args, &args.gateways).await?;
    let mut cells = Cells::default();
    let loads = loads(args);
    let bar = ProgressBar::new((loads.len() * (args.rounds + 1) * args.gateways.len()) as u64);
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len}, {eta} left  {msg}")?);
    for load in loads {
        measure(args, &rig, load, &mut cells, &bar).await?;
        bar.suspend(|| println!("{}", table(&cells.rows(Some(load)))));
        // What is there already is worth having if the rest is interrupted.
        std::fs::write(args.out.join("peers.csv"), cells.csv())?;
    }
    bar.finish_and_clear();
    println!("{}", table(&cells.advantage()));
    let connections = args.connections.iter().copied().find(|count| *count > 1).unwrap_or(1);
    let picture = args.out.join("peers.svg");
    cells.draw(&picture, connections)?;
    let page = args.out.join("README.md");
    std::fs::write(&page, cells.page(&machine, args.rounds, args.seconds))?;
    println!("figures  {}\npage     {}", args.out.join("peers.csv").display(), page.display());
    println!("machine  {} (at the end)", process::machine());
    Ok(())
}

fn loads(args: &Args) -> Vec<Load> {
    let mut loads = Vec::new();
    for &bytes in &args.sizes {
        // Streams come after the answers as a whole, which they are compared with.
        for stream in [false, true].into_iter().take(if args.no_stream { 1 } else { 2 }) {
            loads.extend(args.connections.iter().map(|&connections| Load { bytes, stream, connections }));
        }
    }
    loads
}

async fn measure(args: &Args, rig: &Rig, load: Load, cells: &mut Cells, bar: &ProgressBar) -> Result<()> {
    let mark = Rc::new(std::cell::Cell::new(u64::from(std::process::id()) << 32));
    let step = [Template::chat(load.bytes, Sharing::None, load.stream, "")];
    let time = Duration::from_secs_f64(args.seconds);
    for round in 0..=args.rounds {
        for &gateway in &args.gateways {
            bar.set_message(gateway.name());
            bar.inc(1);
            let cell = cells.cell(load, gateway);
            if cell.failure.is_some() {
                continue;
            }
            if round == 0 {
                match check::one(rig, gateway, load.bytes, load.stream).await {
                    Ok(checked) => cell.checked = Some(checked),
                    Err(error) => cell.failure = Some(format!("{error:#}")),
                }
            }
            let pids = rig.pids(gateway);
            let before = cpu_seconds(pids)?;
            // The first round warms up.
            let until = Until::Elapsed(if round == 0 { time / 2 } else { time });
            match client::run(rig.address(gateway)?, &step, load.connections, until, &mark).await {
                Ok(_) if round == 0 => {}
                Ok(outcome) => cell.add(&outcome, cpu_seconds(pids)? - before, resident_kb(pids)?),
                Err(error) => cell.failure = Some(format!("{error:#}").chars().take(120).collect()),
            }
        }
    }
    Ok(())
}

fn cpu_seconds(pids: &[u32]) -> Result<f64> {
    pids.iter().map(|pid| Ok(process::usage(*pid)?.cpu.as_secs_f64())).sum()
}

fn resident_kb(pids: &[u32]) -> Result<u64> {
    pids.iter().map(|pid| process::resident_kb(*pid)).sum()
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
