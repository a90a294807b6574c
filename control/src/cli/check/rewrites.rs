//! What a route changes of a request after the filter has seen it, and of which prefill legs, which pass no route, have nothing.

use serde_json::Value;

use super::attached::{gateways, proxy, serves_engines};
use super::filters::Filter;
use super::order;
use super::report::Report;
use crate::cli::manifests::{Manifests, Object, items, text};

/// Begin of the values that the route takes from the filter itself.
const OURS: &str = "%FILTER_STATE(wasm.pd.";
/// The key that tells the filter what stands before the paths that it knows.
const PREFIXES: &str = "path_prefixes";

/// Checks the filters of a route's rules and of their backends.
pub(super) fn check(filter: &Filter<'_>, route: &Object, all: &Manifests, report: &mut Report) {
    let rules = items(&route.value, "/spec/rules").iter().enumerate();
    let mut proxies = gateways(route, all).filter_map(|gateway| proxy(gateway, all)).peekable();
    let has_credential = proxies.peek().is_some() && proxies.all(order::has_credential);
    for (i, rule) in rules.filter(|(_, rule)| serves_engines(rule)) {
        let of_rule = items(rule, "/filters").iter().enumerate();
        let of_rule = of_rule.map(|(j, it)| (format!("spec.rules[{i}].filters[{j}]"), it));
        let backends = items(rule, "/backendRefs").iter().enumerate();
        let of_backends = backends.flat_map(|(b, backend)| {
            let filters = items(backend, "/filters").iter().enumerate();
            filters.map(move |(j, it)| (format!("spec.rules[{i}].backendRefs[{b}].filters[{j}]"), it))
        });
        for (key, value) in of_rule.chain(of_backends) {
            check_headers(value, &|what| route.says(&key, what), report);
            for change in paths(rule, value, route, all) {
                check_path(filter, change, &|what| route.says(&key, what), report);
            }
            if let Some(object) = extension(value, route, all) {
                check_extension(object, has_credential, report);
            }
        }
    }
}

/// How a rule changes paths.
#[derive(Debug, PartialEq)]
enum Change<'a> {
    /// One prefix becomes another.
    Prefix(&'a str, &'a str),
    /// In another way.
    Other,
}

fn paths<'a>(rule: &'a Value, filter: &'a Value, route: &'a Object, all: &'a Manifests) -> Vec<Change<'a>> {
    let rewrite = "/urlRewrite/path";
    let of_extension = extension(filter, route, all).and_then(|object| object.value.pointer("/spec/urlRewrite/path"));
    let path = filter.pointer(rewrite).or(of_extension);
    let Some(path) = path else { return Vec::new() };
    if text(path, "/type") != "ReplacePrefixMatch" {
        return vec![Change::Other];
    }
    let replacement = text(path, "/replacePrefixMatch");
    let matches = items(rule, "/matches");
    if matches.is_empty() {
        return vec![Change::Prefix("/", replacement)];
    }
    let change = |of_match| match text(of_match, "/path/type") {
        "" | "PathPrefix" => Change::Prefix(text(of_match, "/path/value"), replacement),
        _ => Change::Other,
    };
    matches.iter().map(change).collect()
}

/// The `HTTPRouteFilter` that a filter of a rule names.
fn extension<'a>(filter: &Value, route: &Object, all: &'a Manifests) -> Option<&'a Object> {
    let kind = "HTTPRouteFilter";
    let is_one = text(filter, "/extensionRef/kind") == kind;
    is_one.then(|| all.find(kind, &route.namespace, text(filter, "/extensionRef/name"))).flatten()
}

fn check_path(filter: &Filter<'_>, change: Change<'_>, says: &dyn Fn(String) -> String, report: &mut Report) {
    let stripped = match change {
        Change::Prefix(from, to) => stripped(from, to),
        Change::Other => None,
    };
    match stripped {
        Some("") => {}
        Some(prefix) => {
            let told = items(filter.raw_config(), &format!("/{PREFIXES}"));
            if !told.iter().any(|it| text(it, "").trim_end_matches('/') == prefix) {
                let what = format!(
                    "takes {prefix} off the path after the filter has read it: config.{PREFIXES} of {} must have \
                     {prefix:?}, or the filter knows none of these paths",
                    filter.policy.title()
                );
                report.fault(says(what));
            }
        }
        None => report.fault(says(format!(
            "changes the path after the filter has read it, and the filter can be told only of a prefix that is taken \
             off (ReplacePrefixMatch, config.{PREFIXES})"
        ))),
    }
}

/// What is taken off a path when one prefix becomes another; `None` where the new one is no end of the old one.
fn stripped<'a>(from: &'a str, to: &str) -> Option<&'a str> {
    let (from, to) = (from.trim_end_matches('/'), to.trim_end_matches('/'));
    from.strip_suffix(to)
}

/// Headers that the route adds or takes away: the prefill leg is sent as the client's request was before.
fn check_headers(filter: &Value, says: &dyn Fn(String) -> String, report: &mut Report) {
    let at = "/requestHeaderModifier";
    for verb in ["set", "add"] {
        let headers = items(filter, &format!("{at}/{verb}")).iter();
        for header in headers.filter(|header| !text(header, "/value").starts_with(OURS)) {
            let name = text(header, "/name");
            report.warn(says(format!("{verb}s header {name}, which prefill legs lack: they pass no route")));
        }
    }
    for name in items(filter, &format!("{at}/remove")).iter().filter_map(Value::as_str) {
        report.warn(says(format!("removes header {name}, which prefill legs keep: they pass no route")));
    }
    let host = text(filter, "/urlRewrite/hostname");
    if !host.is_empty() {
        report.warn(says(format!("makes {host} the host, which prefill legs lack: they pass no route")));
    }
}

