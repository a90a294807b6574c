//! The manifests as files: of their schemas, and with names that agree. `make test-cluster` applies them.

#[path = "combinations.rs"]
mod combinations;
#[path = "gateway/texts.rs"]
mod texts;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use k8s_openapi::api::admissionregistration::v1::{ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Secret, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use pd_cluster::schema;
use pd_support::config::block_of_document;
use pd_support::places;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// The manifests' files but kustomize's own, with each document in them.
fn documents() -> Vec<(PathBuf, Value)> {
    let mut files = Vec::new();
    find(&manifests(), &mut files);
    assert!(files.len() > 8, "{files:?}");
    files.iter().flat_map(|file| read(file).into_iter().map(|document| (file.clone(), document))).collect()
}

fn manifests() -> PathBuf {
    places::root().join("gateway-manifests")
}

fn find(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            find(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "yaml")
            && path.file_name().is_some_and(|name| name != "kustomization.yaml")
        {
            files.push(path);
        }
    }
}

fn read(file: &Path) -> Vec<Value> {
    parse(&fs::read_to_string(file).unwrap(), &file.display().to_string())
}

fn parse(text: &str, name: &str) -> Vec<Value> {
    let documents = text.split("\n---\n").map(serde_saphyr::from_str);
    let documents: Result<Vec<Value>, _> = documents.collect();
    documents.unwrap_or_else(|error| panic!("{name}: {error}")).into_iter().filter(|value| !value.is_null()).collect()
}

/// Objects of `base` by kind and name.
fn base() -> BTreeMap<(String, String), Value> {
    let is_base = |file: &Path| file.parent().is_some_and(|parent| parent.ends_with("base"));
    let key = |object: &Value| {
        (object["kind"].as_str().unwrap().to_owned(), object["metadata"]["name"].as_str().unwrap().to_owned())
    };
    documents().into_iter().filter(|(file, _)| is_base(file)).map(|(_, object)| (key(&object), object)).collect()
}

fn get(kind: &str, name: &str) -> Value {
    base().remove(&(kind.to_owned(), name.to_owned())).unwrap_or_else(|| panic!("{kind} {name}"))
}

/// Those of the tested Envoy Gateway, or of another one.
fn schemas() -> PathBuf {
    std::env::var_os("PD_SCHEMAS").map_or_else(|| places::root().join("tests/cluster/schemas"), PathBuf::from)
}

/// What is wrong with an object, by Kubernetes' types or the stored schema of its kind.
fn faults(object: &Value) -> Vec<String> {
    let kind = object["kind"].as_str().unwrap_or_default();
    match (object["apiVersion"].as_str().unwrap_or_default(), kind) {
        ("v1", "Namespace") => typed::<Namespace>(object),
        ("v1", "Service") => typed::<Service>(object),
        ("v1", "ServiceAccount") => typed::<ServiceAccount>(object),
        ("v1", "Secret") => typed::<Secret>(object),
        ("v1", "ConfigMap") => typed::<ConfigMap>(object),
        ("apps/v1", "Deployment") => typed::<Deployment>(object),
        ("autoscaling/v2", "HorizontalPodAutoscaler") => typed::<HorizontalPodAutoscaler>(object),
        ("batch/v1", "Job") => typed::<Job>(object),
        ("policy/v1", "PodDisruptionBudget") => typed::<PodDisruptionBudget>(object),
        ("networking.k8s.io/v1", "NetworkPolicy") => typed::<NetworkPolicy>(object),
        ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy") => typed::<ValidatingAdmissionPolicy>(object),
        ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicyBinding") => {
            typed::<ValidatingAdmissionPolicyBinding>(object)
        }
        ("rbac.authorization.k8s.io/v1", "Role") => typed::<Role>(object),
        ("rbac.authorization.k8s.io/v1", "RoleBinding") => typed::<RoleBinding>(object),
        (version, kind) => {
            let version = version.rsplit('/').next().unwrap_or_default();
            match fs::read(schemas().join(format!("{kind}.{version}.json"))) {
                Ok(bytes) => {
                    // The API server knows metadata by itself.
                    let mut rest = object.clone();
                    let metadata = std::mem::replace(&mut rest["metadata"], json!({}));
                    let mut faults = typed::<ObjectMeta>(&metadata);
                    faults.extend(schema::faults(&serde_json::from_slice(&bytes).unwrap(), &rest));
                    faults
                }
                Err(_) => vec![format!("there is no schema of {kind} {version}")],
            }
        }
    }
}

