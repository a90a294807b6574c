//! Reads the raw configuration and refuses it whole, with the name of the key, where a value is out of range.

use core::time::Duration;
use std::collections::BTreeMap;

use hashbrown::HashMap;
use serde_json::{Map, Value};

use super::error::ConfigError;
use super::keys::{Key, Values};
use super::legs::Legs;
use super::names::{check_header_name, check_name};
use super::raw::{AnswerModel, CachedTokens, Raw, RawAlias, RawControl, RawPool, RawTarget, SplitMode};
use super::{Alias, Config, Control, Cost, LegLimit, Limits, MediaCost, Pool, Prefix, Queue, Split, TRUSTABLE_HEADERS};
use crate::wire::{Endpoint, Snapshot, Target, WireError, unknown_endpoint_key};

impl Raw {
    /// Checks names of clusters, headers and paths.
    fn check_names(&self) -> Result<(), ConfigError> {
        check_name("cluster", &self.cluster)?;
        if let Some(cluster) = &self.bootstrap_cluster {
            check_name("bootstrap_cluster", cluster)?;
        }
        check_header_name("destination_header", &self.destination_header)?;
        for header in &self.trusted_headers {
            if !TRUSTABLE_HEADERS.contains(&header.as_str()) {
                let why = format!("{header:?} is none of {}", TRUSTABLE_HEADERS.join(", "));
                return Err(ConfigError::new("trusted_headers", why));
            }
        }
        for (i, path) in self.allowed_paths.iter().enumerate() {
            if !path.starts_with('/') || path.trim_end_matches("/*").contains(['*', '?', '#', '%']) {
                let why = "must be a path without a query, or one that ends in `/*`";
                return Err(ConfigError::new(&format!("allowed_paths[{i}]"), why));
            }
        }
        for (i, prefix) in self.path_prefixes.iter().enumerate() {
            if !prefix.starts_with('/') || prefix.ends_with('/') || prefix.contains(['*', '?', '#', '%']) {
                let why = "must be a path such as `/team`, without a slash at its end";
                return Err(ConfigError::new(&format!("path_prefixes[{i}]"), why));
            }
        }
        for (i, header) in self.session_headers.iter().enumerate() {
            // Clients' own names may have underscores.
            check_header_name(&format!("session_headers[{i}]"), &header.replace('_', "-"))?;
        }
        for (i, cookie) in self.session_cookies.iter().enumerate() {
            let is_token = |byte: u8| byte.is_ascii_graphic() && !b"()<>@,;:\\\"/[]?={}".contains(&byte);
            if cookie.is_empty() || cookie.len() > 128 || !cookie.bytes().all(is_token) {
                return Err(ConfigError::new(&format!("session_cookies[{i}]"), "must be the name of a cookie"));
            }
        }
        Ok(())
    }
}

impl Config {
    /// Reads and checks a plugin configuration. No bytes at all stand for `{}`.
    ///
    /// # Errors
    /// [`ConfigError`] names the first key that is unknown, of the wrong type or out of range.
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        let raw: Raw = match bytes.trim_ascii() {
            b"" => Raw::default(),
            // serde would also take an array of all values in order.
            text if text.starts_with(b"{") => {
                serde_json::from_slice(bytes).map_err(|error| ConfigError::new("plugin configuration", error))?
            }
            _ => return Err(ConfigError::new("plugin configuration", "must be a JSON object")),
        };
        raw.check_names()?;
        check_number(Key::MaxBodyBytes, raw.max_body_bytes as f64)?;
        check_number(Key::PrefixBlockBytes, raw.prefix.block_bytes as f64)?;
        check_number(Key::PrefixIndexBytes, raw.prefix.index_bytes as f64)?;
        check_number(Key::PrefixHotShare, raw.prefix.hot_share)?;
        let control = raw.control.map(Control::check).transpose()?;
        let endpoints = check_endpoints(raw.endpoints)?;
        let mut pools = HashMap::with_capacity(raw.pools.len());
        for (name, pool) in &raw.pools {
            pools.insert(name.clone(), Pool::check(name, pool)?);
        }
        let mut models = BTreeMap::new();
        for (name, alias) in raw.models {
            let alias = Alias::check(&format!("models.{name}"), alias)?;
            models.insert(name, alias);
        }
        let default_pool = match pools.get("default") {
            Some(pool) => pool.clone(),
            None => Pool::check("default", &RawPool::default())?,
        };
        Ok(Self {
            revision: raw.revision,
            bootstrap_cluster: raw.bootstrap_cluster.unwrap_or_else(|| raw.cluster.clone()),
            cluster: raw.cluster,
            destination_header: raw.destination_header,
            control,
            endpoints,
            trusted_headers: raw.trusted_headers,
            allowed_paths: raw.allowed_paths,
            path_prefixes: raw.path_prefixes,
            legs: Legs::check(raw.legs)?,
            upgrades: raw.upgrades,
            session_headers: raw.session_headers,
            session_cookies: raw.session_cookies,
            max_body_bytes: raw.max_body_bytes,
            prefix: Prefix {
                block_bytes: raw.prefix.block_bytes,
                index_bytes: raw.prefix.index_bytes,
                hot_share: raw.prefix.hot_share,
            },
            models,
            objectives: raw.objectives.into_iter().map(|objective| (objective.name, objective.priority)).collect(),
            pools,
            default_pool,
        })
    }
}

