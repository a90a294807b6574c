//! What came of a replay: table, CSV, picture.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use pd_bench::drive::Answer;
use pd_bench::figures::{percentile, table};
use pd_bench::plot::{self, Bar, Graph, Panel, Series};
use pd_bench::pods::Pool;
use pd_bench::process;
use pd_bench::trace::{Entry, Summary};

use crate::Args;
use crate::setup::Counted;

/// One request and what came of it; its text is compared and forgotten.
#[derive(Clone, Debug)]
pub struct Record {
    number: u64,
    due: Duration,
    late: Duration,
    input_tokens: u64,
    output_tokens: u64,
    prompt_tokens: u64,
    status: u16,
    reason: String,
    wrong: bool,
    first: Option<Duration>,
    whole: Duration,
}

impl Record {
    /// Compares and keeps the rest.
    pub fn new(number: u64, due: Duration, late: Duration, entry: &Entry, answer: Answer, expected: &str) -> Self {
        Self {
            number,
            due,
            late,
            input_tokens: entry.input_tokens,
            output_tokens: entry.output_tokens,
            prompt_tokens: answer.prompt_tokens,
            status: answer.status,
            wrong: answer.is_ok() && answer.text != expected,
            reason: answer.reason,
            first: answer.first,
            whole: answer.whole,
        }
    }

    /// Whether the answer came and is the right one.
    pub fn is_right(&self) -> bool {
        self.status == 200 && self.reason.is_empty() && !self.wrong
    }
}

fn sorted_us(times: impl Iterator<Item = Duration>) -> Vec<u64> {
    let mut times: Vec<u64> = times.map(|time| time.as_micros() as u64).collect();
    times.sort_unstable();
    times
}

fn share(part: u64, whole: u64) -> String {
    if whole == 0 { "–".to_owned() } else { format!("{:.1} %", 100.0 * part as f64 / whole as f64) }
}

fn row<const N: usize>(cells: [String; N]) -> Vec<String> {
    cells.into()
}

fn head<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).into()
}

/// Prints the tables and writes the files.
pub fn write(args: &Args, summary: &Summary, records: &[Record], counted: &Counted, elapsed: Duration) -> Result<()> {
    println!("machine  {}", process::machine());
    print_outcome(args, summary, records, elapsed);
    print_latency(records);
    print_decisions(counted, records.len() as u64);
    print_pools(summary, records, counted);
    std::fs::create_dir_all(&args.out)?;
    let path = args.out.join("requests.csv");
    std::fs::write(&path, csv(records)).with_context(|| path.display().to_string())?;
    println!("requests {}", path.display());
    let path = args.out.join("replay.svg");
    draw(&path, records, counted)?;
    println!("picture  {}", path.display());
    Ok(())
}

fn print_outcome(args: &Args, summary: &Summary, records: &[Record], elapsed: Duration) {
    let late = sorted_us(records.iter().map(|record| record.late));
    let right = records.iter().filter(|record| record.is_right()).count();
    let wrong = records.iter().filter(|record| record.wrong).count();
    let mut errors: BTreeMap<(u16, &str), u64> = BTreeMap::new();
    for record in records.iter().filter(|record| !record.is_right() && !record.wrong) {
        *errors.entry((record.status, &record.reason)).or_default() += 1;
    }
    let cut = records.iter().filter(|record| record.input_tokens == args.max_input).count();
    println!(
        "requests {} in {:.1} s ({:.1}/s): {right} right, {wrong} WRONG texts, {} errors",
        records.len(),
        elapsed.as_secs_f64(),
        records.len() as f64 / elapsed.as_secs_f64(),
        errors.values().sum::<u64>()
    );
    for ((status, reason), count) in &errors {
        println!("         {count} × {status} {reason}");
    }
    println!(
        "prompts  {} tokens on average, {cut} cut to {}; sent late: p50 {:.1} ms, p99 {:.1} ms, at most {:.1} ms\n",
        summary.input_tokens / summary.requests.max(1),
        args.max_input,
        percentile(&late, 0.5) as f64 / 1e3,
        percentile(&late, 0.99) as f64 / 1e3,
        percentile(&late, 1.0) as f64 / 1e3
    );
}

fn print_latency(records: &[Record]) {
    let mut rows = vec![head(["latency at the gateway, ms", "n", "p50", "p90", "p99", "max"])];
    let right = || records.iter().filter(|record| record.is_right());
    for (name, times) in [
        ("first token (streams)", sorted_us(right().filter_map(|record| record.first))),
        ("whole answer", sorted_us(right().map(|record| record.whole))),
    ] {
        let quantile = |share| format!("{:.1}", percentile(&times, share) as f64 / 1e3);
        rows.push(row([
            name.to_owned(),
            times.len().to_string(),
            quantile(0.5),
            quantile(0.9),
            quantile(0.99),
            quantile(1.0),
        ]));
    }
    println!("{}", table(&rows));
}

fn print_decisions(counted: &Counted, requests: u64) {
    if counted.filter.is_empty() {
        println!("decisions: unknown without Envoy's admin interface\n");
        return;
    }
    let mut rows = vec![head(["decision", "requests", "share"])];
    for (name, count) in counted.decisions().filter(|(_, count)| *count > 0) {
        rows.push(row([name.to_owned(), count.to_string(), share(count, requests)]));
    }
    let others = [
        ("prefill legs tried again", "pd_prefill_retries_total"),
        ("prefill given up", "pd_prefill_given_up_total"),
        ("prefill answers without parameters", "pd_kv_missing_total"),
        ("decode moved to an alternate", "pd_decode_moved_total"),
        ("decode unanswered", "pd_decode_unanswered_total"),
        ("host errors", "pd_host_errors_total"),
    ];
    for (name, metric) in others {
        let count = counted.filter(metric);
        if count > 0 {
            rows.push(row([name.to_owned(), count.to_string(), String::new()]));
        }
    }
    println!("{}", table(&rows));
    let (prompt, matched) = (counted.filter("pd_prompt_tokens_total"), counted.filter("pd_matched_tokens_total"));
    println!("the filter thought {} of prompt tokens cached where they were computed\n", share(matched, prompt));
}

