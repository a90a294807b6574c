//! What was measured, and how it is shown.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use pd_bench::client::Outcome;
use pd_bench::figures::{Sample, markdown, percentile};
use pd_bench::plot::{self, Bar, COLOURS, Panel};
use pd_bench::prompt::COMPLETION_TOKENS;

use crate::check::Checked;
use crate::gateways::Gateway;

/// What requests look like, and how many are under way at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Load {
    /// Bytes of the body.
    pub bytes: usize,
    pub stream: bool,
    pub connections: usize,
}

/// Figures of one gateway under one load, one of each round.
#[derive(Default)]
pub struct Cell {
    rate: Sample,
    cpu_us: Sample,
    p50_us: Sample,
    p99_us: Sample,
    resident_mb: Sample,
    /// What the engines saw of one request before.
    pub checked: Option<Checked>,
    /// Why there are no figures.
    pub failure: Option<String>,
}

impl Cell {
    /// Takes a round in: its requests, the CPU seconds of the gateway's processes and their memory.
    pub fn add(&mut self, outcome: &Outcome, cpu_seconds: f64, resident_kb: u64) {
        let requests = outcome.requests as f64;
        self.rate.push(requests / outcome.elapsed.as_secs_f64());
        self.cpu_us.push(cpu_seconds * 1e6 / requests);
        self.p50_us.push(percentile(&outcome.latencies, 0.5) as f64 / 1e3);
        self.p99_us.push(percentile(&outcome.latencies, 0.99) as f64 / 1e3);
        self.resident_mb.push(resident_kb as f64 / 1_024.0);
    }
}

/// All figures.
#[derive(Default)]
pub struct Cells(BTreeMap<(Load, Gateway), Cell>);

/// What a reader of the page needs to know.
const ABOUT: &str = "All gateways send their requests to the same engine simulators, which answer at once with 128 tokens. CPU is \
                     that of all processes between the client and the engines: Envoy has one worker, routers have as many \
                     threads as they start. The client and the simulators share one core, so they limit the requests per second \
                     of long prompts. Times are those beyond a request that goes to a decode server directly. \"KV moved\" says \
                     whether the decode server used the prefill server's KV cache, \"body kept\" how the client's body arrived \
                     there: byte for byte but for one insertion, with the same values, or changed.";

const HEAD: [&str; 13] = [
    "gateway",
    "bytes",
    "answer",
    "connections",
    "requests/s",
    "CPU µs/request",
    "spread",
    "+p50 µs",
    "+p99 µs",
    "+µs/token",
    "MiB",
    "KV moved",
    "body kept",
];

impl Cells {
    pub fn cell(&mut self, load: Load, gateway: Gateway) -> &mut Cell {
        self.0.entry((load, gateway)).or_default()
    }

    /// The table of one load, or of all.
    pub fn rows(&self, only: Option<Load>) -> Vec<Vec<String>> {
        let cells = self.0.iter().filter(|((load, _), _)| only.is_none_or(|only| only == *load));
        let rows = cells.map(|((load, gateway), cell)| self.row(*load, *gateway, cell));
        std::iter::once(HEAD.map(str::to_owned).to_vec()).chain(rows).collect()
    }

    fn row(&self, load: Load, gateway: Gateway, cell: &Cell) -> Vec<String> {
        let direct = self.0.get(&(load, Gateway::Direct));
        let added = |figure: fn(&Cell) -> &Sample| {
            direct.map_or(f64::NAN, |direct| median(cell, figure) - median(direct, figure))
        };
        let answer = if load.stream { "SSE" } else { "JSON" };
        let mut row =
            vec![gateway.name().to_owned(), load.bytes.to_string(), answer.to_owned(), load.connections.to_string()];
        if let Some(failure) = &cell.failure {
            row.push(failure.clone());
            row.resize(HEAD.len(), String::new());
            return row;
        }
        row.extend([
            number(cell.rate.median(), 0),
            number(cell.cpu_us.median(), 0),
            format!("{:.0}–{:.0}", cell.cpu_us.min(), cell.cpu_us.max()),
            number(added(|cell| &cell.p50_us), 0),
            number(added(|cell| &cell.p99_us), 0),
            number(self.token_us(load, gateway), 2),
            number(cell.resident_mb.median(), 0),
        ]);
        let moved = cell.checked.and_then(|checked| checked.kv_moved);
        row.push(moved.map_or(String::new(), |moved| if moved { "yes" } else { "NO" }.to_owned()));
        row.push(cell.checked.map_or(String::new(), |checked| checked.body.name().to_owned()));
        row
    }

