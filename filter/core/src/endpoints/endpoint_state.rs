//! One endpoint: what `pd-control` pushed, and what this worker knows of it.

use core::net::SocketAddr;
use std::sync::Arc;

use crate::endpoints::departed::InFlight;
use crate::endpoints::elsewhere::Totals;
use crate::endpoints::health::Health;
use crate::endpoints::load::{LedgerEntry, Load, PrefillQueue};
use crate::endpoints::outliers::Answers;
use crate::time::Monotonic;
use crate::wire::{Endpoint, Engine};

/// One endpoint, and what this worker knows of it.
#[derive(Debug)]
pub struct EndpointState {
    /// The endpoint as it was pushed.
    pub endpoint: Endpoint,
    /// `ip:port`, as the destination header names it.
    pub address: Arc<str>,
    /// Hash of the endpoint's id: the key for rendezvous hashing, and its name in events. Every worker of every Envoy
    /// computes the same one.
    pub key: u64,
    /// Engine in force: the endpoint's own, or else its pool's.
    pub engine: Engine,
    /// Address of the endpoint's bootstrap server, for engines that have one.
    pub bootstrap: SocketAddr,
    /// Mooncake's id of the engine, as its bootstrap server gave it: a JSON string. `None` before the first answer, and
    /// after a failure of the endpoint, because a new process has a new id.
    pub engine_id: Option<Arc<[u8]>>,
    /// Whether the endpoint's last prefill answer had no usable KV parameters.
    pub is_kv_missing: bool,
    /// 0 while hand-overs to this endpoint are believed. After an answer that shows a prompt computed twice: answers that
    /// must show a KV cache that came until they are believed again.
    pub kv_doubts: u8,
    /// Leases on KV caches that this prefill endpoint let expire since it started, as far as is known.
    pub(crate) expired_kv_leases: f64,
    /// Whether the last answer to a split request began later than the lease on its KV cache.
    pub(crate) answers_late: bool,
    /// Doubts in the blocks that the index has for this endpoint, from answers that say how much was cached.
    pub(crate) wrong_beliefs: u8,
    /// Prompts in a row that this endpoint computed and at which decode endpoints failed that serve whole requests.
    pub(crate) failed_handovers: u8,
    /// Whether the endpoint answered 5xx to the last request that it got whole.
    pub(crate) fails_whole: bool,
    /// Prefill legs that this Envoy has in flight here.
    pub prefill: PrefillQueue,
    /// Decode legs that this Envoy has in flight here.
    pub decode: Load,
    /// What other Envoys have in flight here, as far as they exchange.
    pub(super) elsewhere: Totals,
    /// Whether the endpoint answered the last time.
    pub health: Health,
    /// When the endpoint last answered, well or not; zero: never. Answers to prefill legs and first bytes of whole requests
    /// count of all workers of this Envoy, others of this worker only.
    pub(crate) answered_at: Monotonic,
    /// What it answered lately: errors, and what followed them, to legs of every worker of this Envoy; other answers to
    /// those of this worker only.
    pub answers: Answers,
    /// Number of this endpoint among those that the table has had: it differs from that of an earlier endpoint at the
    /// same index.
    pub(super) generation: u32,
    /// Index of its pool's fitted cost.
    pub(super) fit: usize,
}

/// What an endpoint has of its pool, as far as it does not say it itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct FromPool {
    /// Engine in force.
    pub(super) engine: Engine,
    /// Address of the bootstrap server.
    pub(super) bootstrap: SocketAddr,
    /// Index of the pool's fitted cost.
    pub(super) fit: usize,
}

impl EndpointState {
    /// An endpoint of which nothing is known yet but what is in flight there.
    pub(super) fn new(
        endpoint: Endpoint,
        key: u64,
        from_pool: FromPool,
        InFlight { prefill, decode }: InFlight,
        generation: u32,
    ) -> Self {
        Self {
            address: endpoint.address.to_string().into(),
            expired_kv_leases: endpoint.expired_kv_leases.unwrap_or(0) as f64,
            answers_late: false,
            endpoint,
            key,
            engine: from_pool.engine,
            bootstrap: from_pool.bootstrap,
            engine_id: None,
            is_kv_missing: false,
            kv_doubts: 0,
            wrong_beliefs: 0,
            failed_handovers: 0,
            fails_whole: false,
            prefill,
            decode,
            elsewhere: Totals::default(),
            health: Health::default(),
            answered_at: Monotonic::ZERO,
            answers: Answers::default(),
            generation,
            fit: from_pool.fit,
        }
    }

    /// Takes over what its pool says now.
    pub(super) fn set(&mut self, FromPool { engine, bootstrap, fit }: FromPool) {
        self.engine = engine;
        self.bootstrap = bootstrap;
        self.fit = fit;
    }

    /// `W`: seconds of prefill work in flight here, from every Envoy that exchanges.
    #[must_use]
    pub fn work(&self, now: Monotonic) -> f64 {
        self.prefill.work(now) + self.elsewhere_seconds()
    }

    /// Seconds until the endpoint is through with what this Envoy has in flight here. A leg that takes longer than it
    /// should is taken to need as long again as it is late.
    #[must_use]
    pub(crate) fn own_seconds_left(&self, now: Monotonic) -> f64 {
        self.prefill.work(now) + self.prefill.late(now)
    }

    /// KV tokens assigned to this endpoint, by every Envoy that exchanges.
    #[must_use]
    pub fn decode_tokens(&self) -> u64 {
        self.decode.tokens.saturating_add(above_zero(self.elsewhere.tokens))
    }

    /// The ledger's entry of this endpoint.
    pub(crate) fn ledger_entry(&mut self) -> LedgerEntry<'_> {
        let elsewhere_seconds = self.elsewhere_seconds();
        LedgerEntry { prefill: &mut self.prefill, decode: &mut self.decode, elsewhere_seconds }
    }

    /// Seconds of prefill work that other Envoys have in flight here.
    #[must_use]
    pub(crate) fn elsewhere_seconds(&self) -> f64 {
        above_zero(self.elsewhere.work) as f64 * 1e-6
    }
}

/// A sum of differences as a number from 0 on. While a difference is missing the sum may be below zero, and counts as 0.
fn above_zero(sum: u64) -> u64 {
    u64::try_from(sum.cast_signed()).unwrap_or(0)
}
