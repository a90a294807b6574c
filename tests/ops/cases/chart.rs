//! The Helm chart: the same objects as the kustomize base and overlays.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use pd_support::places;
use serde_json::Value;

use crate::files::{text, yaml};

const WHAT: &str = "the chart against kustomize";

type Objects = BTreeMap<(String, String, String), Value>;

fn chart() -> PathBuf {
    places::root().join("charts/envoy-pd")
}

fn helm(arguments: &[&str]) -> Option<Output> {
    let helm = places::program("helm", WHAT)?;
    let mut command = Command::new(helm);
    // A helm built from its module takes itself for that of an old Kubernetes.
    command.args(["template", "envoy-pd"]).arg(chart()).args(["--namespace", "llm", "--kube-version", "1.34.0"]);
    Some(command.args(arguments).output().unwrap())
}

fn rendered(arguments: &[&str]) -> Option<String> {
    Some(succeeded(helm(arguments)?))
}

fn kustomized(folder: &Path) -> Option<String> {
    let kustomize = places::program("kustomize", WHAT)?;
    Some(succeeded(Command::new(kustomize).arg("build").arg(folder).output().unwrap()))
}

fn succeeded(done: Output) -> String {
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

fn objects(text: &str) -> Objects {
    let documents = text.split("\n---\n").map(|document| document.trim_start_matches("---\n"));
    let values = documents.map(|document| {
        serde_saphyr::from_str::<Value>(document).unwrap_or_else(|error| panic!("{document}: {error}"))
    });
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let key = |object: &Value| {
        (word(&object["kind"]), word(&object["metadata"]["namespace"]), word(&object["metadata"]["name"]))
    };
    values.filter(|value| !value.is_null()).map(|object| (key(&object), object)).collect()
}

fn assert_same(chart: &str, kustomize: &str) {
    let (chart, kustomize) = (objects(chart), objects(kustomize));
    assert!(kustomize.len() > 20, "{}", kustomize.len());
    let keys = |objects: &Objects| objects.keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&chart), keys(&kustomize));
    for (key, object) in kustomize {
        assert_eq!(chart[&key], object, "{key:?}");
    }
}

/// The values that render an overlay or the base.
fn values(name: &str) -> String {
    chart().join(format!("ci/{name}-values.yaml")).display().to_string()
}

#[test]
fn the_chart_renders_what_kustomize_renders() {
    for (name, folder) in [("base", "base"), ("sim", "overlays/sim")] {
        let kustomized = kustomized(&places::root().join("gateway-manifests").join(folder));
        let (Some(kustomized), Some(rendered)) = (kustomized, rendered(&["--values", &values(name)])) else { return };
        assert_same(&rendered, &kustomized);
    }
}

#[test]
fn keda_and_monitoring_are_kustomizes_components() {
    // Components are named by a path from the overlay.
    let target = places::root().join("target");
    std::fs::create_dir_all(&target).unwrap();
    let overlay = tempfile::tempdir_in(target).unwrap();
    let file = "resources: [../../gateway-manifests/base]\n\
                components: [../../gateway-manifests/autoscaling/keda, ../../gateway-manifests/monitoring]\n";
    std::fs::write(overlay.path().join("kustomization.yaml"), file).unwrap();
    let set = "keda.enabled=true,monitoring.enabled=true";
    let rendered = rendered(&["--values", &values("base"), "--set", set]);
    let (Some(kustomized), Some(rendered)) = (kustomized(overlay.path()), rendered) else { return };
    assert_same(&rendered, &kustomized);
}

/// envoyproxy/gateway#7577, envoyproxy/gateway#4565: by default Envoy listens at IPv4 addresses only.
#[test]
fn families_of_addresses_are_kustomizes_components() {
    let target = places::root().join("target");
    std::fs::create_dir_all(&target).unwrap();
    for (family, component) in [("DualStack", "dual-stack"), ("IPv6", "ipv6")] {
        let overlay = tempfile::tempdir_in(&target).unwrap();
        let file = format!(
            "resources: [../../gateway-manifests/base]\ncomponents: [../../gateway-manifests/components/{component}]\n"
        );
        std::fs::write(overlay.path().join("kustomization.yaml"), file).unwrap();
        let set = format!("gateway.ipFamily={family}");
        let rendered = rendered(&["--values", &values("base"), "--set", &set]);
        let (Some(kustomized), Some(rendered)) = (kustomized(overlay.path()), rendered) else { return };
        assert_same(&rendered, &kustomized);
        assert!(kustomized.contains(&format!("ipFamily: {family}")) && kustomized.contains("[::]:9000"));
    }
}

