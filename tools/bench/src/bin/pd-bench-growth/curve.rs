//! Curves of figures over what grows: their table, their slope, their picture.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use pd_bench::figures::markdown;
use pd_bench::plot::{self, Graph, Panel, Series};

/// Figures by name, each a list of points.
pub struct Curves {
    pub name: &'static str,
    /// What grows.
    x: &'static str,
    figures: BTreeMap<String, Vec<(f64, f64)>>,
}

impl Curves {
    pub fn new(name: &'static str, x: &'static str) -> Self {
        Self { name, x, figures: BTreeMap::new() }
    }

    pub fn add(&mut self, figure: &str, x: f64, y: f64) {
        if y.is_finite() {
            self.figures.entry(figure.to_owned()).or_default().push((x, y));
        }
    }

    /// Prints the figures at `x`: a long run shows how far it is.
    pub fn row(&self, x: f64) {
        let at = |points: &Vec<(f64, f64)>| points.iter().rev().find(|point| point.0 == x).map(|point| point.1);
        let figures = self.figures.iter().filter_map(|(name, points)| Some(format!("{name} {:.2}", at(points)?)));
        eprintln!("{} {x}: {}", self.x, figures.collect::<Vec<_>>().join(", "));
    }

    /// A row for each figure: its values, and the slope of its logarithm over that of what grows, by least squares. 0 means
    /// that it does not grow, 1 that it is proportional.
    pub fn rows(&self) -> Vec<Vec<String>> {
        let mut xs: Vec<f64> = self.figures.values().flatten().map(|point| point.0).collect();
        xs.sort_by(f64::total_cmp);
        xs.dedup();
        let head = std::iter::once(self.x.to_owned()).chain(xs.iter().map(f64::to_string)).chain(["slope".to_owned()]);
        let rows = self.figures.iter().map(|(name, points)| {
            let value =
                |x: &f64| points.iter().find(|point| point.0 == *x).map_or(String::new(), |point| short(point.1));
            let slope = slope(points).map_or(String::new(), |slope| format!("{slope:.2}"));
            std::iter::once(name.clone()).chain(xs.iter().map(value)).chain([slope]).collect()
        });
        std::iter::once(head.collect()).chain(rows).collect()
    }

    /// The section of the page that shows all axes.
    pub fn section(&self) -> String {
        let Self { name, x, .. } = self;
        format!("## {}\n\n{}\n![Growth with {x}]({name}.svg)\n\n", capital(x), markdown(&self.rows()))
    }

    /// All points as CSV.
    pub fn csv(&self) -> String {
        let mut text = format!("figure,{},value\n", self.x);
        for (name, points) in &self.figures {
            for (x, y) in points {
                let _ = writeln!(text, "\"{name}\",{x},{y:.3}");
            }
        }
        text
    }

    /// Draws the figures: one graph for each unit, which is the part of the name before the comma.
    pub fn draw(&self, path: &Path) -> Result<()> {
        let mut graphs: BTreeMap<&str, Graph> = BTreeMap::new();
        let mut legend: Vec<(&str, usize)> = Vec::new();
        for (name, points) in &self.figures {
            let (unit, of) = name.split_once(", ").unwrap_or((name, "filter"));
            let colour =
                legend.iter().find(|(other, _)| *other == of).map(|(_, colour)| *colour).unwrap_or_else(|| {
                    let colour = [0, 2, 3, 5, 6][legend.len() % 5];
                    legend.push((of, colour));
                    colour
                });
            let graph = graphs.entry(unit).or_insert_with(|| Graph {
                title: unit.to_owned(),
                x: self.x.to_owned(),
                log_x: points.iter().all(|point| point.0 > 0.0),
                log_y: false,
                series: Vec::new(),
            });
            graph.series.push(Series { points: points.clone(), colour, joined: true });
        }
        let graphs: Vec<Graph> = graphs.into_values().collect();
        let slopes = self.figures.iter().filter_map(|(name, points)| {
            let slope = slope(points)?;
            // A bar begins at 0; its label says by how much a figure falls.
            let height = slope.max(0.0);
            Some(plot::Bar { label: format!("{name}: {slope:.2}"), value: height, range: (height, height), series: 1 })
        });
        let panel = Panel { title: "slope (log over log)".to_owned(), bars: slopes.collect() };
        plot::graphs(path, &format!("Growth with {}", self.x), &legend, &graphs, Some(&panel))
    }
}

/// Slope of log y over log x by least squares; nothing with fewer than two different points above 0.
fn slope(points: &[(f64, f64)]) -> Option<f64> {
    let logs: Vec<_> = points.iter().filter(|(x, y)| *x > 0.0 && *y > 0.0).map(|(x, y)| (x.ln(), y.ln())).collect();
    let count = logs.len() as f64;
    let (mean_x, mean_y) =
        (logs.iter().map(|p| p.0).sum::<f64>() / count, logs.iter().map(|p| p.1).sum::<f64>() / count);
    let (above, below) = logs.iter().fold((0.0, 0.0), |(above, below), (x, y)| {
        (above + (x - mean_x) * (y - mean_y), below + (x - mean_x) * (x - mean_x))
    });
    (below > 0.0).then(|| above / below)
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars).collect())
}

fn short(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slope_is_the_exponent() {
        let points = |exponent: f64| [1.0_f64, 10.0, 100.0].map(|x| (x, 3.0 * x.powf(exponent)));
        for exponent in [0.0, 0.5, 1.0, 2.0] {
            assert!((slope(&points(exponent)).unwrap() - exponent).abs() < 1e-9);
        }
        assert_eq!(slope(&[(1.0, 2.0)]), None);
        assert_eq!(slope(&[(0.0, 2.0), (1.0, 0.0)]), None);
    }
}
