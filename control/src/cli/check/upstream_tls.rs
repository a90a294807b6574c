//! Engines behind TLS or API keys: pd-control asks them for metrics and models itself, past Envoy.

use serde_json::Value;

use super::attached::serves_engines;
use super::containers::Container;
use super::report::Report;
use crate::cli::arguments::AsksEngines;
use crate::cli::manifests::{Manifests, Object, items, text};

/// Checks that pd-control uses TLS and a credential for engines if the gateway's objects do.
pub(super) fn check_asking(container: &Container<'_>, how: AsksEngines, all: &Manifests, report: &mut Report) {
    if let Some(policy) = all.of_kind("BackendTLSPolicy").find(|policy| is_for_engines(policy, all))
        && !how.tls
    {
        let what = format!(
            "{} says that engines serve TLS: pd-control needs --engine-tls, and --engine-ca-file and --engine-server-name \
             where the policy has them, or it takes them as silent",
            policy.title()
        );
        report.warn(container.says("args", what));
    }
    let injects = |filter: &&Object| filter.value.pointer("/spec/credentialInjection").is_some();
    if let Some(filter) = all.of_kind("HTTPRouteFilter").find(injects)
        && !how.token
    {
        let what = format!(
            "{} adds a credential for engines: pd-control needs it in --engine-token-file, or it learns no models",
            filter.title()
        );
        report.warn(container.says("args", what));
    }
}

/// Whether a policy is for a Service that a route of engines leads to.
fn is_for_engines(policy: &Object, all: &Manifests) -> bool {
    let names = |backend: &Value| {
        let targets = items(&policy.value, "/spec/targetRefs").iter();
        let mut services = targets.filter(|target| matches!(text(target, "/kind"), "Service" | "Backend"));
        services.any(|target| text(target, "/name") == text(backend, "/name"))
    };
    let routes = all.of_kind("HTTPRoute").filter(|route| route.namespace == policy.namespace);
    let mut rules = routes.flat_map(|route| items(&route.value, "/spec/rules")).filter(|rule| serves_engines(rule));
    rules.any(|rule| items(rule, "/backendRefs").iter().any(names))
}

#[cfg(test)]
mod tests {
    use super::super::containers::containers;
    use super::*;

    fn warnings(how: AsksEngines, more: &str) -> Vec<String> {
        let text = format!(
            "kind: Deployment\nmetadata: {{name: c, namespace: ns}}\n\
             spec: {{template: {{spec: {{containers: [{{name: pd-control}}]}}}}}}\n---\n\
             kind: HTTPRoute\nmetadata: {{name: r, namespace: ns}}\n\
             spec: {{rules: [{{matches: [{{path: {{value: /v1}}}}], backendRefs: [{{name: engines}}]}}]}}\n---\n{more}"
        );
        let mut all = Manifests::default();
        all.read("m.yaml".as_ref(), text.as_bytes()).unwrap();
        let mut report = Report::default();
        check_asking(&containers(&all).next().unwrap(), how, &all, &mut report);
        report.warnings
    }

    #[test]
    fn pd_control_asks_engines_as_the_gateway_does() {
        let policy = |service: &str| {
            format!(
                "kind: BackendTLSPolicy\nmetadata: {{name: t, namespace: ns}}\n\
                 spec: {{targetRefs: [{{kind: Service, name: {service}}}]}}\n"
            )
        };
        let injection = "kind: HTTPRouteFilter\nmetadata: {name: f, namespace: ns}\nspec: {credentialInjection: {}}\n";
        let (plain, full) = (AsksEngines { tls: false, token: false }, AsksEngines { tls: true, token: true });
        let found = warnings(plain, &policy("engines"));
        assert!(
            found.len() == 1 && found[0].contains("BackendTLSPolicy ns/t says that engines serve TLS"),
            "{found:?}"
        );
        let found = warnings(plain, injection);
        assert!(found.len() == 1 && found[0].contains("HTTPRouteFilter ns/f adds a credential"), "{found:?}");
        assert_eq!(warnings(plain, &policy("other")), Vec::<String>::new());
        assert_eq!(warnings(full, &format!("{}---\n{injection}", policy("engines"))), Vec::<String>::new());
    }
}
