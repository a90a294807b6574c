//! Changes that a route makes to a request behind the filter. Prefill legs pass no route, so they lack these changes.

use pd_core::config::Config;
use pd_core::config::legs::{LegValue, Legs};
use serde_json::Value;

use super::attached::{gateways, proxy, serves_engines};
use super::filters::Filter;
use super::order;
use super::report::Report;
use crate::cli::manifests::{Manifests, Object, items, text};

/// Begin of the values that the route takes from the filter itself.
const OURS: &str = "%FILTER_STATE(wasm.pd.";
/// The key with the prefixes that stand before the paths of inference APIs.
const PREFIXES: &str = "path_prefixes";

/// A part of a route that changes requests, and the configuration of prefill legs.
struct Place<'a> {
    filter: &'a Filter<'a>,
    legs: &'a Legs,
    object: &'a Object,
    key: String,
}

impl Place<'_> {
    fn says(&self, what: impl std::fmt::Display) -> String {
        self.object.says(&self.key, what)
    }

    /// A change that prefill legs do not have, and the key that gives it to them.
    fn lacks(&self, what: &str, verb: &str, key: &str) -> String {
        let policy = self.filter.policy.title();
        self.says(format!(
            "{what}, which prefill legs {verb}: they pass no route. Name it in config.legs.{key} of {policy}"
        ))
    }

    /// Whether prefill legs have a header of that name from the configuration, or are freed of it.
    fn has(&self, name: &str, is_removed: bool) -> bool {
        self.legs
            .headers
            .iter()
            .any(|header| header.name.eq_ignore_ascii_case(name) && (header.value == LegValue::Removed) == is_removed)
    }
}

