//! `pd-control migrate` on installations of llm-d, the Inference Extension and AIBrix.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/migrate").join(name)
}

fn run(files: &[PathBuf]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pd-control")).arg("migrate").args(files).output().unwrap()
}

/// The values, and the lines of standard error.
fn migrated(files: &[PathBuf]) -> (Value, Vec<String>) {
    let done = run(files);
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.success(), "{said}");
    let values = serde_saphyr::from_str(std::str::from_utf8(&done.stdout).unwrap()).unwrap();
    (values, said.lines().map(|line| line.trim_start_matches("pd-control: ").to_owned()).collect())
}

/// The values for one manifest.
fn of(text: &str) -> (Value, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.yaml");
    std::fs::write(&path, text).unwrap();
    migrated(&[path])
}

#[test]
fn an_llm_d_installation_becomes_values() {
    let (values, said) = migrated(&[file("llm-d.yaml")]);
    let expected = json!({
        "simulators": {"enabled": false},
        "engines": {
            "selector": {"llm-d.ai/inference-serving": "true", "app.kubernetes.io/component": null},
            "port": 8200,
        },
        "gateway": {"hostnames": ["llm.example.com"]},
        "kubernetesConfig": {
            "inference_pools": [{"name": "llama", "namespace": "serving", "group": "inference.networking.k8s.io"}],
            "inference_objects": ["inference.networking.x-k8s.io", "llm-d.ai"],
        },
        "filter": {"config": {
            "pools": {"default": {
                "engine": "vllm-nixl",
                "split": {"mode": "threshold", "uncached_tokens": 512},
                "cache_tokens": 500_000,
                "prefill_attempts": 3,
            }},
        }},
    });
    assert_eq!(values, expected, "{said:#?}");
    pd_core::config::Config::parse(values["filter"]["config"].to_string().as_bytes()).unwrap();
}

#[test]
fn each_setting_that_is_not_carried_over_has_a_line_with_the_reason() {
    let (_, said) = migrated(&[file("llm-d.yaml")]);
    let dropped: Vec<_> = said.iter().filter(|line| line.starts_with("NOT carried over: ")).collect();
    for (object, key) in [
        ("InferencePool serving/llama", "spec.endpointPickerRef"),
        ("ConfigMap serving/llama-epp", "prefix-cache-scorer: maxPrefix"),
        ("ConfigMap serving/llama-epp", "precise-prefix-cache-scorer"),
        ("ConfigMap serving/llama-epp", "schedulingProfiles: prefill: prefix-cache-scorer 2"),
        ("ConfigMap serving/llama-epp", "saturationDetector"),
        ("Deployment serving/llama-decode", "--vllm-port"),
        ("HTTPRoute serving/llama", "timeouts"),
    ] {
        assert!(dropped.iter().any(|line| line.contains(object) && line.contains(key)), "{object} {key}: {dropped:#?}");
    }
    assert_eq!(dropped.len(), 7, "{dropped:#?}");
    assert!(dropped.iter().all(|line| line.contains("llm-d.yaml:")), "{dropped:#?}");
}

#[test]
fn aibrix_variables_become_values() {
    let (values, said) = migrated(&[file("aibrix.yaml")]);
    let pool = &values["filter"]["config"]["pools"]["default"];
    assert_eq!(*pool, json!({"engine": "neuron", "prefill_timeout_ms": 30_000}));
    let line = |name: &str| said.iter().find(|line| line.contains(name)).unwrap_or_else(|| panic!("{name}: {said:#?}"));
    assert!(line("ROUTING_ALGORITHM").starts_with("carried over: "));
    assert!(line("AIBRIX_PREFIX_CACHE_BLOCK_SIZE").starts_with("NOT carried over: "));
    assert!(line("AIBRIX_TTFT_THRESHOLD_S").contains("not in these files"));
    assert!(!said.iter().any(|line| line.contains("REDIS_HOST")), "{said:#?}");
}