/// Unknown fields are faults, too.
fn typed<T: DeserializeOwned>(object: &Value) -> Vec<String> {
    let mut unknown = Vec::new();
    let read: Result<T, _> = serde_ignored::deserialize(object, |path| unknown.push(format!(".{path}: unknown")));
    if let Err(error) = read {
        unknown.push(error.to_string());
    }
    unknown
}

#[test]
fn every_object_is_of_its_schema() {
    for (file, object) in documents() {
        assert_eq!(faults(&object), Vec::<String>::new(), "{}: {}", file.display(), object["kind"]);
    }
}

/// Where there is a kubectl with a kustomize of 2021 or later.
#[test]
fn every_overlay_is_of_its_schemas_once_it_is_put_together() {
    let mut overlays: Vec<_> =
        fs::read_dir(manifests().join("overlays")).unwrap().map(|entry| entry.unwrap().path()).collect();
    overlays.push(manifests().join("base"));
    for overlay in overlays {
        let Ok(done) = Command::new("kubectl").arg("kustomize").arg(&overlay).output() else {
            eprintln!("skipped: there is no kubectl here");
            return;
        };
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{}: {said}", overlay.display());
        let text = String::from_utf8(done.stdout).unwrap();
        let objects = parse(&text, &overlay.display().to_string());
        assert!(objects.len() > 15);
        for object in &objects {
            assert_eq!(faults(object), Vec::<String>::new(), "{}: {}", overlay.display(), object["kind"]);
        }
        // Config map, policies and annotation; config map and Deployment.
        for (file, places) in [("filter-image.env", 4), ("control-image.env", 2)] {
            let pinned = fs::read_to_string(manifests().join("base").join(file)).unwrap();
            let image = pinned.trim().trim_start_matches("image=");
            assert_eq!(text.matches(image).count(), places, "{image} in {}", overlay.display());
        }
        assert!(!text.contains("set-by-kustomize"), "{}", overlay.display());
    }
}