/// Checks the filters of a route's rules and of their backends.
pub(super) fn check(filter: &Filter<'_>, config: &Config, route: &Object, all: &Manifests, report: &mut Report) {
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
            let place = Place { filter, legs: &config.legs, object: route, key };
            check_headers(value, &place, report);
            for change in paths(rule, value, route, all) {
                check_path(change, &place, report);
            }
            if let Some(object) = extension(value, route, all) {
                check_extension(&Place { object, key: "spec".to_owned(), ..place }, has_credential, report);
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

fn check_path(change: Change<'_>, place: &Place<'_>, report: &mut Report) {
    let Change::Prefix(from, to) = change else {
        return report.fault(place.says(format!(
            "changes the path after the filter has read it, and the filter knows only prefixes of its path_prefixes (ReplacePrefixMatch, \
             config.{PREFIXES} and config.legs.path_prefix)"
        )));
    };
    let policy = place.filter.policy.title();
    let (taken_off, put_on) = replaced(from, to);
    let prefixes = items(place.filter.raw_config(), &format!("/{PREFIXES}"));
    if !taken_off.is_empty() && !prefixes.iter().any(|it| text(it, "").trim_end_matches('/') == taken_off) {
        report.fault(place.says(format!(
            "takes {taken_off} off the path after the filter has read it: config.{PREFIXES} of {policy} must have \
             {taken_off:?}, or the filter knows none of these paths"
        )));
    }
    if put_on != place.legs.path_prefix {
        report.fault(place.says(format!(
            "puts {put_on:?} before the path of engines: config.legs.path_prefix of {policy} must be {put_on:?}, or prefill \
             legs go to other paths"
        )));
    }
}

/// The prefix that the route removes from a path, and the prefix that it puts before the rest, when `from` becomes `to`.
fn replaced<'a>(from: &'a str, to: &'a str) -> (&'a str, &'a str) {
    let (from, to) = (from.trim_end_matches('/'), to.trim_end_matches('/'));
    match (from.strip_suffix(to), to.strip_suffix(from)) {
        (Some(taken_off), _) => (taken_off, ""),
        (None, Some(put_on)) => ("", put_on),
        (None, None) => (from, to),
    }
}

/// Headers that the route adds or takes away: the prefill leg is sent as the client's request was before.
fn check_headers(filter: &Value, place: &Place<'_>, report: &mut Report) {
    let modifier = "/requestHeaderModifier";
    for verb in ["set", "add"] {
        let headers = items(filter, &format!("{modifier}/{verb}")).iter();
        for header in headers.filter(|header| !text(header, "/value").starts_with(OURS)) {
            let name = text(header, "/name");
            if !place.has(name, false) {
                report.warn(place.lacks(&format!("{verb}s header {name}"), "lack", "headers"));
            }
        }
    }
    for name in items(filter, &format!("{modifier}/remove")).iter().filter_map(Value::as_str) {
        if !place.has(name, true) {
            report.warn(place.lacks(&format!("removes header {name}"), "keep", "headers"));
        }
    }
    let host = text(filter, "/urlRewrite/hostname");
    if !host.is_empty() && place.legs.authority.as_deref() != Some(host) {
        report.warn(place.lacks(&format!("makes {host} the host"), "lack", "authority"));
    }
}

/// What an `HTTPRouteFilter` changes beside paths.
fn check_extension(place: &Place<'_>, has_credential: bool, report: &mut Report) {
    let of = |key: &str| place.object.value.pointer(&format!("/spec/{key}"));
    if let Some(injection) = of("credentialInjection") {
        let header = Some(text(injection, "/header")).filter(|name| !name.is_empty()).unwrap_or("Authorization");
        if !has_credential && !place.has(header, false) {
            let what = format!("adds a credential in header {header}");
            report.warn(Place { key: "spec.credentialInjection".to_owned(), ..*place }.lacks(&what, "lack", "headers"));
        }
    }
    if of("urlRewrite/hostname").is_some() && place.legs.authority.is_none() {
        let place = Place { key: "spec.urlRewrite.hostname".to_owned(), ..*place };
        report.warn(place.lacks("changes the host", "lack", "authority"));
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
        let filter = filters(&all).next().unwrap();
        let config = filter.config(&mut report).unwrap();
        check(&filter, &config, all.of_kind("HTTPRoute").next().unwrap(), &all, &mut report);
        report
    }

    fn rule(prefix: &str, to: &str) -> String {
        let path = format!("path: {{type: ReplacePrefixMatch, replacePrefixMatch: {to}}}");
        format!("matches: [{{path: {{type: PathPrefix, value: {prefix}}}}}], filters: [{{urlRewrite: {{{path}}}}}]")
    }

    #[test]
    fn a_prefix_that_the_route_takes_off_must_be_in_path_prefixes() {
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
            let config = format!("path_prefixes: [/other, '{prefix}']");
            assert_eq!(checked(&config, &rule(from, to), ""), Report::default());
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
        for (rule, more) in [(full, ""), (&exact, ""), (regex, object)] {
            let found = checked("path_prefixes: [/v1]", rule, more).faults;
            assert!(
                found.len() == 1 && found[0].contains("changes the path after the filter has read it"),
                "{found:?}"
            );
        }
    }

    #[test]
    fn headers_that_prefill_legs_lack_are_warned_of() {
        let rule = "filters: [{requestHeaderModifier: {\
                    set: [{name: x-pd-destination, value: '%FILTER_STATE(wasm.pd.destination:PLAIN)%'}, {name: a, value: b}], \
                    add: [{name: c, value: d}], remove: [e]}}, {extensionRef: {kind: HTTPRouteFilter, name: f}}], \
                    backendRefs: [{name: engines, filters: [{urlRewrite: {hostname: h.example}}]}]";
        let object =
            "---\nkind: HTTPRouteFilter\nmetadata: {name: f, namespace: ns}\nspec: {credentialInjection: {}}\n";
        let found = checked("", rule, object);
        assert_eq!(found.faults, Vec::<String>::new());
        let rest = |verb: &str, key: &str| {
            format!(
                "which prefill legs {verb}: they pass no route. Name it in config.legs.{key} of EnvoyExtensionPolicy ns/pd"
            )
        };
        let (lack, keep) = (rest("lack", "headers"), rest("keep", "headers"));
        let expected = [
            format!("spec.rules[0].filters[0]: sets header a, {lack}"),
            format!("spec.rules[0].filters[0]: adds header c, {lack}"),
            format!("spec.rules[0].filters[0]: removes header e, {keep}"),
            format!("spec.credentialInjection: adds a credential in header Authorization, {lack}"),
            format!("spec.rules[0].backendRefs[0].filters[0]: makes h.example the host, {}", rest("lack", "authority")),
        ];
        let found: Vec<_> = found
            .warnings
            .iter()
            .map(|line| line.split(": ").nth(2).unwrap().to_owned() + ": " + line.splitn(4, ": ").nth(3).unwrap())
            .collect();
        assert_eq!(found, expected);
        let config = "legs: {authority: h.example, headers: [{name: a, value: b}, {name: c, from: d}, {name: e, remove: true}, \
                      {name: authorization, env: KEY, prefix: 'Bearer '}]}";
        assert_eq!(checked(config, rule, object), Report::default());
    }

    #[test]
    fn a_prefix_that_the_route_puts_on_must_be_in_path_prefixes() {
        let puts = |prefix: &str| {
            format!(
                "m.yaml:5: HTTPRoute ns/r: spec.rules[0].filters[0]: puts {prefix:?} before the path of engines: \
                 config.legs.path_prefix of EnvoyExtensionPolicy ns/pd must be {prefix:?}, or prefill legs go to other paths"
            )
        };
        assert_eq!(checked("", &rule("/", "/llm"), "").faults, [puts("/llm")]);
        assert_eq!(checked("", &rule("/v1", "/llm/v1"), "").faults, [puts("/llm")]);
        assert_eq!(checked("path_prefixes: [/team]", &rule("/team", "/llm"), "").faults, [puts("/llm")]);
        let config = "path_prefixes: [/team], legs: {path_prefix: /llm}";
        assert_eq!(checked(config, &rule("/team", "/llm"), ""), Report::default());
        assert_eq!(checked("legs: {path_prefix: /llm}", &rule("/v1", "/v1"), "").faults, [puts("")]);
    }
}
