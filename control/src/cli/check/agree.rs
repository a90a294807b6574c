//! Checks names that the filter's configuration and Envoy Gateway's objects must share.

use pd_core::config::Config;
use serde_json::Value;

use super::attached::{gateways, is_for_upgrades, proxy, serves_engines};
use super::containers::has_token;
use super::filters::Filter;
use super::images::digest;
use super::report::Report;
use super::{engines, order, others, ports, readiness, repeats, rewrites, security, traffic};
use crate::cli::manifests::{Manifests, Object, items, text};

/// Value of the destination header that the route sets.
const DESTINATION: &str = "%FILTER_STATE(wasm.pd.destination:PLAIN)%";
/// Annotation of Envoy's pods with the image of the filter.
const IMAGE_ANNOTATION: &str = "pd-filter-image";

/// Checks a filter against the objects that its policy is attached to. Objects that are in none of the files are not
/// checked.
pub(super) fn check(filter: &Filter<'_>, config: &Config, all: &Manifests, report: &mut Report) {
    // Files without an HTTPRoute are a part of an installation.
    if all.of_kind("HTTPRoute").next().is_none() {
        report.note(filter.says("config", "the files have no HTTPRoute, so names that must agree were not checked"));
        return;
    }
    check_cluster(filter, "cluster", &config.cluster, all, report);
    if let Some(control) = &config.control {
        check_cluster(filter, "control.cluster", &control.cluster, all, report);
        check_token(filter, &control.token_env, all, report);
    }
    check_leg_variables(filter, config, report);
    for route in all.of_kind("HTTPRoute").filter(|route| filter.policy.targets(route)) {
        if items(&route.value, "/spec/rules").iter().any(serves_engines) {
            check_destination_is_set(filter, config, route, report);
            traffic::check(filter, config, route, all, report);
            repeats::check(route, report);
            security::check(filter, config, route, all, report);
            rewrites::check(filter, config, route, all, report);
            others::check_route(route, all, report);
        }
        for proxy in gateways(route, all).filter_map(|gateway| proxy(gateway, all)) {
            check_proxy(filter, config, proxy, report);
            readiness::check(filter, proxy, all, report);
        }
    }
    let mut routes = all.of_kind("HTTPRoute").filter(|route| filter.policy.targets(route));
    if config.upgrades && !routes.any(is_for_upgrades) {
        let what = "is true, and no HTTPRoute of the policy has only matches with the header upgrade: routes whose bodies are \
                    buffered let no upgrade through";
        report.fault(filter.says("config.upgrades", what));
    }
    others::check_generated(filter, config, all, report);
}

/// Checks a cluster that is named as Envoy Gateway names that of a rule of a route: `httproute/NAMESPACE/NAME/rule/N`.
/// Other names are not checked.
fn check_cluster(filter: &Filter<'_>, key: &str, cluster: &str, all: &Manifests, report: &mut Report) {
    let parts: Vec<_> = cluster.split('/').collect();
    let ["httproute", namespace, name, "rule", rule] = parts.as_slice() else { return };
    let says = |what: String| filter.says(&format!("config.{key}"), format!("{cluster:?}: {what}"));
    let Some(route) = all.find("HTTPRoute", namespace, name) else {
        return report.fault(says(format!("there is no HTTPRoute {namespace}/{name}")));
    };
    let rules = items(&route.value, "/spec/rules");
    let Some(rule) = rule.parse().ok().and_then(|index: usize| rules.get(index)) else {
        return report.fault(says(format!("{} has {} rules, counted from 0", route.title(), rules.len())));
    };
    let backends = items(rule, "/backendRefs");
    if backends.is_empty() {
        report.fault(says(format!("that rule of {} has no backendRefs", route.title())));
    }
    if all.of_kind("Service").next().is_none() {
        return;
    }
    let mut services = Vec::new();
    for backend in backends.iter().filter(|backend| matches!(text(backend, "/kind"), "" | "Service")) {
        let (service, port) = (text(backend, "/name"), backend.get("port"));
        let namespace = Some(text(backend, "/namespace")).filter(|text| !text.is_empty()).unwrap_or(&route.namespace);
        let Some(found) = all.find("Service", namespace, service) else {
            report.fault(says(format!("{}: there is no Service {namespace}/{service}", route.title())));
            continue;
        };
        if !items(&found.value, "/spec/ports").iter().any(|known| known.get("port") == port) {
            let port = port.map_or("no port".to_owned(), Value::to_string);
            report.fault(says(format!("{}: {} has no port {port}", route.title(), found.title())));
        }
        services.push((found, port));
    }
    if key == "cluster" {
        ports::check(&services, all, report);
        engines::check(&services, all, report);
    }
}

