//! The configuration as its JSON has it: every key with its default, nothing checked yet.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::legs::RawLegs;
use super::{OnPrefillFailure, SESSION_HEADERS};
use crate::wire::Engine;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Raw {
    pub(super) revision: String,
    pub(super) cluster: String,
    pub(super) bootstrap_cluster: Option<String>,
    pub(super) destination_header: String,
    pub(super) control: Option<RawControl>,
    pub(super) endpoints: Vec<Map<String, Value>>,
    pub(super) trusted_headers: Vec<String>,
    pub(super) allowed_paths: Vec<String>,
    pub(super) path_prefixes: Vec<String>,
    pub(super) legs: RawLegs,
    pub(super) upgrades: bool,
    pub(super) session_headers: Vec<String>,
    pub(super) session_cookies: Vec<String>,
    pub(super) max_body_bytes: usize,
    pub(super) prefix: RawPrefix,
    pub(super) objectives: Vec<RawObjective>,
    pub(super) models: BTreeMap<String, RawAlias>,
    pub(super) pools: BTreeMap<String, RawPool>,
}

impl Default for Raw {
    fn default() -> Self {
        Self {
            revision: String::new(),
            cluster: "engines".to_owned(),
            bootstrap_cluster: None,
            destination_header: "x-pd-destination".to_owned(),
            control: None,
            endpoints: Vec::new(),
            trusted_headers: Vec::new(),
            allowed_paths: Vec::new(),
            path_prefixes: Vec::new(),
            legs: RawLegs::default(),
            upgrades: false,
            session_headers: SESSION_HEADERS.iter().map(|&name| name.to_owned()).collect(),
            session_cookies: Vec::new(),
            max_body_bytes: 16 << 20,
            prefix: RawPrefix::default(),
            objectives: Vec::new(),
            models: BTreeMap::new(),
            pools: BTreeMap::new(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawObjective {
    pub(super) name: String,
    pub(super) priority: i64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawAlias {
    pub(super) targets: Vec<RawTarget>,
    #[serde(default)]
    pub(super) answer: AnswerModel,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawTarget {
    pub(super) model: String,
    #[serde(default = "default_weight")]
    pub(super) weight: u32,
}

fn default_weight() -> u32 {
    1
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum AnswerModel {
    #[default]
    Served,
    Asked,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum CachedTokens {
    Prefill,
    Decode,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawControl {
    pub(super) cluster: String,
    #[serde(default = "default_authority")]
    pub(super) authority: String,
    #[serde(default = "default_wait_ms")]
    pub(super) wait_ms: u64,
    #[serde(default = "default_token_env")]
    pub(super) token_env: String,
    #[serde(default = "default_exchange")]
    pub(super) exchange: bool,
}

fn default_authority() -> String {
    "pd-control".to_owned()
}

fn default_wait_ms() -> u64 {
    30_000
}

fn default_exchange() -> bool {
    true
}

fn default_token_env() -> String {
    "PD_CONTROL_TOKEN".to_owned()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawPrefix {
    pub(super) block_bytes: usize,
    pub(super) index_bytes: usize,
    pub(super) hot_share: f64,
}

impl Default for RawPrefix {
    fn default() -> Self {
        Self { block_bytes: 512, index_bytes: 256 << 20, hot_share: 0.02 }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawPool {
    pub(super) engine: Engine,
    pub(super) split: RawSplit,
    pub(super) on_prefill_failure: OnPrefillFailure,
    pub(super) prefill_attempts: u32,
    pub(super) prefill_timeout_ms: u64,
    pub(super) prefill_timeout_factor: f64,
    pub(super) bootstrap_port: u16,
    pub(super) alternates: usize,
    pub(super) cost: RawCost,
    pub(super) fit: bool,
    pub(super) affinity_weight: Option<f64>,
    pub(super) rendezvous_share: Option<f64>,
    pub(super) decode_stay: f64,
    pub(super) cache_tokens: u64,
    pub(super) bytes_per_token: f64,
    pub(super) media: RawMedia,
    pub(super) cached_tokens: CachedTokens,
    pub(super) kv_lease_ms: u64,
    pub(super) max_requests: u64,
    pub(super) max_tokens: u64,
    pub(super) queue: RawQueue,
}

impl Default for RawPool {
    fn default() -> Self {
        Self {
            engine: Engine::VllmNixl,
            split: RawSplit::default(),
            on_prefill_failure: OnPrefillFailure::DecodeOnly,
            prefill_attempts: 2,
            prefill_timeout_ms: 60_000,
            prefill_timeout_factor: 4.0,
            bootstrap_port: 8_998,
            alternates: 2,
            cost: RawCost::default(),
            fit: true,
            affinity_weight: None,
            rendezvous_share: None,
            decode_stay: 10.0,
            cache_tokens: 500_000,
            bytes_per_token: 4.0,
            media: RawMedia::default(),
            cached_tokens: CachedTokens::Prefill,
            kv_lease_ms: 30_000,
            max_requests: 0,
            max_tokens: 0,
            queue: RawQueue::default(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawQueue {
    pub(super) enabled: bool,
    pub(super) lead_ms: u64,
    pub(super) batch_tokens: u64,
    pub(super) max_wait_ms: u64,
    pub(super) overtaken_ms: u64,
    pub(super) max_requests: usize,
    pub(super) max_bytes: usize,
    pub(super) decode_kv_percent: u32,
    pub(super) no_endpoint_ms: u64,
}

impl Default for RawQueue {
    fn default() -> Self {
        Self {
            enabled: false,
            lead_ms: 20,
            batch_tokens: 8_192,
            max_wait_ms: 600_000,
            overtaken_ms: 300_000,
            max_requests: 8_192,
            max_bytes: 512 << 20,
            decode_kv_percent: 100,
            no_endpoint_ms: 0,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawSplit {
    pub(super) mode: SplitMode,
    pub(super) uncached_tokens: u64,
}

impl Default for RawSplit {
    fn default() -> Self {
        Self { mode: SplitMode::Threshold, uncached_tokens: 256 }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum SplitMode {
    Threshold,
    Cost,
    Always,
    Never,
}

/// An 8-billion-parameter model on one H100, the design's figures.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawCost {
    pub(super) a_ms: f64,
    pub(super) b_us: f64,
    pub(super) c_ns: f64,
}

impl Default for RawCost {
    fn default() -> Self {
        Self { a_ms: 15.0, b_us: 25.0, c_ns: 0.524 }
    }
}

/// A patch of 28 by 28 pixels a token (Qwen2-VL); others are guesses, which answers correct.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawMedia {
    pub(super) pixels_per_token: f64,
    pub(super) image_tokens: f64,
    pub(super) audio_tokens: f64,
    pub(super) video_tokens: f64,
    pub(super) file_tokens: f64,
}

impl Default for RawMedia {
    fn default() -> Self {
        Self {
            pixels_per_token: 784.0,
            image_tokens: 1_024.0,
            audio_tokens: 768.0,
            video_tokens: 4_096.0,
            file_tokens: 2_048.0,
        }
    }
}
