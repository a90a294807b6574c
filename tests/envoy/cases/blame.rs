//! Errors that Envoy answers itself, and the endpoints that bear the blame for them, or do not.

use std::time::Duration;

use pd_sim::FAULT_HEADER;
use pd_support::body::CHAT;
use pd_support::client::{Client, Http};
use pd_support::config::{Config, merge};
use pd_support::wait::until;
use pd_tests::rig::{Rig, run};
use serde_json::{Value, json};

use crate::support::{logged_chat, short_chat};

const ENVOYS: &str = "pd_answered_by_envoy_total";
const UNANSWERED: &str = "pd_decode_unanswered_total";
/// Header that selects one of the routes below.
pub(crate) const CASE: &str = "x-case";

const LOCAL_RATE_LIMIT: &str = "envoy.filters.http.local_ratelimit";
const RBAC: &str = "envoy.filters.http.rbac";
const JWT: &str = "envoy.filters.http.jwt_authn";
const EXT_AUTHZ: &str = "envoy.filters.http.ext_authz";
/// A key that signed nothing.
const KEYS: &str = r#"{"keys":[{"kty":"oct","alg":"HS256","kid":"k","k":"c2VjcmV0"}]}"#;

/// The `@type` of an HTTP filter's message.
fn filter_type(filter: &str, message: &str) -> String {
    format!("type.googleapis.com/envoy.extensions.filters.http.{filter}.v3.{message}")
}

/// Adds filters behind the buffer filter, where the filter has forwarded the request, and a route for each of Envoy's own
/// errors.
pub(crate) fn own_errors(config: &mut Config) {
    let mut full = config.cluster("engines").clone();
    merge(
        &mut full,
        &json!({
            "name": "full",
            "eds_cluster_config": {"service_name": "engines"},
            "circuit_breakers": {"thresholds": [{"max_connections": 0, "max_pending_requests": 0}]},
        }),
    );
    config.root["static_resources"]["clusters"].as_array_mut().unwrap().push(full);
    let mut empty = config.cluster("pd-control").clone();
    empty["name"] = "empty".into();
    empty["load_assignment"] = json!({"cluster_name": "empty"});
    config.root["static_resources"]["clusters"].as_array_mut().unwrap().push(empty);

    let rate_limit = |bucket: Value| {
        let mut limit = json!({"@type": filter_type("local_ratelimit", "LocalRateLimit"), "stat_prefix": "limit"});
        merge(&mut limit, &bucket);
        limit
    };
    let filters = config.http_filters();
    let router = filters.len() - 1;
    filters.insert(router, json!({"name": LOCAL_RATE_LIMIT, "typed_config": rate_limit(json!({}))}));
    filters.insert(router, json!({"name": RBAC, "typed_config": {"@type": filter_type("rbac", "RBAC")}}));

    let jwt = json!({
        "@type": filter_type("jwt_authn", "JwtAuthentication"),
        "providers": {"p": {"issuer": "i", "local_jwks": {"inline_string": KEYS}}},
        "rules": [{"match": {"prefix": "/"}, "requires": {"provider_name": "p"}}],
    });
    // pd-control knows no such path, so it denies.
    let ext_authz = json!({
        "@type": filter_type("ext_authz", "ExtAuthz"),
        "http_service": {"server_uri": {"uri": "http://authz", "cluster": "pd-control", "timeout": "5s"}},
    });
    for (name, config) in [(JWT, jwt), (EXT_AUTHZ, ext_authz)] {
        filters.insert(router, json!({"name": name, "disabled": true, "typed_config": config}));
    }
    let enabled = json!({"@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig", "config": {}});

    let all = json!({"default_value": {"numerator": 100}});
    let limited = rate_limit(json!({
        "token_bucket": {"max_tokens": 1, "fill_interval": "3600s"}, "filter_enabled": all, "filter_enforced": all,
    }));
    let any = json!({"permissions": [{"any": true}], "principals": [{"any": true}]});
    let denied = json!({
        "@type": filter_type("rbac", "RBACPerRoute"),
        "rbac": {"rules": {"action": "DENY", "policies": {"all": any}}},
    });
    let cases = [
        ("limited", json!({"typed_per_filter_config": {LOCAL_RATE_LIMIT: limited}})),
        ("denied", json!({"typed_per_filter_config": {RBAC: denied}})),
        ("without_jwt", json!({"typed_per_filter_config": {JWT: enabled.clone()}})),
        ("not_authorized", json!({"typed_per_filter_config": {EXT_AUTHZ: enabled}})),
        ("full", json!({"route": {"cluster": "full"}})),
        ("empty", json!({"route": {"cluster": "empty"}})),
        ("direct", json!({"route": null, "direct_response": {"status": 404}})),
        ("timeout", json!({"route": {"timeout": "0.3s"}})),
        ("try_timeout", json!({"route": {"retry_policy": {"per_try_timeout": "0.3s"}}})),
        ("idle", json!({"route": {"idle_timeout": "0.3s"}})),
        ("duration", json!({"route": {"max_stream_duration": {"max_stream_duration": "0.3s"}}})),
    ];
    let routes = config.routes();
    let plain = routes.last().unwrap().clone();
    for (name, patch) in cases {
        let mut route = plain.clone();
        merge(&mut route, &patch);
        route["match"]["headers"] = json!([{"name": CASE, "string_match": {"exact": name}}]);
        routes.insert(0, route);
    }
    config.http()["access_log"][0]["typed_config"]["log_format"]["json_format"]["details"] =
        "%RESPONSE_CODE_DETAILS%".into();
}

