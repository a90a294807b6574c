//! Checks for settings that send a request with KV parameters to an endpoint that the filter did not choose.

use super::attached::serves_engines;
use super::report::Report;
use crate::cli::manifests::{Object, items, text};

/// Checks the rules of a route.
pub(super) fn check(route: &Object, report: &mut Report) {
    let rules = items(&route.value, "/spec/rules").iter().enumerate();
    for (i, rule) in rules.filter(|(_, rule)| serves_engines(rule)) {
        for (j, _) in items(rule, "/filters").iter().enumerate().filter(|(_, it)| text(it, "/type") == "RequestMirror")
        {
            let what = "the copy has the KV parameters of the request: an engine that gets it takes the KV cache away from \
                        the chosen one. Mirror in front of this Gateway";
            report.fault(route.says(&format!("spec.rules[{i}].filters[{j}]"), what));
        }
        if rule.get("sessionPersistence").is_some() {
            let what = "Envoy takes the endpoint of the session in place of the one that the filter has chosen: remove it, and \
                        name the header or cookie in config.session_headers or config.session_cookies";
            report.fault(route.says(&format!("spec.rules[{i}].sessionPersistence"), what));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::manifests::Manifests;

    fn faults(rules: &str) -> Vec<String> {
        let mut all = Manifests::default();
        let text = format!("kind: HTTPRoute\nmetadata: {{name: r, namespace: ns}}\nspec: {{rules: [{rules}]}}\n");
        all.read("m.yaml".as_ref(), text.as_bytes()).unwrap();
        let mut report = Report::default();
        check(all.of_kind("HTTPRoute").next().unwrap(), &mut report);
        report.faults
    }

    #[test]
    fn a_mirror_and_session_persistence_are_faults_where_engines_are_served() {
        let mirror = "filters: [{type: RequestHeaderModifier}, {type: RequestMirror}]";
        let found = faults(&format!("{{{mirror}, sessionPersistence: {{type: Cookie}}}}"));
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("HTTPRoute ns/r: spec.rules[0].filters[1]: the copy has the KV parameters"));
        assert!(found[1].contains("spec.rules[0].sessionPersistence: Envoy takes the endpoint of the session"));
        let ready = "matches: [{path: {type: Exact, value: /.pd-ready}}]";
        assert_eq!(
            faults(&format!("{{{ready}, {mirror}}}, {{filters: [{{type: URLRewrite}}]}}")),
            Vec::<String>::new()
        );
    }
}
