//! The state of one endpoint: what `pd-control` pushed, and what this worker learnt of it.

use core::net::SocketAddr;
use std::sync::Arc;

use crate::endpoints::beliefs::Doubts;
use crate::endpoints::departed::InFlight;
use crate::endpoints::elsewhere::{Totals, above_zero};
use crate::endpoints::health::Health;
use crate::endpoints::load::{LedgerEntry, Load, PrefillQueue};
use crate::endpoints::outliers::Answers;
use crate::time::Monotonic;
use crate::wire::{Endpoint, Engine};

/// The state of one endpoint at one worker.
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
    /// Number of further answers with a KV cache that arrived, until the filter trusts hand-overs to this endpoint
    /// again; 0: the filter trusts them. An answer that shows a prompt computed twice sets the number.
    pub kv_doubts: u8,
    /// KV leases that this prefill endpoint let expire since it started, by its last scrape.
    pub(crate) expired_kv_leases: f64,
    /// Whether the last answer to a split request began later than its KV lease.
    pub(crate) answers_late: bool,
    /// Doubts in the blocks that the index has for this endpoint, from the cached tokens in its answers.
    pub(crate) doubts: Doubts,
    /// Streams that this worker reads for the endpoint's cached tokens.
    pub(crate) streams_read: u8,
    /// Failed hand-overs in a row: prompts that this endpoint computed and at which decode endpoints failed, although those
    /// serve whole requests.
    pub(crate) failed_handovers: u8,
    /// Whether the endpoint answered 5xx to the last request that it got whole.
    pub(crate) fails_whole: bool,
    /// Prefill legs that this Envoy has in flight here.
    pub prefill: PrefillQueue,
    /// Decode legs that this Envoy has in flight here.
    pub decode: Load,
    /// What the other Envoys that exchange have in flight here.
    pub(super) elsewhere: Totals,
    /// Whether the endpoint answered the last time.
    pub health: Health,
    /// Time of the endpoint's last answer, with success or with an error; zero: never. For prefill legs and whole requests it
    /// is the last answer to any worker of this Envoy, otherwise to this worker.
    pub(crate) answered_at: Monotonic,
    /// The latest answers. Errors, and answers after errors, are those to any worker of this Envoy; other answers are those
    /// to this worker.
    pub answers: Answers,
    /// Number that an earlier or later endpoint at the same index does not have.
    pub(super) generation: u32,
    /// Index of its pool's fitted cost.
    pub(super) fit: usize,
}

/// Values that an endpoint takes from its pool where it has none of its own.
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
    /// The state of an endpoint that comes to the list, with what is in flight there.
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
            doubts: Doubts::default(),
            streams_read: 0,
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

    /// Replaces the values from the pool.
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

    /// KV tokens assigned to this endpoint, by every Envoy that exchanges.
    #[must_use]
    pub fn decode_tokens(&self) -> u64 {
        self.decode.tokens.saturating_add(above_zero(self.elsewhere.tokens))
    }

    /// Decode legs assigned to this endpoint, by every Envoy that exchanges.
    #[must_use]
    pub(crate) fn decode_requests(&self) -> f64 {
        f64::from(self.decode.requests) + above_zero(self.elsewhere.requests) as f64
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

    /// Prefill legs in flight here, waiting or computed, from every Envoy that exchanges. Work of other Envoys without a
    /// count of legs is one leg: an Envoy of an earlier build does not count them.
    #[must_use]
    pub(crate) fn prefill_legs(&self) -> f64 {
        let elsewhere = above_zero(self.elsewhere.legs).max(u64::from(above_zero(self.elsewhere.work) > 0));
        self.prefill.len() as f64 + elsewhere as f64
    }
}