/// Checks that the module gets the token, if pd-control requires one.
fn check_token(filter: &Filter<'_>, variable: &str, all: &Manifests, report: &mut Report) {
    if !has_token(all) {
        return;
    }
    let is_passed_on = items(filter.entry, "/env/hostKeys").iter().any(|key| key == variable);
    if !is_passed_on {
        let what = format!("must have {variable}: pd-control asks for a token, and config.control.token_env names it");
        report.fault(filter.says("env.hostKeys", what));
    }
}

/// Checks that the module gets the variables that headers of legs come from. It refuses a configuration without them.
fn check_leg_variables(filter: &Filter<'_>, config: &Config, report: &mut Report) {
    for (i, header) in config.legs.headers.iter().enumerate() {
        let Some(variable) = header.value.variable() else { continue };
        if !items(filter.entry, "/env/hostKeys").iter().any(|key| key == variable) {
            let what = format!("must have {variable}: config.legs.headers[{i}].env names it");
            report.fault(filter.says("env.hostKeys", what));
        }
    }
}

fn check_destination_is_set(filter: &Filter<'_>, config: &Config, route: &Object, report: &mut Report) {
    let rules = items(&route.value, "/spec/rules").iter().enumerate();
    for (i, rule) in rules.filter(|(_, rule)| serves_engines(rule)) {
        let sets = items(rule, "/filters").iter().flat_map(|it| items(it, "/requestHeaderModifier/set"));
        let is_header = |set: &&Value| text(set, "/name").eq_ignore_ascii_case(&config.destination_header);
        let found = sets.into_iter().find(is_header).map(|set| text(set, "/value"));
        if found != Some(DESTINATION) {
            let what = format!(
                "must set {} to {DESTINATION}: config.destination_header of {} names it",
                config.destination_header,
                filter.policy.title()
            );
            report.fault(route.says(&format!("spec.rules[{i}].filters"), what));
        }
    }
}

fn check_proxy(filter: &Filter<'_>, config: &Config, proxy: &Object, report: &mut Report) {
    order::check(proxy, report);
    let deployment = "/spec/provider/kubernetes/envoyDeployment";
    let Some(envoys) = proxy.value.pointer(deployment) else { return };
    let annotation = text(envoys, &format!("/pod/annotations/{IMAGE_ANNOTATION}"));
    if annotation != filter.image() && digest(filter.image()).is_some() {
        let what = format!(
            "must be the image of {}, {}: Envoy goes on with the code it has, so a new image needs new pods",
            filter.policy.title(),
            filter.image()
        );
        let key = format!("spec.provider.kubernetes.envoyDeployment.pod.annotations.{IMAGE_ANNOTATION}");
        report.fault(proxy.says(&key, what));
    }
    let of_legs = config.legs.headers.iter().filter_map(|header| header.value.variable());
    for variable in config.control.iter().map(|control| control.token_env.as_str()).chain(of_legs) {
        let is_passed_on = items(filter.entry, "/env/hostKeys").iter().any(|key| key == variable);
        let is_there = items(envoys, "/container/env").iter().any(|env| text(env, "/name") == variable);
        if is_passed_on && !is_there {
            let what = format!("must have {variable}: {} passes it on to the filter", filter.policy.title());
            report.fault(proxy.says("spec.provider.kubernetes.envoyDeployment.container.env", what));
        }
    }
}
