//! What one simulated engine server is: addresses, role, engine, sizes, speed, faults.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::fault::Fault;
use crate::role::{Engine, Role};

/// Everything that [`crate::start`] needs. [`Config::default`] is made for tests: an ephemeral port, no sleeps,
/// the last 256 requests recorded.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address of the API; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Address of the listener from which other simulators pull KV; absent: a free port at the IP of `listen`.
    pub side_channel: Option<SocketAddr>,
    /// Work that the server is meant for.
    pub role: Role,
    /// Engine and connector.
    pub engine: Engine,
    /// Revision of engine and model. A server refuses to fetch a KV cache from one of another revision, as vLLM does where
    /// the compatibility hashes differ.
    pub revision: Option<String>,
    /// API key: requests below `/v1` and `/inference` without it as a bearer token are answered 401, as by vLLM.
    pub api_key: Option<String>,
    /// Names of base models, at least one. Each gives other text.
    pub models: Vec<String>,
    /// Names of LoRA adapters of the first model.
    pub loras: Vec<String>,
    /// Factor on every simulated time: 1 real, 0.1 ten times faster, 0 no timers at all.
    pub speed: f64,
    /// Milliseconds of every prefill.
    pub a_ms: f64,
    /// Microseconds per uncached prompt token.
    pub b_us: f64,
    /// Nanoseconds per token², on `n² − p²` for `n` prompt tokens with `p` cached.
    pub c_ns: f64,
    /// Milliseconds per output token of a request that decodes alone.
    pub tpot_ms: f64,
    /// Microseconds that every other decoding request adds to each token.
    pub tpot_batch_us: f64,
    /// Milliseconds of every KV transfer.
    pub transfer_ms: f64,
    /// Microseconds of KV transfer per token.
    pub transfer_us: f64,
    /// Tokens that the KV cache holds.
    pub cache_tokens: u64,
    /// Tokens of a KV block.
    pub block_tokens: u32,
    /// How long blocks of a prefill leg wait for their decode leg.
    pub lease: Duration,
    /// Longest prompt plus output, in tokens.
    pub max_model_len: u64,
    /// Requests that run at once; more wait.
    pub max_num_seqs: usize,
    /// Directory that `vllm-shared` servers share.
    pub shared_dir: Option<PathBuf>,
    /// Faults from the start.
    pub faults: Vec<Fault>,
    /// Seed of the faults' probabilities.
    pub seed: u64,
    /// Requests kept for `GET /requests`; 0 keeps none.
    pub record: usize,
    /// Bytes that a request body may have; more is answered 413.
    pub max_body_bytes: usize,
    /// How long a connection may be without a request before the server closes it, as uvicorn does after 5 s; absent: for
    /// ever. A client that sends its next request at that moment loses the request, as it sometimes does at a real server.
    /// Time between two parts of a stream counts, too.
    pub keep_alive: Option<Duration>,
    /// Accepts KV parameters that a gateway parsed and wrote again with the same values, as vLLM does. Without it they must
    /// come back byte for byte, so that a test sees any gateway that changes them.
    pub rebuilt_params: bool,
    /// Counts the prompts that were computed, for all servers of a test together; absent: nobody counts.
    pub computed: Option<Arc<Computed>>,
}

/// How often each prompt was computed, more than half of it: a server that had it cached or fetched its KV did not.
#[derive(Debug, Default)]
pub struct Computed(Mutex<HashMap<u64, u32>>);

impl Computed {
    pub(crate) fn add(&self, digest: u64) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(digest).or_default() += 1;
    }

    /// Prompts that were computed once, and those that were computed more often.
    #[must_use]
    pub fn once_and_more(&self) -> (u64, u64) {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let more = counts.values().filter(|count| **count > 1).count() as u64;
        (counts.len() as u64 - more, more)
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            side_channel: None,
            role: Role::Both,
            engine: Engine::VllmNixl,
            revision: None,
            api_key: None,
            models: vec!["sim".to_owned()],
            loras: Vec::new(),
            speed: 0.0,
            a_ms: 15.0,
            b_us: 25.0,
            c_ns: 0.524,
            tpot_ms: 8.0,
            tpot_batch_us: 100.0,
            transfer_ms: 2.0,
            transfer_us: 2.5,
            cache_tokens: 2_000_000,
            block_tokens: 16,
            lease: Duration::from_secs(30),
            max_model_len: 131_072,
            max_num_seqs: 256,
            shared_dir: None,
            faults: Vec::new(),
            seed: 0,
            record: 256,
            max_body_bytes: 64 << 20,
            keep_alive: None,
            rebuilt_params: false,
            computed: None,
        }
    }
}

impl Config {
    /// The default with another role.
    #[must_use]
    pub fn of(role: Role) -> Self {
        Self { role, ..Self::default() }
    }

    /// Says what is wrong, naming the option.
    ///
    /// # Errors
    /// One line for people.
    pub fn validate(&self) -> Result<(), String> {
        if self.engine == Engine::VllmShared && self.shared_dir.is_none() {
            return Err("--engine vllm-shared needs --shared-dir".to_owned());
        }
        let in_header = [("--revision", &self.revision), ("--api-key", &self.api_key)];
        for (option, text) in in_header {
            if text.as_ref().is_some_and(|text| text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic())) {
                return Err(format!("{option} must be visible ASCII characters"));
            }
        }
        if self.models.is_empty() || self.models.iter().chain(&self.loras).any(String::is_empty) {
            return Err("--model and --lora must not be empty".to_owned());
        }
        for (option, value) in [
            ("--speed", self.speed),
            ("--a-ms", self.a_ms),
            ("--b-us", self.b_us),
            ("--c-ns", self.c_ns),
            ("--tpot-ms", self.tpot_ms),
            ("--tpot-batch-us", self.tpot_batch_us),
            ("--transfer-ms", self.transfer_ms),
            ("--transfer-us", self.transfer_us),
        ] {
            // An hour per token is far beyond every use and far below what a Duration holds.
            if !(0.0..=3.6e6).contains(&value) {
                return Err(format!("{option} must be between 0 and 3600000"));
            }
        }
        if self.block_tokens == 0 || self.cache_tokens < u64::from(self.block_tokens) {
            return Err("--block-tokens must be at least 1 and --cache-tokens at least one block".to_owned());
        }
        if self.cache_tokens / u64::from(self.block_tokens) > u64::from(u32::MAX / 2) {
            return Err("--cache-tokens is too large".to_owned());
        }
        if self.max_model_len < 2 || self.max_num_seqs == 0 {
            return Err("--max-model-len must be at least 2 and --max-num-seqs at least 1".to_owned());
        }
        Ok(())
    }
}
