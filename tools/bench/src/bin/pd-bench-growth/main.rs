//! How what the filter costs grows, one axis after the other.

mod axes;
mod curve;
mod load;
mod rig;

use std::cell::Cell;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;

use anyhow::{Context as _, Result};
use clap::Parser;
use pd_bench::figures::table;
use pd_bench::process;
use pd_support::places;

use axes::Bench;
use rig::Engines;

/// Measures how cost and memory grow with prompts, endpoints, workers, Envoys, streams and more.
///
/// Each axis prints a table with the slope of every figure: that of its logarithm over the logarithm of what grows, so that 0
/// means no growth and 1 proportional growth. A CSV and a picture of each axis and a page with all of them go to
/// the folder.
#[derive(Parser)]
#[command(name = "pd-bench-growth", version, max_term_width = 120)]
pub struct Args {
    /// What grows
    #[arg(long = "axis", value_enum, value_delimiter = ',', default_values_t = Axis::ALL)]
    axes: Vec<Axis>,
    /// Rounds, of which the median counts
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of load per round and point
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// The filter's module
    #[arg(long, default_value_os_t = places::wasm_path())]
    wasm: PathBuf,
    /// Envoy
    #[arg(long, default_value_os_t = places::envoy_path())]
    envoy: PathBuf,
    /// Folder for CSVs and pictures
    #[arg(long, default_value_os_t = places::root().join("target/bench-growth"))]
    out: PathBuf,
}

/// What a reader of the page needs to know.
const ABOUT: &str = "\"Plain\" is Envoy without the filter, which forwards one request; \"one leg\" serves a request whole, \
                     \"two legs\" splits it. CPU and memory are those of the Envoy process. The slope is that of the figure's \
                     logarithm over the logarithm of what grows: 0 means no growth, 1 proportional growth.";

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Axis {
    /// Bytes of the body, to 16 MB
    Prompt,
    /// Requests of 400 kB each second, with 100 endpoints
    Long,
    /// Endpoints of the list, to 10,000
    Endpoints,
    /// Workers, to 16
    Workers,
    /// Envoys at one pd-control, to 64
    Envoys,
    /// Prompts in the prefix index, beyond its bound
    Index,
    /// Requests that the queue holds, to 5,000
    Held,
    /// Open streams, to 10,000
    Streams,
    /// A connection for each request
    Churn,
    /// Changes of the list each second
    List,
    /// Start of Envoy, and memory at rest
    Start,
    /// The first requests after a new configuration
    Reconfigured,
}

impl Axis {
    const ALL: [Self; 12] = [
        Self::Prompt,
        Self::Long,
        Self::Endpoints,
        Self::Workers,
        Self::Envoys,
        Self::Index,
        Self::Held,
        Self::Streams,
        Self::Churn,
        Self::List,
        Self::Start,
        Self::Reconfigured,
    ];
}

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().event_interval(8).build();
    let run = |runtime: tokio::runtime::Runtime| {
        let tasks = tokio::task::LocalSet::new();
        runtime.block_on(tasks.run_until(async {
            tokio::select! {
                done = run(&args) => done,
                _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
            }
        }))
    };
    match runtime.context("start").and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pd-bench-growth: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<()> {
    let bytes = std::fs::metadata(&args.wasm).with_context(|| args.wasm.display().to_string())?.len();
    let machine = process::machine();
    println!("machine  {machine}\nmodule   {bytes} bytes");
    let mut page = format!(
        "# Growth\n\n`make bench-growth` wrote this page on a machine with: {machine}. The module had {bytes} bytes. {ABOUT}\n\n"
    );
    std::fs::create_dir_all(&args.out)?;
    let mark = Rc::new(Cell::new(u64::from(std::process::id()) << 40));
    for &axis in &args.axes {
        let bench = Bench { args, engines: Engines::start().await?, mark: Rc::clone(&mark) };
        let curves = match axis {
            Axis::Prompt => axes::prompt(&bench).await,
            Axis::Long => axes::long(&bench).await,
            Axis::Endpoints => axes::endpoints(&bench).await,
            Axis::Workers => axes::workers(&bench).await,
            Axis::Envoys => axes::envoys(&bench).await,
            Axis::Index => axes::index(&bench).await,
            Axis::Held => axes::held(&bench).await,
            Axis::Streams => axes::streams(&bench).await,
            Axis::Churn => axes::churn(&bench).await,
            Axis::List => axes::list(&bench).await,
            Axis::Start => axes::start(&bench).await,
            Axis::Reconfigured => axes::reconfigured(&bench).await,
        }
        .with_context(|| format!("{axis:?}"))?;
        let file = |end: &str| args.out.join(format!("{}.{end}", curves.name));
        std::fs::write(file("csv"), curves.csv())?;
        curves.draw(&file("svg"))?;
        println!("\n{}\n{}", table(&curves.rows()), file("svg").display());
        page.push_str(&curves.section());
        // What is measured already is worth having if the rest is interrupted.
        std::fs::write(args.out.join("README.md"), page.trim_end().to_owned() + "\n")?;
    }
    println!("machine  {} (at the end)", process::machine());
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
