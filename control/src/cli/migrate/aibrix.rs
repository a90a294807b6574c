//! AIBrix' gateway plugin, by its environment variables.

use serde_json::{Value, json};

use super::report::Report;
use super::sidecar::containers;
use super::values::Values;
use crate::cli::manifests::{Manifests, Object, items, text};

pub(super) fn read(manifests: &Manifests, values: &mut Values, report: &mut Report) {
    for (object, key, container) in containers(manifests) {
        let is_read = |name: &str| name.starts_with("AIBRIX_") || name == "ROUTING_ALGORITHM";
        for variable in items(container, "/env").iter().filter(|it| is_read(text(it, "/name"))) {
            let name = text(variable, "/name");
            let key = format!("{key}.env {name}");
            match variable.get("value").and_then(Value::as_str) {
                Some(value) => set(object, &key, name, value, values, report),
                None => report.dropped(object, &key, "its value is not in these files"),
            }
        }
    }
}

fn set(object: &Object, key: &str, name: &str, value: &str, values: &mut Values, report: &mut Report) {
    match name {
        "ROUTING_ALGORITHM" if value == "pd" => {
            report.carried(object, key, "the filter splits requests between the roles of AIBrix' labels");
        }
        "ROUTING_ALGORITHM" => {
            let why = format!("{value}: the filter has one rule, by waiting work and by what endpoints hold");
            report.dropped(object, key, why);
        }
        "AIBRIX_KV_CONNECTOR_TYPE" => {
            let engine = match value {
                "shfs" => "vllm-nixl",
                "nixl" => "neuron",
                "mooncake" => "mooncake",
                _ => return report.dropped(object, key, format!("no engine of the filter hands over as {value:?}")),
            };
            values.pool.insert("engine".to_owned(), json!(engine));
            report.carried(object, key, format!("filter.config.pools.default.engine: {engine}"));
        }
        "AIBRIX_PREFILL_REQUEST_TIMEOUT" => match value.parse::<u64>() {
            Ok(seconds @ 1..=3_600) => {
                values.pool.insert("prefill_timeout_ms".to_owned(), json!(seconds * 1_000));
                report.carried(object, key, "filter.config.pools.default.prefill_timeout_ms");
            }
            _ => report.dropped(object, key, "must be 1 to 3,600 seconds"),
        },
        "AIBRIX_PROMPT_LENGTH_BUCKETING" => {
            let what = "pods keep their bounds: pd-control reads the annotations of AIBrix' prompt length buckets";
            report.carried(object, key, what);
        }
        "AIBRIX_PREFILL_SCORE_POLICY" | "AIBRIX_DECODE_SCORE_POLICY" => {
            let why = format!("{value}: the filter has one rule, by waiting work and by what endpoints hold");
            report.dropped(object, key, why);
        }
        name if name.starts_with("AIBRIX_PREFIX_CACHE_") => {
            report.dropped(object, key, "the filter's index follows the engines' own cache sizes");
        }
        name if name.contains("IMBALANCE") || name.contains("DECODE_LB_WEIGHT") || name.contains("SCORE_RATIO") => {
            report.dropped(object, key, "the filter weighs work in seconds and tokens, without such thresholds");
        }
        _ => report.dropped(object, key, "the filter has no such setting"),
    }
}