fn print_pools(summary: &Summary, records: &[Record], counted: &Counted) {
    let mut rows = vec![head([
        "engines",
        "pods",
        "requests",
        "max/mean",
        "prompt tokens",
        "cached",
        "from prefill",
        "computed",
        "hit rate",
    ])];
    let mut computed = 0;
    for role in ["prefill", "decode", "both"] {
        let pool = Pool::of(counted.pods.iter().filter(|pod| pod.stats.role == role));
        if pool.pods == 0 {
            continue;
        }
        computed += pool.computed_tokens;
        rows.push(row([
            role.to_owned(),
            pool.pods.to_string(),
            pool.requests.to_string(),
            format!("{:.2}", pool.imbalance()),
            pool.prompt_tokens.to_string(),
            share(pool.cached_tokens, pool.prompt_tokens),
            share(pool.external_tokens, pool.prompt_tokens),
            share(pool.computed_tokens, pool.prompt_tokens),
            format!("{:.1} %", 100.0 * pool.hit_rate()),
        ]));
    }
    println!("{}", table(&rows));
    let prompt: u64 = records.iter().map(|record| record.prompt_tokens).sum();
    println!(
        "all engines together computed {} of the {prompt} prompt tokens that clients sent: hit rate {} (a cache without \
         bound: {})",
        share(computed, prompt),
        share(prompt.saturating_sub(computed), prompt),
        share(summary.seen_tokens, summary.input_tokens)
    );
    let all = Pool::of(counted.pods.iter());
    println!(
        "engines counted {} wrong texts and {} KV caches that nobody fetched\n",
        all.wrong_text, all.leases_expired
    );
}

fn csv(records: &[Record]) -> String {
    let mut text =
        "number,due_s,late_ms,input_tokens,output_tokens,status,reason,wrong_text,first_token_ms,whole_ms\n".to_owned();
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    for record in records {
        let first = record.first.map(|first| format!("{:.2}", ms(first))).unwrap_or_default();
        let _ = writeln!(
            text,
            "{},{:.3},{:.2},{},{},{},\"{}\",{},{first},{:.2}",
            record.number,
            record.due.as_secs_f64(),
            ms(record.late),
            record.input_tokens,
            record.output_tokens,
            record.status,
            record.reason.replace('"', "'"),
            record.wrong,
            ms(record.whole)
        );
    }
    text
}

/// Points that a cloud may have; of more, every so manieth is drawn.
const MAX_POINTS: usize = 4_000;

fn draw(path: &Path, records: &[Record], counted: &Counted) -> Result<()> {
    const FIRST: usize = 3;
    const WHOLE: usize = 0;
    let right = || records.iter().filter(|record| record.is_right());
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let every = records.len() / MAX_POINTS + 1;
    let first = |record: &Record| record.first.map(|first| (record.due.as_secs_f64(), ms(first)));
    let cloud = |points: Vec<(f64, f64)>, colour| Series {
        points: points.into_iter().step_by(every).collect(),
        colour,
        joined: false,
    };
    let over_time = Graph {
        title: "Latency over time, ms".to_owned(),
        x: "seconds since the begin".to_owned(),
        log_x: false,
        log_y: true,
        series: vec![
            cloud(right().map(|record| (record.due.as_secs_f64(), ms(record.whole))).collect(), WHOLE),
            cloud(right().filter_map(first).collect(), FIRST),
        ],
    };
    let steps = |times: Vec<u64>, colour| {
        let share = |i: usize| i as f64 / 200.0;
        let points = (0..=200).map(|i| (percentile(&times, share(i)) as f64 / 1e3, 100.0 * share(i)));
        Series { points: if times.is_empty() { Vec::new() } else { points.collect() }, colour, joined: true }
    };
    let distribution = Graph {
        title: "Answered within, % of requests".to_owned(),
        x: "ms".to_owned(),
        log_x: true,
        log_y: false,
        series: vec![
            steps(sorted_us(right().map(|record| record.whole)), WHOLE),
            steps(sorted_us(right().filter_map(|record| record.first)), FIRST),
        ],
    };
    let bar = |(role, number, requests): (&str, usize, u64)| Bar {
        label: format!("{} {number}", role.chars().next().unwrap_or('?')),
        value: requests as f64,
        range: (requests as f64, requests as f64),
        series: if role == "prefill" { 4 } else { 2 },
    };
    let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
    let bars = counted.pods.iter().map(|pod| {
        let number = numbers.entry(&pod.stats.role).or_default();
        *number += 1;
        bar((&pod.stats.role, *number, pod.stats.requests))
    });
    let panel = Panel { title: "Requests per engine".to_owned(), bars: bars.collect() };
    let legend = [("whole answer", WHOLE), ("first token", FIRST), ("decode engine", 2), ("prefill engine", 4)];
    let title = format!("Replay of {} requests", records.len());
    plot::graphs(path, &title, &legend, &[over_time, distribution], Some(&panel))
}
