//! What was measured, round by round, and how it is shown.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use pd_bench::client::Outcome;
use pd_bench::figures::{Sample, percentile};
use pd_bench::plot::{self, Bar, Panel};
use pd_bench::process::Usage;

use crate::variant::Variant;

/// One round of one variant at one size.
#[derive(Default)]
pub struct Round {
    /// Under load.
    pub loaded: Outcome,
    /// What Envoy took for that.
    pub envoy: Usage,
    /// With one connection.
    pub alone: Outcome,
}

impl Round {
    /// CPU microseconds per request.
    fn cpu_us(&self) -> f64 {
        self.envoy.cpu.as_secs_f64() * 1e6 / self.loaded.requests as f64
    }
}

pub type Rounds = BTreeMap<(usize, Variant), Vec<Round>>;

/// Figures of a variant and their comparison with its floor, round by round.
struct Figures {
    rate: Sample,
    busy: Sample,
    waited: Sample,
    cpu: Sample,
    ratio: Sample,
    extra: Sample,
    p50: Sample,
    p99: Sample,
    added_p50: Sample,
    added_p99: Sample,
}

fn figures(rounds: &Rounds, size: usize, variant: Variant) -> Option<Figures> {
    let own = rounds.get(&(size, variant))?;
    let floor = rounds.get(&(size, variant.floor()))?;
    let of = |figure: &dyn Fn(&Round) -> f64| own.iter().map(figure).collect::<Sample>();
    let pair = |figure: &dyn Fn(&Round, &Round) -> f64| {
        own.iter().zip(floor).map(|(own, floor)| figure(own, floor)).collect::<Sample>()
    };
    let quantile = |round: &Round, share: f64| percentile(&round.alone.latencies, share) as f64 / 1e3;
    Some(Figures {
        rate: of(&|round| round.loaded.requests as f64 / round.loaded.elapsed.as_secs_f64()),
        busy: of(&|round| 100.0 * round.envoy.cpu.as_secs_f64() / round.loaded.elapsed.as_secs_f64()),
        waited: of(&|round| 100.0 * round.envoy.waited.as_secs_f64() / round.loaded.elapsed.as_secs_f64()),
        cpu: of(&Round::cpu_us),
        ratio: pair(&|own, floor| own.cpu_us() / floor.cpu_us()),
        extra: pair(&|own, floor| own.cpu_us() - floor.cpu_us()),
        p50: of(&|round| quantile(round, 0.5)),
        p99: of(&|round| quantile(round, 0.99)),
        added_p50: pair(&|own, floor| quantile(own, 0.5) - quantile(floor, 0.5)),
        added_p99: pair(&|own, floor| quantile(own, 0.99) - quantile(floor, 0.99)),
    })
}

fn head(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

pub fn rows(rounds: &Rounds, sizes: &[usize], variants: &[Variant]) -> Vec<Vec<String>> {
    let mut rows = vec![head(&[
        "variant",
        "bytes",
        "requests/s",
        "busy %",
        "waited %",
        "CPU ms per 1,000",
        "× floor",
        "µs more",
        "p50 µs",
        "p99 µs",
        "+p50 µs",
        "+p99 µs",
    ])];
    for &size in sizes {
        for &variant in variants {
            let Some(figures) = figures(rounds, size, variant) else { continue };
            let compared = variant != variant.floor();
            let only = |text: String| if compared { text } else { String::new() };
            rows.push(vec![
                variant.name().to_owned(),
                size.to_string(),
                format!("{:.0}", figures.rate.median()),
                format!("{:.0}", figures.busy.median()),
                format!("{:.0}", figures.waited.median()),
                figures.cpu.show(1),
                only(figures.ratio.show(2)),
                only(figures.extra.show(0)),
                format!("{:.0}", figures.p50.median()),
                format!("{:.0}", figures.p99.median()),
                only(format!("{:.0}", figures.added_p50.median())),
                only(format!("{:.0}", figures.added_p99.median())),
            ]);
        }
    }
    rows
}

pub fn summary(rounds: &Rounds, sizes: &[usize], variants: &[Variant]) -> Vec<Vec<String>> {
    let mut rows = vec![head(&["variant", "bytes", "× floor", "target", "µs more", "target"])];
    for &size in sizes {
        for &variant in variants.iter().filter(|variant| **variant != variant.floor()) {
            let Some(figures) = figures(rounds, size, variant) else { continue };
            let verdict = |value: f64, target: Option<f64>| match target {
                Some(target) if value <= target => format!("≤ {target} met"),
                Some(target) => format!("≤ {target} MISSED"),
                None => String::new(),
            };
            rows.push(vec![
                variant.name().to_owned(),
                size.to_string(),
                figures.ratio.show(2),
                verdict(figures.ratio.median(), variant.target(size)),
                figures.extra.show(0),
                verdict(figures.extra.median(), variant.target_us(size)),
            ]);
        }
    }
    rows
}

pub fn csv(rounds: &Rounds) -> String {
    let mut text =
        "bytes,variant,round,requests,seconds,cpu_ms_per_1000,p50_us_loaded,p99_us_loaded,p50_us,p99_us\n".to_owned();
    for ((size, variant), rounds) in rounds {
        for (i, round) in rounds.iter().enumerate() {
            let us = |values: &[u64], share| percentile(values, share) as f64 / 1e3;
            let (loaded, alone) = (&round.loaded.latencies, &round.alone.latencies);
            let _ = writeln!(
                text,
                "{size},\"{}\",{i},{},{:.3},{:.2},{:.1},{:.1},{:.1},{:.1}",
                variant.name(),
                round.loaded.requests,
                round.loaded.elapsed.as_secs_f64(),
                round.cpu_us(),
                us(loaded, 0.5),
                us(loaded, 0.99),
                us(alone, 0.5),
                us(alone, 0.99),
            );
        }
    }
    text
}

pub fn draw(path: &Path, rounds: &Rounds, sizes: &[usize], variants: &[Variant]) -> Result<()> {
    let bar = |size: usize, variant: Variant| {
        let figures = figures(rounds, size, variant)?;
        let (cpu, ratio) = (figures.cpu, figures.ratio);
        let compared = variant != variant.floor();
        let label = if compared { format!("× {:.2}", ratio.median()) } else { format!("{:.0}", cpu.median()) };
        let series = Variant::ALL.iter().position(|other| *other == variant)?;
        Some(Bar { label, value: cpu.median(), range: (cpu.min(), cpu.max()), series })
    };
    let panel = |&size: &usize| Panel {
        title: if size < 1_000 { format!("{size} B") } else { format!("{} kB", size / 1_000) },
        bars: variants.iter().filter_map(|variant| bar(size, *variant)).collect(),
    };
    let all = Variant::ALL.iter().enumerate().filter(|(_, variant)| variants.contains(variant));
    let legend: Vec<_> = all.map(|(series, variant)| (variant.name(), series)).collect();
    let title = "CPU of Envoy, ms per 1,000 requests, by size of the request's body; × is the ratio to plain Envoy";
    plot::bars(path, title, &legend, &sizes.iter().map(panel).collect::<Vec<_>>())
}
