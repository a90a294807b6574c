//! Metrics that the code has, and those that an expression names.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::SystemTime;

use pd_control::api::metrics::Metrics;
use pd_control::counters::Counters;
use pd_control::engines::answers::Scrapes;
use pd_control::publish::registry::Registry;
use pd_control::scaling::metrics::GAUGES;
use pd_control::sources::kubernetes::pods::{Pods, PodsView, WatchView};
use pd_core::metrics::{FAMILIES, Level, Metric};
use pd_support::places;

use crate::files::text;

/// Names without labels, as Prometheus has them; a histogram's without suffix.
pub fn known() -> BTreeSet<String> {
    let of_filter = Metric::ALL.iter().map(|metric| metric.name()).chain(Level::ALL.iter().map(|level| level.name()));
    let of_filter = of_filter.chain(FAMILIES.iter().map(|family| family.name));
    let of_filter = of_filter.map(|name| name.split(';').next().unwrap_or_default().to_owned());
    of_filter.chain(of_control()).collect()
}

fn of_control() -> Vec<String> {
    let pods = Pods::default();
    let watches = vec![WatchView { name: "pods".into(), is_listed: true, problem: None }];
    pods.set(PodsView { watches, ..PodsView::default() });
    let registry = Arc::new(Registry::new("e", SystemTime::UNIX_EPOCH));
    let scrapes = Some(Arc::new(Scrapes::default()));
    let page = Metrics::new(&Counters::default(), registry, Arc::new(pods), scrapes).encode();
    let families = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let suffix = BTreeMap::from([("counter", "_total"), ("info", "_info")]);
    let families = families.map(|(name, kind)| format!("{name}{}", suffix.get(kind).unwrap_or(&"")));
    families.chain(GAUGES.iter().map(|(name, ..)| format!("pd_control_{name}"))).collect()
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == ':'
}

/// Metrics of ours that an expression names.
pub fn named(expression: &str) -> BTreeSet<String> {
    let words = expression.split(|c| !is_name(c));
    words.filter(|word| word.starts_with("pd_")).map(str::to_owned).collect()
}

/// Those of them that the code does not have.
pub fn unknown(expression: &str, known: &BTreeSet<String>) -> Vec<String> {
    let is_known = |name: &String| {
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        known.contains(name) || base.is_some_and(|base| known.contains(base))
    };
    named(expression).into_iter().filter(|name| !is_known(name)).collect()
}

#[test]
fn a_metric_that_the_code_does_not_have_is_found() {
    let known = known();
    assert!(known.contains("pd_kv_not_moved_total") && known.contains("pd_control_watch_up"), "{known:?}");
    assert!(known.contains("pd_build_seen_seconds") && known.contains("pd_control_build_info"), "{known:?}");
    let expression = "rate(pd_prefill_ms_bucket{result=\"pd\"}[5m]) / pd_requests + pd_control_degraded";
    assert_eq!(unknown(expression, &known), ["pd_requests"]);
}

#[test]
fn the_table_of_what_scales_a_role_is_the_codes() {
    let document = text(&places::root().join("docs/autoscaling.md"));
    let rows: Vec<_> = document.lines().filter(|line| line.starts_with("| `pd_control_role_")).collect();
    let wanted: Vec<_> = GAUGES.iter().map(|(name, help, _)| format!("| `pd_control_{name}` | {help} |")).collect();
    assert_eq!(rows, wanted);
}
