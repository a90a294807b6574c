//! What comes of a simulated run.

/// What came of one run, without its warm-up.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Requests.
    pub requests: usize,
    /// Prompt tokens.
    pub tokens: u64,
    /// Of these, tokens found in the cache of the server that computed the prompt.
    pub cached_tokens: u64,
    /// Seconds of work of each prefill server.
    pub busy: Vec<f64>,
    /// Seconds to the first token, sorted.
    pub ttft: Vec<f64>,
    /// Milliseconds per further token of each request, sorted.
    pub tpot_ms: Vec<f64>,
    /// Tokens whose KV was moved to a decode server that did not hold them.
    pub moved_tokens: u64,
    /// Tokens that would be moved if all decode servers had one cache as large as theirs together.
    pub least_moved_tokens: u64,
    /// Tokens that no prompt before had.
    pub new_tokens: u64,
    /// Seconds to the first token of those that go before all others, sorted.
    pub high_ttft: Vec<f64>,
    /// Seconds of prefill that each fairness id got until the last request came.
    pub seconds_by_fairness_id: Vec<f64>,
    /// Seconds in which a prefill server was idle while a request waited in the gateway, until the last request came.
    pub idle_seconds: f64,
}

impl Outcome {
    /// Percent of prompt tokens found in a cache.
    #[must_use]
    pub fn hit_percent(&self) -> f64 {
        100.0 * self.cached_tokens as f64 / self.tokens.max(1) as f64
    }

    /// Work of the busiest prefill server over the mean; 1 is even.
    #[must_use]
    pub fn busy_over_mean(&self) -> f64 {
        let mean = self.busy.iter().sum::<f64>() / self.busy.len().max(1) as f64;
        self.busy.iter().copied().fold(0.0, f64::max) / mean.max(1e-9)
    }

    /// Tokens moved to decode servers over tokens that no prompt before had; 0 where nothing is moved.
    #[must_use]
    pub fn moved_over_new(&self) -> f64 {
        self.moved_tokens as f64 / self.new_tokens.max(1) as f64
    }

    /// The same if all decode servers had one cache as large as theirs together: about the least that a choice among them
    /// can move. It is no strict bound, because a cache that drops what was used least recently does not keep the best.
    #[must_use]
    pub fn least_moved_over_new(&self) -> f64 {
        self.least_moved_tokens as f64 / self.new_tokens.max(1) as f64
    }

    /// Seconds to the first token on average.
    #[must_use]
    pub fn mean_ttft(&self) -> f64 {
        self.ttft.iter().sum::<f64>() / self.ttft.len().max(1) as f64
    }

    /// Jain's index of the fairness ids' shares: 1 if the shares are equal, 1/n if one of n gets everything.
    #[must_use]
    pub fn fairness(&self) -> f64 {
        let sum: f64 = self.seconds_by_fairness_id.iter().sum();
        let squares: f64 = self.seconds_by_fairness_id.iter().map(|seconds| seconds * seconds).sum();
        sum * sum / (self.seconds_by_fairness_id.len().max(1) as f64 * squares).max(1e-9)
    }

    /// Seconds to the first token of those that go before all others, at a share of them, 0 to 1.
    #[must_use]
    pub fn high_ttft(&self, share: f64) -> f64 {
        at_share(&self.high_ttft, share)
    }

    /// Seconds to the first token at a share of the requests, 0 to 1.
    #[must_use]
    pub fn ttft(&self, share: f64) -> f64 {
        at_share(&self.ttft, share)
    }

    /// Milliseconds per further token at a share of the requests, 0 to 1.
    #[must_use]
    pub fn tpot_ms(&self, share: f64) -> f64 {
        at_share(&self.tpot_ms, share)
    }

    /// Percent of requests whose first token came within so many seconds.
    #[must_use]
    pub fn slo_percent(&self, seconds: f64) -> f64 {
        100.0 * self.ttft.partition_point(|ttft| *ttft <= seconds) as f64 / self.ttft.len().max(1) as f64
    }

    /// Sorts the figures of which shares are asked.
    #[must_use]
    pub(crate) fn sorted(mut self) -> Self {
        self.ttft.sort_by(f64::total_cmp);
        self.tpot_ms.sort_by(f64::total_cmp);
        self.high_ttft.sort_by(f64::total_cmp);
        self
    }
}

fn at_share(sorted: &[f64], share: f64) -> f64 {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied().unwrap_or(0.0)
}
