//! The ledger's entry of a request that an engine endpoint has.

use crate::endpoints::table::EndpointRef;
use crate::metrics::Metric;
use crate::time::Monotonic;
use crate::workers::worker::Worker;

/// What the ledger has of a request.
#[derive(Debug)]
pub(super) struct Assignment {
    pub(super) endpoint: EndpointRef,
    tokens: u64,
    /// The prefill that no leg of the filter does: its endpoint, and its number in the ledger. `None` from the first byte on.
    pub(super) own_prefill: Option<(EndpointRef, u64)>,
}

impl Assignment {
    /// Counts a request of so many KV tokens at an endpoint.
    pub(super) fn start(worker: &mut Worker, endpoint: EndpointRef, tokens: u64) -> Self {
        worker.decode_started(endpoint, tokens);
        worker.counts.add(Metric::DecodeInFlight, 1);
        worker.counts.add(Metric::DecodeTokensInFlight, to_i64(tokens));
        Self { endpoint, tokens, own_prefill: None }
    }

    /// The prompt has been computed, or never will be.
    pub(super) fn end_own_prefill(&mut self, worker: &mut Worker, now: Monotonic) {
        if let Some((endpoint, leg)) = self.own_prefill.take() {
            worker.prefill_ended(endpoint, leg, now);
        }
    }

    /// Another endpoint has the request.
    pub(super) fn move_to(&mut self, worker: &mut Worker, endpoint: EndpointRef, now: Monotonic) {
        self.end_own_prefill(worker, now);
        worker.decode_ended(self.endpoint, self.tokens);
        worker.decode_started(endpoint, self.tokens);
        self.endpoint = endpoint;
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
