//! The keys of a file for `--kubernetes-config`: default, values, meaning. `docs/pd-control.md` is generated from them.

use pd_core::config::keys::{Entry, REQUIRED, Values};

/// A value that the file gives or that pd-control reads from each pod.
const TEXT_OR_SOURCE: Values = Values::Described("text, `{label: NAME}` or `{annotation: NAME}`");

/// Every key of the file, for its documentation; `[]` stands for each entry of a list.
pub const KEYS: &[Entry] = &[
    entry(
        "namespaces",
        "[]",
        Values::Described("list of names"),
        "Namespaces that pd-control follows. `[]`: the namespace of pd-control's own pod. `--namespace` replaces the list.",
    ),
    entry(
        "labels",
        "true",
        Values::OneOf(&["true", "false"]),
        "Whether the labels of llm-d and AIBrix make a pod an engine.",
    ),
    entry(
        "inference_pools",
        "[]",
        Values::Described("list of objects"),
        "InferencePools that pd-control follows. Their selectors choose pods, and their target ports are the pods' ports.",
    ),
    entry(
        "inference_pools[].name",
        REQUIRED,
        Values::Described("name, or `\"*\"`"),
        "Name of the InferencePool. It becomes the endpoints' pool. `\"*\"`: every InferencePool.",
    ),
    entry(
        "inference_pools[].namespace",
        "null",
        Values::Described("name"),
        "Namespace of the InferencePool. `null`: each namespace that pd-control follows.",
    ),
    entry(
        "inference_pools[].group",
        "\"inference.networking.k8s.io\"",
        Values::OneOf(&["inference.networking.k8s.io", "inference.networking.x-k8s.io"]),
        "API group of the InferencePool. pd-control reads version `v1` of the first group and `v1alpha2` of the second.",
    ),
    entry(
        "inference_objects",
        "[]",
        Values::Described("list of `llm-d.ai`, `inference.networking.x-k8s.io`"),
        "API groups whose InferenceObjectives and InferenceModelRewrites pd-control follows. With `inference_pools` only objects of those pools count. For a name that the plugin configuration's `objectives` or `models` have, the plugin configuration counts.",
    ),
    entry(
        "revision",
        "null",
        TEXT_OR_SOURCE,
        "[Revision](#revisions) of pods whose selector names none. `null`: the label `disaggregatedset.x-k8s.io/revision`.",
    ),
    entry(
        "selectors",
        "[]",
        Values::Described("list of objects"),
        "Selectors of the operator. The first selector that matches a pod gives the values of its endpoints. If no selector matches, the first InferencePool that selects the pod does, else the pod's labels.",
    ),
    entry(
        "selectors[].match",
        REQUIRED,
        Values::Described("`matchLabels`, `matchExpressions` or both"),
        "Label selector of the pods. An empty one is refused.",
    ),
    entry(
        "selectors[].namespace",
        "null",
        Values::Described("name"),
        "Namespace of the pods. `null`: each namespace that pd-control follows.",
    ),
    entry(
        "selectors[].role",
        "null",
        TEXT_OR_SOURCE,
        "Role. With a label or an annotation, `values: {TEXT: ROLE}` translates its text. `null`: the pod's labels, else `both`.",
    ),
    entry("selectors[].pool", "null", TEXT_OR_SOURCE, "Pool. `null`: `default`."),
    entry(
        "selectors[].engine",
        "null",
        TEXT_OR_SOURCE,
        "Engine. `values` translates as for `role`. `null`: the pod's labels, else the pool's.",
    ),
    entry("selectors[].group", "null", TEXT_OR_SOURCE, "Pairing group. `null`: none."),
    entry(
        "selectors[].revision",
        "null",
        TEXT_OR_SOURCE,
        "[Revision](#revisions) of model and engine. `null`: the key `revision` of the file.",
    ),
    entry(
        "selectors[].port",
        "null",
        Values::Described(
            "number, list of 1 to 64 numbers, `{name: CONTAINER_PORT}`, `{label: NAME}` or `{annotation: NAME}`",
        ),
        "Port. A list makes one endpoint per port. `null`: as for pods without a selector.",
    ),
    entry(
        "selectors[].models",
        "null",
        Values::Described("list of names"),
        "Models, beside those that the engine reports. `null`: the pod's labels.",
    ),
    entry(
        "selectors[].models_closed",
        "null",
        Values::OneOf(&["true", "false"]),
        "Whether pd-control adds no model that the engine reports. `null`: `false`.",
    ),
    entry(
        "selectors[].weight",
        "null",
        Values::between(0.01, 100.0, ""),
        "Speed relative to the pool's other endpoints. `null`: 1.",
    ),
    entry(
        "selectors[].cache_tokens",
        "null",
        Values::Described("tokens"),
        "Size of the prefix cache. `null`: the engine's own figure, else the pool's.",
    ),
    entry(
        "selectors[].bootstrap_port",
        "null",
        Values::between(0.0, 65_535.0, ""),
        "Port of the bootstrap server. `null`: the pool's.",
    ),
    entry(
        "selectors[].min_prompt_tokens",
        "null",
        Values::Described("tokens"),
        "Lower bound of prompts, as in the endpoint's key. `null`: none.",
    ),
    entry(
        "selectors[].max_prompt_tokens",
        "null",
        Values::Described("tokens"),
        "Upper bound of prompts, as in the endpoint's key. `null`: none.",
    ),
    entry(
        "selectors[].ranks",
        "null",
        Values::between(1.0, 256.0, ""),
        "Data-parallel ranks behind each port; one endpoint per rank. `null`: no ranks.",
    ),
    entry(
        "allowed_cidrs",
        "[]",
        Values::Described("list of networks"),
        "Networks that addresses of pods and DNS names must be in, beside those of `--allowed-cidr`. `[]`: every address that is not [special](#allowed-addresses).",
    ),
];

