//! What an Envoy reports of itself once a second, for people.

use serde::{Deserialize, Serialize};

use crate::time::{Clocks, Monotonic, UnixTime};
use crate::workers::recent::{Decision, Generation};
use crate::workers::worker::Worker;

/// Bytes of a report at most; a longer one is not kept.
pub const MAX_REPORT_BYTES: usize = 64 << 10;
/// Failing endpoints that a report names.
const MAX_FAILING: usize = 64;

/// One Envoy's report. Newer filters may tell more; what is missing stands at its default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// What its workers run, a line per build and configuration: two or more while one is rolled out.
    pub generations: Vec<Generation>,
    /// Epoch of the endpoint list in force.
    pub epoch: String,
    /// Its version.
    pub version: u64,
    /// Endpoints in it.
    pub endpoints: u64,
    /// `ip:port` of those that did not answer last time.
    pub failing: Vec<String>,
    /// Some of the latest decisions, newest first.
    pub decisions: Vec<ReportedDecision>,
}

/// A decision and when it was taken.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReportedDecision {
    /// Time of the day.
    pub at_ms: UnixTime,
    /// The decision.
    #[serde(flatten)]
    pub decision: Decision,
}

impl Report {
    /// The report of the Envoy of a worker: `generations` are what its workers run, `decisions` what they decided and
    /// when. `clocks` are the times of now, by which decisions get a time of the day.
    #[must_use]
    pub fn of(
        worker: &Worker,
        generations: Vec<Generation>,
        decisions: Vec<(Monotonic, Decision)>,
        clocks: Clocks,
    ) -> Self {
        let reported = |(at, decision)| ReportedDecision { at_ms: clocks.unix_at(at), decision };
        let table = &worker.state.table;
        let (epoch, version) = table.version();
        let failing = table.iter().filter(|(_, slot)| slot.health.is_failing());
        Self {
            generations,
            epoch: epoch.to_owned(),
            version,
            endpoints: table.len() as u64,
            failing: failing.take(MAX_FAILING).map(|(_, slot)| slot.address.to_string()).collect(),
            decisions: decisions.into_iter().map(reported).collect(),
        }
    }

    /// The bytes of [`Record::report`](super::message::Record::report).
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        // Strings and integers only: serde_json has nothing to refuse here.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads what [`to_json`](Self::to_json) wrote, or a newer one.
    #[must_use]
    pub fn from_json(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_filters_report_is_read_and_rubbish_is_none() {
        let newer = br#"{"new":1,"generations":[{"version":"2","new":[]}]}"#;
        assert_eq!(Report::from_json(newer).unwrap().generations[0].version, "2");
        assert_eq!(Report::from_json(b"[]x"), None);
    }
}
