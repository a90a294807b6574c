//! What a request may cost: `tests/host/budgets.csv`, one figure in a line. With `PD_BUDGETS=write` (`make budgets`) a test
//! writes what it measures into that file.

use std::path::PathBuf;
use std::sync::Mutex;

use crate::places;

/// Tests of one program write the file one after the other.
static WRITING: Mutex<()> = Mutex::new(());

fn file() -> PathBuf {
    places::root().join("tests/host/budgets.csv")
}

/// Checks that a figure is at most its budget times `tolerance`.
///
/// # Panics
/// When the figure is above that, or when the file has no such line.
pub fn check(request: &str, what: &str, measured: f64, tolerance: f64) {
    let path = file();
    let _writing = WRITING.lock();
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let head = format!("{request},{what},");
    if std::env::var_os("PD_BUDGETS").is_some_and(|value| value == "write") {
        let mut lines: Vec<_> = text.lines().filter(|line| !line.starts_with(&head)).map(str::to_owned).collect();
        lines.push(format!("{head}{measured}"));
        lines.get_mut(1..).unwrap_or_default().sort();
        std::fs::write(&path, lines.join("\n") + "\n").expect("the budgets can be written");
        return;
    }
    let budget = text.lines().find_map(|line| line.strip_prefix(&head)?.parse::<f64>().ok());
    let budget = budget.unwrap_or_else(|| panic!("{} has no budget for {head} (`make budgets`)", path.display()));
    println!("{request}: {measured} {what}, budget {budget}");
    assert!(
        measured <= budget * tolerance,
        "{request}: {measured} {what}, budget {budget}. Find what costs more; `make budgets` raises the budget."
    );
}