const fn entry(key: &'static str, default_value: &'static str, values: Values, meaning: &'static str) -> Entry {
    Entry { key, default_value, values, meaning }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;
    use crate::sources::kubernetes::config::KubernetesConfig;

    /// The keys that the parser takes below a path: the refusal of a key that does not exist lists them.
    fn known_keys(file: &str) -> BTreeSet<String> {
        let error = KubernetesConfig::parse(Path::new("k.yaml"), file.as_bytes()).unwrap_err().to_string();
        let (_, expected) = error.split_once("expected one of ").unwrap_or_else(|| panic!("{error}"));
        expected.split(", ").map(|key| key.trim_matches(['`', '"', '\'']).to_owned()).collect()
    }

    #[test]
    fn the_table_has_every_key_of_the_file() {
        for (prefix, file) in [
            ("", "nothing: 1\n"),
            ("inference_pools[].", "inference_pools:\n- nothing: 1\n"),
            ("selectors[].", "selectors:\n- nothing: 1\n"),
        ] {
            let documented = KEYS.iter().filter_map(|entry| entry.key.strip_prefix(prefix));
            let documented: BTreeSet<_> = documented.filter(|key| !key.contains('.')).map(str::to_owned).collect();
            assert_eq!(documented, known_keys(file));
        }
    }

    #[test]
    fn defaults_are_those_in_force() {
        let file: String = KEYS
            .iter()
            .filter(|entry| !entry.key.contains('.'))
            .map(|entry| format!("{}: {}\n", entry.key, entry.default_value))
            .collect();
        assert_eq!(KubernetesConfig::parse(Path::new("k.yaml"), file.as_bytes()), Ok(KubernetesConfig::default()));
        let parse = |file: &str| KubernetesConfig::parse(Path::new("k.yaml"), file.as_bytes()).unwrap();
        for (required, list) in [("name: a", "inference_pools"), ("match: {matchLabels: {a: b}}", "selectors")] {
            let of_list = KEYS.iter().filter(|entry| entry.key.starts_with(&format!("{list}[].")));
            let with_defaults: String = of_list
                .filter(|entry| entry.default_value != REQUIRED)
                .map(|entry| format!("  {}: {}\n", entry.key.rsplit('.').next().unwrap(), entry.default_value))
                .collect();
            assert_eq!(
                parse(&format!("{list}:\n- {required}\n{with_defaults}")),
                parse(&format!("{list}:\n- {required}\n"))
            );
        }
    }
}