#[test]
fn the_default_chart_runs_simulators_and_is_one_that_pd_control_finds_no_fault_with() {
    let Some(text) = rendered(&[]) else { return };
    let objects = objects(&text);
    let object = |kind: &str, name: &str| &objects[&(kind.to_owned(), "llm".to_owned(), name.to_owned())];
    assert_eq!(object("Deployment", "prefill")["spec"]["replicas"], 2);
    let token = &object("Secret", "pd-control")["stringData"]["token"];
    assert_eq!(token.as_str().unwrap().len(), 48, "a random one");
    assert_eq!(objects.keys().filter(|(kind, ..)| kind == "Secret").count(), 2);
    let config = object("EnvoyExtensionPolicy", "pd")["spec"]["wasm"][0]["config"].to_string();
    pd_core::config::Config::parse(config.as_bytes()).unwrap_or_else(|error| panic!("{config}: {error}"));
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("chart.yaml");
    std::fs::write(&file, &text).unwrap();
    let report = pd_control::cli::check::check(&[file], None);
    assert_eq!(report.faults, Vec::<String>::new());
}

/// What `pd-control migrate` writes for an installation of llm-d, in the pool's namespace.
#[test]
fn migrated_values_make_a_chart_that_pd_control_finds_no_fault_with() {
    let file = places::root().join("control/tests/migrate/llm-d.yaml");
    let migration = pd_control::cli::migrate::migrate(&[file]).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let values = directory.path().join("values.yaml");
    std::fs::write(&values, migration.values).unwrap();
    let Some(text) = rendered(&["--namespace", "serving", "--values", &values.display().to_string()]) else { return };
    let objects = objects(&text);
    let object = |kind: &str, name: &str| &objects[&(kind.to_owned(), "serving".to_owned(), name.to_owned())];
    let service = &object("Service", "engines")["spec"];
    assert_eq!(service["selector"], serde_json::json!({"llm-d.ai/inference-serving": "true"}));
    assert_eq!(service["ports"][0]["targetPort"], 8200);
    assert_eq!(object("HTTPRoute", "pd")["spec"]["hostnames"], serde_json::json!(["llm.example.com"]));
    let backends = &object("HTTPRoute", "pd")["spec"]["rules"][0]["backendRefs"];
    assert_eq!(*backends, serde_json::json!([{"name": "engines", "port": 8200}]));
    let file = object("ConfigMap", "pd-control")["data"]["kubernetes.yaml"].as_str().unwrap();
    let config =
        pd_control::sources::kubernetes::KubernetesConfig::parse(Path::new("kubernetes.yaml"), file.as_bytes());
    assert_eq!(config.unwrap().inference_pools[0].name, "llama");
    let manifests = directory.path().join("chart.yaml");
    std::fs::write(&manifests, &text).unwrap();
    let report = pd_control::cli::check::check(&[manifests], None);
    assert_eq!(report.faults, Vec::<String>::new());
}

#[test]
fn names_that_must_agree_follow_the_namespace() {
    let Some(text) = rendered(&["--namespace", "other", "--set", "filter.maxBodyMiB=32"]) else { return };
    assert!(!text.contains("llm/") && !text.contains("namespace: llm"));
    let objects = objects(&text);
    let config = &objects[&("EnvoyExtensionPolicy".into(), "other".into(), "pd".into())]["spec"]["wasm"][0]["config"];
    assert_eq!(config["cluster"], "httproute/other/pd/rule/0");
    assert_eq!(config["max_body_bytes"], 32 << 20);
}

#[test]
fn bad_values_are_refused_with_their_key() {
    for (set, says) in [
        ("gateway.prot=1", "'prot' not allowed"),
        ("filter.config.cluster=x", "/filter/config/cluster"),
        ("images.filter=", "/images/filter"),
        ("keda.decode.kvLoad=much", "/keda/decode/kvLoad"),
    ] {
        let Some(done) = helm(&["--set", set]) else { return };
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(!done.status.success() && said.contains(says), "{set}: {said}");
    }
}

/// A key without a schema would be refused; one without a description helps nobody.
#[test]
fn every_value_has_a_schema_with_a_description() {
    let schema: Value = serde_json::from_str(&text(&chart().join("values.schema.json"))).unwrap();
    let (mut missing, mut seen) = (Vec::new(), 0);
    check(&yaml(&chart().join("values.yaml")), &schema, "", &mut |path, schema| {
        seen += 1;
        if schema["description"].as_str().is_none_or(str::is_empty) {
            missing.push(path.to_owned());
        }
    });
    assert_eq!(missing, Vec::<String>::new());
    assert!(seen > 40, "{seen}");
}

fn check(value: &Value, schema: &Value, path: &str, visit: &mut impl FnMut(&str, &Value)) {
    let (Some(members), Some(properties)) = (value.as_object(), schema["properties"].as_object()) else { return };
    let is_closed = schema["additionalProperties"] == false;
    for (key, value) in members {
        let path = format!("{path}.{key}");
        match properties.get(key) {
            Some(schema) => {
                visit(&path, schema);
                check(value, schema, &path, visit);
            }
            None => assert!(!is_closed, "{path} has no schema"),
        }
    }
}

#[test]
fn the_charts_version_is_the_workspaces() {
    let chart = yaml(&chart().join("Chart.yaml"));
    assert_eq!(
        (&chart["version"], &chart["appVersion"]),
        (&env!("CARGO_PKG_VERSION").into(), &env!("CARGO_PKG_VERSION").into())
    );
}
