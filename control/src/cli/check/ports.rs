//! Checks that Envoy's cluster has the ports that pd-control lists: an endpoint that the cluster lacks is never reached,
//! and any host of the cluster answers in its place.

use serde_json::{Map, Value};

use super::report::Report;
use crate::cli::manifests::{Manifests, Object, items};

/// Checks the `InferencePool`s with pods of a rule's Services. `backends` are these Services, each with the port that the
/// rule names.
pub(super) fn check(backends: &[(&Object, Option<&Value>)], all: &Manifests, report: &mut Report) {
    for pool in all.of_kind("InferencePool") {
        let of_pool: Vec<_> = backends.iter().filter(|(service, _)| shares_pods(service, pool)).collect();
        let reached: Option<Vec<u64>> = of_pool.iter().map(|(service, port)| target_port(service, *port)).collect();
        // A port with a name is another number in each pod.
        let Some(reached) = reached.filter(|reached| !reached.is_empty()) else { continue };
        for port in target_ports(pool).into_iter().filter(|port| !reached.contains(port)) {
            let services: Vec<_> = of_pool.iter().map(|(service, _)| service.title()).collect();
            let what = format!(
                "{port}: {} leads to {reached:?} only, so Envoy's cluster lacks the endpoints of that port. Give the route \
                 a backend for each port",
                services.join(", ")
            );
            report.fault(pool.says("spec.targetPorts", what));
        }
    }
}

/// Whether a Service and a pool select the same pods, or one selects a part of the other's.
fn shares_pods(service: &Object, pool: &Object) -> bool {
    let of_service = service.value.pointer("/spec/selector").and_then(Value::as_object);
    let of_pool = ["/spec/selector/matchLabels", "/spec/selector"];
    let of_pool = of_pool.into_iter().find_map(|place| pool.value.pointer(place).and_then(Value::as_object));
    let (Some(of_service), Some(of_pool)) = (of_service, of_pool) else { return false };
    let holds = |all: &Map<String, Value>, part: &Map<String, Value>| {
        !part.is_empty() && part.iter().all(|(key, value)| all.get(key) == Some(value))
    };
    service.namespace == pool.namespace && (holds(of_service, of_pool) || holds(of_pool, of_service))
}

/// Port of the pods behind a port of a Service; `None` if the pods' port has a name, or if the Service has no such port.
fn target_port(service: &Object, port: Option<&Value>) -> Option<u64> {
    let found = items(&service.value, "/spec/ports").iter().find(|known| known.get("port") == port)?;
    found.get("targetPort").or_else(|| found.get("port"))?.as_u64()
}

/// Target ports of an `InferencePool`, of `v1` and of `v1alpha2`.
fn target_ports(pool: &Object) -> Vec<u64> {
    let listed = items(&pool.value, "/spec/targetPorts").iter().filter_map(|port| port.get("number")?.as_u64());
    let single = pool.value.pointer("/spec/targetPortNumber").and_then(Value::as_u64);
    listed.chain(single).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn faults(service_ports: &str, pool: &str) -> Vec<String> {
        let text = format!(
            "kind: Service\nmetadata: {{name: engines, namespace: llm}}\n\
             spec: {{selector: {{app: vllm}}, ports: [{service_ports}]}}\n---\n\
             kind: InferencePool\nmetadata: {{name: pool, namespace: llm}}\nspec: {{{pool}}}\n"
        );
        let mut manifests = Manifests::default();
        manifests.read(Path::new("m.yaml"), text.as_bytes()).unwrap();
        let mut report = Report::default();
        let port = Value::from(80);
        let backends: Vec<_> = manifests.of_kind("Service").map(|service| (service, Some(&port))).collect();
        check(&backends, &manifests, &mut report);
        report.faults
    }

    const SELECTOR: &str = "selector: {matchLabels: {app: vllm, model: m}}";

    #[test]
    fn a_port_that_no_backend_leads_to_is_a_fault() {
        let pool = format!("{SELECTOR}, targetPorts: [{{number: 8000}}, {{number: 8001}}]");
        let found = faults("{port: 80, targetPort: 8000}", &pool);
        let fault = "InferencePool llm/pool: spec.targetPorts: 8001: Service llm/engines leads to [8000] only";
        assert!(found.len() == 1 && found[0].contains(fault), "{found:?}");
        let old = faults("{port: 80}", "selector: {app: vllm}, targetPortNumber: 8000");
        assert!(old.len() == 1 && old[0].contains("8000: Service llm/engines leads to [80] only"), "{old:?}");
    }

    #[test]
    fn ports_that_agree_or_cannot_be_compared_are_none() {
        let pool = format!("{SELECTOR}, targetPorts: [{{number: 8000}}]");
        for ports in ["{port: 80, targetPort: 8000}", "{port: 80, targetPort: http}", "{port: 81, targetPort: 1}"] {
            assert_eq!(faults(ports, &pool), Vec::<String>::new(), "{ports}");
        }
        let others = "selector: {matchLabels: {app: other}}, targetPorts: [{number: 1}]";
        assert_eq!(faults("{port: 80, targetPort: 8000}", others), Vec::<String>::new());
    }
}