/// Sends a chat and returns its access log's entry.
async fn logged(rig: &Rig, client: &mut Client, body: &str, headers: &[(&str, &[u8])]) -> Value {
    let (request, path) = logged_chat(client, body, headers);
    drop(client.try_send(request).await);
    rig.access_log_of(&path).await
}

#[test]
fn envoys_own_errors_put_no_endpoint_out() {
    run(async {
        let rig = Rig::builder().envoy(own_errors).start().await;
        let mut client = rig.client(Http::One).await;
        // A prompt stays with its endpoint for as long as that endpoint is not ejected.
        let body = short_chat();
        let entry = logged(&rig, &mut client, &body, &[(CASE, b"limited")]).await;
        assert_eq!(entry["status"], 200, "the bucket has one token");
        let decode = entry["decode"].clone();

        let mut errors = 0.0;
        for (case, status, details) in [
            ("limited", 429, "local_rate_limited"),
            ("denied", 403, "rbac_access_denied_matched_policy[all]"),
            ("without_jwt", 401, "jwt_authn_access_denied{Jwt_is_missing}"),
            ("not_authorized", 404, "ext_authz_denied"),
            ("full", 503, "upstream_reset_before_response_started{overflow}"),
            ("empty", 503, "no_healthy_upstream"),
            ("timeout", 504, "response_timeout"),
            ("try_timeout", 504, "upstream_per_try_timeout"),
            ("idle", 504, "stream_idle_timeout"),
            ("duration", 504, "max_duration_timeout"),
        ] {
            for _ in 0..2 {
                let headers: [(&str, &[u8]); 2] = [(CASE, case.as_bytes()), (FAULT_HEADER, b"hang")];
                let entry = logged(&rig, &mut client, &body, &headers).await;
                assert_eq!((&entry["status"], &entry["decode"]), (&json!(status), &decode), "{entry}");
                let got = entry["details"].as_str().unwrap_or_default();
                assert!(got.starts_with(details), "{case}: {entry}");
                errors += 1.0;
            }
            let entry = logged(&rig, &mut client, &body, &[]).await;
            assert_eq!((&entry["status"], &entry["decode"]), (&json!(200), &decode), "{case}: {entry}");
        }
        assert_eq!(rig.until_metric(ENVOYS, |value| value >= errors).await, errors);

        for _ in 0..3 {
            let mut leaving = rig.client(Http::One).await;
            let request = leaving.json(CHAT, body.clone(), &[(FAULT_HEADER, b"hang")]);
            assert!(tokio::time::timeout(Duration::from_millis(200), leaving.send(request)).await.is_err());
        }
        rig.until_idle().await;
        let entry = logged(&rig, &mut client, &body, &[]).await;
        assert_eq!(entry["decode"], decode, "a client that leaves");
        assert_eq!(rig.final_metric(UNANSWERED).await, 0.0);
    });
}

#[test]
fn an_attempt_that_failed_puts_its_endpoint_out() {
    run(async {
        // Envoy sends such a request once more.
        let rig = Rig::builder().engines(2, 3).envoy(own_errors).start().await;
        let mut client = rig.client(Http::One).await;
        let body = short_chat();
        let decode = logged(&rig, &mut client, &body, &[]).await["decode"].clone();
        let entry = logged(&rig, &mut client, &body, &[(FAULT_HEADER, b"reset")]).await;
        assert_eq!(entry["details"], "upstream_reset_before_response_started{connection_termination}", "{entry}");
        assert_eq!(entry["decode"], decode);
        let entry = logged(&rig, &mut client, &body, &[]).await;
        assert_ne!(entry["decode"], decode, "another one in its place");
        rig.until_metric(UNANSWERED, |value| value == 1.0).await;
        assert_eq!(rig.final_metric(ENVOYS).await, 0.0);

        for engine in &rig.decode {
            rig.refuse(engine).await;
        }
        let entry = logged(&rig, &mut client, &body, &[]).await;
        let details = entry["details"].as_str().unwrap_or_default();
        assert!(details.starts_with("upstream_reset_before_response_started{remote_connection_failure"), "{entry}");
        rig.until_metric(UNANSWERED, |value| value == 2.0).await;
        for engine in &rig.decode {
            rig.accept(engine).await;
        }
        until("the endpoints are back", async || {
            (logged(&rig, &mut client, &body, &[]).await["status"] == 200).then_some(())
        })
        .await;
        rig.until_idle().await;
    });
}

#[test]
fn a_prefill_leg_that_envoy_does_not_send_puts_no_endpoint_out() {
    run(async {
        let breakers = json!({"thresholds": [{"max_connections": 0, "max_pending_requests": 0}]});
        let rig = Rig::builder().envoy(move |config| config.cluster("engines")["circuit_breakers"] = breakers);
        let rig = rig.start().await;
        let mut client = rig.client(Http::One).await;
        let (request, path) = logged_chat(&client, &crate::support::long_chat(), &[]);
        assert_eq!(client.send(request).await.status, 503);
        assert_eq!(rig.access_log_of(&path).await["reason"], "prefill_failed");
        assert_eq!(rig.until_metric(ENVOYS, |value| value >= 1.0).await, 1.0);
        let legs = async |result: &str| rig.metric(&format!("pd_prefill_legs_total{{result=\"{result}\"}}")).await;
        assert_eq!((legs("not_sent").await, legs("unreachable").await), (2.0, 0.0));
        rig.until_idle().await;
    });
}