impl Alias {
    fn check(key: &str, raw: RawAlias) -> Result<Self, ConfigError> {
        if raw.targets.iter().any(|target| target.model.is_empty()) {
            return Err(ConfigError::new(key, "targets: a model must have a name"));
        }
        if raw.targets.iter().all(|target| target.weight == 0) {
            return Err(ConfigError::new(key, "targets: there must be one with a weight"));
        }
        let target = |RawTarget { model, weight }| Target { model, weight };
        let targets = raw.targets.into_iter().map(target).collect();
        Ok(Self { targets, is_put_back: matches!(raw.answer, AnswerModel::Asked) })
    }
}

impl Control {
    fn check(raw: RawControl) -> Result<Self, ConfigError> {
        check_name("control.cluster", &raw.cluster)?;
        check_name("control.authority", &raw.authority)?;
        check_number(Key::ControlWaitMs, raw.wait_ms as f64)?;
        Ok(Self {
            cluster: raw.cluster,
            authority: raw.authority,
            wait: Duration::from_millis(raw.wait_ms),
            token_env: raw.token_env,
            exchange: raw.exchange,
        })
    }
}

impl Pool {
    fn check(name: &str, raw: &RawPool) -> Result<Self, ConfigError> {
        let numbers = [
            (Key::PoolsPrefillAttempts, f64::from(raw.prefill_attempts)),
            (Key::PoolsPrefillTimeoutMs, raw.prefill_timeout_ms as f64),
            (Key::PoolsPrefillTimeoutFactor, raw.prefill_timeout_factor),
            (Key::PoolsBootstrapPort, f64::from(raw.bootstrap_port)),
            (Key::PoolsAlternates, raw.alternates as f64),
            (Key::PoolsCostA, raw.cost.a_ms),
            (Key::PoolsCostB, raw.cost.b_us),
            (Key::PoolsCostC, raw.cost.c_ns),
            (Key::PoolsAffinityWeight, raw.affinity_weight.unwrap_or(0.0)),
            (Key::PoolsRendezvousShare, raw.rendezvous_share.unwrap_or(0.0)),
            (Key::PoolsDecodeStay, raw.decode_stay),
            (Key::PoolsCacheTokens, raw.cache_tokens as f64),
            (Key::PoolsBytesPerToken, raw.bytes_per_token),
            (Key::PoolsQueueLeadMs, raw.queue.lead_ms as f64),
            (Key::PoolsQueueBatchTokens, raw.queue.batch_tokens as f64),
            (Key::PoolsQueueMaxWaitMs, raw.queue.max_wait_ms as f64),
            (Key::PoolsQueueOvertakenMs, raw.queue.overtaken_ms as f64),
            (Key::PoolsQueueMaxRequests, raw.queue.max_requests as f64),
            (Key::PoolsQueueMaxBytes, raw.queue.max_bytes as f64),
            (Key::PoolsMediaPixelsPerToken, raw.media.pixels_per_token),
            (Key::PoolsMediaImageTokens, raw.media.image_tokens),
            (Key::PoolsMediaAudioTokens, raw.media.audio_tokens),
            (Key::PoolsMediaVideoTokens, raw.media.video_tokens),
            (Key::PoolsMediaFileTokens, raw.media.file_tokens),
            (Key::PoolsKvLeaseMs, raw.kv_lease_ms as f64),
            (Key::PoolsQueueDecodeKvPercent, f64::from(raw.queue.decode_kv_percent)),
            (Key::PoolsQueueNoEndpointMs, raw.queue.no_endpoint_ms as f64),
        ];
        for (key, value) in numbers {
            check_range(&key.path().replacen("NAME", name, 1), key, value)?;
        }
        Ok(Self::unchecked(raw))
    }

