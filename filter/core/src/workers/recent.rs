//! What a worker runs, and its latest decisions: parts of the report of its Envoy.

use core::time::Duration;
use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::codec::{Reader, Writer};
use crate::time::Monotonic;

/// Most decisions of a report. The newest ones stay.
pub const MAX_DECISIONS: usize = 8;
/// Least time between two decisions of a worker that are recorded.
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
    /// Writes what one worker runs; [`workers`](Self::workers) is not written.
    pub(crate) fn write(&self, out: &mut Writer) {
        [&self.version, &self.build, &self.revision].into_iter().for_each(|text| out.bytes(text.as_bytes()));
    }

    /// Reads one worker's build and configuration, as a count of one worker; `None` if the bytes have another form.
    pub(crate) fn read(rest: &mut Reader<'_>) -> Option<Self> {
        let mut text = || rest.text();
        Some(Self { version: text()?, build: text()?, revision: text()?, workers: 1 })
    }
}

/// Where a request went, in the words of the access log. An empty text means: none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DecisionRecord {
    /// `split`, `decode_only`, `prefill_only`, `passed` or `rejected`.
    pub decision: String,
    /// Reason code.
    pub reason: String,
    /// Model that served.
    pub model: String,
    /// `ip:port` of the prefill endpoint, where there was one.
    pub prefill: String,
    /// `ip:port` of the decode endpoint.
    pub decode: String,
    /// Estimated tokens of the prompt.
    pub prompt_tokens: u64,
    /// Matched tokens at the endpoint that computed the prompt; at most `prompt_tokens`.
    pub matched_tokens: u64,
    /// HTTP status of the answer; 0: there is no answer yet, or the client left before it. 0 in a report of an earlier build.
    pub status: u64,
    /// Milliseconds that the prefill leg took, where it ended before the decode leg began; 0: there was none.
    pub prefill_ms: u64,
    /// Milliseconds from the choice of the first endpoint to the first byte of the answer's body; 0: it has not begun.
    pub first_ms: u64,
    /// Milliseconds from the choice of the first endpoint to the end of the answer; 0: it has not ended.
    pub total_ms: u64,
}

impl DecisionRecord {
    /// Writes the record for the other workers, with the time of the decision in milliseconds.
    fn write(&self, at: Monotonic, out: &mut Writer) {
        let words = [at.as_millis(), self.prompt_tokens, self.matched_tokens];
        let answer = [self.status, self.prefill_ms, self.first_ms, self.total_ms];
        words.into_iter().chain(answer).for_each(|word| out.word(word));
        let texts = [&self.decision, &self.reason, &self.model, &self.prefill, &self.decode];
        texts.into_iter().for_each(|text| out.bytes(text.as_bytes()));
    }

    /// Reads a record and its time; `None` where the bytes are not of that form.
    pub(crate) fn read(rest: &mut Reader<'_>) -> Option<(Monotonic, Self)> {
        let (at_ms, prompt_tokens, matched_tokens) = (rest.word()?, rest.word()?, rest.word()?);
        let (status, prefill_ms, first_ms, total_ms) = (rest.word()?, rest.word()?, rest.word()?, rest.word()?);
        let mut text = || rest.text();
        let [decision, reason, model, prefill, decode] = [text()?, text()?, text()?, text()?, text()?];
        let of_answer = Self { status, prefill_ms, first_ms, total_ms, ..Self::default() };
        let record = Self { decision, reason, model, prefill, decode, prompt_tokens, matched_tokens, ..of_answer };
        Some((Monotonic::from_millis(at_ms), record))
    }
}

/// Latest decisions of one worker, at most [`MAX_DECISIONS`].
#[derive(Debug, Default)]
pub(crate) struct Recent {
    decisions: VecDeque<(Monotonic, DecisionRecord)>,
    /// Number of the newest decision; the one behind it in `decisions` has the number before.
    newest: u64,
    /// Whether there is a decision that is not in shared data yet.
    pub(crate) is_new: bool,
}

impl Recent {
    /// Whether the last decision was recorded long enough ago for another one.
    pub(crate) fn is_due(&self, now: Monotonic) -> bool {
        self.decisions.front().is_none_or(|(at, _)| now.saturating_sub(*at) >= DECISION_PAUSE)
    }

    /// Records a decision, and returns its number. Beyond [`MAX_DECISIONS`] the oldest one is dropped.
    pub(crate) fn push(&mut self, at: Monotonic, decision: DecisionRecord) -> u64 {
        self.decisions.truncate(MAX_DECISIONS.saturating_sub(1));
        self.decisions.push_front((at, decision));
        self.newest = self.newest.wrapping_add(1);
        self.is_new = true;
        self.newest
    }

    /// Adds to a recorded decision what became of its request. A decision that was dropped is left alone.
    pub(crate) fn amend(&mut self, number: u64, change: impl FnOnce(&mut DecisionRecord)) {
        let index = usize::try_from(self.newest.wrapping_sub(number)).ok();
        if let Some((_, decision)) = index.and_then(|index| self.decisions.get_mut(index)) {
            change(decision);
            self.is_new = true;
        }
    }

    /// The decisions and their times, newest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &(Monotonic, DecisionRecord)> {
        self.decisions.iter()
    }

    /// Writes the decisions for the other workers.
    pub(crate) fn write(&self, out: &mut Writer) {
        self.iter().for_each(|(at, decision)| decision.write(*at, out));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_worker_writes_another_reads() {
        let generation = Generation { version: "1".into(), build: "b".into(), revision: "ä".into(), workers: 1 };
        let decision = DecisionRecord {
            decision: "split".into(),
            model: "m".into(),
            matched_tokens: 3,
            status: 200,
            total_ms: 1_500,
            ..DecisionRecord::default()
        };
        let at = Monotonic::from_millis(7);
        let mut out = Writer::default();
        generation.write(&mut out);
        decision.write(at, &mut out);
        let mut rest = Reader(&out.0);
        assert_eq!(Generation::read(&mut rest), Some(generation));
        assert_eq!(DecisionRecord::read(&mut rest), Some((at, decision)));
        for length in 0..out.0.len() {
            let mut rest = Reader(&out.0[..length]);
            assert!(Generation::read(&mut rest).is_none() || DecisionRecord::read(&mut rest).is_none());
        }
    }

    #[test]
    fn what_became_of_a_request_is_added_to_its_decision_only() {
        let mut recent = Recent::default();
        let first = recent.push(Monotonic::ZERO, DecisionRecord::default());
        let numbers: Vec<_> =
            (0..MAX_DECISIONS).map(|_| recent.push(Monotonic::ZERO, DecisionRecord::default())).collect();
        recent.amend(first, |_| panic!("it was dropped"));
        recent.amend(numbers[2], |it| it.status = 503);
        let statuses: Vec<_> = recent.iter().map(|(_, it)| it.status).collect();
        assert_eq!(statuses, [0, 0, 0, 0, 0, 503, 0, 0]);
    }
}
