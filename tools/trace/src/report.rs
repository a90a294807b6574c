//! What came of the runs: tables, CSV, picture.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use pd_bench::figures::table;
use pd_bench::plot::{self, Bar, Graph, Panel, Series};
use pd_trace::late::Classes;
use pd_trace::load::Pods;
use pd_trace::outcome::Outcome;
use pd_trace::rules::Policy;

/// What was simulated.
#[derive(Clone, Debug)]
pub struct Case {
    /// Name of the trace or the shape.
    pub load: String,
    /// Servers.
    pub pods: Pods,
    /// Share of what the prefill servers could do.
    pub share: f64,
    /// Priorities and fairness ids of the requests.
    pub classes: Classes,
}

impl Case {
    fn title(&self) -> String {
        let Pods { prefill, decode, cache_tokens, .. } = self.pods;
        let (load, cache, percent) = (&self.load, cache_tokens as f64 * 1e-6, self.share * 100.0);
        format!("{load}, {prefill}P{decode}D, {cache:.1}M tokens of cache per server, {percent:.0} % load")
    }
}

/// One run.
#[derive(Clone, Debug)]
pub struct Row {
    /// The policy that chose.
    pub policy: Policy,
    /// Of the load and of what is random in the policy.
    pub seed: u64,
    /// What came of it.
    pub outcome: Outcome,
}

/// A figure of a run.
type Figure = (&'static str, usize, fn(&Outcome, f64) -> f64);

/// Figures in the order of the columns, with the digits to print. The last is the bound of the one before.
const FIGURES: &[Figure] = &[
    ("hit %", 1, |outcome, _| outcome.hit_percent()),
    ("busy max/mean", 3, |outcome, _| outcome.busy_over_mean()),
    ("TTFT mean s", 3, |outcome, _| outcome.mean_ttft()),
    ("p50 s", 3, |outcome, _| outcome.ttft(0.5)),
    ("p90 s", 3, |outcome, _| outcome.ttft(0.9)),
    ("p99 s", 3, |outcome, _| outcome.ttft(0.99)),
    ("SLO %", 1, |outcome, slo| outcome.slo_percent(slo)),
    ("TPOT p99 ms", 2, |outcome, _| outcome.tpot_ms(0.99)),
    ("moved/new", 2, |outcome, _| outcome.moved_over_new()),
    ("bound", 2, |outcome, _| outcome.least_moved_over_new()),
];
const HITS: usize = 0;
const MEAN: usize = 2;
const P90: usize = 4;
const P99: usize = 5;

/// Medians over the seeds.
fn medians(rows: &[(usize, Row)], index: usize, policy: Policy, slo: f64) -> Option<Vec<f64>> {
    let runs: Vec<&Outcome> =
        rows.iter().filter(|(of, row)| *of == index && row.policy == policy).map(|(_, row)| &row.outcome).collect();
    (!runs.is_empty()).then(|| FIGURES.iter().map(|figure| median(runs.iter().map(|run| figure.2(run, slo)))).collect())
}

/// The middle one, or the mean of the two in the middle; 0 without any.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = |index: usize| values.get(index).copied().unwrap_or(0.0);
    match values.len() {
        0 => 0.0,
        count => 0.5 * (middle((count - 1) / 2) + middle(count / 2)),
    }
}

fn policies(rows: &[(usize, Row)]) -> Vec<Policy> {
    let mut policies: Vec<Policy> = rows.iter().map(|(_, row)| row.policy).collect();
    policies.sort_unstable();
    policies.dedup();
    policies
}

/// Prints a table for each case: medians over the seeds, and shares of those of the row `greedy-true`.
pub fn print(cases: &[Case], rows: &[(usize, Row)], slo: f64) {
    for (index, case) in cases.iter().enumerate() {
        let base = medians(rows, index, Policy::GreedyTrue, slo);
        let mut lines = vec![vec!["policy".to_owned()]];
        lines[0].extend(FIGURES.iter().map(|(name, ..)| (*name).to_owned()));
        lines[0].extend(["hits ×", "mean ×", "p90 ×", "p99 ×"].map(str::to_owned));
        for policy in policies(rows) {
            let Some(medians) = medians(rows, index, policy, slo) else { continue };
            let mut line = vec![policy.name()];
            line.extend(medians.iter().zip(FIGURES).map(|(median, (_, digits, _))| format!("{median:.digits$}")));
            if let Some(base) = &base {
                line.extend([HITS, MEAN, P90, P99].map(|figure| match base[figure] {
                    0.0 => "–".to_owned(),
                    base => format!("{:.3}", medians[figure] / base),
                }));
            }
            lines.push(line);
        }
        let requests = rows.iter().find(|(of, _)| *of == index).map_or(0, |(_, row)| row.outcome.requests);
        println!("{}, {requests} requests measured per run\n{}", case.title(), table(&lines));
        print_classes(case, index, rows);
    }
}

/// Prints the results for each priority and fairness id, for policies that hold requests; nothing if the load has
/// neither.
fn print_classes(case: &Case, index: usize, rows: &[(usize, Row)]) {
    if case.classes == Classes::default() || case.classes == (Classes { high: 0.0, fairness_ids: 1 }) {
        return;
    }
    let runs = rows.iter().filter(|(of, row)| *of == index && matches!(row.policy, Policy::Late | Policy::LateTrue));
    for (_, Row { policy, seed, outcome }) in runs {
        println!(
            "{}, seed {seed}: high priority TTFT p50 {:.3} s, p99 {:.3} s; Jain's index of {} fairness ids {:.4}; idle while a \
             request waits {:.1} of {:.0} s",
            policy.name(),
            outcome.high_ttft(0.5),
            outcome.high_ttft(0.99),
            case.classes.fairness_ids,
            outcome.fairness(),
            outcome.idle_seconds,
            outcome.busy.iter().sum::<f64>(),
        );
    }
}

