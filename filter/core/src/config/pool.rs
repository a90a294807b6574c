//! Policy of a pool.

use core::time::Duration;

use serde::Deserialize;

use crate::wire::Engine;

/// Policy of one pool.
#[derive(Clone, Debug, PartialEq)]
pub struct Pool {
    /// Hand-over protocol of endpoints that do not name their own.
    pub engine: Engine,
    /// When to run a prefill leg.
    pub split: Split,
    /// What to do when no prefill endpoint could be had.
    pub on_prefill_failure: OnPrefillFailure,
    /// Prefill endpoints to try, 1 to 8.
    pub prefill_attempts: u32,
    /// How long a prefill leg may take.
    pub prefill_timeout: LegLimit,
    /// Port of a prefill endpoint's bootstrap server (SGLang, Mooncake) where the endpoint does not say.
    pub bootstrap_port: u16,
    /// Alternates named beside the decode endpoint for Envoy's connect-failure retry, 0 to 4.
    pub alternates: usize,
    /// Prefill seconds of a prompt, to begin with.
    pub cost: Cost,
    /// Whether [`cost`](Self::cost) and [`bytes_per_token`](Self::bytes_per_token) follow what is seen.
    pub fit: bool,
    /// `w`: what a second of this prompt's own prefill weighs against a second of work ahead of it. `None`: by what is in
    /// flight, see [`affinity_weight`](crate::choose::weight::affinity_weight).
    pub affinity_weight: Option<f64>,
    /// β: share of a prompt that its rendezvous endpoint is costed as holding, 0 to 1, when this worker has not seen
    /// the prefix but others may have. Right where Envoys know of each other's decisions within 50 ms: 0, a prompt
    /// that is new to all of them would wait for nothing (+16 % p99 at 0.6). Without any exchange 0.3 to 0.6 keeps hits.
    /// `None`: 0.6 times the share of the other Envoys that [do not exchange](crate::endpoints::elsewhere::Fleet::not_exchanging).
    pub rendezvous_share: Option<f64>,
    /// A conversation keeps its decode endpoint while that has at most so many times the prompt's tokens more assigned than
    /// the least loaded one. 0: it never stays for its own sake.
    pub decode_stay: f64,
    /// Tokens of an endpoint's prefix cache where the endpoint does not say.
    pub cache_tokens: u64,
    /// Bytes of JSON per token, for estimates.
    pub bytes_per_token: f64,
    /// Tokens of media, for estimates.
    pub media: MediaCost,
    /// Whether `cached_tokens` in the answer of a split request are those of its prefill leg.
    pub shows_prefills_cached_tokens: bool,
    /// How long prefill endpoints keep a KV cache for its decode leg; `None`: answers that begin later are not looked at.
    pub kv_lease: Option<Duration>,
    /// What may be in flight.
    pub limits: Limits,
    /// Whether and how requests wait for a prefill endpoint with room.
    pub queue: Queue,
}

/// How requests of a pool wait for a prefill endpoint with room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queue {
    /// Whether they wait at all. Otherwise each goes to an endpoint as soon as it comes.
    pub is_on: bool,
    /// Work that an endpoint may have left and still have room.
    pub lead: Duration,
    /// Longest wait. Who has waited so long gets 503.
    pub max_wait: Duration,
    /// How long a request can be overtaken by others of its priority.
    pub overtaken: Duration,
    /// Most requests that wait at this Envoy.
    pub max_requests: usize,
    /// Most bytes that they take.
    pub max_bytes: usize,
    /// How long a request waits for an endpoint where none is ready for its model. Zero: it gets 503 at once. The one of the
    /// pool `default` counts, since a model without endpoints belongs to no pool.
    pub no_endpoint: Duration,
}

/// Tokens of media in a prompt, to begin with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MediaCost {
    /// Pixels of an image per token, where its data says how many it has.
    pub pixels_per_token: f64,
    /// Tokens of any other image.
    pub image_tokens: f64,
    /// Tokens of a sound.
    pub audio_tokens: f64,
    /// Tokens of a film.
    pub video_tokens: f64,
    /// Tokens of a document.
    pub file_tokens: f64,
}

/// Limits of one pool, all workers of an Envoy together. 0: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests in flight.
    pub requests: u64,
    /// KV tokens in flight: prompts and expected output.
    pub tokens: u64,
}

/// Prefill seconds `a + b·(n − p) + c·(n² − p²)` of `n` prompt tokens of which `p` are cached.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Seconds per request.
    pub a: f64,
    /// Seconds per uncached token.
    pub b: f64,
    /// Seconds per squared token (attention).
    pub c: f64,
}

impl Cost {
    /// Seconds of prefill for `n` tokens of which `p` are cached.
    #[must_use]
    pub fn seconds(&self, n: f64, p: f64) -> f64 {
        let p = p.min(n).max(0.0);
        self.a + self.b * (n - p) + self.c * (n * n - p * p)
    }
}

/// Time limit of a prefill leg. It follows what the ledger expects, so that a long prompt behind a long queue is not taken
/// for an endpoint that does not answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LegLimit {
    /// Shortest limit.
    pub floor: Duration,
    /// Times of the expected seconds, 1 or more.
    pub factor: f64,
}

impl LegLimit {
    /// Longest limit.
    const MAX: Duration = Duration::from_secs(3_600);

    /// Limit of a leg that is expected to end after so many seconds, with the work ahead of it.
    #[must_use]
    pub fn of(&self, seconds: f64) -> Duration {
        let expected = Duration::try_from_secs_f64(seconds * self.factor).unwrap_or_default();
        expected.max(self.floor).min(Self::MAX)
    }
}

/// When to run a prefill leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// When this many prompt tokens or more are not cached on the best decode endpoint.
    Threshold {
        /// Tokens.
        uncached_tokens: u64,
    },
    /// Always.
    Always,
    /// Never.
    Never,
}

/// What to do when no prefill endpoint could be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnPrefillFailure {
    /// The decode endpoint computes the prompt itself.
    DecodeOnly,
    /// The client gets 503.
    Fail,
}
