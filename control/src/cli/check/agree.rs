//! Checks names that the filter's configuration and Envoy Gateway's objects must share.

use pd_core::config::Config;
use serde_json::Value;

use super::attached::{gateways, policies, proxy, serves_engines};
use super::containers::has_token;
use super::filters::Filter;
use super::images::digest;
use super::report::Report;
use super::{order, others, ports, readiness, rewrites};
use crate::cli::manifests::{Manifests, Object, items, text};

/// Value of the destination header that the route sets.
const DESTINATION: &str = "%FILTER_STATE(wasm.pd.destination:PLAIN)%";
/// Milliseconds after which uvicorn, which most engines run in, closes an idle connection.
const ENGINE_IDLE_MS: u64 = 5_000;
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
    for route in all.of_kind("HTTPRoute").filter(|route| filter.policy.targets(route)) {
        if items(&route.value, "/spec/rules").iter().any(serves_engines) {
            check_destination_is_set(filter, config, route, report);
            check_traffic(filter, config, route, all, report);
            rewrites::check(filter, route, all, report);
            others::check_route(route, all, report);
        }
        for proxy in gateways(route, all).filter_map(|gateway| proxy(gateway, all)) {
            check_proxy(filter, config, proxy, report);
            readiness::check(filter, proxy, all, report);
        }
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
    let Some(rule) = rule.parse().ok().and_then(|at: usize| rules.get(at)) else {
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

/// Checks the traffic policies that are in force for the route.
fn check_traffic(filter: &Filter<'_>, config: &Config, route: &Object, all: &Manifests, report: &mut Report) {
    let policies = policies("BackendTrafficPolicy", route, all);
    if policies.is_empty() {
        let what = format!(
            "no BackendTrafficPolicy is for it, so nothing reads {} and holds the body",
            config.destination_header
        );
        report.fault(route.says("spec", what));
    }
    for policy in policies {
        let key = "spec.loadBalancer.endpointOverride.extractFrom";
        let sources = items(&policy.value, "/spec/loadBalancer/endpointOverride/extractFrom");
        let is_header = |source: &Value| text(source, "/header").eq_ignore_ascii_case(&config.destination_header);
        if !sources.iter().any(is_header) {
            let what = format!(
                "must have header {}: config.destination_header of {} names it",
                config.destination_header,
                filter.policy.title()
            );
            report.fault(policy.says(key, what));
        }
        check_idle_time(policy, report);
        let limit = policy.value.pointer("/spec/requestBuffer/limit");
        match limit.and_then(quantity) {
            Some(bytes) if bytes >= config.max_body_bytes as f64 => {}
            Some(_) => {
                let what = format!(
                    "is below config.max_body_bytes of {}, {}: Envoy ends when the filter edits a larger body",
                    filter.policy.title(),
                    config.max_body_bytes
                );
                report.fault(policy.says("spec.requestBuffer.limit", what));
            }
            None => {
                let what = "must be there: without the buffer filter headers leave before the filter has chosen";
                report.fault(policy.says("spec.requestBuffer.limit", what));
            }
        }
    }
}

/// Envoy must close an idle connection before the engine does.
fn check_idle_time(policy: &Object, report: &mut Report) {
    let idle = policy.value.pointer("/spec/timeout/http/connectionIdleTimeout").and_then(Value::as_str);
    let what = match idle.map(|text| (text, milliseconds(text))) {
        Some((_, Some(1..ENGINE_IDLE_MS))) => return,
        Some((text, _)) => format!("is {text}, and an engine closes a connection that was idle for 5 s (uvicorn)"),
        None => "is not there, and an engine closes a connection that was idle for 5 s (uvicorn)".to_owned(),
    };
    let what = format!("{what}: a request that meets that is lost, so let Envoy close it before: 3s");
    report.warn(policy.says("spec.timeout.http.connectionIdleTimeout", what));
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
    for variable in config.control.iter().map(|control| &control.token_env) {
        let is_passed_on = items(filter.entry, "/env/hostKeys").iter().any(|key| key == variable);
        let is_there = items(envoys, "/container/env").iter().any(|env| text(env, "/name") == variable);
        if is_passed_on && !is_there {
            let what = format!("must have {variable}: {} passes it on to the filter", filter.policy.title());
            report.fault(proxy.says("spec.provider.kubernetes.envoyDeployment.container.env", what));
        }
    }
}

/// Milliseconds of a duration of the Gateway API: `1h2m3s4ms`.
fn milliseconds(text: &str) -> Option<u64> {
    let (mut rest, mut sum) = (text, 0_u64);
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest.get(..end)?.parse().ok()?;
        let (unit, factor) = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)]
            .into_iter()
            .find(|(unit, _)| rest[end..].starts_with(unit))?;
        sum = sum.checked_add(number.checked_mul(factor)?)?;
        rest = &rest[end + unit.len()..];
    }
    Some(sum)
}

/// The bytes of a Kubernetes quantity; `None` when it is none.
fn quantity(value: &Value) -> Option<f64> {
    if let Some(number) = value.as_f64() {
        return Some(number);
    }
    let text = value.as_str()?;
    let end = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(end)?;
    let factor = match unit {
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "Ki" => 1024.0,
        "Mi" => 1024.0 * 1024.0,
        "Gi" => 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_milliseconds() {
        for (text, ms) in [
            ("3s", Some(3_000)),
            ("500ms", Some(500)),
            ("1h2m3s4ms", Some(3_723_004)),
            ("0s", Some(0)),
            ("3", None),
            ("s", None),
            ("3d", None),
            ("-1s", None),
        ] {
            assert_eq!(milliseconds(text), ms, "{text}");
        }
    }

    #[test]
    fn quantities_are_bytes() {
        for (text, bytes) in
            [("16Mi", Some(16_777_216.0)), ("16M", Some(16e6)), ("5", Some(5.0)), ("5x", None), ("", None)]
        {
            assert_eq!(quantity(&text.into()), bytes, "{text}");
        }
        assert_eq!(quantity(&7.into()), Some(7.0));
    }
}
