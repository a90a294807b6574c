//! `pd-control check` on manifests: those of this repository, and with mistakes in them.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const IMAGE: &str =
    "registry.example/pd-filter@sha256:5555555555555555555555555555555555555555555555555555555555555555";
const OTHER: &str =
    "registry.example/pd-filter@sha256:6666666666666666666666666666666666666666666666666666666666666666";
const CONTROL: &str = "registry.example/pd-control:0.1.0";
const FILES: [&str; 8] = [
    "gateway.yaml",
    "routes.yaml",
    "policies.yaml",
    "filter.yaml",
    "preflight.yaml",
    "engines.yaml",
    "pd-control.yaml",
    "upgrade.yaml",
];

/// What kustomize makes of the base, all but namespaces of rights.
pub fn manifests() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../gateway-manifests/base");
    let read = |file| {
        let image = if file == "pd-control.yaml" { CONTROL } else { IMAGE };
        std::fs::read_to_string(folder.join(file)).unwrap().replace("set-by-kustomize", image)
    };
    [FILES.map(read).join("\n---\n"), image_map(IMAGE, "0.1.0")].join("\n---\n")
}

fn image_map(image: &str, version: &str) -> String {
    format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: pd-filter-image, namespace: llm}}\n\
         data: {{image: '{image}', version: '{version}'}}\n"
    )
}

/// The same with one text replaced, which must be there.
pub fn with(from: &str, to: &str) -> String {
    replaced(&manifests(), from, to)
}

pub fn replaced(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "{from} stands in no manifest any more");
    text.replace(from, to)
}

/// The same, where it stands first.
fn replaced_once(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "{from} stands in no manifest any more");
    text.replacen(from, to, 1)
}

pub struct Checked {
    pub is_good: bool,
    said: String,
    pub faults: String,
}

pub fn check(text: &str) -> Checked {
    check_after(text, None)
}

fn check_after(text: &str, applied: Option<&str>) -> Checked {
    let directory = tempfile::tempdir().unwrap();
    let file: PathBuf = directory.path().join("applied.yaml");
    let mut command = Command::new(env!("CARGO_BIN_EXE_pd-control"));
    command.args(["check", "-"]).env_clear().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if let Some(text) = applied {
        std::fs::write(&file, text).unwrap();
        command.arg("--applied").arg(&file);
    }
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Checked { is_good: output.status.success(), said: text(output.stdout), faults: text(output.stderr) }
}

/// Says what one fault is, without its place in the file.
fn fault(text: &str) -> String {
    fault_after(text, None)
}

fn fault_after(text: &str, applied: Option<&str>) -> String {
    let checked = check_after(text, applied);
    assert!(!checked.is_good, "{}", checked.said);
    // A fault may come with warnings.
    let faults: Vec<_> = checked.faults.lines().filter(|line| !line.starts_with("pd-control: warning: ")).collect();
    assert_eq!(faults.len(), 1, "{}", checked.faults);
    let line = faults[0].strip_prefix("pd-control: -:").unwrap_or_else(|| panic!("{}", checked.faults));
    let (number, rest) = line.trim_end().split_once(": ").unwrap();
    assert!(number.parse::<u64>().unwrap() > 1, "the line of the document");
    rest.to_owned()
}

