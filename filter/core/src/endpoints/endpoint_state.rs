//! One endpoint: what `pd-control` pushed, and what this worker knows of it.

use core::net::SocketAddr;
use std::sync::Arc;

use crate::endpoints::elsewhere::Totals;
use crate::endpoints::health::Health;
use crate::endpoints::load::{Load, PrefillQueue};
use crate::time::Monotonic;
use crate::wire::{Endpoint, Engine};

/// One endpoint and what we know of it.
#[derive(Debug)]
pub struct Slot {
    /// As pushed.
    pub endpoint: Endpoint,
    /// `ip:port`, as the destination header names it.
    pub address: Arc<str>,
    /// Key for rendezvous hashing: equal on every worker and replica.
    pub key: u64,
    /// Engine in force: the endpoint's, else its pool's.
    pub engine: Engine,
    /// Where its bootstrap server listens, if it has one.
    pub bootstrap: SocketAddr,
    /// Mooncake's id of the engine as its bootstrap server told it: a JSON string. Forgotten when the endpoint fails,
    /// for a new process has a new one.
    pub engine_id: Option<Arc<[u8]>>,
    /// Whether its last prefill answer had no usable KV parameters.
    pub is_kv_missing: bool,
    /// Answers of split requests that must show a KV cache that came, until it is believed again; above 0 once one
    /// showed a prompt that was computed twice.
    pub kv_doubts: u8,
    /// Prefill legs in flight.
    pub prefill: PrefillQueue,
    /// Decode work in flight.
    pub decode: Load,
    /// What other Envoys have in flight here, as far as they are heard.
    pub(super) elsewhere: Totals,
    /// Whether it answered lately.
    pub health: Health,
    /// Counts the endpoints that the table has had: tells this one from others at its index.
    pub(super) generation: u32,
    /// Index of its pool's fitted cost.
    pub(super) fit: usize,
}

impl Slot {
    /// `W`: seconds of prefill work in flight here, from every Envoy that is heard.
    #[must_use]
    pub fn work(&self, now: Monotonic) -> f64 {
        self.prefill.work(now) + self.elsewhere_seconds()
    }

    /// KV tokens assigned to this endpoint, by every Envoy that is heard.
    #[must_use]
    pub fn decode_tokens(&self) -> u64 {
        self.decode.tokens.saturating_add(above_zero(self.elsewhere.tokens))
    }

    /// Seconds of prefill work that other Envoys have in flight here.
    #[must_use]
    pub(crate) fn elsewhere_seconds(&self) -> f64 {
        above_zero(self.elsewhere.work) as f64 * 1e-6
    }
}

/// A sum of differences; one that is missing still makes it small, not huge.
fn above_zero(sum: u64) -> u64 {
    u64::try_from(sum.cast_signed()).unwrap_or(0)
}
