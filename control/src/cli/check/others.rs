//! Other controllers of inference traffic on the same routes: Envoy AI Gateway, and the Gateway API Inference Extension.

use pd_core::config::Config;
use serde_json::Value;

use super::attached::serves_engines;
use super::filters::Filter;
use super::report::Report;
use crate::cli::manifests::{Manifests, Object, items, text};

/// Header that Envoy AI Gateway sets to the model that it has read from the body.
const MODEL_HEADER: &str = "x-ai-eg-model";
/// Where this is documented.
const SEE: &str = "see docs/kubernetes/ai-gateway.md";

/// Checks a route of the filter's policies.
pub(super) fn check_route(route: &Object, all: &Manifests, report: &mut Report) {
    let rules = items(&route.value, "/spec/rules").iter().enumerate();
    for (i, rule) in rules.filter(|(_, rule)| serves_engines(rule)) {
        for (j, backend) in items(rule, "/backendRefs").iter().enumerate() {
            if text(backend, "/kind") == "InferencePool" {
                let what = format!(
                    "an InferencePool has no endpoints for Envoy Gateway (500), and with an endpoint picker the picker \
                     chooses: name the Service of the engines, and the pool in inference_pools of pd-control's \
                     --kubernetes-config; {SEE}"
                );
                report.fault(route.says(&format!("spec.rules[{i}].backendRefs[{j}]"), what));
            }
        }
        for (j, of_match) in items(rule, "/matches").iter().enumerate() {
            let is_model = |header: &&Value| text(header, "/name").eq_ignore_ascii_case(MODEL_HEADER);
            if items(of_match, "/headers").iter().any(|header| is_model(&header)) {
                let what = format!(
                    "Envoy AI Gateway sets {MODEL_HEADER} when a request's filters are fixed already, so a client that \
                     names the model in the body only reaches engines without the filter; {SEE}"
                );
                report.fault(route.says(&format!("spec.rules[{i}].matches[{j}].headers"), what));
            }
        }
        let is_open = items(&route.value, "/spec/hostnames").is_empty();
        for other in ai_routes(all).filter(|other| is_open && share_gateway(route, other)) {
            let what = format!(
                "must be there beside {}: on one Envoy without a hostname of its own each takes requests of the other; {SEE}",
                other.title()
            );
            report.fault(route.says("spec.hostnames", what));
        }
    }
}

/// Checks the routes that Envoy AI Gateway makes for the filter's policy: each is named as its `AIGatewayRoute`.
pub(super) fn check_generated(filter: &Filter<'_>, config: &Config, all: &Manifests, report: &mut Report) {
    for route in ai_routes(all).filter(|route| filter.policy.targets_kind("HTTPRoute", route)) {
        if items(&route.value, "/spec/hostnames").is_empty() {
            let what = format!("must be there: the filter answers 404 for models that are not its own; {SEE}");
            report.fault(route.says("spec.hostnames", what));
        }
        let header = &config.destination_header;
        let sets = |patch: &Object| patch.value.to_string().contains(&format!("\"{header}\""));
        if !all.of_kind("EnvoyPatchPolicy").any(sets) {
            let what = format!(
                "no EnvoyPatchPolicy adds {header} to the route that Envoy AI Gateway makes, which takes no \
                 RequestHeaderModifier; {SEE}"
            );
            report.fault(route.says("spec.rules", what));
        }
        let traffic = all.of_kind("BackendTrafficPolicy").find(|policy| policy.targets_kind("HTTPRoute", route));
        let sources = traffic.map_or(&[][..], |it| items(&it.value, "/spec/loadBalancer/endpointOverride/extractFrom"));
        if !sources.iter().any(|source| text(source, "/header").eq_ignore_ascii_case(header)) {
            let what =
                format!("no BackendTrafficPolicy with endpointOverride by {header} is for the route of this name");
            report.fault(route.says("spec.rules", what));
        }
    }
}

fn ai_routes(all: &Manifests) -> impl Iterator<Item = &Object> {
    all.of_kind("AIGatewayRoute")
}

fn share_gateway(one: &Object, other: &Object) -> bool {
    let parents = |route: &Object| -> Vec<(String, String)> {
        let parents = items(&route.value, "/spec/parentRefs").iter();
        let of = |parent: &Value| {
            let namespace = Some(text(parent, "/namespace")).filter(|it| !it.is_empty()).unwrap_or(&route.namespace);
            (namespace.to_owned(), text(parent, "/name").to_owned())
        };
        parents.map(of).collect()
    };
    let others = parents(other);
    parents(one).iter().any(|parent| others.contains(parent))
}

