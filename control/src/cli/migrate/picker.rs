//! The configuration of the endpoint picker: `EndpointPickerConfig` of llm-d and the Inference Extension.
//!
//! The configuration is in a ConfigMap, or in an argument of the picker's container.

use std::path::Path;

use serde_json::{Value, json};

use super::report::Report;
use super::sidecar::{containers, flags};
use super::values::Values;
use crate::cli::manifests::{Manifests, Object, items, text};
use crate::sources::yaml;

/// Characters of a token, by which the picker counts blocks of its older versions.
const CHARACTERS_PER_TOKEN: u64 = 4;
/// Tokens of a block unless the configuration says otherwise.
const DEFAULT_BLOCK_TOKENS: u64 = 16;

pub(super) fn read(manifests: &Manifests, values: &mut Values, report: &mut Report) {
    for map in manifests.of_kind("ConfigMap") {
        let data = map.value.pointer("/data").and_then(Value::as_object);
        for (name, content) in data.into_iter().flatten() {
            if let Some(content) = content.as_str().filter(|content| content.contains("EndpointPickerConfig")) {
                config(map, &format!("data.{name}"), content, values, report);
            }
        }
    }
    for (object, key, container) in containers(manifests) {
        for (name, value) in flags(container).iter().filter(|(name, _)| name == "config-text") {
            config(object, &format!("{key}.args --{name}"), value, values, report);
        }
    }
}

fn config(object: &Object, key: &str, content: &str, values: &mut Values, report: &mut Report) {
    let parsed: Value = match yaml::parse(Path::new(&object.title()), content.as_bytes()) {
        Ok(parsed) => parsed,
        Err(error) => return report.dropped(object, key, format!("cannot be read: {error}")),
    };
    let plugins = items(&parsed, "/plugins");
    for plugin in plugins {
        let key = format!("{key}: plugins: {}", text(plugin, "/type"));
        self::plugin(object, &key, plugin, plugins, values, report);
    }
    for profile in items(&parsed, "/schedulingProfiles") {
        let weights: Vec<_> = items(profile, "/plugins")
            .iter()
            .filter_map(|it| Some(format!("{} {}", text(it, "/pluginRef"), it.get("weight")?)))
            .collect();
        if !weights.is_empty() {
            let key = format!("{key}: schedulingProfiles: {}", text(profile, "/name"));
            let why = "the filter compares seconds of waiting work with seconds of the prompt, without weights of scorers \
                       (affinity_weight is the one factor)";
            report.dropped(object, &key, format!("{}: {why}", weights.join(", ")));
        }
    }
    for (part, why) in [
        ("saturationDetector", "pools.NAME.max_requests and max_tokens limit what is in flight"),
        ("flowControl", "pools.NAME.max_requests and max_tokens limit what is in flight"),
        ("dataLayer", "pd-control reads the engines' metrics itself"),
        ("featureGates", "the filter has none"),
        ("parser", "the filter reads the APIs by their paths"),
        ("requestHandler", "the filter reads the APIs by their paths"),
    ] {
        if parsed.get(part).is_some_and(|value| !value.is_null()) {
            report.dropped(object, &format!("{key}: {part}"), why);
        }
    }
}

fn plugin(object: &Object, key: &str, plugin: &Value, all: &[Value], values: &mut Values, report: &mut Report) {
    let number = |name: &str| plugin.pointer(&format!("/parameters/{name}")).and_then(Value::as_u64);
    match text(plugin, "/type") {
        "prefix-based-pd-decider" => decider(object, key, plugin, values, report),
        "always-disagg-pd-decider" => {
            values.pool.insert("split".to_owned(), json!({"mode": "always"}));
            report.carried(object, key, "filter.config.pools.default.split: always");
        }
        "pd-profile-handler" | "disagg-profile-handler" => profile_handler(object, key, plugin, all, values, report),
        "prefix-cache-scorer" | "approx-prefix-cache-producer" => {
            let block = number("blockSizeTokens").filter(|tokens| *tokens > 0).or_else(|| {
                let characters = number("blockSize").or_else(|| number("hashBlockSize"))?;
                (characters > 0).then(|| (characters / CHARACTERS_PER_TOKEN).max(1))
            });
            match number("lruCapacityPerServer") {
                Some(blocks) => {
                    let tokens = blocks.saturating_mul(block.unwrap_or(DEFAULT_BLOCK_TOKENS));
                    values.pool.insert("cache_tokens".to_owned(), json!(tokens));
                    let what = format!(
                        "filter.config.pools.default.cache_tokens: {tokens}; an engine that reports its own counts instead"
                    );
                    report.carried(object, key, what);
                }
                None => {
                    report.carried(object, key, "the filter's index of prefixes, with the engines' own cache sizes")
                }
            }
            if number("maxPrefixBlocksToMatch").or_else(|| number("maxPrefixTokensToMatch")).is_some() {
                report.dropped(object, key, "maxPrefix…ToMatch: the filter matches the whole prompt");
            }
        }
        "session-affinity-scorer" | "session-affinity-filter" | "session-id-producer" => {
            session(object, key, plugin, values, report);
        }
        kind => others(object, key, kind, report),
    }
}

