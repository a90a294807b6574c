//! Checks the filter in Envoy Gateway's policies: its code, its configuration, and the objects around it.

use serde_json::Value;

use super::filters::{Filter, filters};
use super::images::digest;
use super::report::Report;
use super::{agree, rollout};
use crate::cli::manifests::{Manifests, Object, text};

/// Checks every filter; returns their policies. `old` has the manifests in force now.
pub(super) fn check<'a>(new: &'a Manifests, old: &Manifests, report: &mut Report) -> Vec<&'a Object> {
    let mut policies = Vec::new();
    for filter in filters(new) {
        policies.push(filter.policy);
        check_entry(&filter, report);
        // An entry without a configuration is there to load the image. It handles no requests.
        if filter.raw_config().is_null() {
            continue;
        }
        let config = filter.config(report);
        rollout::check(&filter, new, old, report);
        if let Some(config) = config {
            agree::check(&filter, &config, new, report);
        }
    }
    policies
}

fn check_entry(filter: &Filter<'_>, report: &mut Report) {
    if filter.entry.get("failOpen") == Some(&Value::Bool(true)) {
        report
            .fault(filter.says("failOpen", "true sends requests to any engine while Envoy has not loaded the filter"));
    }
    let key = if filter.entry.pointer("/code/http").is_some() { "code.http" } else { "code.image.url" };
    let is_pinned = text(filter.entry, "/code/http/sha256").len() == 64 || digest(filter.image()).is_some();
    if !is_pinned {
        let what =
            format!("{:?} has no sha256 digest: with a tag, Envoy may keep the code that it has", filter.image());
        report.fault(filter.says(key, what));
    }
}

#[cfg(test)]
mod tests {
    use super::super::release;
    use super::*;

    fn manifests(version: &str, digit: &str, config: &str) -> Manifests {
        let image = format!("r.example/pd-filter@sha256:{}", digit.repeat(64));
        let text = format!(
            "apiVersion: gateway.envoyproxy.io/v1alpha1\nkind: EnvoyExtensionPolicy\nmetadata: {{name: pd}}\n\
             spec: {{wasm: [{{code: {{image: {{url: '{image}'}}}}, config: {config}}}]}}\n---\n\
             apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: i}}\ndata: {{image: '{image}', version: {version}}}\n\
             ---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: pd-control}}\nspec: {{template: {{spec: \
             {{containers: [{{name: pd-control, image: 'r.example/pd-control:{version}'}}]}}}}}}\n"
        );
        let mut manifests = Manifests::default();
        manifests.read("m.yaml".as_ref(), text.as_bytes()).unwrap();
        manifests
    }

    fn faults(new: &Manifests, old: &Manifests) -> Vec<String> {
        let mut report = Report::default();
        check(new, old, &mut report);
        report.faults
    }

    #[test]
    fn an_image_and_a_key_that_the_old_one_does_not_know_are_not_applied_at_once() {
        let own = release::own().version;
        let (old, new) = (manifests("0.0.1", "1", "{cluster: a}"), manifests(own, "2", "{cluster: a, revision: b}"));
        let found = faults(&new, &old);
        let place = "m.yaml:1: EnvoyExtensionPolicy pd: spec.wasm[0]";
        assert!(found[0].starts_with(&format!("{place}.code: filter {own} takes lists of wire version ")), "{found:?}");
        assert!(
            found[1].starts_with(&format!("{place}.config.revision: filter 0.0.1, which runs until its pods are gone")),
            "{found:?}"
        );
        assert_eq!(found.len(), 2, "{found:?}");
        let same = manifests(own, "2", "{cluster: a}");
        assert_eq!(faults(&new, &same), Vec::<String>::new(), "the configuration alone");
        assert_eq!(faults(&same, &Manifests::default()), Vec::<String>::new());
        let back = faults(&manifests("0.0.1", "1", "{cluster: a, revision: b}"), &Manifests::default());
        assert_eq!(
            back,
            [format!(
                "{place}.config.revision: filter 0.0.1 does not know this key and would refuse the configuration"
            )]
        );
    }
}
