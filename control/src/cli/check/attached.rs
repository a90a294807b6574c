//! What a route is attached to: its Gateways, their Envoys' settings, and the policies that are in force for it.

use serde_json::Value;

use crate::cli::manifests::{Manifests, Object, items, text};

/// The Gateways of a route that the files have.
pub(super) fn gateways<'a>(route: &'a Object, all: &'a Manifests) -> impl Iterator<Item = &'a Object> {
    items(&route.value, "/spec/parentRefs").iter().filter_map(|parent| {
        let namespace = Some(text(parent, "/namespace")).filter(|text| !text.is_empty()).unwrap_or(&route.namespace);
        all.find("Gateway", namespace, text(parent, "/name"))
    })
}

/// The settings of a Gateway's Envoys: its own, else its class's.
pub(super) fn proxy<'a>(gateway: &'a Object, all: &'a Manifests) -> Option<&'a Object> {
    let name = text(&gateway.value, "/spec/infrastructure/parametersRef/name");
    let own = all.find("EnvoyProxy", &gateway.namespace, name);
    own.or_else(|| {
        let class = all.find("GatewayClass", "", text(&gateway.value, "/spec/gatewayClassName"))?;
        let of = |key: &str| text(&class.value, &format!("/spec/parametersRef/{key}"));
        all.find("EnvoyProxy", of("namespace"), of("name"))
    })
}

/// The policies of a kind that are in force for a route: its own, else those of its Gateways; both where a policy of
/// the route has a `mergeType`.
pub(super) fn policies<'a>(kind: &'a str, route: &'a Object, all: &'a Manifests) -> Vec<&'a Object> {
    let own: Vec<_> = all.of_kind(kind).filter(|policy| policy.targets(route)).collect();
    if !own.is_empty() && own.iter().all(|policy| policy.value.pointer("/spec/mergeType").is_none()) {
        return own;
    }
    let of_gateways = gateways(route, all).flat_map(|gateway| all.of_kind(kind).filter(move |it| it.targets(gateway)));
    let of_gateways: Vec<_> = of_gateways.collect();
    [own, of_gateways].concat()
}

/// Whether a rule's matches have a path that is not the readiness path; a rule without matches has all paths.
pub(super) fn serves_engines(rule: &Value) -> bool {
    let matches = items(rule, "/matches");
    matches.is_empty() || matches.iter().any(|it| !is_exactly_ready(it))
}

/// Whether a route is for upgrades to other protocols alone: every match of its rules asks for the header `upgrade`.
pub(super) fn is_for_upgrades(route: &Object) -> bool {
    let is_upgrade = |of_match: &Value| {
        items(of_match, "/headers").iter().any(|header| text(header, "/name").eq_ignore_ascii_case("upgrade"))
    };
    let matches = |rule: &Value| {
        let matches = items(rule, "/matches");
        !matches.is_empty() && matches.iter().all(is_upgrade)
    };
    let rules = items(&route.value, "/spec/rules");
    !rules.is_empty() && rules.iter().all(matches)
}

fn is_exactly_ready(of_match: &Value) -> bool {
    text(of_match, "/path/type") == "Exact" && text(of_match, "/path/value").as_bytes() == pd_core::request::READY_PATH
}