    /// What a gateway adds to each token of a stream, beyond what it adds to an answer that comes as a whole.
    fn token_us(&self, load: Load, gateway: Gateway) -> f64 {
        let p50 = |stream: bool, gateway: Gateway| {
            let cell = self.0.get(&(Load { stream, ..load }, gateway));
            cell.map_or(f64::NAN, |cell| cell.p50_us.median())
        };
        let added = |stream: bool| p50(stream, gateway) - p50(stream, Gateway::Direct);
        if load.stream { (added(true) - added(false)) / COMPLETION_TOKENS as f64 } else { f64::NAN }
    }

    /// For each load: CPU of the best other router behind Envoy, divided by that of the filter with two legs.
    pub fn advantage(&self) -> Vec<Vec<String>> {
        let mut rows = vec![
            ["bytes", "answer", "connections", "best router behind Envoy", "its CPU ÷ the filter's"]
                .map(str::to_owned)
                .to_vec(),
        ];
        for load in self.loads() {
            let peers = [Gateway::EnvoyVllmRouter, Gateway::EnvoySglangRouter, Gateway::EnvoySmg].into_iter();
            let measured =
                peers.filter_map(|peer| Some((median(self.0.get(&(load, peer))?, |cell| &cell.cpu_us), peer)));
            let best = measured.filter(|(cpu, _)| cpu.is_finite()).min_by(|a, b| a.0.total_cmp(&b.0));
            let own = self.0.get(&(load, Gateway::TwoLegs)).map(|cell| cell.cpu_us.median());
            let (Some((cpu, peer)), Some(own)) = (best, own) else { continue };
            rows.push(vec![
                load.bytes.to_string(),
                if load.stream { "SSE" } else { "JSON" }.to_owned(),
                load.connections.to_string(),
                peer.name().to_owned(),
                format!("{:.2}", cpu / own),
            ]);
        }
        rows
    }

    /// The page that shows all loads, with the picture of [`Cells::draw`].
    pub fn page(&self, machine: &str, rounds: usize, seconds: f64) -> String {
        let mut text = format!(
            "# Beside other routers\n\n`make bench-peers` wrote this page on a machine with: {machine}. Medians of {rounds} rounds \
             of {seconds} s. {ABOUT}\n\n![CPU per request](peers.svg)\n\n## CPU of the best other router, relative to the \
             filter\n\n{}\n",
            markdown(&self.advantage())
        );
        for load in self.loads() {
            let answer = if load.stream { "streams" } else { "JSON" };
            let Load { bytes, connections, .. } = load;
            let _ = writeln!(text, "## {}, {answer}, {connections} connections\n", size(bytes));
            let _ = writeln!(text, "{}", markdown(&self.rows(Some(load))));
        }
        text.trim_end().to_owned() + "\n"
    }

    fn loads(&self) -> BTreeSet<Load> {
        self.0.keys().map(|(load, _)| *load).collect()
    }

    /// All rows as CSV.
    pub fn csv(&self) -> String {
        let mut text = String::new();
        for row in self.rows(None) {
            let cells: Vec<String> = row.iter().map(|cell| format!("\"{}\"", cell.replace('"', "'"))).collect();
            let _ = writeln!(text, "{}", cells.join(","));
        }
        text
    }

    /// Draws CPU per request: a panel for each size, answers as JSON, so many connections.
    pub fn draw(&self, path: &Path, connections: usize) -> Result<()> {
        let mut panels: BTreeMap<usize, Vec<Bar>> = BTreeMap::new();
        for ((load, gateway), cell) in &self.0 {
            if load.stream || load.connections != connections || *gateway == Gateway::Direct || cell.cpu_us.is_empty() {
                continue;
            }
            let cpu = &cell.cpu_us;
            panels.entry(load.bytes).or_default().push(Bar {
                label: format!("{}: {:.0}", gateway.name(), cpu.median()),
                value: cpu.median(),
                range: (cpu.min(), cpu.max()),
                series: series(*gateway),
            });
        }
        let panels: Vec<_> = panels.into_iter().map(|(bytes, bars)| Panel { title: size(bytes), bars }).collect();
        let title =
            format!("CPU of all processes between client and engines, µs per request, {connections} connections");
        plot::bars(path, &title, &[("Envoy", 0), ("Envoy with the filter", 3), ("other routers", 5)], &panels)
    }
}

fn series(gateway: Gateway) -> usize {
    let index = match gateway {
        Gateway::Direct | Gateway::Plain => 0,
        _ if gateway.router().is_some() => 5,
        _ => 3,
    };
    index % COLOURS.len()
}

fn size(bytes: usize) -> String {
    if bytes < 1_000 { format!("{bytes} B") } else { format!("{} kB", bytes / 1_000) }
}

fn median(cell: &Cell, figure: fn(&Cell) -> &Sample) -> f64 {
    figure(cell).median()
}

fn number(value: f64, decimals: usize) -> String {
    if value.is_finite() { format!("{value:.decimals$}") } else { String::new() }
}
