//! Finds the filter in Envoy Gateway's policies, and parses its configuration.

use pd_core::config::Config;
use serde_json::Value;

use super::content::config_faults;
use super::faults::MAX_FAULTS;
use super::report::Report;
use crate::cli::manifests::{Manifests, Object, items, text};

/// Keys by which a configuration of this filter is known, also one with faults.
const OUR_KEYS: &[&str] = &["bootstrap_cluster", "control", "destination_header", "pools", "prefix", "trusted_headers"];

/// An entry of a policy's `wasm` list with this filter.
pub(super) struct Filter<'a> {
    pub(super) policy: &'a Object,
    /// `spec.wasm[0]`.
    pub(super) key: String,
    pub(super) entry: &'a Value,
}

/// The filters of all policies.
pub(super) fn filters(manifests: &Manifests) -> impl Iterator<Item = Filter<'_>> {
    manifests.of_kind("EnvoyExtensionPolicy").flat_map(|policy| {
        let entries = items(&policy.value, "/spec/wasm").iter().enumerate();
        let named = entries.map(move |(i, entry)| Filter { policy, key: format!("spec.wasm[{i}]"), entry });
        named.filter(Filter::is_ours)
    })
}

impl Filter<'_> {
    fn is_ours(&self) -> bool {
        let is_named =
            ["/name", "/rootID"].iter().any(|pointer| matches!(text(self.entry, pointer), "pd" | "pd-filter"));
        let has_key = |key: &&str| self.entry.pointer("/config").is_some_and(|config| config.get(key).is_some());
        is_named || self.image().contains("pd-filter") || OUR_KEYS.iter().any(has_key)
    }

    /// Image or URL of the module; empty when there is none.
    pub(super) fn image(&self) -> &str {
        match text(self.entry, "/code/image/url") {
            "" => text(self.entry, "/code/http/url"),
            url => url,
        }
    }

    /// One line about a key of the entry.
    pub(super) fn says(&self, key: &str, what: impl std::fmt::Display) -> String {
        self.policy.says(&format!("{}.{key}", self.key), what)
    }

    /// The configuration, not parsed; null when there is none.
    pub(super) fn raw_config(&self) -> &Value {
        self.entry.get("config").unwrap_or(&Value::Null)
    }

    /// The configuration, parsed as the filter does. Reports all faults and returns `None` when there are any.
    pub(super) fn config(&self, report: &mut Report) -> Option<Config> {
        let raw = self.raw_config();
        let text = if raw.is_null() { String::new() } else { raw.to_string() };
        let error = match Config::parse(text.as_bytes()) {
            Ok(config) => return Some(config),
            Err(error) => error.to_string(),
        };
        let faults = config_faults(raw);
        if faults.is_empty() {
            report.fault(self.says("config", error));
        }
        for fault in faults.iter().take(MAX_FAULTS) {
            let key = if fault.steps.is_empty() { "config".to_owned() } else { format!("config.{}", fault.key()) };
            report.fault(self.says(&key, &fault.what));
        }
        None
    }
}