#[test]
fn the_manifests_of_this_repository_are_good() {
    let checked = check(&manifests());
    assert_eq!(checked.faults, "");
    let ours = "EnvoyExtensionPolicy llm/pd, EnvoyExtensionPolicy llm/pd-preflight, Deployment llm/pd-control\n";
    assert!(checked.said.starts_with("-: ok, ") && checked.said.ends_with(ours), "{}", checked.said);
    let list: Vec<String> = manifests()
        .split("\n---\n")
        .map(|document| serde_saphyr::from_str::<serde_json::Value>(document).unwrap().to_string())
        .collect();
    let list = format!(r#"{{"apiVersion": "v1", "kind": "List", "items": [{}]}}"#, list.join(","));
    assert!(check(&list).is_good, "as `kubectl get -o json` prints them");
}

#[test]
fn a_mistake_in_the_plugin_configuration_is_named_by_its_key() {
    let place = "EnvoyExtensionPolicy llm/pd: spec.wasm[0].config";
    let wrong = fault(&with("uncached_tokens: 256", "uncached_tokens: many"));
    assert!(
        wrong.starts_with(&format!("{place}.pools.default.split.uncached_tokens: invalid type: string")),
        "{wrong}"
    );
    let unknown = check(&with("uncached_tokens: 256", "uncached_tokns: 256")).faults;
    assert!(unknown.contains(&format!("{place}.pools.default.split.uncached_tokns: unknown field")), "{unknown}");
    let small = fault(&with("max_body_bytes: 16777216", "max_body_bytes: 6"));
    assert!(small.starts_with(&format!("{place}.max_body_bytes: must be between 1024 and ")), "{small}");
}

#[test]
fn names_that_do_not_agree_are_found() {
    for (from, to, expected) in [
        (
            "cluster: httproute/llm/pd/rule/0",
            "cluster: httproute/llm/pd/rule/1",
            "EnvoyExtensionPolicy llm/pd: spec.wasm[0].config.cluster: \"httproute/llm/pd/rule/1\": HTTPRoute llm/pd \
             has 1 rules",
        ),
        (
            "{cluster: httproute/llm/pd-control/rule/0}",
            "{cluster: httproute/llm/control/rule/0}",
            "EnvoyExtensionPolicy llm/pd: spec.wasm[0].config.control.cluster: \"httproute/llm/control/rule/0\": there \
             is no HTTPRoute llm/control",
        ),
        (
            "extractFrom: [{header: x-pd-destination}]\n  # The filter's",
            "extractFrom: [{header: x-destination}]\n  # The filter's",
            "BackendTrafficPolicy llm/pd: spec.loadBalancer.endpointOverride.extractFrom: must have header \
             x-pd-destination",
        ),
        (
            "{name: x-pd-destination, value: '%FILTER_STATE(wasm.pd.destination:PLAIN)%'}\n        # For",
            "{name: x-pd-destination, value: '%FILTER_STATE(pd.destination:PLAIN)%'}\n        # For",
            "HTTPRoute llm/pd: spec.rules[0].filters: must set x-pd-destination to",
        ),
        (
            "- {name: envoy.filters.http.buffer, after: envoy.filters.http.wasm}",
            "- {name: envoy.filters.http.buffer, before: envoy.filters.http.wasm}",
            "EnvoyProxy llm/pd: spec.filterOrder: must have {name: envoy.filters.http.buffer",
        ),
        (
            "- {name: envoy.filters.http.ratelimit, before: envoy.filters.http.wasm}",
            "- {name: envoy.filters.http.ratelimit, after: envoy.filters.http.wasm}",
            "EnvoyProxy llm/pd: spec.filterOrder: must have {name: envoy.filters.http.ratelimit, before: \
             envoy.filters.http.wasm}: the prompt of a request that it refuses",
        ),
        (
            "requestBuffer: {limit: 16Mi}",
            "requestBuffer: {limit: 8Mi}",
            "BackendTrafficPolicy llm/pd: spec.requestBuffer.limit: is below config.max_body_bytes",
        ),
        (
            "httpUpgrade: [{type: websocket}]",
            "requestBuffer: {limit: 16Mi}",
            "BackendTrafficPolicy llm/pd-upgrade: spec.requestBuffer: must not be there: HTTPRoute llm/pd-upgrade is for \
             upgrades",
        ),
        (
            "env: {hostKeys: [PD_CONTROL_TOKEN]}",
            "env: {hostKeys: [TOKEN]}",
            "EnvoyExtensionPolicy llm/pd: spec.wasm[0].env.hostKeys: must have PD_CONTROL_TOKEN",
        ),
        ("failOpen: false", "failOpen: true", "EnvoyExtensionPolicy llm/pd: spec.wasm[0].failOpen: true sends"),
        (
            "backendRefs:\n    - {name: pd-control, port: 9000}",
            "backendRefs:\n    - {name: pd-control, port: 9001}",
            "EnvoyExtensionPolicy llm/pd: spec.wasm[0].config.control.cluster: \"httproute/llm/pd-control/rule/0\": \
             HTTPRoute llm/pd-control: Service llm/pd-control has no port 9001",
        ),
        (
            "args: [--kubernetes, --namespace,",
            "args: [--kubernetes, --namespaces,",
            "Deployment llm/pd-control: spec.template.spec.containers[0].args: unexpected argument '--namespaces'",
        ),
    ] {
        let fault = fault(&with(from, to));
        assert!(fault.starts_with(expected), "{fault}");
    }
}

#[test]
fn upgrades_need_a_route_that_lets_them_through() {
    let on = |text: &str| replaced(text, "destination_header: x-pd", "upgrades: true\n      destination_header: x-pd");
    assert_eq!(check(&on(&manifests())).faults, "");
    let target = "  - {group: gateway.networking.k8s.io, kind: HTTPRoute, name: pd-upgrade}\n  wasm:";
    let lost = fault(&on(&with(target, "  wasm:")));
    assert!(
        lost.starts_with("EnvoyExtensionPolicy llm/pd: spec.wasm[0].config.upgrades: is true, and no HTTPRoute"),
        "{lost}"
    );
}

#[test]
fn an_image_is_named_by_digest_and_stands_in_the_pods_annotation() {
    let tagged = manifests().replace(IMAGE, "registry.example/pd-filter:0.1.0");
    let place = "EnvoyExtensionPolicy llm/pd: spec.wasm[0].code.image.url: \"registry.example/pd-filter:0.1.0\" has no";
    assert!(check(&tagged).faults.contains(place));
    let forgotten = with(&format!("pd-filter-image: {IMAGE}"), &format!("pd-filter-image: {OTHER}"));
    assert!(fault(&forgotten).starts_with(
        "EnvoyProxy llm/pd: spec.provider.kubernetes.envoyDeployment.pod.annotations.pd-filter-image: must be the image"
    ));
}

#[test]
fn configuration_maps_are_read_where_pd_control_reads_them() {
    let mounted = |content: &str| {
        let text = replaced(
            &manifests(),
            "args: [--kubernetes, --namespace, llm,",
            "volumeMounts: [{name: config, mountPath: /etc/pd}]\n        args: [--kubernetes-config, /etc/pd/k.yaml,",
        );
        let text = replaced(
            &text,
            "serviceAccountName: pd-control\n",
            "serviceAccountName: pd-control\n      volumes: [{name: config, configMap: {name: settings-5f2k}}]\n",
        );
        format!(
            "{text}---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: settings-5f2k, namespace: llm}}\n\
             data:\n  k.yaml: |\n    {content}\n"
        )
    };
    let good = check(&mounted("namespaces: [llm]"));
    assert!(good.is_good, "{}", good.faults);
    assert!(good.said.contains("ConfigMap llm/settings-5f2k"), "{}", good.said);
    assert!(
        fault(&mounted("selector: []"))
            .starts_with("ConfigMap llm/settings-5f2k: data[\"k.yaml\"]: line 1, column 1: unknown field `selector`")
    );
    let missing = replaced(&mounted("namespaces: [llm]"), "  k.yaml: |", "  other.yaml: |");
    assert!(fault(&missing).starts_with("ConfigMap llm/settings-5f2k: data[\"k.yaml\"]: must be there"));
    let alone = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: pd-control-endpoints}\ndata:\n  e.yaml: |\n    \
                 endpoints: [{address: 'host:1', role: both}]\n";
    assert!(check(alone).faults.contains("ConfigMap pd-control-endpoints: data[\"e.yaml\"]: line 1, column 23: "));
}