#[test]
fn settings_of_older_versions_are_read_too() {
    let (values, _) = of(
        "apiVersion: inference.networking.x-k8s.io/v1alpha2\nkind: InferencePool\nmetadata: {name: p}\n\
        spec: {selector: {app: vllm}, targetPortNumber: 8000, extensionRef: {name: epp}}\n---\n\
        apiVersion: inference.networking.x-k8s.io/v1alpha2\nkind: InferenceModel\nmetadata: {name: food}\n\
        spec: {modelName: food-review, criticality: Sheddable, targetModels: [{name: food-review-1, weight: 100}]}\n---\n\
        kind: ConfigMap\nmetadata: {name: epp}\ndata:\n  c: |\n    kind: EndpointPickerConfig\n    plugins:\n\
        \x20   - {type: pd-profile-handler, parameters: {threshold: 10, hashBlockSize: 5}}\n\
        \x20   - {type: session-affinity-scorer, parameters: {sessionIdConfig: {headerName: X-Chat}}}\n",
    );
    assert_eq!(values["engines"]["selector"]["app"], "vllm");
    assert_eq!(values["kubernetesConfig"]["inference_pools"][0]["group"], "inference.networking.x-k8s.io");
    let config = &values["filter"]["config"];
    assert_eq!(config["objectives"], json!([{"name": "food", "priority": -1}]));
    assert_eq!(config["models"]["food-review"]["targets"], json!([{"model": "food-review-1", "weight": 100}]));
    assert_eq!(config["pools"]["default"]["split"], json!({"mode": "threshold", "uncached_tokens": 10}));
    assert_eq!(config["session_headers"], json!(["x-chat"]));
}

#[test]
fn every_target_port_of_a_pool_becomes_a_port_of_the_service() {
    let (values, said) =
        of("apiVersion: inference.networking.k8s.io/v1\nkind: InferencePool\nmetadata: {name: p, namespace: n}\n\
         spec: {selector: {matchLabels: {app: v}}, targetPorts: [{number: 8000}, {number: 8001}, {number: 8002}]}\n");
    assert_eq!(
        (&values["engines"]["port"], &values["engines"]["morePorts"]),
        (&json!(8000), &json!([8001, 8002])),
        "{said:#?}"
    );
}

#[test]
fn a_decider_of_zero_tokens_never_splits_as_llm_d_has_it() {
    let (values, _) =
        of("kind: ConfigMap\nmetadata: {name: c}\ndata:\n  c: |\n    kind: EndpointPickerConfig\n    plugins:\n\
        \x20   - {type: prefix-based-pd-decider, parameters: {nonCachedTokens: 0}}\n");
    assert_eq!(values["filter"]["config"]["pools"]["default"]["split"], json!({"mode": "never"}));
}

#[test]
fn odd_manifests_are_no_panic_and_no_guess() {
    for text in [
        "kind: InferencePool\nmetadata: {name: p}\nspec: 5\n",
        "kind: InferencePool\nmetadata: {name: p}\nspec: {selector: {matchLabels: [a]}, targetPorts: [{number: 70000}]}\n",
        "apiVersion: llm-d.ai/v1alpha2\nkind: InferenceObjective\nmetadata: {name: o}\nspec: {priority: high, poolRef: {name: p}}\n",
        "apiVersion: llm-d.ai/v1alpha2\nkind: InferenceModelRewrite\nmetadata: {name: r}\nspec: {rules: [5, {matches: [{}], targets: [{}]}]}\n",
        "apiVersion: other/v1\nkind: InferenceObjective\nmetadata: {name: o}\nspec: {poolRef: {name: p}}\n",
        "kind: ConfigMap\nmetadata: {name: c}\ndata: {a: 'kind: EndpointPickerConfig\n\n\n\n plugins: [5, {}]', b: '{EndpointPickerConfig'}\n",
        "kind: Deployment\nmetadata: {name: d}\nspec: {template: {spec: {containers: [{name: routing-proxy, args: ['--', --x, 5]}]}}}\n",
    ] {
        let (values, said) = of(text);
        assert!(said.iter().any(|line| line.contains("NOT carried over")), "{text}: {said:#?}");
        let config = values["filter"]["config"].to_string();
        pd_core::config::Config::parse(config.as_bytes()).unwrap_or_else(|error| panic!("{text}: {config}: {error}"));
    }
}

#[test]
fn files_without_anything_to_migrate_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.yaml");
    std::fs::write(&path, "kind: Service\nmetadata: {name: s}\n").unwrap();
    let done = run(&[path]);
    assert!(!done.status.success() && done.stdout.is_empty());
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(said.starts_with("pd-control: no InferencePool") && said.lines().count() == 1, "{said}");
    let done = run(&[PathBuf::from("/nonexistent.yaml")]);
    assert!(String::from_utf8(done.stderr).unwrap().contains("/nonexistent.yaml"));
}
