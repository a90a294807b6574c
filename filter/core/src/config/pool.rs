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
    /// What to do with a request that no prefill endpoint served.
    pub on_prefill_failure: OnPrefillFailure,
    /// Prefill endpoints to try, 1 to 8.
    pub prefill_attempts: u32,
    /// How long a prefill leg may take.
    pub prefill_timeout: LegLimit,
    /// Port of a prefill endpoint's bootstrap server (SGLang, Mooncake) where the endpoint gives none.
    pub bootstrap_port: u16,
    /// Alternates named beside the decode endpoint for Envoy's connect-failure retry, 0 to 4.
    pub alternates: usize,
    /// Prefill cost, from which the fit begins.
    pub cost: Cost,
    /// Whether [`cost`](Self::cost), [`bytes_per_token`](Self::bytes_per_token) and [`media`](Self::media) are fitted.
    pub fit: bool,
    /// `w`: weight of a second of the prompt's own prefill against a second of work ahead of it; 0 or more. `None`: a
    /// function of the load, see [`affinity_weight`](crate::choose::weight::affinity_weight).
    pub affinity_weight: Option<f64>,
    /// β, 0 to 1: part of an unseen prompt that its rendezvous endpoint counts as holding, because other Envoys may have sent
    /// it there.
    ///
    /// - Where Envoys exchange, 0 is right: a larger β makes a prompt that is new to all of them wait (+16 % p99 at 0.6).
    /// - Without an exchange, 0.3 to 0.6 keeps hits.
    /// - `None`: 0.6 times the part of the other Envoys that
    ///   [do not exchange](crate::endpoints::elsewhere::Fleet::not_exchanging).
    pub rendezvous_share: Option<f64>,
    /// Bound within which a conversation keeps its decode endpoint. The endpoint's load may exceed the lowest load by this
    /// many times the prompt's tokens. 0 or more; 0: the choice ignores the conversation.
    pub decode_stay: f64,
    /// Tokens of an endpoint's prefix cache where the endpoint gives none.
    pub cache_tokens: u64,
    /// Bytes of JSON per token, for estimates.
    pub bytes_per_token: f64,
    /// Tokens of media, for estimates.
    pub media: MediaCost,
    /// Whether `cached_tokens` in the answer of a split request are those of its prefill leg.
    pub shows_prefills_cached_tokens: bool,
    /// KV lease: how long prefill endpoints keep a KV cache for its decode leg. `None`: the filter does not look for late
    /// answers.
    pub kv_lease: Option<Duration>,
    /// Limits of the load in flight.
    pub limits: Limits,
    /// Whether and how requests wait for a prefill endpoint with room.
    pub queue: Queue,
}

/// How requests of a pool wait for a prefill endpoint with room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queue {
    /// Whether requests wait. Otherwise each request goes to an endpoint as soon as it comes.
    pub is_on: bool,
    /// An endpoint has room while its remaining work takes less than this time.
    pub lead: Duration,
    /// Tokens that an engine computes together: an endpoint has room for prompts that it will begin together, while they
    /// have no more than these. 0: engines compute one prompt after another.
    pub batch_tokens: u64,
    /// Longest wait. A request that has waited this long gets 503.
    pub max_wait: Duration,
    /// Wait after which no request of the same priority overtakes a request.
    pub overtaken: Duration,
    /// Most requests of the pool that wait at this Envoy.
    pub max_requests: usize,
    /// Most bytes that the waiting requests of the pool take.
    pub max_bytes: usize,
    /// Percent of a decode endpoint's KV cache up to which requests are bound. 0: the decode endpoints' room does not
    /// matter.
    pub decode_kv_percent: u32,
    /// How long a request waits while no endpoint is ready for its model. Zero: it gets 503 at once. Only the value of the
    /// pool `default` counts, because a model without endpoints belongs to no pool.
    pub no_endpoint: Duration,
}

/// Tokens of media in a prompt, from which the fit begins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MediaCost {
    /// Pixels per token of an image whose size is known from its data.
    pub pixels_per_token: f64,
    /// Tokens of any other image.
    pub image_tokens: f64,
    /// Tokens of a sound.
    pub audio_tokens: f64,
    /// Tokens of a video.
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

/// Time limit of a prefill leg. It follows the seconds that the ledger expects, so a long prompt behind much work does not
/// make an endpoint look dead.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LegLimit {
    /// Shortest limit.
    pub floor: Duration,
    /// Factor on the expected seconds, 1 or more.
    pub factor: f64,
}

impl LegLimit {
    /// Longest limit.
    const MAX: Duration = Duration::from_secs(3_600);

    /// Time limit of a leg whose end the filter expects after `seconds`, including the work ahead of the leg.
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
    /// When that [costs](crate::choose::split_cost) less than to serve the request whole.
    Cost,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// What follows when every prefill leg of a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnPrefillFailure {
    /// The decode endpoint computes the prompt.
    DecodeOnly,
    /// The client gets 503.
    Fail,
}
