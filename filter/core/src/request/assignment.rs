//! The ledger's entry of a request that an engine endpoint has.

use crate::endpoints::table::EndpointRef;
use crate::metrics::Metric;
use crate::prefix::hash::BlockHash;
use crate::time::Monotonic;
use crate::workers::worker::Worker;

/// What the ledger has of a request.
#[derive(Debug)]
pub(super) struct Assignment {
    pub(super) endpoint: EndpointRef,
    tokens: u64,
    /// The prefill work of a request without a prefill leg of the filter: its endpoint, and its number in the ledger.
    /// `None` after the first byte of the answer.
    pub(super) own_prefill: Option<(EndpointRef, u64)>,
    /// Blocks of the prompt that the endpoint did not hold before. Empty once it has answered.
    pub(super) new_blocks: Vec<BlockHash>,
}

impl Assignment {
    /// Counts a request of so many KV tokens at an endpoint.
    pub(super) fn start(worker: &mut Worker, endpoint: EndpointRef, tokens: u64) -> Self {
        worker.decode_started(endpoint, tokens);
        worker.counts.add(Metric::DecodeInFlight, 1);
        worker.counts.add(Metric::DecodeTokensInFlight, to_i64(tokens));
        Self { endpoint, tokens, own_prefill: None, new_blocks: Vec::new() }
    }

    /// Ends the prefill work because an answer came: all workers learn that the endpoint answers.
    pub(super) fn own_prefill_answered(&mut self, worker: &mut Worker, now: Monotonic) {
        if let Some((endpoint, leg)) = self.own_prefill.take() {
            worker.prefill_answered(endpoint, leg, now);
        }
    }

    /// Ends prefill work that the endpoint will not do, or whose answer will not come.
    pub(super) fn end_own_prefill(&mut self, worker: &mut Worker, now: Monotonic) {
        if let Some((endpoint, leg)) = self.own_prefill.take() {
            worker.prefill_ended(endpoint, leg, now);
        }
    }

    /// The endpoint answered, with a refusal or not: it holds the prompt unless it refused.
    pub(super) fn answered(&mut self, worker: &mut Worker, is_refusal: bool) {
        let new_blocks = core::mem::take(&mut self.new_blocks);
        if is_refusal {
            worker.lacks(self.endpoint, &new_blocks);
        }
    }

    /// Another endpoint has the request.
    pub(super) fn move_to(&mut self, worker: &mut Worker, endpoint: EndpointRef, now: Monotonic) {
        self.end_own_prefill(worker, now);
        worker.decode_ended(self.endpoint, self.tokens);
        worker.decode_started(endpoint, self.tokens);
        self.endpoint = endpoint;
        self.new_blocks.clear();
    }

    /// No endpoint has the request any more.
    pub(super) fn end(&mut self, worker: &mut Worker, now: Monotonic) {
        self.end_own_prefill(worker, now);
        worker.decode_ended(self.endpoint, self.tokens);
        worker.counts.add(Metric::DecodeInFlight, -1);
        worker.counts.add(Metric::DecodeTokensInFlight, to_i64(self.tokens).saturating_neg());
    }
}

fn to_i64(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
