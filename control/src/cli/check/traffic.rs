//! Checks the `BackendTrafficPolicy`s that are in force for the filter's route.

use pd_core::config::Config;

use super::attached::{is_for_upgrades, policies, serves_engines};
use super::filters::Filter;
use super::report::Report;
use super::units::{milliseconds, quantity};
use crate::cli::manifests::{Manifests, Object, items, text};
use serde_json::Value;

/// Milliseconds after which uvicorn, which most engines run in, closes an idle connection.
const ENGINE_IDLE_MS: u64 = 5_000;
/// Milliseconds of a long answer: 10,000 tokens at 30 ms.
const LONG_ANSWER_MS: u64 = 300_000;
/// Triggers of a retry before which nothing of a request has reached an engine.
const UNSENT: &[&str] = &["connect-failure", "refused-stream"];

/// Checks the policies, and the time that the route leaves for an answer.
pub(super) fn check(filter: &Filter<'_>, config: &Config, route: &Object, all: &Manifests, report: &mut Report) {
    let policies = policies("BackendTrafficPolicy", route, all);
    if policies.is_empty() {
        let what = format!(
            "no BackendTrafficPolicy is for it, so nothing reads {} and holds the body",
            config.destination_header
        );
        report.fault(route.says("spec", what));
    }
    for policy in &policies {
        check_destination(filter, config, policy, report);
        if is_for_upgrades(route) {
            check_no_buffer(route, policy, report);
        } else {
            check_buffer(filter, config, policy, report);
        }
        check_idle_time(policy, report);
        check_retries(policy, report);
        check_protocol(policy, report);
    }
    check_time(route, &policies, report);
}

fn check_destination(filter: &Filter<'_>, config: &Config, policy: &Object, report: &mut Report) {
    let sources = items(&policy.value, "/spec/loadBalancer/endpointOverride/extractFrom");
    let is_header = |source: &Value| text(source, "/header").eq_ignore_ascii_case(&config.destination_header);
    if !sources.iter().any(is_header) {
        let what = format!(
            "must have header {}: config.destination_header of {} names it",
            config.destination_header,
            filter.policy.title()
        );
        report.fault(policy.says("spec.loadBalancer.endpointOverride.extractFrom", what));
    }
}

