//! The order of Envoy's filters, as Envoy Gateway makes it of an `EnvoyProxy`.

use serde_json::Value;

use super::report::Report;
use crate::cli::manifests::{Object, items, text};

/// Envoy's buffer filter, which holds the headers until this project's filter has chosen, and the filter itself.
const BUFFER: &str = "buffer";
const WASM: &str = "wasm";
/// Envoy's filter that finds the place of a client, and the filter that may need the place.
const GEOIP: &str = "geoip";
const RBAC: &str = "rbac";
const PREFIX: &str = "envoy.filters.http.";

/// Envoy Gateway's own order, without the filters that do not matter here: `newOrderedHTTPFilter` in
/// `internal/xds/translator/httpfilters.go` of Envoy Gateway 1.9.
const DEFAULT: &[&str] = &[
    "custom_response",
    "health_check",
    "fault",
    "cors",
    "csrf",
    "header_mutation",
    "ext_authz",
    "api_key_auth",
    "basic_auth",
    "oauth2",
    "jwt_authn",
    "stateful_session",
    BUFFER,
    "lua",
    "ext_proc",
    WASM,
    "dynamic_modules",
    GEOIP,
    RBAC,
    "local_ratelimit",
    "ratelimit",
    "bandwidth_limit",
    "grpc_web",
    "grpc_stats",
    INJECTOR,
    COMPRESSOR,
    "dynamic_forward_proxy",
];

/// The filter that adds a credential to a request, and the one that compresses an answer.
const INJECTOR: &str = "credential_injector";
const COMPRESSOR: &str = "compressor";

/// Filters that answer a request themselves. `lua`, `ext_proc` and `dynamic_modules` may.
const REFUSING: &[&str] = &[
    "fault",
    "cors",
    "csrf",
    "ext_authz",
    "api_key_auth",
    "basic_auth",
    "oauth2",
    "jwt_authn",
    "lua",
    "ext_proc",
    "dynamic_modules",
    RBAC,
    "local_ratelimit",
    "ratelimit",
];

/// Checks that filters that may refuse a request stand before this project's filter, because it would have the prompt
/// computed first, and that the buffer stands after it.
pub(super) fn check(proxy: &Object, report: &mut Report) {
    let order = effective(items(&proxy.value, "/spec/filterOrder"));
    let place = |name: &str| order.iter().position(|known| *known == name);
    let mut fault = |what: String| report.fault(proxy.says("spec.filterOrder", what));
    if place(BUFFER) < place(WASM) {
        fault(format!(
            "must have {{name: {PREFIX}{BUFFER}, after: {PREFIX}{WASM}}}: the buffer holds what the filter has changed"
        ));
    }
    for name in REFUSING.iter().filter(|name| place(name) > place(WASM)) {
        fault(format!(
            "must have {{name: {PREFIX}{name}, before: {PREFIX}{WASM}}}: the prompt of a request that it refuses is \
             computed before"
        ));
    }
    if place(COMPRESSOR) > place(WASM) {
        fault(format!(
            "must have {{name: {PREFIX}{COMPRESSOR}, before: {PREFIX}{WASM}}}: answers pass the filters backwards, and the \
             filter reads no compressed ones"
        ));
    }
    if place(GEOIP) > place(RBAC) {
        fault(format!("must have {{name: {PREFIX}{GEOIP}, before: {PREFIX}{RBAC}}}, which asks where a client is"));
    }
}

/// Whether the filter gets requests with the credential that an `HTTPRouteFilter` adds.
pub(super) fn has_credential(proxy: &Object) -> bool {
    let order = effective(items(&proxy.value, "/spec/filterOrder"));
    let place = |name: &str| order.iter().position(|known| *known == name);
    place(INJECTOR) < place(WASM)
}

/// Applies `filterOrder` as `sortHTTPFilters` of Envoy Gateway does: one entry after the other.
fn effective(entries: &[Value]) -> Vec<&'static str> {
    let mut order = DEFAULT.to_vec();
    for entry in entries {
        let place = |order: &[&str], key: &str| {
            let name = text(entry, key).strip_prefix(PREFIX)?;
            order.iter().position(|known| *known == name)
        };
        let Some(from) = place(&order, "/name") else { continue };
        let name = order.remove(from);
        let to = place(&order, "/before").or_else(|| place(&order, "/after").map(|index| index + 1)).unwrap_or(from);
        order.insert(to, name);
    }
    order
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::cli::manifests::Manifests;

    fn faults(order: &str) -> Vec<String> {
        let mut manifests = Manifests::default();
        let proxy = format!("kind: EnvoyProxy\nmetadata: {{name: pd}}\nspec: {{filterOrder: [{order}]}}\n");
        manifests.read(Path::new("m.yaml"), proxy.as_bytes()).unwrap();
        let mut report = Report::default();
        check(manifests.of_kind("EnvoyProxy").next().unwrap(), &mut report);
        let filter = |line: &String| {
            let (_, rest) = line.split_once("must have {name: envoy.filters.http.").unwrap();
            rest.split('}').next().unwrap().replace("envoy.filters.http.", "")
        };
        report.faults.iter().map(filter).collect()
    }

    fn entry(name: &str, relation: &str, other: &str) -> String {
        format!("{{name: {PREFIX}{name}, {relation}: {PREFIX}{other}}},")
    }

    #[test]
    fn envoy_gateways_own_order_computes_what_is_refused() {
        let expected = [
            "buffer, after: wasm",
            "dynamic_modules, before: wasm",
            "rbac, before: wasm",
            "local_ratelimit, before: wasm",
            "ratelimit, before: wasm",
            "compressor, before: wasm",
        ];
        assert_eq!(faults(""), expected);
    }

    #[test]
    fn entries_are_applied_one_after_the_other() {
        let before = |name| entry(name, "before", "wasm");
        let all =
            ["dynamic_modules", "geoip", "rbac", "local_ratelimit", "ratelimit", "compressor"].map(before).concat();
        let buffer = entry("buffer", "after", "wasm");
        assert_eq!(faults(&format!("{all}{buffer}")), Vec::<String>::new());
        assert_eq!(faults(&format!("{all}{buffer}{}", entry("rbac", "after", "router"))), Vec::<String>::new());
        assert_eq!(faults(&format!("{all}{buffer}{}", entry("rbac", "after", "grpc_web"))), ["rbac, before: wasm"]);
        // The buffer goes where the filter went, wherever that is then.
        let late = entry("wasm", "after", "compressor");
        assert_eq!(faults(&format!("{late}{buffer}")), Vec::<String>::new());
        assert_eq!(faults(&format!("{buffer}{late}")), ["buffer, after: wasm"]);
        assert_eq!(faults(&format!("{buffer}{late}{}", entry("jwt_authn", "after", "wasm"))).len(), 2);
    }

    #[test]
    fn authorization_by_place_needs_the_place_first() {
        let wrong = ["rbac", "dynamic_modules", "local_ratelimit", "ratelimit", "compressor"]
            .map(|it| entry(it, "before", "wasm"));
        let buffer = entry("buffer", "after", "wasm");
        assert_eq!(faults(&format!("{}{buffer}", wrong.concat())), ["geoip, before: rbac"]);
    }
}