/// Writes every run as a line of CSV, and a picture of the medians.
///
/// # Errors
/// When a file cannot be written.
pub fn save(out: &Path, cases: &[Case], rows: &[(usize, Row)], slo: f64) -> Result<()> {
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let mut csv = "load,share,prefill,decode,cache_tokens,policy,seed,requests".to_owned();
    let key = |name: &str| name.replace('%', "percent").replace([' ', '/'], "_").to_lowercase();
    FIGURES.iter().for_each(|(name, ..)| _ = write!(csv, ",{}", key(name)));
    csv.push('\n');
    for (index, row) in rows {
        let Case { load, pods, share, .. } = &cases[*index];
        let (policy, seed, requests) = (row.policy.name(), row.seed, row.outcome.requests);
        let _ = write!(csv, "{load},{share},{},{},{},", pods.prefill, pods.decode, pods.cache_tokens);
        let _ = write!(csv, "{policy},{seed},{requests}");
        FIGURES.iter().for_each(|(.., figure)| _ = write!(csv, ",{:.6}", figure(&row.outcome, slo)));
        csv.push('\n');
    }
    let path = out.join("sim.csv");
    std::fs::write(&path, csv).with_context(|| path.display().to_string())?;
    println!("{}", path.display());
    for (index, case) in cases.iter().enumerate() {
        let Pods { prefill, decode, cache_tokens, .. } = case.pods;
        let path = out.join(format!("{}-{:.0}-{prefill}x{decode}-{cache_tokens}.svg", case.load, case.share * 100.0));
        picture(&path, case, index, rows, slo)?;
        println!("{}", path.display());
    }
    pictures_by_load(out, cases, rows, slo)
}

/// Writes a picture of the time to the first token by load for each trace and fleet that has three loads or more.
fn pictures_by_load(out: &Path, cases: &[Case], rows: &[(usize, Row)], slo: f64) -> Result<()> {
    let fleet = |case: &Case| (case.load.clone(), case.pods.prefill, case.pods.decode, case.pods.cache_tokens);
    let mut fleets: BTreeMap<_, Vec<(usize, f64)>> = BTreeMap::new();
    for (index, case) in cases.iter().enumerate() {
        fleets.entry(fleet(case)).or_default().push((index, case.share * 100.0));
    }
    let policies = policies(rows);
    let names: Vec<String> = policies.iter().map(|policy| policy.name()).collect();
    let legend: Vec<(&str, usize)> = names.iter().enumerate().map(|(colour, name)| (name.as_str(), colour)).collect();
    for ((load, prefill, decode, cache), loads) in fleets.into_iter().filter(|(_, loads)| loads.len() > 2) {
        let points = |policy, figure: usize| {
            let point = |(index, load): &(usize, f64)| Some((*load, medians(rows, *index, policy, slo)?[figure]));
            loads.iter().filter_map(point).collect()
        };
        let graph = |(figure, name): (usize, &str)| Graph {
            title: format!("seconds to the first token, {name}"),
            x: "load in %".to_owned(),
            log_x: false,
            log_y: true,
            series: (policies.iter().enumerate())
                .map(|(colour, policy)| Series { points: points(*policy, figure), colour, joined: true })
                .collect(),
        };
        let path = out.join(format!("{load}-by-load-{prefill}x{decode}-{cache}.svg"));
        let title = format!("{load}, {prefill}P{decode}D, {:.1}M tokens of cache per server", cache as f64 * 1e-6);
        plot::graphs(&path, &title, &legend, &[(MEAN, "mean"), (P90, "p90"), (P99, "p99")].map(graph), None)?;
        println!("{}", path.display());
    }
    Ok(())
}

/// Colours of the bars: ours, what knows everything, the field's.
const LEGEND: [(&str, usize); 3] = [("knows everything", 1), ("pd-core", 5), ("the field's rules", 2)];

fn picture(path: &Path, case: &Case, index: usize, rows: &[(usize, Row)], slo: f64) -> Result<()> {
    let panel = |figure: usize| {
        let (name, digits, of) = FIGURES[figure];
        let bars = policies(rows).into_iter().filter_map(|policy| {
            let value = medians(rows, index, policy, slo)?[figure];
            let runs = rows.iter().filter(|(case, row)| *case == index && row.policy == policy);
            let range = runs
                .map(|(_, row)| of(&row.outcome, slo))
                .fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)));
            let series = match policy {
                Policy::NoWait
                | Policy::Pooled
                | Policy::PooledShortest
                | Policy::LateTrue
                | Policy::GreedyTrue
                | Policy::GreedyLoad => 1,
                Policy::PdCore | Policy::Late => 5,
                _ => 2,
            };
            Some(Bar { label: format!("{} {value:.digits$}", policy.name()), value, range, series })
        });
        let title = if [P90, P99].contains(&figure) { format!("TTFT {name}") } else { name.to_owned() };
        Panel { title, bars: bars.collect() }
    };
    plot::bars(path, &case.title(), &LEGEND, &[panel(HITS), panel(P90), panel(P99)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_or_between_the_two() {
        let of = |values: &[f64]| median(values.iter().copied());
        assert_eq!((of(&[]), of(&[7.0]), of(&[9.0, 1.0]), of(&[100.0, 1.0, 2.0])), (0.0, 7.0, 5.0, 2.0));
    }
}