#[test]
fn a_mistake_is_found() {
    let mut proxy = get("EnvoyProxy", "pd");
    proxy["spec"]["concurency"] = json!(4);
    assert_eq!(faults(&proxy), [".spec.concurency: unknown"]);
    let mut deployment = get("Deployment", "pd-control");
    deployment["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = json!({});
    assert_eq!(faults(&deployment).len(), 1, "{:?}", faults(&deployment));
}

/// Envoy Gateway's name of a rule's cluster.
fn cluster_of(service: &str) -> String {
    for ((kind, name), route) in base() {
        let rules = route["spec"]["rules"].as_array().cloned().unwrap_or_default();
        let index = rules.iter().position(|rule| rule["backendRefs"][0]["name"] == service);
        if let Some(index) = index.filter(|_| kind == "HTTPRoute") {
            let namespace = route["metadata"]["namespace"].as_str().unwrap();
            return format!("httproute/{namespace}/{name}/rule/{index}");
        }
    }
    panic!("no route to {service}")
}

fn plugin() -> Value {
    get("EnvoyExtensionPolicy", "pd")["spec"]["wasm"][0].clone()
}

#[test]
fn the_plugin_configuration_is_one_that_the_filter_takes() {
    let config = plugin()["config"].to_string();
    pd_core::config::Config::parse(config.as_bytes()).unwrap_or_else(|error| panic!("{config}: {error}"));
}

#[test]
fn the_filter_names_the_clusters_that_the_routes_make() {
    let config = plugin()["config"].clone();
    assert_eq!(config["cluster"], cluster_of("engines"));
    assert_eq!(config["control"]["cluster"], cluster_of("pd-control"));
}

#[test]
fn the_destination_header_is_the_same_everywhere() {
    let header = plugin()["config"]["destination_header"].clone();
    let traffic = get("BackendTrafficPolicy", "pd");
    assert_eq!(traffic["spec"]["loadBalancer"]["endpointOverride"]["extractFrom"], json!([{"header": header}]));
    let route = get("HTTPRoute", "pd");
    let set = route["spec"]["rules"][0]["filters"][0]["requestHeaderModifier"]["set"].as_array().unwrap().clone();
    assert_eq!(set[0], json!({"name": header, "value": "%FILTER_STATE(wasm.pd.destination:PLAIN)%"}));
    // What the route sets, clients cannot send.
    let removed = get("ClientTrafficPolicy", "pd")["spec"]["headers"]["earlyRequestHeaders"]["remove"].clone();
    assert_eq!(removed, set.iter().map(|header| header["name"].clone()).collect::<Value>());
}

#[test]
fn texts_that_tests_on_the_cluster_change_stand_once() {
    for (file, text) in texts::ALL {
        let found = fs::read_to_string(manifests().join(file)).unwrap().matches(text).count();
        assert_eq!(found, 1, "{text:?} in {file}");
    }
}

/// A buffer waits for the end of a body, and a WebSocket has none.
#[test]
fn upgrades_have_a_route_that_buffers_nothing() {
    let (route, plain) = (get("HTTPRoute", "pd-upgrade"), get("HTTPRoute", "pd"));
    let rule = &route["spec"]["rules"][0];
    for of in rule["matches"].as_array().unwrap() {
        assert_eq!(of["headers"], json!([{"type": "RegularExpression", "name": "upgrade", "value": "(?i)websocket"}]));
    }
    assert_eq!(rule["backendRefs"], plain["spec"]["rules"][0]["backendRefs"]);
    let set = |rule: &Value| rule["filters"][0]["requestHeaderModifier"]["set"].clone();
    assert_eq!(set(rule)[0], set(&plain["spec"]["rules"][0])[0]);
    let filter = get("EnvoyExtensionPolicy", "pd");
    let targets = filter["spec"]["targetRefs"].as_array().unwrap();
    assert!(targets.iter().any(|target| target["name"] == "pd-upgrade"));
    let (mut own, mut traffic) =
        (get("BackendTrafficPolicy", "pd-upgrade")["spec"].clone(), get("BackendTrafficPolicy", "pd")["spec"].clone());
    assert_eq!(own["httpUpgrade"].take(), json!([{"type": "websocket"}]));
    assert_eq!(own["targetRefs"].take()[0]["name"], "pd-upgrade");
    assert!(traffic["targetRefs"].take().is_array() && traffic["requestBuffer"].take().is_object());
    let rest = |spec: Value| spec.as_object().unwrap().clone().into_iter().filter(|(_, value)| !value.is_null());
    assert!(rest(own).eq(rest(traffic)), "in all else the policies agree");
}

/// The paths that the filter lets through.
#[test]
fn the_route_has_all_paths_of_inference_apis() {
    let paths = pd_core::paths::INFERENCE;
    let matches = get("HTTPRoute", "pd")["spec"]["rules"][0]["matches"].as_array().unwrap().clone();
    // A rule takes so many.
    assert!(matches.len() <= 64);
    let has = |path: &str| {
        matches.iter().any(|of| {
            let value = of["path"]["value"].as_str().unwrap();
            match of["path"]["type"].as_str().unwrap() {
                "Exact" => value == path,
                _ => path == value || path.starts_with(&format!("{value}/")),
            }
        })
    };
    let spelt =
        paths.iter().map(|path| path.trim_end_matches("/*")).flat_map(|path| [path.to_owned(), format!("{path}/")]);
    let missing: Vec<_> = spelt.filter(|path| !has(path)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    for of in &matches {
        let value = of["path"]["value"].as_str().unwrap();
        let is_of_api = |path: &&str| *path == value || path.starts_with(&format!("{value}/"));
        assert!(paths.iter().any(is_of_api), "{value}: the filter refuses all of it");
    }
}

/// uvicorn closes idle connections after 5 s.
#[test]
fn idle_connections_are_closed_here_as_on_one_machine() {
    let local: Value = serde_saphyr::from_str(&fs::read_to_string(places::local_yaml()).unwrap()).unwrap();
    let clusters = local["static_resources"]["clusters"].as_array().unwrap();
    let engines = clusters.iter().find(|cluster| cluster["name"] == "engines").unwrap();
    let options =
        &engines["typed_extension_protocol_options"]["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"];
    let idle = &get("BackendTrafficPolicy", "pd")["spec"]["timeout"]["http"]["connectionIdleTimeout"];
    assert_eq!((idle, &options["common_http_protocol_options"]["idle_timeout"]), (&json!("3s"), &json!("3s")));
}

#[test]
fn the_buffer_takes_what_the_filter_takes() {
    let limit = get("BackendTrafficPolicy", "pd")["spec"]["requestBuffer"]["limit"].clone();
    let mebibytes: u64 = limit.as_str().unwrap().trim_end_matches("Mi").parse().unwrap();
    assert_eq!(plugin()["config"]["max_body_bytes"], mebibytes << 20);
}

/// The preflight policy names the same image as the filter's policy, and the API server denies pods and policies with an
/// image other than the preflight's.
#[test]
fn an_image_is_fetched_before_it_is_named() {
    let preflight = get("EnvoyExtensionPolicy", "pd-preflight");
    assert_eq!(preflight["spec"]["wasm"][0]["code"], plugin()["code"]);
    let route = get("HTTPRoute", "pd-preflight");
    let [of_route, of_rule] = ["pd-preflight", "pd-preflight-rule"]
        .map(|name| get("EnvoyExtensionPolicy", name)["spec"]["targetRefs"][0].clone());
    assert_eq!((&of_route["kind"], &of_route["name"]), (&route["kind"], &route["metadata"]["name"]));
    assert_eq!((&of_rule["kind"], &of_rule["name"]), (&route["kind"], &route["metadata"]["name"]));
    assert_eq!(of_rule["sectionName"], route["spec"]["rules"][0]["name"]);
    assert!(
        of_route["sectionName"].is_null() && get("EnvoyExtensionPolicy", "pd-preflight-rule")["spec"]["wasm"].is_null()
    );

    let policy = get("ValidatingAdmissionPolicy", "pd-filter-image");
    let images = policy["spec"]["variables"][0]["expression"].as_str().unwrap().to_owned();
    let annotations =
        get("EnvoyProxy", "pd")["spec"]["provider"]["kubernetes"]["envoyDeployment"]["pod"]["annotations"].clone();
    let annotation = annotations.as_object().unwrap().keys().next().unwrap();
    assert!(images.contains(&format!("'{annotation}'")), "{images}");
    for (binding, of, param) in [
        ("pd-filter-image-of-policy", "envoyextensionpolicies", "pd-preflight"),
        ("pd-filter-image-of-pods", "envoyproxies", "pd"),
    ] {
        let binding = get("ValidatingAdmissionPolicyBinding", binding);
        let spec = &binding["spec"];
        assert_eq!(spec["policyName"], policy["metadata"]["name"]);
        assert_eq!(spec["paramRef"], json!({"name": param, "parameterNotFoundAction": "Deny"}));
        assert_eq!(spec["matchResources"]["resourceRules"][0]["resources"], json!([of]));
        let namespace = &spec["matchResources"]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"];
        assert_eq!(*namespace, preflight["metadata"]["namespace"]);
        let rules = &policy["spec"]["matchConstraints"]["resourceRules"][0];
        assert!(rules["resources"].as_array().unwrap().contains(&json!(of)));
    }
}

#[test]
fn envoys_pods_are_asked_whether_the_filter_is_ready() {
    let proxy = get("EnvoyProxy", "pd");
    let deployment = &proxy["spec"]["provider"]["kubernetes"]["envoyDeployment"];
    let containers = &deployment["patch"]["value"]["spec"]["template"]["spec"]["containers"];
    let probe = containers[0]["readinessProbe"]["httpGet"].clone();
    let path = std::str::from_utf8(pd_core::request::READY_PATH).unwrap();
    assert_eq!(probe["path"], path);
    // Envoy Gateway adds 10,000 to ports below 1,024.
    let port = get("Gateway", "pd")["spec"]["listeners"][0]["port"].as_u64().unwrap();
    assert_eq!(probe["port"], if port < 1_024 { port + 10_000 } else { port });
    let route = get("HTTPRoute", "pd-ready");
    assert_eq!(route["spec"]["rules"][0]["matches"], json!([{"path": {"type": "Exact", "value": path}}]));
    let logged = proxy["spec"]["telemetry"]["accessLog"]["settings"][0]["matches"].to_string();
    assert!(logged.contains(path), "{logged}");
}

#[test]
fn the_token_is_the_same_everywhere() {
    let variable = plugin()["env"]["hostKeys"][0].clone();
    let control = get("Deployment", "pd-control")["spec"]["template"]["spec"]["containers"][0]["env"].clone();
    let envoy =
        get("EnvoyProxy", "pd")["spec"]["provider"]["kubernetes"]["envoyDeployment"]["container"]["env"].clone();
    let token = control.as_array().unwrap().iter().find(|of| of["name"] == variable).unwrap();
    assert_eq!(envoy, json!([token]));
    let of = &token["valueFrom"]["secretKeyRef"];
    let sim = read(&manifests().join("overlays/sim/token.yaml"));
    let namespaces: Vec<_> = sim.iter().map(|secret| secret["metadata"]["namespace"].as_str().unwrap()).collect();
    assert_eq!(namespaces, ["llm", "envoy-gateway-system"]);
    for secret in &sim {
        assert_eq!(secret["metadata"]["name"], of["name"]);
        assert!(secret["stringData"][of["key"].as_str().unwrap()].is_string());
    }
}

#[test]
fn ports_agree() {
    let container = get("Deployment", "pd-control")["spec"]["template"]["spec"]["containers"][0].clone();
    let port = container["ports"][0]["containerPort"].clone();
    let arguments: Vec<_> = container["args"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
    assert!(arguments.join(" ").ends_with(&format!("--listen 0.0.0.0:{port}")), "{arguments:?}");
    assert_eq!(get("Service", "pd-control")["spec"]["ports"][0]["targetPort"], container["ports"][0]["name"]);
    assert_eq!(get("NetworkPolicy", "pd-control")["spec"]["ingress"][0]["ports"][0]["port"], port);
    let peers = container["env"].as_array().unwrap().iter().find(|of| of["name"] == "PD_CONTROL_PEERS").unwrap();
    assert_eq!(peers["value"], format!("pd-control-peers:{port}"));
    assert_eq!(get("Service", "pd-control-peers")["spec"]["ports"][0]["targetPort"], container["ports"][0]["name"]);
    for (route, service) in [("pd", "engines"), ("pd-control", "pd-control")] {
        let of_service = get("Service", service)["spec"]["ports"][0]["port"].clone();
        assert_eq!(
            get("HTTPRoute", route)["spec"]["rules"][0]["backendRefs"],
            json!([{"name": service, "port": of_service}])
        );
    }
    let engines = get("Service", "engines")["spec"]["ports"][0]["targetPort"].clone();
    for engine in read(&manifests().join("overlays/sim/engines.yaml")) {
        let container = &engine["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container["ports"][0]["containerPort"], engines);
        assert_eq!(container["args"][1], format!("$(POD_IP):{engines}"));
    }
}

#[test]
fn selectors_find_their_pods() {
    let contains = |labels: &Value, selector: &Value| {
        selector.as_object().unwrap().iter().all(|(key, value)| labels.get(key) == Some(value))
    };
    let control = get("Deployment", "pd-control")["spec"].clone();
    let labels = &control["template"]["metadata"]["labels"];
    for selector in [
        &control["selector"]["matchLabels"],
        &get("Service", "pd-control")["spec"]["selector"],
        &get("Service", "pd-control-peers")["spec"]["selector"],
        &get("NetworkPolicy", "pd-control")["spec"]["ingress"][0]["from"][1]["podSelector"]["matchLabels"],
        &get("PodDisruptionBudget", "pd-control")["spec"]["selector"]["matchLabels"],
        &get("NetworkPolicy", "pd-control")["spec"]["podSelector"]["matchLabels"],
    ] {
        assert!(contains(labels, selector), "{selector}");
    }
    let engines = get("Service", "engines")["spec"]["selector"].clone();
    for engine in read(&manifests().join("overlays/sim/engines.yaml")) {
        let labels = &engine["spec"]["template"]["metadata"]["labels"];
        assert!(contains(labels, &engines) && contains(labels, &engine["spec"]["selector"]["matchLabels"]), "{labels}");
    }
}

/// Envoy on one machine and Envoy in a cluster write the same tags and access log.
#[test]
fn tags_and_access_log_are_those_of_one_machine() {
    let local: Value = serde_saphyr::from_str(&fs::read_to_string(places::local_yaml()).unwrap()).unwrap();
    let proxy = get("EnvoyProxy", "pd");
    let patches = proxy["spec"]["bootstrap"]["jsonPatches"].as_array().unwrap();
    assert!(patches.iter().all(|patch| patch["op"] == "add" && patch["path"] == "/stats_config/stats_tags/-"));
    let tags: Value = patches.iter().map(|patch| patch["value"].clone()).collect();
    assert_eq!(tags, local["stats_config"]["stats_tags"]);
    let manager = &local["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"];
    let format = &proxy["spec"]["telemetry"]["accessLog"]["settings"][0]["format"]["json"];
    assert_eq!(*format, manager["access_log"][0]["typed_config"]["log_format"]["json_format"]);
}

/// The component for Envoy Gateway has the tags and the filter that the document shows and tests/envoy runs.
#[test]
fn the_component_has_the_tags_and_the_filter_of_the_document() {
    let read = |name: &str| read(&manifests().join("tracing").join(name)).remove(0);
    let block = |first_line: &str| block_of_document("observability.md", first_line);
    let kustomization = read("kustomization.yaml");
    let patch = kustomization["patches"][0]["patch"].as_str().unwrap();
    let patch: Value = serde_saphyr::from_str(patch).unwrap();
    let mut expected = BTreeMap::new();
    let manager = block("# In the HTTP connection manager:")["tracing"]["custom_tags"].clone();
    for tags in [manager, block("# Beside the other custom_tags:")] {
        for tag in tags.as_array().unwrap() {
            let value = if tag["value"].is_null() { &tag["literal"]["value"] } else { &tag["value"] };
            expected.insert(tag["tag"].as_str().unwrap().to_owned(), value.clone());
        }
    }
    assert_eq!(patch[0]["value"]["tags"], json!(expected));
    let filter = read("tracing.yaml")["spec"]["jsonPatches"][0]["operation"]["value"].clone();
    assert_eq!(filter, block("# The first of http_filters:"));
}
