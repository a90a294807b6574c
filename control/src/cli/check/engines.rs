//! Checks that the Services behind Envoy's cluster have the pods that pd-control lists. Envoy never reaches an endpoint
//! that its cluster lacks, and any host of the cluster answers in its place.

use std::borrow::Cow;
use std::collections::BTreeMap;

use pd_core::wire::Endpoint;
use serde_json::{Value, json};

use super::containers::containers;
use super::report::Report;
use crate::cli::arguments::files_of;
use crate::cli::manifests::{Manifests, Object, items, text};
use crate::sources::kubernetes::KubernetesConfig;
use crate::sources::kubernetes::aibrix;
use crate::sources::kubernetes::cluster::{Cluster, Watched};
use crate::sources::kubernetes::config::PoolGroup;
use crate::sources::kubernetes::follow::Event;

/// Kinds of workloads, each with the place of its pods' template. A LeaderWorkerSet's leaders serve.
const WORKLOADS: &[(&str, &str)] = &[
    ("Deployment", "/spec/template"),
    ("StatefulSet", "/spec/template"),
    ("DaemonSet", "/spec/template"),
    ("LeaderWorkerSet", "/spec/leaderWorkerTemplate/leaderTemplate"),
    ("LeaderWorkerSet", "/spec/leaderWorkerTemplate/workerTemplate"),
];

/// A workload and the template of its pods.
struct Workload<'a> {
    object: &'a Object,
    template: Cow<'a, Value>,
}

/// Checks the workloads of the files. `backends` are the Services behind Envoy's cluster, each with the port that the
/// route names. Without a pd-control that follows pods nothing is checked.
pub(super) fn check(backends: &[(&Object, Option<&Value>)], all: &Manifests, report: &mut Report) {
    let Some(config) = followed(all) else { return };
    let workloads: Vec<Workload<'_>> = workloads(all).collect();
    let listed = listed(&config, &workloads, all);
    for (index, workload) in workloads.iter().enumerate() {
        let selecting: Vec<_> = backends.iter().filter(|(service, _)| workload.is_selected_by(service)).collect();
        let services = |of: &[&(&Object, Option<&Value>)]| {
            of.iter().map(|(service, _)| service.title()).collect::<Vec<_>>().join(", ")
        };
        let labels = "spec.template.metadata.labels";
        match listed.get(&index) {
            Some(_) if selecting.is_empty() => report.fault(workload.object.says(
                labels,
                format!(
                    "pd-control lists these pods, and {} selects none of them: Envoy's cluster lacks them, and any other \
                     host answers in their place",
                    services(&backends.iter().collect::<Vec<_>>())
                ),
            )),
            // Ports of InferencePools are compared as they stand there.
            Some(endpoints) if config.inference_pools.is_empty() => {
                let reached: Option<Vec<u64>> = selecting.iter().map(|it| workload.target_port(it.0, it.1)).collect();
                let Some(reached) = reached else { continue };
                let lacks = |endpoint: &&Endpoint| !reached.contains(&u64::from(endpoint.address.port()));
                for endpoint in endpoints.iter().filter(lacks) {
                    let what = format!(
                        "pd-control lists port {}, and {} leads to {reached:?} only: Envoy's cluster lacks these endpoints",
                        endpoint.address.port(),
                        services(&selecting)
                    );
                    report.fault(workload.object.says("spec.template.spec.containers", what));
                }
            }
            None if !selecting.is_empty() => report.warn(workload.object.says(
                labels,
                format!(
                    "{} selects these pods, which are no engines to pd-control: Envoy's cluster has hosts that the filter \
                     never names",
                    services(&selecting)
                ),
            )),
            _ => {}
        }
    }
}

