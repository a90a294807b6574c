//! README.md says what the code does: every configuration key with its default, every metric, every filter state, and
//! `make` targets that exist.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::SystemTime;

use pd_core::config::Config;
use pd_core::metrics::{Level, Metric, MetricKind};
use pd_core::request::STATES;
use pd_core::wire::ENDPOINT_KEYS;
use serde_json::{Value, json};

const README: &str = include_str!("../../../README.md");
const MAKEFILE: &str = include_str!("../../../Makefile");
const SHELL: &str = include_str!("../../../filter/src/shell.rs");
/// Stands for the name of a pool or an alias in README's keys.
const POOL: &str = "NAME";

/// Rows of the tables below a heading, by what stands between backticks in their first cell.
fn rows(heading: &str) -> BTreeMap<&str, Vec<&str>> {
    let section = README.split(&format!("\n{heading}\n")).nth(1).unwrap_or_else(|| panic!("README has no {heading}"));
    let end = section.find("\n#").unwrap_or(section.len());
    let mut rows = BTreeMap::new();
    for line in section[..end].lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<_> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let key = cells[0].trim_matches('`');
        assert!(rows.insert(key, cells[1..].to_vec()).is_none(), "{heading} has {key} twice");
    }
    rows
}

/// Every key of the plugin configuration, found by asking for one that does not exist: the refusal lists those that do.
fn config_keys(path: &str, found: &mut BTreeSet<String>) {
    let mut probe = json!({"?": 1});
    for part in path.split('.').rev().filter(|part| !part.is_empty()) {
        probe = json!({part: probe});
    }
    let refusal = Config::parse(probe.to_string().as_bytes()).unwrap_err().to_string();
    let Some((_, expected)) = refusal.split_once("unknown field `?`, expected ") else { return };
    for key in expected.split('`').skip(1).step_by(2) {
        let key = if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
        config_keys(&key, found);
        // A map of any names, not an object of known keys.
        config_keys(&format!("{key}.{POOL}"), found);
        found.insert(key);
    }
}

#[test]
fn every_configuration_key_has_a_row() {
    let mut keys = BTreeSet::new();
    config_keys("", &mut keys);
    assert!(keys.len() > 20, "{keys:?}");
    // Objects are described by their keys, but for those that may be absent.
    let is_object = |key: &String| keys.iter().any(|other| other.starts_with(&format!("{key}.")));
    let wanted: BTreeSet<_> = keys
        .iter()
        .filter(|key| !is_object(key) || ["control", "models", "pools"].contains(&key.as_str()))
        .map(String::as_str)
        .collect();
    let documented: BTreeSet<_> = rows("### Plugin configuration").into_keys().collect();
    assert_eq!(documented, wanted);
}

#[test]
fn every_default_is_the_one_in_force() {
    let required = json!({
        "control": {"cluster": "c"}, "models": {POOL: {"targets": [{"model": "m"}]}}, "pools": {POOL: {}}
    });
    let mut documented = required.clone();
    for (key, cells) in rows("### Plugin configuration") {
        let literal = cells[0].trim_matches('`');
        if literal == "required" || ["control", "models", "pools"].contains(&key) {
            continue;
        }
        let value: Value = serde_json::from_str(literal).unwrap_or_else(|error| panic!("{key} {literal}: {error}"));
        let mut place = &mut documented;
        for part in key.split('.') {
            place = &mut place[part];
        }
        *place = value;
    }
    let configured = Config::parse(documented.to_string().as_bytes()).unwrap();
    assert_eq!(configured, Config::parse(required.to_string().as_bytes()).unwrap());
    assert_eq!(Config::parse(b"{}").unwrap().control, None);
}

#[test]
fn every_endpoint_key_has_a_row() {
    let documented: BTreeSet<_> = rows("### Endpoints").into_keys().collect();
    assert_eq!(documented, ENDPOINT_KEYS.iter().copied().collect());
}

#[test]
fn every_metric_has_a_row_with_its_labels() {
    let documented = rows("## Metrics");
    let mut families = BTreeSet::new();
    for metric in Metric::ALL {
        let (family, tag) = metric.name().split_once(';').unwrap_or((metric.name(), ""));
        families.insert(family);
        let row = documented.get(family).unwrap_or_else(|| panic!("README has no {family}"));
        let kind = match metric.kind() {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
            MetricKind::Histogram => "histogram",
        };
        assert_eq!(row[0], kind, "{family}");
        for part in tag.split('=').filter(|part| !part.is_empty()) {
            assert!(row[1].contains(&format!("`{part}`")), "{family}: {part}");
        }
    }
    families.extend(Level::ALL.iter().map(|level| level.name()));
    families.extend(pd_core::endpoints::fitted_cost::GAUGES);
    families.insert(pd_core::workers::worker::INDEX_BYTES);
    for family in documented.keys().filter(|family| !families.contains(*family)) {
        assert!(SHELL.contains(&format!("\"{family}")), "README has {family}, the filter has not");
    }
}

#[test]
fn every_filter_state_has_a_row() {
    let documented: BTreeSet<_> = rows("## Access log").into_keys().collect();
    assert_eq!(documented, STATES.iter().copied().collect());
}

#[test]
fn pd_control_has_what_is_said_of_it() {
    let registry = Arc::new(pd_control::publish::registry::Registry::new("e", SystemTime::UNIX_EPOCH));
    let metrics = pd_control::api::metrics::Metrics::new(
        &pd_control::counters::Counters::default(),
        registry,
        Arc::default(),
        None,
    )
    .encode();
    for name in README.split('`').filter(|text| text.starts_with("pd_control_") && !text.ends_with('*')) {
        assert!(metrics.contains(&format!("# TYPE {name} ")), "{name}");
    }
}

#[test]
fn every_make_target_that_is_named_exists() {
    let code = README.split('`').skip(1).step_by(2).flat_map(str::lines);
    let targets = code.filter_map(|line| line.trim().strip_prefix("make ")?.split_whitespace().next());
    let mut count = 0;
    for target in targets {
        assert!(MAKEFILE.contains(&format!("\n{target}:")), "make {target}");
        count += 1;
    }
    assert!(count > 8, "{count}");
}