/// What an `HTTPRouteFilter` changes beside paths.
fn check_extension(object: &Object, has_credential: bool, report: &mut Report) {
    if object.value.pointer("/spec/credentialInjection").is_some() && !has_credential {
        let what = "adds a credential after the filter has read the headers, so prefill legs lack it: spec.filterOrder of the \
                    EnvoyProxy must have {name: envoy.filters.http.credential_injector, before: envoy.filters.http.wasm}";
        report.warn(object.says("spec.credentialInjection", what));
    }
    if object.value.pointer("/spec/urlRewrite/hostname").is_some() {
        let what = "changes the host, which prefill legs lack: they pass no route";
        report.warn(object.says("spec.urlRewrite.hostname", what));
    }
}

#[cfg(test)]
mod tests {
    use super::super::filters::filters;
    use super::*;
    use crate::cli::manifests::Manifests;

    fn checked(config: &str, rule: &str, more: &str) -> Report {
        let text = format!(
            "kind: EnvoyExtensionPolicy\nmetadata: {{name: pd, namespace: ns}}\n\
             spec: {{wasm: [{{name: pd, config: {{{config}}}}}]}}\n---\n\
             kind: HTTPRoute\nmetadata: {{name: r, namespace: ns}}\nspec: {{rules: [{{{rule}}}]}}\n{more}"
        );
        let mut all = Manifests::default();
        all.read("m.yaml".as_ref(), text.as_bytes()).unwrap();
        let mut report = Report::default();
        check(&filters(&all).next().unwrap(), all.of_kind("HTTPRoute").next().unwrap(), &all, &mut report);
        report
    }

    fn rule(prefix: &str, to: &str) -> String {
        let path = format!("path: {{type: ReplacePrefixMatch, replacePrefixMatch: {to}}}");
        format!("matches: [{{path: {{type: PathPrefix, value: {prefix}}}}}], filters: [{{urlRewrite: {{{path}}}}}]")
    }

    #[test]
    fn a_prefix_that_the_route_takes_off_is_told_to_the_filter() {
        for (from, to, prefix) in [
            ("/team/v1", "/v1", "/team"),
            ("/team", "/", "/team"),
            ("/a/b/", "/", "/a/b"),
            ("/openai/v1/", "/v1/", "/openai"),
        ] {
            let expected = format!(
                "m.yaml:5: HTTPRoute ns/r: spec.rules[0].filters[0]: takes {prefix} off the path after the filter has \
                 read it: config.path_prefixes of EnvoyExtensionPolicy ns/pd must have \"{prefix}\", or the filter knows \
                 none of these paths"
            );
            assert_eq!(checked("path_prefixes: [/other]", &rule(from, to), "").faults, [expected]);
            for told in [prefix.to_owned(), format!("{prefix}/")] {
                let config = format!("path_prefixes: [/other, '{told}']");
                assert_eq!(checked(&config, &rule(from, to), ""), Report::default());
            }
        }
        assert_eq!(checked("", &rule("/v1", "/v1"), ""), Report::default());
    }

    #[test]
    fn other_changes_of_paths_are_faults() {
        let full = "matches: [{path: {value: /v1}}], filters: [{urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: /v1}}}]";
        let exact = rule("/v1", "/v2").replace("PathPrefix", "Exact");
        let regex = "filters: [{extensionRef: {kind: HTTPRouteFilter, name: f}}]";
        let object = "---\nkind: HTTPRouteFilter\nmetadata: {name: f, namespace: ns}\n\
                      spec: {urlRewrite: {path: {type: ReplaceRegexMatch}}}\n";
        for (rule, more) in [(full, ""), (&exact, ""), (&rule("/v1", "/v2"), ""), (regex, object)] {
            let found = checked("path_prefixes: [/v1]", rule, more).faults;
            assert!(
                found.len() == 1 && found[0].contains("changes the path after the filter has read it"),
                "{found:?}"
            );
        }
    }

    #[test]
    fn headers_that_prefill_legs_lack_are_told() {
        let rule = "filters: [{requestHeaderModifier: {\
                    set: [{name: x-pd-destination, value: '%FILTER_STATE(wasm.pd.destination:PLAIN)%'}, {name: a, value: b}], \
                    add: [{name: c, value: d}], remove: [e]}}, {extensionRef: {kind: HTTPRouteFilter, name: f}}], \
                    backendRefs: [{name: engines, filters: [{urlRewrite: {hostname: h.example}}]}]";
        let object =
            "---\nkind: HTTPRouteFilter\nmetadata: {name: f, namespace: ns}\nspec: {credentialInjection: {}}\n";
        let found = checked("", rule, object);
        assert_eq!(found.faults, Vec::<String>::new());
        let expected = [
            "spec.rules[0].filters[0]: sets header a, which prefill legs lack: they pass no route",
            "spec.rules[0].filters[0]: adds header c, which prefill legs lack: they pass no route",
            "spec.rules[0].filters[0]: removes header e, which prefill legs keep: they pass no route",
            "spec.credentialInjection: adds a credential after the filter has read the headers, so prefill legs lack it: \
             spec.filterOrder of the EnvoyProxy must have {name: envoy.filters.http.credential_injector, before: \
             envoy.filters.http.wasm}",
            "spec.rules[0].backendRefs[0].filters[0]: makes h.example the host, which prefill legs lack: they pass no route",
        ];
        let found: Vec<_> = found
            .warnings
            .iter()
            .map(|line| line.split(": ").nth(2).unwrap().to_owned() + ": " + line.splitn(4, ": ").nth(3).unwrap())
            .collect();
        assert_eq!(found, expected);
    }
}