/// The configuration of the pd-control that follows pods; `None` where there is none, or its arguments are not known.
fn followed(all: &Manifests) -> Option<KubernetesConfig> {
    containers(all).find_map(|container| {
        let arguments: Vec<&str> = items(container.value, "/args").iter().map(|argument| text(argument, "")).collect();
        let variables = items(container.value, "/env").iter();
        let variables: Vec<_> = variables.map(|env| (text(env, "/name"), text(env, "/value"))).collect();
        let files = files_of(&arguments, &variables).ok().filter(|files| files.follows_pods)?;
        let Some(path) = &files.kubernetes_config else { return Some(KubernetesConfig::default()) };
        let name = path.file_name()?.to_str()?;
        let mut maps = all.of_kind("ConfigMap").filter(|map| map.namespace == container.workload.namespace);
        let content = maps.find_map(|map| map.value.get("data")?.get(name)?.as_str())?;
        KubernetesConfig::parse(path, content.as_bytes()).ok()
    })
}

fn workloads(all: &Manifests) -> impl Iterator<Item = Workload<'_>> {
    let with_template = WORKLOADS.iter().flat_map(|(kind, place)| {
        let of_kind = all.of_kind(kind);
        of_kind.filter_map(|object| Some(Workload { object, template: Cow::Borrowed(object.value.pointer(place)?) }))
    });
    with_template.chain(all.of_kind("StormService").flat_map(|object| {
        let roles = items(&object.value, "/spec/template/spec/roles").iter();
        roles.map(move |role| Workload { object, template: Cow::Owned(role_template(object, role)) })
    }))
}

/// Template of the pods of one role of AIBrix' StormService, with the labels that its controller adds.
fn role_template(service: &Object, role: &Value) -> Value {
    let of = |place: &str| role.pointer(place).and_then(Value::as_object).cloned().unwrap_or_default();
    let mut labels = of("/template/metadata/labels");
    let added = [
        (aibrix::ROLE, text(role, "/name").to_owned()),
        (aibrix::ROLESET, format!("{}-roleset", service.name)),
        (aibrix::STORM_SERVICE, service.name.clone()),
    ];
    labels.extend(added.map(|(key, value)| (key.to_owned(), value.into())));
    json!({
        "metadata": {"labels": labels, "annotations": of("/template/metadata/annotations")},
        "spec": of("/template/spec"),
    })
}

