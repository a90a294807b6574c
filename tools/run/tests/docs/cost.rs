//! The tables of what a request costs, from `docs/cost.csv`: a new measurement replaces that file, and `make docs` the tables.

use std::fmt::Write;

use crate::markdown::root;

/// What was measured, and where.
struct Cost {
    note: String,
    columns: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Cost {
    fn read() -> Self {
        let text = std::fs::read_to_string(root().join("docs/cost.csv")).unwrap();
        let mut lines = text.lines();
        let note = lines.next().and_then(|line| line.strip_prefix("# ")).expect("a note").to_owned();
        let mut rows: Vec<Vec<String>> =
            lines.map(|line| line.split(',').map(|cell| cell.trim().to_owned()).collect()).collect();
        let columns = rows.remove(0);
        assert!(!rows.is_empty() && rows.iter().all(|row| row.len() == columns.len()), "{text}");
        Self { note, columns, rows }
    }

    /// The note, and the table of these columns and of the quotient of the last one and the third but last.
    fn table(&self, columns: &[usize]) -> String {
        let mut text = format!("{}\n\n", self.note);
        let heads: Vec<&str> = columns.iter().map(|column| self.columns[*column].as_str()).collect();
        let _ = writeln!(text, "| {} | two legs ÷ plain |", heads.join(" | "));
        let _ = writeln!(text, "|{}", "---|".repeat(columns.len() + 1));
        for row in &self.rows {
            let cells: Vec<&str> = columns.iter().map(|column| row[*column].as_str()).collect();
            let number = |column: &str| -> f64 {
                let index = self.columns.iter().position(|name| name == column).expect(column);
                row[index].parse().unwrap_or_else(|_| panic!("{column} is no number: {row:?}"))
            };
            let quotient = number("two legs") / number("plain two requests");
            let _ = writeln!(text, "| {} | {quotient:.2} |", cells.join(" | "));
        }
        text
    }
}

/// Both tables, by the names of their places: all columns, and those of the README.
pub fn tables() -> [(&'static str, String); 2] {
    let cost = Cost::read();
    let all: Vec<usize> = (0..cost.columns.len()).collect();
    [("cost of a request", cost.table(&all)), ("cost", cost.table(&[0, 1, 2, 3, 5]))]
}