fn decider(object: &Object, key: &str, plugin: &Value, values: &mut Values, report: &mut Report) {
    match plugin.pointer("/parameters/nonCachedTokens").map_or(Some(0), Value::as_u64) {
        Some(0) => {
            values.pool.insert("split".to_owned(), json!({"mode": "never"}));
            report.carried(object, key, "nonCachedTokens 0: filter.config.pools.default.split: never");
        }
        Some(tokens) => {
            values.pool.insert("split".to_owned(), json!({"mode": "threshold", "uncached_tokens": tokens}));
            let what = format!("filter.config.pools.default.split: from {tokens} uncached tokens on");
            report.carried(object, key, what);
        }
        None => report.dropped(object, key, "nonCachedTokens is no number"),
    }
    if plugin.pointer("/parameters/promptTokens").and_then(Value::as_u64).is_some_and(|tokens| tokens > 0) {
        report.dropped(object, key, "promptTokens: the filter looks at uncached tokens only");
    }
}

/// The handler of prefill and decode profiles. Older ones have the threshold themselves, newer ones name a decider.
fn profile_handler(
    object: &Object,
    key: &str,
    plugin: &Value,
    all: &[Value],
    values: &mut Values,
    report: &mut Report,
) {
    report.carried(object, key, "the filter splits requests between prefill and decode endpoints");
    let named = ["deciders/prefill", "deciderPluginName"];
    let decider = named.iter().map(|name| text(plugin, &format!("/parameters/{name}"))).find(|name| !name.is_empty());
    let is_there = |name: &str| all.iter().any(|it| text(it, "/name") == name || text(it, "/type") == name);
    if let Some(name) = decider.filter(|name| !is_there(name)) {
        report.dropped(object, key, format!("the configuration has no plugin {name}"));
    }
    if plugin.pointer("/parameters/deciders/encode").is_some() {
        report.dropped(object, key, "deciders.encode: the filter has no leg for encoders");
    }
    if let Some(tokens) = plugin.pointer("/parameters/threshold").and_then(Value::as_u64) {
        let split = match tokens {
            0 => json!({"mode": "always"}),
            tokens => json!({"mode": "threshold", "uncached_tokens": tokens}),
        };
        values.pool.insert("split".to_owned(), split);
        report.carried(object, key, format!("threshold: filter.config.pools.default.split: {tokens} uncached tokens"));
    }
}

fn session(object: &Object, key: &str, plugin: &Value, values: &mut Values, report: &mut Report) {
    let headers = ["sessionIdConfig/headerName", "sessionIdConfig/header", "headerName"];
    let header = headers.iter().map(|name| text(plugin, &format!("/parameters/{name}"))).find(|name| !name.is_empty());
    match (header, text(plugin, "/parameters/strategy")) {
        (Some(header), _) => {
            let header = header.to_ascii_lowercase();
            report.carried(object, key, format!("filter.config.session_headers: {header}"));
            values.session_headers.push(header);
        }
        (None, "session_id") => {
            report.carried(object, key, "filter.config.session_headers has x-session-id by default")
        }
        (None, _) => report.dropped(
            object,
            key,
            "the header that names an endpoint to the client and back: the filter keeps a session by x-session-id, and \
             clients cannot name an endpoint",
        ),
    }
}

/// Plugins without parameters that matter here.
fn others(object: &Object, key: &str, kind: &str, report: &mut Report) {
    match kind {
        "decode-filter" | "prefill-filter" => {
            report.carried(object, key, "pd-control reads the roles of llm-d's labels")
        }
        "single-profile-handler" | "max-score-picker" | "disagg-headers-handler" | "prefill-header-handler" => {
            report.carried(object, key, "the filter chooses the best endpoint and sends both legs itself");
        }
        "queue-scorer"
        | "load-aware-scorer"
        | "active-request-scorer"
        | "running-requests-size-scorer"
        | "token-load-scorer"
        | "kv-cache-utilization-scorer"
        | "inflight-load-producer" => {
            report.carried(object, key, "the filter counts waiting work and assigned tokens of each endpoint");
        }
        "metrics-data-source" | "core-metrics-extractor" | "endpoint-notification-source" => {
            report.carried(object, key, "pd-control reads the engines' metrics and the cluster's pods");
        }
        "precise-prefix-cache-scorer" | "precise-prefix-cache-producer" | "token-producer" | "tokenizer" => {
            report.dropped(object, key, "the filter knows what it sent where, and reads no cache events of engines")
        }
        "by-label" | "by-label-selector" | "label-selector-filter" => {
            report.dropped(object, key, "write it as a selector of kubernetesConfig");
        }
        "context-length-aware" => {
            report.dropped(object, key, "annotate the pods with envoy-pd/min-prompt-tokens and max-prompt-tokens");
        }
        "data-parallel-profile-handler" => {
            report.dropped(object, key, "set `ranks` for these pods in a selector of kubernetesConfig");
        }
        "random-picker" | "weighted-random-picker" => {
            report.dropped(object, key, "the filter takes the best endpoint, not a random one");
        }
        "lora-affinity-scorer" => {
            report.dropped(object, key, "every endpoint that lists an adapter is a candidate for it");
        }
        "" => report.dropped(object, key, "the plugin has no type"),
        _ => report.dropped(object, key, "the filter has no such plugin"),
    }
}
