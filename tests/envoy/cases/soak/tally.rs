//! What became of each request.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};

use pd_sim::expected_text;
use pd_support::client::{Answer, Broken};
use pd_tests::answer::{is_done, text};

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// 200, whole, with the text that one server would have given.
    Right,
    /// An error with a status, and a body that says why.
    Refused,
    /// 200, then an error: an error event, or a connection that ends before the answer does.
    Broken,
    /// The client left before the end, as it meant to.
    Left,
    /// Another text. Never.
    Wrong,
    /// 200 that looks whole and is not. Never.
    Cut,
    /// An error without a word. Never.
    Mute,
    /// No answer in time. Never.
    Unanswered,
}

/// All of them, for the table.
const ENDS: [End; 8] =
    [End::Right, End::Refused, End::Broken, End::Left, End::Wrong, End::Cut, End::Mute, End::Unanswered];
/// Answers that no disturbance excuses.
const NEVER: [End; 4] = [End::Wrong, End::Cut, End::Mute, End::Unanswered];

/// Judges an answer to a request with this body.
pub fn judge(body: &str, is_stream: bool, answer: &Result<Answer, Broken>) -> End {
    let Ok(answer) = answer else { return End::Broken };
    if answer.status != 200 {
        return if answer.body.is_empty() { End::Mute } else { End::Refused };
    }
    let (got, expected) = (text(&answer.body), expected_text("sim", body));
    let says_error = String::from_utf8_lossy(&answer.body).contains("\"error\":");
    match () {
        () if got == expected && (!is_stream || is_done(&answer.body)) => End::Right,
        () if says_error && expected.starts_with(&got) => End::Broken,
        () if expected.starts_with(&got) => End::Cut,
        () => End::Wrong,
    }
}

/// Ends of requests, by what was going on.
#[derive(Debug, Default)]
pub struct Tally(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    of: BTreeMap<&'static str, BTreeMap<End, u64>>,
    /// Statuses and reasons of errors.
    refusals: BTreeMap<String, u64>,
    /// The first answers that should not be.
    examples: Vec<String>,
}

impl Tally {
    /// Counts the end of a request for each disturbance that there was, and once in all.
    pub fn count(&self, disturbances: &[&'static str], end: End, answer: &Result<Answer, Broken>, about: &str) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for disturbance in disturbances.iter().chain(&["all"]) {
            *counts.of.entry(disturbance).or_default().entry(end).or_default() += 1;
        }
        if let (End::Refused, Ok(answer)) = (end, answer) {
            let reason = answer.reason().map_or_else(|| "by the engine or Envoy".to_owned(), str::to_owned);
            *counts.refusals.entry(format!("{} {reason}", answer.status)).or_default() += 1;
        }
        if NEVER.contains(&end) && counts.examples.len() < 5 {
            let answer = answer.as_ref().map_or_else(ToString::to_string, |it| format!("{} {}", it.status, it.text()));
            counts.examples.push(format!("{end:?} of {about} during {disturbances:?}: {answer}"));
        }
    }

    pub fn of(&self, end: End) -> u64 {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.of.get("all").and_then(|of| of.get(&end)).copied().unwrap_or(0)
    }

    /// One line for each disturbance, and the errors.
    pub fn table(&self) -> String {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = format!("{:<28}", "requests during");
        for end in ENDS {
            let _ = write!(table, "{:>11}", format!("{end:?}"));
        }
        for (disturbance, of) in &counts.of {
            let _ = write!(table, "\n{disturbance:<28}");
            for end in ENDS {
                let _ = write!(table, "{:>11}", of.get(&end).copied().unwrap_or(0));
            }
        }
        table += "\n\nerrors that clients got\n";
        for (what, count) in &counts.refusals {
            let _ = writeln!(table, "{count:>8}  {what}");
        }
        table
    }

    /// # Panics
    /// Where an answer was one that no disturbance excuses.
    pub fn check(&self) {
        let bad: Vec<_> = NEVER.into_iter().map(|end| (end, self.of(end))).filter(|(_, count)| *count > 0).collect();
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(bad.is_empty(), "{bad:?}\n{}", counts.examples.join("\n"));
    }
}
