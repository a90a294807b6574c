//! Whether what the index has for an endpoint is believed: answers that say how much of a prompt was cached raise doubts.
//!
//! An endpoint that was restarted holds nothing of what it was sent before, but soon holds again what it was sent since. So
//! an answer that finds its prompt cached ends the doubts only where the prompt was sent there before them.

/// Fewest tokens that an endpoint must be believed to hold for a comparison with what it says. Engines cache whole blocks,
/// and the tokens are an estimate.
const LEAST_BELIEF: f64 = 512.0;

/// Doubts at which what an endpoint holds is forgotten: three answers, or two where nothing was cached.
const MOST_DOUBTS: u8 = 3;

/// Blocks after which doubts are over: so many were touched since, and no answer confirmed them.
const MOST_TOUCHES: u64 = 16_384;

/// What an endpoint is believed to hold of a prompt that goes there.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Belief {
    /// Tokens of the prompt.
    pub(crate) tokens: f64,
    /// Whether the endpoint was sent them after the doubts in what it holds began.
    pub(crate) is_fresh: bool,
    /// Touches of the endpoint's blocks before the prompt went there.
    pub(crate) touches: u64,
}

impl Belief {
    /// Whether it is large enough to be judged.
    pub(crate) fn can_be_judged(self) -> bool {
        self.tokens >= LEAST_BELIEF
    }

    /// Believed tokens that were not there.
    pub(crate) fn missing(self, cached: u64) -> f64 {
        (self.tokens - cached as f64).max(0.0)
    }

    /// What an answer that found so many tokens `cached` says of all that the endpoint is believed to hold: doubts, 0 where
    /// it confirms that, `None` where it says nothing.
    pub(crate) fn doubt(self, cached: u64) -> Option<u8> {
        match self.missing(cached) {
            // Not even the blocks that most prompts begin with.
            missing if missing * 2.0 > self.tokens => Some(if cached == 0 { 2 } else { 1 }),
            // The tokens are an estimate.
            missing if missing * 4.0 > self.tokens || self.is_fresh => None,
            _ => Some(0),
        }
    }
}

/// Doubts in the blocks that the index has for one endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Doubts {
    count: u8,
    /// Touches of the endpoint's blocks before the prompt went there at which the first doubt came.
    since: u64,
}

impl Doubts {
    /// Adds doubts; 0: what the endpoint holds was confirmed. `touches`: those of the endpoint's blocks before the prompt went
    /// there whose answer says so.
    pub(crate) fn add(&mut self, doubt: u8, touches: u64) {
        if doubt == 0 {
            *self = Self::default();
            return;
        }
        if self.count == 0 || touches.saturating_sub(self.since) > MOST_TOUCHES {
            *self = Self { count: 0, since: touches };
        }
        self.count = self.count.saturating_add(doubt);
    }

    /// Whether there are any.
    pub(crate) fn exist(self) -> bool {
        self.count > 0
    }

    /// Whether what the endpoint holds is to be forgotten.
    pub(crate) fn are_enough(self) -> bool {
        self.count >= MOST_DOUBTS
    }

    /// Number of the endpoint's blocks that were touched last, among which are all that were since the doubts began. 0 where
    /// there are no doubts.
    pub(crate) fn fresh_blocks(self, touches: u64) -> usize {
        let since = touches.saturating_sub(self.since);
        if self.exist() && since <= MOST_TOUCHES { usize::try_from(since).unwrap_or(0) } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_confirms_only_what_was_sent_before_the_doubts() {
        let belief = |is_fresh| Belief { tokens: 1_000.0, is_fresh, touches: 0 };
        assert_eq!(
            [0, 1, 499, 500, 749, 750, 2_000].map(|cached| belief(false).doubt(cached)),
            [Some(2), Some(1), Some(1), None, None, Some(0), Some(0)]
        );
        assert_eq!([0, 1, 750].map(|cached| belief(true).doubt(cached)), [Some(2), Some(1), None]);
        assert!(belief(false).can_be_judged() && !Belief { tokens: 511.0, ..belief(false) }.can_be_judged());
    }

    #[test]
    fn doubts_end_with_a_confirmation_or_after_many_blocks() {
        let mut doubts = Doubts::default();
        doubts.add(2, 100);
        assert_eq!((doubts.exist(), doubts.are_enough(), doubts.fresh_blocks(140)), (true, false, 40));
        doubts.add(1, 150);
        assert!(doubts.are_enough());
        doubts.add(0, 160);
        assert_eq!((doubts, doubts.fresh_blocks(200)), (Doubts::default(), 0));
        doubts.add(2, 100);
        assert_eq!(doubts.fresh_blocks(101 + MOST_TOUCHES), 0);
        doubts.add(2, 101 + MOST_TOUCHES);
        assert!(!doubts.are_enough());
    }
}
