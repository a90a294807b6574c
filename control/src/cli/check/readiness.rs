//! Whether the readiness probe of Envoy's pods gets the filter's answer.

use pd_core::request::READY_PATH;
use serde_json::Value;

use super::attached::{gateways, policies, proxy};
use super::filters::Filter;
use super::report::Report;
use crate::cli::manifests::{Manifests, Object, items, text};

/// Keys of a `SecurityPolicy` that make requests need credentials. A probe has none.
const CREDENTIALS: &[&str] = &["apiKeyAuth", "basicAuth", "extAuth", "jwt", "oidc"];
/// Keys of a `BackendTrafficPolicy` that make Envoy refuse requests.
const LIMITS: &[&str] = &["faultInjection", "rateLimit"];
/// Envoy Gateway adds this to listeners' ports below 1,024 in the pod.
const PORT_SHIFT: u64 = 10_000;

/// A probe of the readiness path.
struct Probe<'a> {
    /// Its `httpGet`.
    get: &'a Value,
    /// The host name that it asks for; none: the pod's address.
    host: Option<&'a str>,
}

/// Checks the probes of a proxy that the filter's route runs in.
pub(super) fn check(filter: &Filter<'_>, proxy: &Object, all: &Manifests, report: &mut Report) {
    let mut probes = Vec::new();
    find(proxy.value.pointer("/spec/provider/kubernetes").unwrap_or(&Value::Null), &mut probes);
    let gateways: Vec<_> =
        all.of_kind("Gateway").filter(|it| self::proxy(it, all).is_some_and(|it| is(it, proxy))).collect();
    for probe in probes {
        for gateway in &gateways {
            check_listener(&probe, proxy, gateway, report);
            match answering(&probe, gateway, all) {
                Ok(route) => check_route(filter, route, all, report),
                Err(Some(named)) => {
                    let what = format!(
                        "keep {} from the readiness probe of {}, which asks {}: give the path a route of its own, without \
                         hostnames",
                        path(),
                        proxy.title(),
                        probe.asks()
                    );
                    report.fault(named.says("spec.hostnames", what));
                }
                Err(None) => {
                    let what = format!(
                        "the readiness probe asks {} for {}, and no HTTPRoute of {} has it: no Envoy becomes ready",
                        probe.asks(),
                        path(),
                        gateway.title()
                    );
                    report.fault(proxy.says("spec.provider.kubernetes.envoyDeployment", what));
                }
            }
        }
    }
}

fn path() -> &'static str {
    std::str::from_utf8(READY_PATH).unwrap_or_default()
}

fn is(one: &Object, other: &Object) -> bool {
    std::ptr::eq(one, other)
}

/// Every `readinessProbe` of the readiness path, wherever a patch has it.
fn find<'a>(value: &'a Value, probes: &mut Vec<Probe<'a>>) {
    match value {
        Value::Array(list) => list.iter().for_each(|item| find(item, probes)),
        Value::Object(members) => {
            for (key, member) in members {
                if key == "readinessProbe" && text(member, "/httpGet/path") == path() {
                    let is_host = |header: &&Value| text(header, "/name").eq_ignore_ascii_case("host");
                    let host = items(member, "/httpGet/httpHeaders").iter().find(is_host);
                    probes.push(Probe { get: &member["httpGet"], host: host.map(|header| text(header, "/value")) });
                }
                find(member, probes);
            }
        }
        _ => {}
    }
}

/// The port must be a listener's, and the listener must take the probe's host name.
fn check_listener(probe: &Probe<'_>, proxy: &Object, gateway: &Object, report: &mut Report) {
    let Some(port) = probe.get.get("port").and_then(Value::as_u64) else { return };
    let in_pod = |port: u64| if port < 1_024 { port + PORT_SHIFT } else { port };
    let mut fault = |what: String| {
        report.fault(proxy.says("spec.provider.kubernetes.envoyDeployment", format!("the readiness probe asks {what}")))
    };
    let listeners = items(&gateway.value, "/spec/listeners").iter();
    let at_port: Vec<_> = listeners.filter(|it| it["port"].as_u64().map(in_pod) == Some(port)).collect();
    if at_port.is_empty() {
        let listened: Vec<_> =
            items(&gateway.value, "/spec/listeners").iter().filter_map(|it| it["port"].as_u64()).collect();
        let listened: Vec<_> = listened.into_iter().map(|port| in_pod(port).to_string()).collect();
        return fault(format!(
            "port {port}, and the listeners of {} are at {} in the pod",
            gateway.title(),
            listened.join(", ")
        ));
    }
    let is_tls = text(probe.get, "/scheme").eq_ignore_ascii_case("https");
    let is_alike = |listener: &&Value| matches!(text(listener, "/protocol"), "HTTPS" | "TLS") == is_tls;
    if !at_port.iter().any(is_alike) {
        let scheme = if is_tls { "HTTPS" } else { "HTTP" };
        fault(format!("port {port} for {scheme}, which the listener of {} there does not speak", gateway.title()));
    }
    let takes =
        |listener: &&Value| text(listener, "/hostname").is_empty() || probe.is_host(text(listener, "/hostname"));
    if !at_port.iter().any(takes) {
        let what = format!("{}, and every listener of {} at port {port} has a hostname", probe.asks(), gateway.title());
        fault(what);
    }
}

