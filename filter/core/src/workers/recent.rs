//! What a worker runs and what it decided lately, for the report of its Envoy.

use core::time::Duration;
use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::codec::{Reader, Writer};
use crate::time::Monotonic;

/// Decisions that a report may hold.
pub const MAX_DECISIONS: usize = 8;
/// Time between two decisions of a report.
const DECISION_PAUSE: Duration = Duration::from_millis(200);

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
        [&self.version, &self.build, &self.revision].into_iter().for_each(|text| out.bytes(text.as_bytes()));
    }

    pub(crate) fn read(rest: &mut Reader<'_>) -> Option<Self> {
        let mut text = || rest.text();
        Some(Self { version: text()?, build: text()?, revision: text()?, workers: 1 })
    }
}

/// Where a request went. The words are those of the access log.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Decision {
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
    /// For the other workers, with the time of the decision in milliseconds.
    fn write(&self, at: Monotonic, out: &mut Writer) {
        [at.as_millis(), self.prompt_tokens, self.matched_tokens].into_iter().for_each(|word| out.word(word));
        let texts = [&self.decision, &self.reason, &self.model, &self.prefill, &self.decode];
        texts.into_iter().for_each(|text| out.bytes(text.as_bytes()));
    }

    /// Reads what another worker wrote.
    pub(crate) fn read(rest: &mut Reader<'_>) -> Option<(Monotonic, Self)> {
        let (at_ms, prompt_tokens, matched_tokens) = (rest.word()?, rest.word()?, rest.word()?);
        let mut text = || rest.text();
        let [decision, reason, model, prefill, decode] = [text()?, text()?, text()?, text()?, text()?];
        let decision = Self { decision, reason, model, prefill, decode, prompt_tokens, matched_tokens };
        Some((Monotonic::from_millis(at_ms), decision))
    }
}

/// Some of the latest decisions of a worker.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    decisions: VecDeque<(Monotonic, Decision)>,
    /// Whether there is one that the other workers do not know.
    pub(crate) is_new: bool,
}

impl Recent {
    /// Whether it is time for another one.
    pub(crate) fn is_due(&self, now: Monotonic) -> bool {
        self.decisions.front().is_none_or(|(at, _)| now.saturating_sub(*at) >= DECISION_PAUSE)
    }

    pub(crate) fn push(&mut self, at: Monotonic, decision: Decision) {
        self.decisions.truncate(MAX_DECISIONS.saturating_sub(1));
        self.decisions.push_front((at, decision));
        self.is_new = true;
    }

    /// Newest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &(Monotonic, Decision)> {
        self.decisions.iter()
    }

    /// For the other workers.
    pub(crate) fn write(&self, out: &mut Writer) {
        self.iter().for_each(|(at, decision)| decision.write(*at, out));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_worker_writes_the_voice_reads() {
        let generation = Generation { version: "1".into(), build: "b".into(), revision: "ä".into(), workers: 1 };
        let decision =
            Decision { decision: "split".into(), model: "m".into(), matched_tokens: 3, ..Decision::default() };
        let at = Monotonic::from_millis(7);
        let mut out = Writer::default();
        generation.write(&mut out);
        decision.write(at, &mut out);
        let mut rest = Reader(&out.0);
        assert_eq!(Generation::read(&mut rest), Some(generation));
        assert_eq!(Decision::read(&mut rest), Some((at, decision)));
        for length in 0..out.0.len() {
            let mut rest = Reader(&out.0[..length]);
            assert!(Generation::read(&mut rest).is_none() || Decision::read(&mut rest).is_none());
        }
    }
}
