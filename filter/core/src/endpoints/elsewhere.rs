//! What other Envoys have in flight at the endpoints, and how many Envoys there are.

use crate::codec::{Reader, Writer};

/// What is in flight at one endpoint, or a change of that. Numbers wrap around, so a change may be below zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Prefill work in microseconds of the endpoint's time.
    pub work: u64,
    /// Assigned KV tokens.
    pub tokens: u64,
    /// Decode legs.
    pub requests: u64,
    /// Prefill legs, waiting or computed. 0 where the Envoys run an earlier build, which does not count them.
    pub legs: u64,
}

impl Totals {
    /// The sum of each count. Counts wrap, as [`minus`](Self::minus) undoes it.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            work: self.work.wrapping_add(other.work),
            tokens: self.tokens.wrapping_add(other.tokens),
            requests: self.requests.wrapping_add(other.requests),
            legs: self.legs.wrapping_add(other.legs),
        }
    }

    /// The smaller of each count and that of `most`.
    #[must_use]
    pub fn at_most(self, most: Self) -> Self {
        Self {
            work: self.work.min(most.work),
            tokens: self.tokens.min(most.tokens),
            requests: self.requests.min(most.requests),
            legs: self.legs.min(most.legs),
        }
    }

    /// The difference of each count, wrapping: a count may pass through values below 0 while messages cross.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        Self {
            work: self.work.wrapping_sub(other.work),
            tokens: self.tokens.wrapping_sub(other.tokens),
            requests: self.requests.wrapping_sub(other.requests),
            legs: self.legs.wrapping_sub(other.legs),
        }
    }

    pub(crate) fn write(self, out: &mut Writer) {
        [self.work, self.tokens, self.requests, self.legs].into_iter().for_each(|word| out.word(word));
    }

    pub(crate) fn read(rest: &mut Reader<'_>) -> Option<Self> {
        let (work, tokens, requests) = (rest.word()?, rest.word()?, rest.word()?);
        // An earlier build writes no legs.
        Some(Self { work, tokens, requests, legs: rest.word().unwrap_or(0) })
    }
}

/// A sum of changes; 0 where the sum is below zero because a change has not arrived yet.
pub(crate) fn above_zero(sum: u64) -> u64 {
    u64::try_from(sum.cast_signed()).unwrap_or(0)
}

/// Number of Envoys that follow the same `pd-control`. All 0 where there is no exchange.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fleet {
    /// All Envoys that `pd-control` knows.
    pub gateways: u64,
    /// Envoys that exchange, this one included.
    pub exchanging: u64,
}

impl Fleet {
    /// Share of the other Envoys that do not exchange, 0 to 1; 0 where there is no other.
    #[must_use]
    pub fn not_exchanging(self) -> f64 {
        let others = self.gateways.saturating_sub(1);
        let not_exchanging = self.gateways.saturating_sub(self.exchanging.max(1));
        if others == 0 { 0.0 } else { not_exchanging as f64 / others as f64 }
    }

    pub(crate) fn write(self, out: &mut Writer) {
        [self.gateways, self.exchanging].into_iter().for_each(|word| out.word(word));
    }

    pub(crate) fn read(rest: &mut Reader<'_>) -> Option<Self> {
        Some(Self { gateways: rest.word()?, exchanging: rest.word()? })
    }
}
