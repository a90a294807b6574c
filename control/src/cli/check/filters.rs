//! The filter in Envoy Gateway's policies, and its configuration.

use pd_core::config::Config;
use serde_json::Value;

use super::manifests::{Manifests, Object, items, text};
use super::report::Report;

/// Keys that tell a configuration of ours, also one with mistakes in it.
const OUR_KEYS: &[&str] = &["bootstrap_cluster", "control", "destination_header", "pools", "prefix", "trusted_headers"];

/// One entry of a policy's `wasm` list that is ours.
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
        let is_named = ["/name", "/rootID"].iter().any(|at| matches!(text(self.entry, at), "pd" | "pd-filter"));
        let has_key = |key: &&str| self.entry.pointer("/config").is_some_and(|config| config.get(key).is_some());
        is_named || self.image().contains("pd-filter") || OUR_KEYS.iter().any(has_key)
    }

    /// Where the module comes from.
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

    /// The configuration as it stands there.
    pub(super) fn raw_config(&self) -> &Value {
        self.entry.get("config").unwrap_or(&Value::Null)
    }

    /// The configuration, as the filter reads it.
    pub(super) fn config(&self, report: &mut Report) -> Option<Config> {
        let raw = self.raw_config();
        // One key a line, so that a line tells the key.
        let lines = if raw.is_null() { String::new() } else { format!("{raw:#}") };
        match Config::parse(lines.as_bytes()) {
            Ok(config) => Some(config),
            Err(error) => {
                let error = error.to_string();
                report.fault(match located(&error, &lines) {
                    Some((path, what)) => self.says(&["config", &path].join("."), what),
                    None if error.starts_with("plugin configuration") => self.says("config", error),
                    None => {
                        self.says(&format!("config.{}", error.split(": ").next().unwrap_or_default()), reason(&error))
                    }
                });
                None
            }
        }
    }
}

/// What follows the key.
fn reason(error: &str) -> &str {
    error.split_once(": ").map_or("", |(_, reason)| reason)
}

/// Key and reason of serde's "… at line 3 column 7", in text that has one key a line.
fn located(error: &str, lines: &str) -> Option<(String, String)> {
    let (what, place) = error.rsplit_once(" at line ")?;
    let line: usize = place.split(' ').next()?.parse().ok()?;
    let what = what.strip_prefix("plugin configuration: ").unwrap_or(what);
    let mut path = Vec::new();
    let mut indent = usize::MAX;
    let above: Vec<&str> = lines.lines().take(line).collect();
    for text in above.into_iter().rev() {
        let depth = text.len() - text.trim_start().len();
        if depth < indent
            && let Some((key, _)) = text.trim_start().strip_prefix('"').and_then(|rest| rest.split_once("\":"))
        {
            path.push(key);
            indent = depth;
        }
    }
    path.reverse();
    (!path.is_empty()).then(|| (path.join("."), what.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_of_a_wrong_value_is_found() {
        let lines = format!("{:#}", serde_json::json!({"a": {"b": [1, {"c": "x"}], "d": 1}, "e": 1}));
        let at = |needle: &str| lines.lines().position(|line| line.contains(needle)).unwrap() + 1;
        let path = |line: usize| located(&format!("plugin configuration: wrong at line {line} column 1"), &lines);
        assert_eq!(path(at("\"c\"")), Some(("a.b.c".to_owned(), "wrong".to_owned())));
        assert_eq!(path(at("\"d\"")).unwrap().0, "a.d");
        assert_eq!(path(at("\"e\"")).unwrap().0, "e");
        assert_eq!(located("no place", &lines), None);
        assert_eq!(located("x at line 9999999 column 1", ""), None);
    }
}