fn check_buffer(filter: &Filter<'_>, config: &Config, policy: &Object, report: &mut Report) {
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

/// A buffer waits for the end of a body that an upgrade does not have.
fn check_no_buffer(route: &Object, policy: &Object, report: &mut Report) {
    if policy.value.pointer("/spec/requestBuffer").is_some() {
        let what = format!("must not be there: {} is for upgrades, and a buffer lets none through", route.title());
        report.fault(policy.says("spec.requestBuffer", what));
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

/// A retry sends the same body once more, with the KV parameters that the first try has used.
fn check_retries(policy: &Object, report: &mut Report) {
    let Some(retry) = policy.value.pointer("/spec/retry") else { return };
    if retry.get("numRetries").and_then(Value::as_u64) == Some(0) {
        return;
    }
    if retry.pointer("/perRetry/timeout").is_some() {
        let what = "must not be there: a whole request that takes longer is computed a second time";
        report.fault(policy.says("spec.retry.perRetry.timeout", what));
    }
    let triggers: Vec<_> = items(retry, "/retryOn/triggers").iter().filter_map(Value::as_str).collect();
    let codes = "must be [connect-failure, refused-stream]";
    let why = "the second try has the KV parameters of the first, which an engine may have used: its text may be wrong";
    if triggers.is_empty() {
        let what = format!("{codes}: without it Envoy Gateway retries 503 and other answers, and {why}");
        return report.fault(policy.says("spec.retry.retryOn.triggers", what));
    }
    for trigger in triggers.iter().filter(|trigger| !UNSENT.contains(trigger)) {
        report.fault(policy.says("spec.retry.retryOn.triggers", format!("{trigger}: {codes}: {why}")));
    }
}

/// Engines speak HTTP/1.1, whatever the client speaks.
fn check_protocol(policy: &Object, report: &mut Report) {
    if policy.value.pointer("/spec/useClientProtocol") == Some(&Value::Bool(true)) {
        let what = "true sends requests of HTTP/2 clients to engines in HTTP/2, which uvicorn does not speak";
        report.fault(policy.says("spec.useClientProtocol", what));
    }
}

/// Warns of time limits that cut off long answers. A rule's own limit wins over the policy's.
fn check_time(route: &Object, policies: &[&Object], report: &mut Report) {
    let of_policy = |key: &str| {
        let found = policies.iter().map(|policy| (*policy, text(&policy.value, &format!("/spec/timeout/http/{key}"))));
        found.filter(|(_, text)| !text.is_empty()).collect::<Vec<_>>()
    };
    let is_short = |text: &str| milliseconds(text).is_some_and(|ms| ms > 0 && ms < LONG_ANSWER_MS);
    let rules = items(&route.value, "/spec/rules").iter().enumerate();
    for (i, rule) in rules.filter(|(_, rule)| serves_engines(rule)) {
        let key = format!("spec.rules[{i}].timeouts.request");
        match text(rule, "/timeouts/request") {
            "" if of_policy("requestTimeout").is_empty() => {
                report.warn(route.says(&key, "is not there, so every answer ends after 15 s: 0s"));
            }
            "" => {
                for (policy, limit) in of_policy("requestTimeout").iter().filter(|(_, limit)| is_short(limit)) {
                    let what = format!("is {limit}: an answer that takes longer is cut off");
                    report.warn(policy.says("spec.timeout.http.requestTimeout", what));
                }
            }
            limit if is_short(limit) => {
                report.warn(route.says(&key, format!("is {limit}: an answer that takes longer is cut off")));
            }
            _ => {}
        }
    }
    for (policy, limit) in of_policy("maxStreamDuration").iter().filter(|(_, limit)| is_short(limit)) {
        let what = format!("is {limit}: an answer that takes longer is cut off");
        report.warn(policy.says("spec.timeout.http.maxStreamDuration", what));
    }
}

#[cfg(test)]
mod tests {
    use super::super::filters::filters;
    use super::*;

    const GOOD: &str = "loadBalancer: {endpointOverride: {extractFrom: [{header: x-pd-destination}]}}, requestBuffer: \
                        {limit: 16Mi}, timeout: {http: {connectionIdleTimeout: 3s}}";

    fn checked(policy: &str, timeouts: &str) -> Report {
        let text = format!(
            "kind: EnvoyExtensionPolicy\nmetadata: {{name: pd, namespace: ns}}\nspec: {{wasm: [{{name: pd, config: {{}}}}]}}\n\
             ---\nkind: HTTPRoute\nmetadata: {{name: r, namespace: ns}}\nspec: {{rules: [{{{timeouts}}}]}}\n---\n\
             kind: BackendTrafficPolicy\nmetadata: {{name: t, namespace: ns}}\n\
             spec: {{targetRefs: [{{kind: HTTPRoute, name: r}}], {policy}}}\n"
        );
        let mut all = Manifests::default();
        all.read("m.yaml".as_ref(), text.as_bytes()).unwrap();
        let mut report = Report::default();
        let route = all.of_kind("HTTPRoute").next().unwrap();
        check(&filters(&all).next().unwrap(), &Config::parse(b"{}").unwrap(), route, &all, &mut report);
        report
    }

    const ENDLESS: &str = "timeouts: {request: 0s}";

    #[test]
    fn a_retry_must_not_send_kv_parameters_again() {
        let with = |retry: &str| checked(&format!("{GOOD}, retry: {{{retry}}}"), ENDLESS);
        for good in [
            "numRetries: 2, retryOn: {triggers: [connect-failure, refused-stream]}",
            "numRetries: 0",
            "retryOn: {triggers: [connect-failure]}",
        ] {
            assert_eq!(with(good), Report::default(), "{good}");
        }
        let found = with("numRetries: 2, retryOn: {triggers: [connect-failure, 5xx, reset]}").faults;
        assert!(
            found.len() == 2 && found[0].contains("5xx: must be") && found[1].contains("reset: must be"),
            "{found:?}"
        );
        let limited = with("retryOn: {triggers: [connect-failure]}, perRetry: {timeout: 30s}").faults;
        assert!(limited.len() == 1 && limited[0].contains("spec.retry.perRetry.timeout: must not be"), "{limited:?}");
        let by_default = with("numRetries: 2").faults;
        assert!(by_default.len() == 1 && by_default[0].contains("retries 503 and other answers"), "{by_default:?}");
    }

    #[test]
    fn engines_get_their_own_protocol() {
        let found = checked(&format!("{GOOD}, useClientProtocol: true"), ENDLESS).faults;
        assert!(found.len() == 1 && found[0].contains("spec.useClientProtocol: true sends"), "{found:?}");
    }

    #[test]
    fn an_answer_has_the_time_that_it_takes() {
        let line = |report: Report| {
            assert_eq!(report.faults, Vec::<String>::new());
            report.warnings.join("; ")
        };
        let in_http =
            |more: &str| GOOD.replace("connectionIdleTimeout: 3s", &format!("connectionIdleTimeout: 3s, {more}"));
        assert!(line(checked(GOOD, "")).contains("spec.rules[0].timeouts.request: is not there, so every answer ends"));
        assert!(line(checked(GOOD, "timeouts: {request: 30s}")).contains("timeouts.request: is 30s"));
        let of_policy = line(checked(&in_http("requestTimeout: 1m"), ""));
        assert!(
            of_policy.contains("BackendTrafficPolicy ns/t: spec.timeout.http.requestTimeout: is 1m"),
            "{of_policy}"
        );
        assert!(line(checked(&in_http("maxStreamDuration: 1m"), ENDLESS)).contains("maxStreamDuration: is 1m"));
        for (policy, timeouts) in [
            (GOOD.to_owned(), ENDLESS),
            (GOOD.to_owned(), "timeouts: {request: 1h}"),
            (in_http("requestTimeout: 0s"), ""),
            (in_http("requestTimeout: 1m"), ENDLESS),
        ] {
            assert_eq!(line(checked(&policy, timeouts)), "");
        }
    }
}
