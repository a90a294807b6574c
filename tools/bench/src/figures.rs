//! Percentiles, medians and how they are printed.

/// Value at a share (0 to 1) of sorted values, by nearest rank; 0 of none.
#[must_use]
pub fn percentile(sorted: &[u64], share: f64) -> u64 {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(0)
}

/// Several measurements of one figure.
#[derive(Clone, Debug, Default)]
pub struct Sample(Vec<f64>);

impl Sample {
    /// Adds a measurement; what is not a finite number is left out.
    pub fn push(&mut self, value: f64) {
        if value.is_finite() {
            let index = self.0.partition_point(|other| *other < value);
            self.0.insert(index, value);
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The middle one, or the mean of the two in the middle; not a number if there are none.
    #[must_use]
    pub fn median(&self) -> f64 {
        let n = self.0.len();
        match (self.0.get(n / 2), self.0.get(n.saturating_sub(1) / 2)) {
            (Some(upper), Some(lower)) => f64::midpoint(*upper, *lower),
            _ => f64::NAN,
        }
    }

    /// The smallest; not a number if there are none.
    #[must_use]
    pub fn min(&self) -> f64 {
        self.0.first().copied().unwrap_or(f64::NAN)
    }

    /// The largest; not a number if there are none.
    #[must_use]
    pub fn max(&self) -> f64 {
        self.0.last().copied().unwrap_or(f64::NAN)
    }

    /// `median (min–max)`.
    #[must_use]
    pub fn show(&self, decimals: usize) -> String {
        format!("{:.decimals$} ({:.decimals$}–{:.decimals$})", self.median(), self.min(), self.max())
    }
}

impl FromIterator<f64> for Sample {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        let mut sample = Self::default();
        values.into_iter().for_each(|value| sample.push(value));
        sample
    }
}

/// Lines a table up: the first column to the left, the others to the right. The first row is the head.
#[must_use]
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<_> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for (i, row) in rows.iter().enumerate() {
        let cells = row.iter().zip(&widths).enumerate();
        let line: Vec<_> =
            cells.map(|(j, (cell, w))| if j == 0 { format!("{cell:<w$}") } else { format!("{cell:>w$}") }).collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
        if i == 0 {
            text.push_str(&widths.iter().map(|w| "─".repeat(*w)).collect::<Vec<_>>().join("  "));
            text.push('\n');
        }
    }
    text
}

/// The same as a table in Markdown.
#[must_use]
pub fn markdown(rows: &[Vec<String>]) -> String {
    let mut text = String::new();
    for (i, row) in rows.iter().enumerate() {
        let cells: Vec<String> = row.iter().map(|cell| cell.replace('|', "\\|")).collect();
        text.push_str(&format!("| {} |\n", cells.join(" | ")));
        if i == 0 {
            text.push_str(&format!("|---|{}\n", "---:|".repeat(row.len().saturating_sub(1))));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<u64> = (1..=100).collect();
        assert_eq!(percentile(&values, 0.5), 50);
        assert_eq!(percentile(&values, 0.99), 99);
        assert_eq!(percentile(&values, 1.0), 100);
        assert_eq!(percentile(&values, 0.0), 1);
        assert_eq!(percentile(&[7], 0.99), 7);
        assert_eq!(percentile(&[], 0.5), 0);
    }

    #[test]
    fn a_median_is_the_middle() {
        let median = |values: &[f64]| values.iter().copied().collect::<Sample>().median();
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[5.0]), 5.0);
        assert!(median(&[]).is_nan() && median(&[f64::NAN]).is_nan());
    }

    #[test]
    fn tables_line_up() {
        let row = |a: &str, b: &str| vec![a.to_owned(), b.to_owned()];
        assert_eq!(table(&[row("size", "µs"), row("a", "10")]), "size  µs\n────  ──\na     10\n");
        assert_eq!(markdown(&[row("size", "µs"), row("a|b", "10")]), "| size | µs |\n|---|---:|\n| a\\|b | 10 |\n");
    }
}