#[test]
fn versions_that_do_not_know_each_other_are_stopped() {
    let unknown = replaced(&manifests(), "version: '0.1.0'", "version: '9.0.0'");
    assert!(fault(&unknown).contains("spec.wasm[0].code: pd-control 0.1.0 does not know its version 9.0.0"));
    let control = with("image: registry.example/pd-control:0.1.0", "image: registry.example/pd-control:v9.0.0");
    assert!(
        fault(&control)
            .starts_with("Deployment llm/pd-control: spec.template: pd-control 0.1.0 does not know its version 9.0.0")
    );
    let unsaid = check(&manifests().replace(", version: '0.1.0'", ""));
    assert!(unsaid.is_good && unsaid.said.contains("no ConfigMap has its version"), "{}", unsaid.said);
    // A part of an installation is checked as far as it goes.
    let part = manifests().split("\n---\n").find(|text| text.contains("EnvoyExtensionPolicy")).unwrap().to_owned();
    let part = check(&part);
    assert!(part.is_good && part.said.contains("names that must agree were not checked"), "{}", part.said);
}

#[test]
fn what_follows_on_what_is_in_force_is_reported() {
    let new = manifests().replace(IMAGE, OTHER);
    let checked = check_after(&new, Some(&manifests()));
    assert!(checked.is_good, "{}", checked.faults);
    let before = manifests().replace(", version: '0.1.0'", "");
    let checked = check_after(&new, Some(&before));
    assert!(checked.is_good && checked.said.contains("no ConfigMap has the version that runs now"), "{}", checked.said);
    let checked = check_after(&new, Some(&with("pd-control:0.1.0", "pd-control:0.0.1")));
    assert!(
        checked.faults.contains("applied.yaml:") && checked.faults.contains("does not know its version 0.0.1"),
        "{}",
        checked.faults
    );
}