    fn unchecked(raw: &RawPool) -> Self {
        let uncached_tokens = raw.split.uncached_tokens;
        Self {
            engine: raw.engine,
            split: match raw.split.mode {
                SplitMode::Threshold => Split::Threshold { uncached_tokens },
                SplitMode::Cost => Split::Cost,
                SplitMode::Always => Split::Always,
                SplitMode::Never => Split::Never,
            },
            on_prefill_failure: raw.on_prefill_failure,
            prefill_attempts: raw.prefill_attempts,
            prefill_timeout: LegLimit {
                floor: Duration::from_millis(raw.prefill_timeout_ms),
                factor: raw.prefill_timeout_factor,
            },
            bootstrap_port: raw.bootstrap_port,
            alternates: raw.alternates,
            cost: Cost { a: raw.cost.a_ms * 1e-3, b: raw.cost.b_us * 1e-6, c: raw.cost.c_ns * 1e-9 },
            fit: raw.fit,
            affinity_weight: raw.affinity_weight,
            rendezvous_share: raw.rendezvous_share,
            decode_stay: raw.decode_stay,
            cache_tokens: raw.cache_tokens,
            bytes_per_token: raw.bytes_per_token,
            media: MediaCost {
                pixels_per_token: raw.media.pixels_per_token,
                image_tokens: raw.media.image_tokens,
                audio_tokens: raw.media.audio_tokens,
                video_tokens: raw.media.video_tokens,
                file_tokens: raw.media.file_tokens,
            },
            shows_prefills_cached_tokens: matches!(raw.cached_tokens, CachedTokens::Prefill),
            kv_lease: (raw.kv_lease_ms > 0).then(|| Duration::from_millis(raw.kv_lease_ms)),
            limits: Limits { requests: raw.max_requests, tokens: raw.max_tokens },
            queue: Queue {
                is_on: raw.queue.enabled,
                lead: Duration::from_millis(raw.queue.lead_ms),
                batch_tokens: raw.queue.batch_tokens,
                max_wait: Duration::from_millis(raw.queue.max_wait_ms),
                overtaken: Duration::from_millis(raw.queue.overtaken_ms),
                max_requests: raw.queue.max_requests,
                max_bytes: raw.queue.max_bytes,
                decode_kv_percent: raw.queue.decode_kv_percent,
                no_endpoint: Duration::from_millis(raw.queue.no_endpoint_ms),
            },
        }
    }
}

fn check_endpoints(raw: Vec<Map<String, Value>>) -> Result<Vec<Endpoint>, ConfigError> {
    let mut endpoints = Vec::with_capacity(raw.len());
    for (i, object) in raw.into_iter().enumerate() {
        if let Some(key) = unknown_endpoint_key(&object) {
            return Err(ConfigError::new(&format!("endpoints[{i}].{key}"), "unknown key"));
        }
        let endpoint: Endpoint = serde_json::from_value(Value::Object(object))
            .map_err(|error| ConfigError::new(&format!("endpoints[{i}]"), error))?;
        endpoints.push(endpoint);
    }
    let snapshot = Snapshot::whole("", 1, endpoints);
    snapshot.validate().map_err(|error: WireError| ConfigError::new("endpoints", error))?;
    Ok(snapshot.endpoints)
}

fn check_number(key: Key, value: f64) -> Result<(), ConfigError> {
    check_range(key.path(), key, value)
}

fn check_range(path: &str, key: Key, value: f64) -> Result<(), ConfigError> {
    match key.values() {
        Values::Between { low, high, .. } if !key.values().allows(value) => {
            Err(ConfigError::new(path, format_args!("must be between {low} and {high}, is {value}")))
        }
        _ => Ok(()),
    }
}