/// The route that answers the probe. `Err`: a route that would answer if it had no hostnames, if there is one.
fn answering<'a>(probe: &Probe<'_>, gateway: &Object, all: &'a Manifests) -> Result<&'a Object, Option<&'a Object>> {
    let attached = all.of_kind("HTTPRoute").filter(|route| gateways(route, all).any(|it| is(it, gateway)));
    let mut found: Vec<_> = attached.filter_map(|route| Some((best(route)?, route))).collect();
    found.sort_by_key(|(best, _)| std::cmp::Reverse(*best));
    let takes = |route: &Object| {
        let hostnames = items(&route.value, "/spec/hostnames");
        hostnames.is_empty() || hostnames.iter().any(|name| probe.is_host(name.as_str().unwrap_or_default()))
    };
    let taking = found.iter().find(|(_, route)| takes(route));
    taking.map(|(_, route)| *route).ok_or_else(|| found.first().map(|(_, route)| *route))
}

/// How well the best of a route's matches fits a `GET` of the readiness path: an exact path before a prefix, and a long
/// prefix before a short one.
fn best(route: &Object) -> Option<(bool, usize)> {
    let rules = items(&route.value, "/spec/rules").iter();
    rules
        .filter_map(|rule| {
            let matches = items(rule, "/matches");
            let fits = matches.iter().filter_map(fit);
            if matches.is_empty() { Some((false, 0)) } else { fits.max() }
        })
        .max()
}

fn fit(of_match: &Value) -> Option<(bool, usize)> {
    let is_for_all = ["/headers", "/queryParams"].iter().all(|key| items(of_match, key).is_empty());
    if !is_for_all || !matches!(text(of_match, "/method"), "" | "GET") {
        return None;
    }
    let value = text(of_match, "/path/value");
    match text(of_match, "/path/type") {
        "Exact" => (value == path()).then_some((true, value.len())),
        "" | "PathPrefix" => {
            let prefix = value.trim_end_matches('/');
            let rest = path().strip_prefix(prefix)?;
            (rest.is_empty() || rest.starts_with('/')).then_some((false, prefix.len()))
        }
        _ => None,
    }
}

/// Checks that the filter is on the route, and that no policy of the route refuses the probe.
fn check_route(filter: &Filter<'_>, route: &Object, all: &Manifests, report: &mut Report) {
    let has_filter = policies("EnvoyExtensionPolicy", route, all).iter().any(|it| is(it, filter.policy));
    if !has_filter {
        let what = format!("must have {}: the filter's answer to {} makes Envoy's pods ready", route.title(), path());
        report.fault(filter.policy.says("spec.targetRefs", what));
    }
    let covers = |policy: &Object, key: &str| {
        let what = format!(
            "covers {} of {}, which the readiness probe of Envoy's pods asks for without credentials: give the path a \
             route of its own with policies of its own, as base/routes.yaml has it",
            path(),
            route.title()
        );
        policy.says(&format!("spec.{key}"), what)
    };
    for policy in policies("SecurityPolicy", route, all) {
        let spec = &policy.value["spec"];
        for key in CREDENTIALS.iter().filter(|key| spec.get(key).is_some_and(|it| it["optional"] != true)) {
            report.fault(covers(policy, key));
        }
        if spec.get("authorization").is_some_and(|it| text(it, "/defaultAction") != "Allow") {
            report.fault(covers(policy, "authorization"));
        }
    }
    for policy in policies("BackendTrafficPolicy", route, all) {
        for key in LIMITS.iter().filter(|key| policy.value["spec"].get(key).is_some()) {
            report.fault(covers(policy, key));
        }
    }
    for policy in policies("EnvoyExtensionPolicy", route, all) {
        let processors = items(&policy.value, "/spec/extProc");
        if processors.iter().any(|it| it["failOpen"] != true) {
            report.fault(covers(policy, "extProc"));
        }
    }
}

impl Probe<'_> {
    fn asks(&self) -> String {
        self.host.map_or_else(|| "without a host name".to_owned(), |host| format!("host {host}"))
    }

    /// Whether a hostname of a route or listener is for its host.
    fn is_host(&self, name: &str) -> bool {
        self.host.is_some_and(|host| {
            let host = host.split(':').next().unwrap_or_default();
            name.strip_prefix('*').map_or(host == name, |rest| host.ends_with(rest))
        })
    }
}