#[cfg(test)]
mod tests {
    use super::super::filters::filters;
    use super::*;

    fn faults(text: &str) -> Vec<String> {
        let policy = "kind: EnvoyExtensionPolicy\nmetadata: {name: pd, namespace: ns}\nspec: {targetRefs: \
                      [{kind: HTTPRoute, name: r}], wasm: [{name: pd, config: {}}]}\n---\n";
        let mut all = Manifests::default();
        all.read("m.yaml".as_ref(), format!("{policy}{text}").as_bytes()).unwrap();
        let mut report = Report::default();
        for filter in filters(&all) {
            for route in all.of_kind("HTTPRoute").filter(|route| filter.policy.targets(route)) {
                check_route(route, &all, &mut report);
            }
            let config = Config::parse(b"{}").unwrap();
            check_generated(&filter, &config, &all, &mut report);
        }
        report.faults
    }

    fn route(spec: &str) -> String {
        format!(
            "kind: HTTPRoute\nmetadata: {{name: r, namespace: ns}}\nspec: {{parentRefs: [{{name: g}}], {spec}}}\n---\n"
        )
    }

    fn ai_route(name: &str, spec: &str) -> String {
        format!(
            "kind: AIGatewayRoute\nmetadata: {{name: {name}, namespace: ns}}\nspec: {{parentRefs: [{{name: g}}], {spec}}}\n---\n"
        )
    }

    #[track_caller]
    fn assert_one(found: &[String], begin: &str) {
        assert!(found.len() == 1 && found[0].contains(begin), "{found:?}");
    }

    #[test]
    fn an_inference_pool_behind_a_route_of_ours_is_a_fault() {
        let of_kind = |kind: &str| route(&format!("rules: [{{backendRefs: [{{kind: {kind}, name: llama}}]}}]"));
        assert_one(
            &faults(&of_kind("InferencePool")),
            "HTTPRoute ns/r: spec.rules[0].backendRefs[0]: an InferencePool",
        );
        assert_eq!(faults(&of_kind("Service")), Vec::<String>::new());
    }

    #[test]
    fn a_route_of_ours_that_matches_on_ai_gateways_header_is_a_fault() {
        let by = |name: &str| route(&format!("rules: [{{matches: [{{headers: [{{name: {name}, value: m}}]}}]}}]"));
        assert_one(
            &faults(&by("X-AI-EG-Model")),
            "HTTPRoute ns/r: spec.rules[0].matches[0].headers: Envoy AI Gateway sets",
        );
        assert_eq!(faults(&by("x-other")), Vec::<String>::new());
    }

    #[test]
    fn one_envoy_with_ai_gateway_needs_a_hostname() {
        let rules = "rules: [{matches: [{path: {value: /v1}}]}]";
        let other = ai_route("other", "rules: []");
        assert_one(
            &faults(&(route(rules) + &other)),
            "HTTPRoute ns/r: spec.hostnames: must be there beside AIGatewayRoute ns/other",
        );
        assert_eq!(faults(&(route(&format!("hostnames: [a.example], {rules}")) + &other)), Vec::<String>::new());
        let elsewhere = other.replace("name: g}", "name: h}");
        assert_eq!(faults(&(route(rules) + &elsewhere)), Vec::<String>::new());
        let ready = "rules: [{matches: [{path: {type: Exact, value: /.pd-ready}}]}]";
        assert_eq!(faults(&(route(ready) + &other)), Vec::<String>::new());
    }

    #[test]
    fn a_route_that_ai_gateway_makes_needs_what_ours_has() {
        let traffic = "kind: BackendTrafficPolicy\nmetadata: {name: t, namespace: ns}\nspec: {targetRefs: [{kind: HTTPRoute, \
                       name: r}], loadBalancer: {endpointOverride: {extractFrom: [{header: x-pd-destination}]}}}\n---\n";
        let patch = "kind: EnvoyPatchPolicy\nmetadata: {name: e, namespace: ns}\nspec: {jsonPatches: [{operation: {value: \
                     {key: x-pd-destination}}}]}\n---\n";
        let whole = ai_route("r", "hostnames: [a.example], rules: []") + traffic + patch;
        assert_eq!(faults(&whole), Vec::<String>::new());
        assert_one(
            &faults(&whole.replace("hostnames: [a.example], ", "")),
            "AIGatewayRoute ns/r: spec.hostnames: must be there",
        );
        assert_one(&faults(&whole.replace("key: x-pd-destination", "key: x")), "spec.rules: no EnvoyPatchPolicy adds");
        assert_one(
            &faults(&whole.replace("header: x-pd-destination", "header: x")),
            "spec.rules: no BackendTrafficPolicy",
        );
    }
}