fn warning(text: &str) -> String {
    let checked = check(text);
    assert!(checked.is_good && checked.faults.lines().count() == 1, "{}", checked.faults);
    checked.faults.strip_prefix("pd-control: warning: ").unwrap_or_else(|| panic!("{}", checked.faults)).to_owned()
}

#[test]
fn envoy_closes_idle_connections_before_engines_do() {
    const KEY: &str = "BackendTrafficPolicy llm/pd: spec.timeout.http.connectionIdleTimeout: is ";
    for (to, expected) in [
        ("", "not there, and an engine"),
        (", connectionIdleTimeout: 5s", "5s, and an engine"),
        (", connectionIdleTimeout: 1m", "1m, and"),
    ] {
        let warning = warning(&replaced_once(&manifests(), ", connectionIdleTimeout: 3s", to));
        assert!(warning.contains(&format!("{KEY}{expected}")), "{warning}");
    }
}

#[test]
fn a_route_that_rewrites_paths_needs_path_prefixes() {
    const BEGIN: &str = "    filters:\n";
    const HEADERS: &str = "    - type: RequestHeaderModifier\n      requestHeaderModifier:\n        set:\n";
    const REWRITE: &str =
        "    - {type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}\n";
    let matches = manifests();
    let (_, matches) = matches.split_once("below these prefixes\n    # itself.").unwrap();
    let (matches, _) = matches.split_once("    # No limit:").unwrap();
    let text = replaced(&manifests(), matches, "\n    - path: {type: PathPrefix, value: /team}\n");
    let text = replaced_once(&text, &format!("{BEGIN}{HEADERS}"), &format!("{BEGIN}{REWRITE}{HEADERS}"));
    let faults = check(&text).faults;
    assert!(faults.contains("HTTPRoute llm/pd: spec.rules[0].filters[0]: takes /team off the path"), "{faults}");
    let with_prefixes = "destination_header: x-pd-destination\n      path_prefixes: [/team]\n";
    let checked = check(&replaced(&text, "destination_header: x-pd-destination\n", with_prefixes));
    assert!(checked.is_good, "{}", checked.faults);
}

#[test]
fn headers_that_prefill_legs_lack_are_warned_of() {
    let warning = warning(&replaced_once(
        &manifests(),
        "        - {name: x-pd-destination,",
        "        - {name: x-api-key, value: secret}\n        - {name: x-pd-destination,",
    ));
    assert!(
        warning.contains("HTTPRoute llm/pd: spec.rules[0].filters[0]: sets header x-api-key, which prefill legs lack"),
        "{warning}"
    );
}
