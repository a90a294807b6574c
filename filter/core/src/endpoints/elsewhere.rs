//! What other Envoys have in flight at the endpoints, and how many Envoys there are.

use crate::codec::{Reader, Writer};

/// What is in flight at one endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Prefill work, microseconds of the endpoint's time.
    pub work: u64,
    /// KV tokens assigned for decoding.
    pub tokens: u64,
    /// Requests that decode.
    pub requests: u64,
}

impl Totals {
    /// Adds, around the end of the numbers: a difference may be below zero.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            work: self.work.wrapping_add(other.work),
            tokens: self.tokens.wrapping_add(other.tokens),
            requests: self.requests.wrapping_add(other.requests),
        }
    }

    /// Subtracts, around zero.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        Self {
            work: self.work.wrapping_sub(other.work),
            tokens: self.tokens.wrapping_sub(other.tokens),
            requests: self.requests.wrapping_sub(other.requests),
        }
    }

    pub(crate) fn write(self, out: &mut Writer) {
        [self.work, self.tokens, self.requests].into_iter().for_each(|word| out.word(word));
    }

    pub(crate) fn read(rest: &mut Reader<'_>) -> Option<Self> {
        Some(Self { work: rest.word()?, tokens: rest.word()?, requests: rest.word()? })
    }
}

/// Envoys that there are, and those of them that exchange.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fleet {
    /// All.
    pub gateways: u64,
    /// Those that are heard, this one included.
    pub exchanging: u64,
}

impl Fleet {
    /// Share of the other Envoys whose decisions are not heard, 0 to 1.
    #[must_use]
    pub fn unheard(self) -> f64 {
        let others = self.gateways.saturating_sub(1);
        let unheard = self.gateways.saturating_sub(self.exchanging.max(1));
        if others == 0 { 0.0 } else { unheard as f64 / others as f64 }
    }

    pub(crate) fn write(self, out: &mut Writer) {
        [self.gateways, self.exchanging].into_iter().for_each(|word| out.word(word));
    }

    pub(crate) fn read(rest: &mut Reader<'_>) -> Option<Self> {
        Some(Self { gateways: rest.word()?, exchanging: rest.word()? })
    }
}