/// Endpoints of each workload, by its place among them, as pd-control would list a pod of it.
fn listed(config: &KubernetesConfig, workloads: &[Workload<'_>], all: &Manifests) -> BTreeMap<usize, Vec<Endpoint>> {
    let mut config = config.clone();
    config.allowed_cidrs.clear();
    if config.namespaces.is_empty() {
        // pd-control then follows its own namespace, which is taken to be that of the engines.
        config.namespaces = workloads.iter().map(|workload| workload.object.namespace.clone()).collect();
    }
    let Ok(rules) = config.rules() else { return BTreeMap::new() };
    let mut cluster = Cluster::new(&config, rules);
    let mut apply = |watched: &Watched, object: Value| {
        if let Ok(object) = serde_json::from_value(object) {
            cluster.take(watched, Event::Applied(Box::new(object)));
        }
    };
    for pool in all.of_kind("InferencePool") {
        let is_alpha = text(&pool.value, "/apiVersion").starts_with("inference.networking.x-k8s.io/");
        let group = if is_alpha { PoolGroup::Alpha } else { PoolGroup::V1 };
        apply(&Watched::Pools(group, pool.namespace.clone()), with_namespace(&pool.value, &pool.namespace));
    }
    for (index, workload) in workloads.iter().enumerate() {
        if config.namespaces.contains(&workload.object.namespace) {
            apply(&Watched::Pods(workload.object.namespace.clone()), workload.pod(index));
        }
    }
    let (endpoints, view) = cluster.endpoints();
    let mut listed: BTreeMap<usize, Vec<Endpoint>> = BTreeMap::new();
    for endpoint in endpoints {
        let place = view.names.get(&endpoint.id()).and_then(|name| name.name.parse().ok());
        if let Some(place) = place {
            listed.entry(place).or_default().push(endpoint);
        }
    }
    listed
}

fn with_namespace(object: &Value, namespace: &str) -> Value {
    let mut object = object.clone();
    object["metadata"]["namespace"] = namespace.into();
    object
}

impl Workload<'_> {
    /// A ready pod of it, with its place for a name.
    fn pod(&self, index: usize) -> Value {
        let of = |key: &str| self.template.pointer(&format!("/metadata/{key}")).cloned().unwrap_or(json!({}));
        // Addresses for tests of networks (RFC 2544), which no pod has.
        let ip = format!("198.18.{}.{}", index / 250, 1 + index % 250);
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": index.to_string(), "namespace": self.object.namespace,
                "labels": of("labels"), "annotations": of("annotations"),
            },
            "spec": self.template.get("spec").cloned().unwrap_or(json!({"containers": []})),
            "status": {"phase": "Running", "podIP": ip, "conditions": [{"type": "Ready", "status": "True"}]},
        })
    }

    fn is_selected_by(&self, service: &Object) -> bool {
        let selector = service.value.pointer("/spec/selector").and_then(Value::as_object);
        let labels = self.template.pointer("/metadata/labels");
        service.namespace == self.object.namespace
            && selector.is_some_and(|selector| {
                let has = |(key, value): (&String, &Value)| labels.and_then(|labels| labels.get(key)) == Some(value);
                !selector.is_empty() && selector.iter().all(has)
            })
    }

    /// Port of the pods behind a port of a Service; `None` where it is not known.
    fn target_port(&self, service: &Object, port: Option<&Value>) -> Option<u64> {
        let found = items(&service.value, "/spec/ports").iter().find(|known| known.get("port") == port)?;
        let target = found.get("targetPort").or_else(|| found.get("port"))?;
        target.as_u64().or_else(|| {
            let containers = items(&self.template, "/spec/containers").iter();
            let mut ports = containers.flat_map(|container| items(container, "/ports"));
            ports.find(|it| it.get("name") == Some(target))?.get("containerPort")?.as_u64()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTROL: &str = "kind: Deployment\nmetadata: {name: pd-control, namespace: llm}\n\
         spec: {template: {spec: {containers: [{name: pd-control, args: [--kubernetes]}]}}}\n---\n";

    fn checked(control: &str, selector: &str, port: &str, labels: &str) -> Report {
        let text = format!(
            "{control}kind: Service\nmetadata: {{name: engines, namespace: llm}}\n\
             spec: {{selector: {{{selector}}}, ports: [{{port: 80, targetPort: {port}}}]}}\n---\n\
             kind: Deployment\nmetadata: {{name: prefill, namespace: llm}}\n\
             spec: {{template: {{metadata: {{labels: {{{labels}}}}}, \
             spec: {{containers: [{{name: e, ports: [{{name: http, containerPort: 8000}}]}}]}}}}}}\n"
        );
        let mut all = Manifests::default();
        all.read("m.yaml".as_ref(), text.as_bytes()).unwrap();
        let port = Value::from(80);
        let backends: Vec<_> = all.of_kind("Service").map(|service| (service, Some(&port))).collect();
        let mut report = Report::default();
        check(&backends, &all, &mut report);
        report
    }

    const ENGINE: &str = "app: vllm, llm-d.ai/role: prefill";

    #[test]
    fn pods_that_the_service_does_not_select_are_a_fault() {
        let found = checked(CONTROL, "app: vllm, llm-d.ai/role: decode", "8000", ENGINE).faults;
        let fault = "Deployment llm/prefill: spec.template.metadata.labels: pd-control lists these pods, and Service \
                     llm/engines selects none of them";
        assert!(found.len() == 1 && found[0].contains(fault), "{found:?}");
    }

    #[test]
    fn a_port_that_the_service_does_not_lead_to_is_a_fault() {
        let found = checked(CONTROL, "app: vllm", "8001", ENGINE).faults;
        let fault = "pd-control lists port 8000, and Service llm/engines leads to [8001] only";
        assert!(found.len() == 1 && found[0].contains(fault), "{found:?}");
    }

    #[test]
    fn an_odd_storm_service_is_no_panic() {
        for roles in
            ["x", "[x, {name: [], template: x}, {template: [1]}, {template: {metadata: x, spec: {containers: 1}}}]"]
        {
            let text = format!(
                "{CONTROL}kind: StormService\nmetadata: {{name: s, namespace: llm}}\nspec: {{template: {{spec: {{roles: {roles}}}}}}}\n"
            );
            let mut all = Manifests::default();
            all.read("m.yaml".as_ref(), text.as_bytes()).unwrap();
            let mut report = Report::default();
            check(&[], &all, &mut report);
            assert_eq!(report, Report::default(), "{roles}");
        }
    }

    /// AIBrix' samples for SGLang name port 30000 by a label, and the Service of an overlay leads to 8000.
    #[test]
    fn the_roles_of_a_storm_service_are_workloads() {
        let of = |selector: &str, port: &str| {
            let role = |name: &str| {
                format!(
                    "{{name: {name}, template: {{metadata: {{labels: {{model.aibrix.ai/name: m, model.aibrix.ai/port: '30000'}}}}, \
                     spec: {{containers: [{{name: {name}}}]}}}}}}"
                )
            };
            let text = format!(
                "{CONTROL}kind: Service\nmetadata: {{name: engines, namespace: llm}}\n\
                 spec: {{selector: {{{selector}}}, ports: [{{port: 80, targetPort: {port}}}]}}\n---\n\
                 kind: StormService\nmetadata: {{name: pool, namespace: llm}}\n\
                 spec: {{template: {{spec: {{roles: [{}, {}, {{name: routing, template: {{spec: {{}}}}}}]}}}}}}\n",
                role("prefill"),
                role("decode"),
            );
            let mut all = Manifests::default();
            all.read("m.yaml".as_ref(), text.as_bytes()).unwrap();
            let port = Value::from(80);
            let backends: Vec<_> = all.of_kind("Service").map(|service| (service, Some(&port))).collect();
            let mut report = Report::default();
            check(&backends, &all, &mut report);
            report
        };
        assert_eq!(of("model.aibrix.ai/name: m", "30000"), Report::default());
        let faults = of("model.aibrix.ai/name: m", "8000").faults;
        let fault = "StormService llm/pool: spec.template.spec.containers: pd-control lists port 30000, and Service llm/engines \
                     leads to [8000] only";
        // Both roles have the same fault.
        assert!(faults.len() == 1 && faults[0].contains(fault), "{faults:?}");
        let faults = of("app: other", "30000").faults;
        assert!(faults.len() == 1 && faults[0].contains("selects none of them"), "{faults:?}");
        // The controller puts these labels on pods.
        assert_eq!(of("storm-service-name: pool, role-name: prefill", "30000").faults.len(), 1);
    }

    #[test]
    fn pods_that_are_no_engines_are_warned_of() {
        let found = checked(CONTROL, "app: vllm", "8000", "app: vllm");
        assert_eq!(found.faults, Vec::<String>::new());
        assert!(found.warnings.len() == 1 && found.warnings[0].contains("no engines to pd-control"), "{found:?}");
    }

    #[test]
    fn what_agrees_or_is_not_known_is_none() {
        for (control, selector, port, labels) in [
            (CONTROL, "app: vllm", "8000", ENGINE),
            (CONTROL, "app: vllm", "http", ENGINE),
            (CONTROL, "app: other", "1", "app: web"),
            ("", "app: other", "1", ENGINE),
        ] {
            assert_eq!(checked(control, selector, port, labels), Report::default(), "{selector} {port} {labels}");
        }
    }
}
