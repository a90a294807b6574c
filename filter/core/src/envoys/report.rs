//! What an Envoy reports of itself once a second, for people.

use serde::{Deserialize, Serialize};

use super::message::{read_bytes, write_bytes};
use crate::workers::ledger::{Reader, Writer};

/// Decisions that a report may hold.
pub const MAX_DECISIONS: usize = 8;
/// Bytes of a report at most; a longer one is not kept.
pub const MAX_REPORT_BYTES: usize = 64 << 10;

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
    pub decisions: Vec<Decision>,
}

impl Report {
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

/// Workers that run one build with one configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct Generation {
    /// Release.
    pub version: String,
    /// Source revision.
    pub build: String,
    /// `revision` of the plugin configuration in force.
    pub revision: String,
    /// Workers alive.
    pub workers: u64,
}

impl Generation {
    /// For the other workers; [`workers`](Self::workers) is one.
    pub(crate) fn write(&self, out: &mut Writer) {
        [&self.version, &self.build, &self.revision].into_iter().for_each(|text| write_bytes(out, text.as_bytes()));
    }

    pub(crate) fn read(rest: &mut Reader<'_>) -> Option<Self> {
        let mut text = || read_text(rest);
        Some(Self { version: text()?, build: text()?, revision: text()?, workers: 1 })
    }
}

/// Where a request went. The words are those of the access log.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Decision {
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// `split`, `decode_only` …
    pub decision: String,
    /// Why.
    pub reason: String,
    /// Model that served.
    pub model: String,
    /// `ip:port` of the prefill endpoint, where there was one.
    pub prefill: String,
    /// `ip:port` of the decode endpoint.
    pub decode: String,
    /// Estimated tokens of the prompt.
    pub prompt_tokens: u64,
    /// Those that the endpoint which computed it held.
    pub matched_tokens: u64,
}

impl Decision {
    /// For the other workers.
    pub(crate) fn write(&self, out: &mut Writer) {
        [self.at_ms, self.prompt_tokens, self.matched_tokens].into_iter().for_each(|word| out.word(word));
        let texts = [&self.decision, &self.reason, &self.model, &self.prefill, &self.decode];
        texts.into_iter().for_each(|text| write_bytes(out, text.as_bytes()));
    }

    pub(crate) fn read(rest: &mut Reader<'_>) -> Option<Self> {
        let (at_ms, prompt_tokens, matched_tokens) = (rest.word()?, rest.word()?, rest.word()?);
        let mut text = || read_text(rest);
        let [decision, reason, model, prefill, decode] = [text()?, text()?, text()?, text()?, text()?];
        Some(Self { at_ms, decision, reason, model, prefill, decode, prompt_tokens, matched_tokens })
    }
}

fn read_text(rest: &mut Reader<'_>) -> Option<String> {
    String::from_utf8(read_bytes(rest)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_worker_writes_the_voice_reads() {
        let generation = Generation { version: "1".into(), build: "b".into(), revision: "ä".into(), workers: 1 };
        let decision = Decision {
            at_ms: 7,
            decision: "split".into(),
            model: "m".into(),
            matched_tokens: 3,
            ..Decision::default()
        };
        let mut out = Writer::default();
        generation.write(&mut out);
        decision.write(&mut out);
        let mut rest = Reader(&out.0);
        assert_eq!(Generation::read(&mut rest), Some(generation));
        assert_eq!(Decision::read(&mut rest), Some(decision));
        for length in 0..out.0.len() {
            let mut rest = Reader(&out.0[..length]);
            assert!(Generation::read(&mut rest).is_none() || Decision::read(&mut rest).is_none());
        }
    }

    #[test]
    fn a_newer_filters_report_is_read_and_rubbish_is_none() {
        let newer = br#"{"new":1,"generations":[{"version":"2","new":[]}]}"#;
        assert_eq!(Report::from_json(newer).unwrap().generations[0].version, "2");
        assert_eq!(Report::from_json(b"[]x"), None);
    }
}
