//! The report that an Envoy sends once a second, for people.

use serde::{Deserialize, Serialize};

use crate::time::{Clocks, Monotonic, UnixTime};
use crate::workers::recent::{DecisionRecord, Generation};
use crate::workers::served::Sums;
use crate::workers::waits::{Parked, PoolWaits};
use crate::workers::worker::Worker;

/// Most bytes of a report. The hub does not keep a longer one.
pub const MAX_REPORT_BYTES: usize = 128 << 10;
/// Most failing endpoints that a report names.
const MAX_FAILING: usize = 64;
/// Most generations and most decisions of a report that the status page shows.
const MAX_SHOWN: usize = 64;
/// Most characters of one text that the status page shows.
const MAX_TEXT: usize = 256;
/// Most endpoints of a report whose sums are read.
const MAX_SERVED: usize = 2_048;

/// Report of one Envoy. A reader ignores fields that it does not know, and takes the default for fields that are missing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// Name of the Envoy: the `id` of its node, which is its pod's name with Envoy Gateway. Empty where it has none, and in a
    /// report of an earlier build.
    pub name: String,
    /// Generations of the Envoy's workers: two or more during a roll-out.
    pub generations: Vec<Generation>,
    /// Epoch of the endpoint list in force.
    pub epoch: String,
    /// Version of that list.
    pub version: u64,
    /// Number of endpoints in that list.
    pub endpoints: u64,
    /// `ip:port` of endpoints that are ejected, 64 at most.
    pub failing: Vec<String>,
    /// These endpoints with the reason, 64 at most. Empty in a report of an earlier build.
    pub ejected: Vec<Ejected>,
    /// Latest decisions, newest first.
    pub decisions: Vec<ReportedDecision>,
    /// Pools with requests that wait or are parked. Empty in a report of an earlier build.
    pub waits: Vec<PoolWaits>,
    /// What endpoints served since this Envoy's workers started, of those whose sums have changed within the last reports.
    pub served: Vec<Served>,
}

/// What one endpoint served: its [key](crate::endpoints::endpoint_state::EndpointState::key), then
/// [`Sums::words`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served(pub u64, pub [u64; Sums::WORDS]);

/// An ejected endpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ejected {
    /// `ip:port`.
    pub address: String,
    /// What the endpoint does, as the rest of a sentence that begins with its address.
    pub reason: String,
    /// Time of the day of the first failure after the endpoint's last answer.
    pub since_ms: UnixTime,
}

/// A decision and its time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReportedDecision {
    /// Time of the day at which the worker took the decision.
    pub at_ms: UnixTime,
    /// The decision.
    #[serde(flatten)]
    pub decision: DecisionRecord,
}

impl Report {
    /// The report of a worker's Envoy. `generations`, `decisions`, `parked` and `served` are those of all its workers. `clocks`
    /// are read now; they turn the times of decisions into times of the day.
    #[must_use]
    pub fn of(
        worker: &Worker,
        generations: Vec<Generation>,
        decisions: Vec<(Monotonic, DecisionRecord)>,
        parked: Parked,
        served: Vec<(u64, Sums)>,
        clocks: Clocks,
    ) -> Self {
        let reported = |(at, decision)| ReportedDecision { at_ms: clocks.unix_at(at), decision };
        let table = &worker.state.table;
        let (epoch, version) = table.version();
        let ejected = table.iter().filter_map(|(_, state)| {
            let (cause, since) = state.health.ejection()?;
            let (address, reason) = (state.address.to_string(), cause.text().to_owned());
            Some(Ejected { address, reason, since_ms: clocks.unix_at(since) })
        });
        let ejected: Vec<_> = ejected.take(MAX_FAILING).collect();
        Self {
            generations,
            epoch: epoch.to_owned(),
            version,
            endpoints: table.len() as u64,
            failing: ejected.iter().map(|it| it.address.clone()).collect(),
            ejected,
            decisions: decisions.into_iter().map(reported).collect(),
            waits: worker.waits(parked, clocks.monotonic),
            name: worker.name.clone(),
            served: served.into_iter().map(|(key, sums)| Served(key, sums.words())).collect(),
        }
    }

    /// As JSON, for [`Record::report`](super::message::Record::report).
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        // Strings and integers never fail to serialise.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// The report as the status page shows it. A report may have any content, so
    /// - texts and lists are cut to a bound,
    /// - texts lose their control characters,
    /// - times after `now` become `now`.
    #[must_use]
    pub fn for_people(mut self, now: UnixTime) -> Self {
        self.generations.truncate(MAX_SHOWN);
        self.failing.truncate(MAX_FAILING);
        self.ejected.truncate(MAX_FAILING);
        self.decisions.truncate(MAX_SHOWN);
        self.waits.truncate(MAX_SHOWN);
        self.served.truncate(MAX_SERVED);
        let mut texts: Vec<&mut String> = vec![&mut self.epoch, &mut self.name];
        texts.extend(&mut self.failing);
        for it in &mut self.generations {
            texts.extend([&mut it.version, &mut it.build, &mut it.revision]);
        }
        texts.extend(self.waits.iter_mut().map(|it| &mut it.pool));
        for it in &mut self.ejected {
            it.since_ms = it.since_ms.min(now);
            texts.extend([&mut it.address, &mut it.reason]);
        }
        for it in &mut self.decisions {
            it.at_ms = it.at_ms.min(now);
            let of = &mut it.decision;
            texts.extend([&mut of.decision, &mut of.reason, &mut of.model, &mut of.prefill, &mut of.decode]);
        }
        for text in texts {
            *text = text.chars().filter(|it| !it.is_control()).take(MAX_TEXT).collect();
        }
        self
    }

    /// Reads a report in JSON, also one of a newer filter; `None` where the bytes are no report.
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

    #[test]
    fn people_see_no_more_of_a_report_than_fits_no_escape_sequence_and_no_time_to_come() {
        let decision = format!(r#"{{"at_ms":18446744073709551615,"model":"\u001b[2J{}"}}"#, "m".repeat(9_999));
        let texts = r#""","#.repeat(9_999) + r#""""#;
        let json = format!(
            r#"{{"failing":[{texts}],"ejected":[{{"address":"a\u009b","since_ms":18446744073709551615}}],"decisions":[{decision}]}}"#
        );
        let now = UnixTime::from_millis(1_000);
        let shown = Report::from_json(json.as_bytes()).unwrap().for_people(now);
        assert_eq!(shown.failing.len(), MAX_FAILING);
        let decision = &shown.decisions[0];
        assert_eq!((decision.at_ms, decision.decision.model.len()), (now, MAX_TEXT));
        assert!(decision.decision.model.starts_with("[2Jm"));
        assert_eq!((shown.ejected[0].address.as_str(), shown.ejected[0].since_ms), ("a", now));
    }
}
