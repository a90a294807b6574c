//! Drives a trace of real requests through Envoy and says how they were served.

mod report;
mod send;
mod setup;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use pd_bench::drive::Gateway;
use pd_bench::trace::{self, Conversations, Entries, Spread, Summary};
use pd_support::places;
use tokio::sync::{Semaphore, mpsc};

use report::Record;
use send::Sender;
use setup::Setup;

/// Sends a trace of real requests through Envoy and reports how Envoy served them.
///
/// Without --gateway it starts Envoy with the configuration of envoy/local.yaml and engine simulators, and stops them
/// at the end. It sends each request at its time, whether or not earlier ones are answered, unless --closed-loop is given.
#[derive(Clone, Debug, Parser)]
#[command(name = "pd-replay", version, max_term_width = 120)]
struct Args {
    /// The trace: JSON lines with timestamp (ms), input_length, output_length and hash_ids per 512 tokens
    #[arg(long, value_name = "FILE", required_unless_present = "generate")]
    trace: Option<PathBuf>,
    /// Synthetic conversations in place of a trace, such as conversations=50,turns=4,system=1024,question=1500,answer=200,gap_ms=10000
    #[arg(long, value_name = "KEY=N,…", conflicts_with = "trace")]
    generate: Option<Conversations>,
    /// Mean requests per second: pd-replay stretches the trace's times to it
    #[arg(long, value_name = "R", conflicts_with = "scale")]
    rate: Option<f64>,
    /// Factor on the trace's times: 1 real, 0.1 ten times faster [default: --speed]
    #[arg(long)]
    scale: Option<f64>,
    /// Factor on the simulators' times: 1 real, 0.1 ten times faster, 0 at once
    #[arg(long, default_value_t = 0.1)]
    speed: f64,
    /// Send a turn of a session when the one before is answered, after the trace's pause
    #[arg(long)]
    closed_loop: bool,
    /// Only the first N requests
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Share of requests that ask for a stream, 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.8)]
    streams: f64,
    /// Most requests in flight; further ones wait, and count as late
    #[arg(long, value_name = "N", default_value_t = 512)]
    concurrency: usize,
    /// Longest prompt in tokens; pd-replay cuts longer ones
    #[arg(long, value_name = "TOKENS", default_value_t = 130_000)]
    max_input: u64,
    /// Longest answer in tokens
    #[arg(long, value_name = "TOKENS", default_value_t = 1_024)]
    max_output: u64,
    /// Prefill simulators
    #[arg(long, value_name = "N", default_value_t = 2)]
    prefill: usize,
    /// Decode simulators
    #[arg(long, value_name = "N", default_value_t = 2)]
    decode: usize,
    /// Tokens that each simulator's cache holds
    #[arg(long, value_name = "TOKENS", default_value_t = 500_000)]
    cache_tokens: u64,
    /// When to run a prefill leg, in place of what envoy/local.yaml says
    #[arg(long, value_enum)]
    split: Option<SplitMode>,
    /// Envoy's workers
    #[arg(long, value_name = "N", default_value_t = 2)]
    workers: u32,
    /// URL of a running gateway
    #[arg(long, value_name = "URL", requires = "engines")]
    gateway: Option<String>,
    /// Simulators of that gateway
    #[arg(long, value_name = "IP:PORT,…", value_delimiter = ',', requires = "gateway")]
    engines: Vec<SocketAddr>,
    /// Admin interface of that gateway's Envoy, for the filter's decisions
    #[arg(long, value_name = "IP:PORT", requires = "gateway")]
    admin: Option<SocketAddr>,
    /// Model to ask for
    #[arg(long, default_value = "sim")]
    model: String,
    /// The filter's module
    #[arg(long, default_value_os_t = places::wasm_path())]
    wasm: PathBuf,
    /// Envoy
    #[arg(long, default_value_os_t = places::envoy_path())]
    envoy: PathBuf,
    /// Folder for the CSV and the picture
    #[arg(long, default_value_os_t = places::root().join("target/replay"))]
    out: PathBuf,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SplitMode {
    Threshold,
    Always,
    Never,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Arc::new(Args::parse());
    let Ok(mut terminate) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) else {
        return ExitCode::FAILURE;
    };
    let done = tokio::select! {
        done = run(&args) => done,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        _ = terminate.recv() => Err(anyhow::anyhow!("terminated")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pd-replay: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The trace from its begin; it is read anew for each use and never held.
fn entries(args: &Args) -> Result<Entries> {
    let all: Entries = match (&args.trace, &args.generate) {
        (Some(path), _) => trace::read(path)?,
        (None, Some(conversations)) => Box::new(conversations.entries().map(Ok)),
        (None, None) => anyhow::bail!("no trace"),
    };
    let (max_input, max_output) = (args.max_input, args.max_output);
    let bounded = all.take(args.limit.unwrap_or(usize::MAX)).map(move |entry| {
        let mut entry = entry?;
        entry.cut(max_input);
        entry.output_tokens = entry.output_tokens.min(max_output);
        Ok(entry)
    });
    Ok(Box::new(bounded))
}

/// Factor from the trace's times to ours.
fn scale(args: &Args, summary: &Summary) -> f64 {
    match args.rate {
        Some(rate) => summary.requests as f64 / rate * 1e3 / summary.span_ms.max(1.0),
        None => args.scale.unwrap_or(args.speed),
    }
}

async fn run(args: &Arc<Args>) -> Result<()> {
    ensure!(args.rate.is_none_or(|rate| rate > 0.0), "--rate must be above 0");
    ensure!((0.0..=1.0).contains(&args.streams), "--streams must be between 0 and 1");
    ensure!(args.concurrency > 0 && args.prefill > 0 && args.decode > 0, "nothing to run");
    let summary = Summary::of(entries(args)?)?;
    ensure!(summary.requests > 0, "the trace is empty");
    let scale = scale(args, &summary);
    let setup = Setup::start(args).await?;
    let before = setup.ask().await?;
    let seconds = summary.span_ms * scale / 1e3;
    eprintln!(
        "{} requests in {seconds:.0} s ({:.1}/s) to {}, {} in flight at most",
        summary.requests,
        summary.requests as f64 / seconds.max(1e-3),
        setup.gateway,
        args.concurrency
    );
    let begun = Instant::now();
    let records = drive(args, &summary, scale, &setup.gateway).await?;
    let elapsed = begun.elapsed();
    let after = setup.ask_when_counted(records.len() as u64, &before).await?;
    report::write(args, &summary, &records, &after, elapsed)
}

/// Sends every request at its time and collects what came of them, in the order of their ends.
async fn drive(args: &Arc<Args>, summary: &Summary, scale: f64, gateway: &str) -> Result<Vec<Record>> {
    let permits = Arc::new(Semaphore::new(args.concurrency));
    let (records, mut receiver) = mpsc::unbounded_channel();
    let progress = Progress::new(summary.requests);
    let sender = Sender::new(Gateway::new(gateway), Arc::clone(&permits), records, Arc::clone(args));
    let source = Spread::new(entries(args)?);
    let sending = async {
        if args.closed_loop {
            sender.closed_loop(source.collect::<Result<_>>()?, scale).await
        } else {
            sender.open_loop(source, scale).await
        }
    };
    let collecting = async {
        let mut records = Vec::with_capacity(summary.requests as usize);
        while let Some(record) = receiver.recv().await {
            records.push(record);
            progress.show(&records, args.concurrency - permits.available_permits());
        }
        records
    };
    let (sent, records) = tokio::join!(sending, collecting);
    progress.bar.finish_and_clear();
    sent?;
    Ok(records)
}

/// A bar on a terminal, a line now and then elsewhere.
struct Progress {
    bar: ProgressBar,
    lines: bool,
    logged: std::cell::Cell<Instant>,
    errors: std::cell::Cell<(usize, usize)>,
}

impl Progress {
    fn new(requests: u64) -> Self {
        let bar = ProgressBar::new(requests);
        let style = "{bar:40} {pos}/{len} requests, {per_sec}, {elapsed} of about {duration}; {msg}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        let lines = bar.is_hidden();
        Self { bar, lines, logged: Instant::now().into(), errors: (0, 0).into() }
    }

    fn show(&self, records: &[Record], in_flight: usize) {
        let (counted, mut errors) = self.errors.get();
        errors += records.iter().skip(counted).filter(|record| !record.is_right()).count();
        self.errors.set((records.len(), errors));
        let message = format!("{in_flight} in flight, {errors} wrong or failed");
        if self.lines && self.logged.get().elapsed() > Duration::from_secs(10) {
            self.logged.set(Instant::now());
            eprintln!("{} of {} requests, {message}", records.len(), self.bar.length().unwrap_or_default());
        }
        self.bar.set_message(message);
        self.bar.inc(1);
    }
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
