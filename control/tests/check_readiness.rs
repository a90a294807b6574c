//! `pd-control check` on policies, routes and listeners that keep the readiness probe of Envoy's pods from the filter.

use crate::check::{check, manifests, replaced, with};

/// The manifests with a document more.
fn and(document: &str) -> String {
    format!("{}\n---\n{document}", manifests())
}

fn security(target: &str, spec: &str) -> String {
    format!(
        "apiVersion: gateway.envoyproxy.io/v1alpha1\nkind: SecurityPolicy\nmetadata: {{name: users, namespace: llm}}\n\
         spec: {{targetRefs: [{target}], {spec}}}\n"
    )
}

const GATEWAY: &str = "{group: gateway.networking.k8s.io, kind: Gateway, name: pd}";
const ROUTE: &str = "{group: gateway.networking.k8s.io, kind: HTTPRoute, name: pd}";

#[test]
fn policies_for_clients_do_not_cover_the_readiness_path() {
    for spec in [
        "jwt: {providers: [{name: a, issuer: i, remoteJWKS: {uri: 'https://i.example/k'}}]}",
        "apiKeyAuth: {credentialRefs: [{name: keys}], extractFrom: [{headers: [x-api-key]}]}",
        "extAuth: {http: {backendRefs: [{name: auth, port: 80}]}}",
    ] {
        for target in [GATEWAY, ROUTE] {
            let checked = check(&and(&security(target, spec)));
            assert!(checked.is_good, "{target} {spec}: {}", checked.faults);
        }
    }
}

#[test]
fn a_policy_that_covers_the_readiness_path_is_a_fault() {
    const JWT: &str = "jwt: {providers: [{name: a, issuer: i, remoteJWKS: {uri: 'https://i.example/k'}}]}";
    let covered = |spec: &str| {
        let text = replaced(
            &and(&security(GATEWAY, spec)),
            "name: pd-ready}\n  authorization:",
            "name: other}\n  authorization:",
        );
        check(&text)
    };
    for (spec, key) in [
        (JWT, "jwt"),
        ("apiKeyAuth: {credentialRefs: [{name: keys}], extractFrom: [{headers: [x-api-key]}]}", "apiKeyAuth"),
        ("extAuth: {http: {backendRefs: [{name: auth, port: 80}]}}", "extAuth"),
        ("authorization: {defaultAction: Deny}", "authorization"),
    ] {
        let checked = covered(spec);
        let expected = format!(
            "SecurityPolicy llm/users: spec.{key}: covers /.pd-ready of HTTPRoute llm/pd-ready, which the readiness probe"
        );
        assert!(
            checked.faults.contains(&expected) && checked.faults.lines().count() == 1,
            "{spec}: {}",
            checked.faults
        );
    }
    assert!(covered("jwt: {optional: true, providers: []}").is_good && covered("cors: {allowOrigins: ['*']}").is_good);

    // As it was when the path was one more match of the route that clients use.
    let text = replaced(
        &replaced(
            &and(&security(ROUTE, JWT)),
            "- path: {type: Exact, value: /.pd-ready}",
            "- path: {type: Exact, value: /x}",
        ),
        "    - path: {type: PathPrefix, value: /v1}\n",
        "    - path: {type: PathPrefix, value: /v1}\n    - path: {type: Exact, value: /.pd-ready}\n",
    );
    assert!(
        check(&text).faults.contains("spec.jwt: covers /.pd-ready of HTTPRoute llm/pd, "),
        "{}",
        check(&text).faults
    );
}

#[test]
fn the_readiness_probe_reaches_the_filter() {
    let probe = "EnvoyProxy llm/pd: spec.provider.kubernetes.envoyDeployment: the readiness probe asks ";
    let one_rule = "metadata: {name: pd-ready, namespace: llm}\nspec:\n  parentRefs: [{name: pd}]\n";
    for (from, to, expected) in [
        (
            one_rule,
            &*format!("{one_rule}  hostnames: [llm.example]\n"),
            "HTTPRoute llm/pd-ready: spec.hostnames: keep /.pd-ready from the readiness probe of EnvoyProxy llm/pd, which \
             asks without a host name",
        ),
        (
            "- path: {type: Exact, value: /.pd-ready}",
            "- path: {type: Exact, value: /.ready}",
            &*format!("{probe}without a host name for /.pd-ready, and no HTTPRoute of Gateway llm/pd has it"),
        ),
        (
            "kind: HTTPRoute, name: pd-ready}\n  - {group: gateway.networking.k8s.io, kind: HTTPRoute, name: pd-upgrade}",
            "kind: HTTPRoute, name: pd-upgrade}",
            "EnvoyExtensionPolicy llm/pd: spec.targetRefs: must have HTTPRoute llm/pd-ready",
        ),
        (
            "- {name: http, port: 80, protocol: HTTP}",
            "- {name: http, port: 8080, protocol: HTTP}",
            &*format!("{probe}port 10080, and the listeners of Gateway llm/pd are at 8080 in the pod"),
        ),
        (
            "- {name: http, port: 80, protocol: HTTP}",
            "- {name: http, port: 80, protocol: HTTPS}",
            &*format!("{probe}port 10080 for HTTP, which the listener of Gateway llm/pd there does not speak"),
        ),
        (
            "- {name: http, port: 80, protocol: HTTP}",
            "- {name: http, port: 80, protocol: HTTP, hostname: llm.example}",
            &*format!("{probe}without a host name, and every listener of Gateway llm/pd at port 10080 has a hostname"),
        ),
    ] {
        let faults = check(&with(from, to)).faults;
        assert!(faults.contains(expected), "{faults}");
    }
    // A probe that names the host.
    let named = with(
        "httpGet: {path: /.pd-ready, port: 10080}",
        "httpGet: {path: /.pd-ready, port: 10080, httpHeaders: [{name: Host, value: a.llm.example}]}",
    );
    let named = replaced(&named, one_rule, &format!("{one_rule}  hostnames: ['*.llm.example']\n"));
    assert!(check(&named).is_good, "{}", check(&named).faults);
}
