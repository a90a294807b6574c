//! The filter in Envoy Gateway's policies: its configuration and its image.

use pd_core::config::Config;
use serde_json::Value;

use super::manifests::{Manifests, Object};
use super::release::{self, Release};
use super::{Report, agree, items, text};

/// Keys that tell a configuration of ours, also one with mistakes in it.
const OUR_KEYS: &[&str] = &["bootstrap_cluster", "control", "destination_header", "pools", "prefix", "trusted_headers"];

/// One entry of a policy's `wasm` list that is ours.
pub(super) struct Filter<'a> {
    pub(super) policy: &'a Object,
    /// `spec.wasm[0]`.
    pub(super) key: String,
    pub(super) entry: &'a Value,
}

/// Checks every filter; returns their policies. `old` is in force now.
pub(super) fn check<'a>(new: &'a Manifests, old: &Manifests, report: &mut Report) -> Vec<&'a Object> {
    let mut policies = Vec::new();
    for filter in filters(new) {
        policies.push(filter.policy);
        filter.check_entry(report);
        // Without a configuration it serves nobody: it is there for its image.
        if filter.raw_config().is_null() {
            continue;
        }
        let config = filter.config(report);
        check_release(&filter, new, old, report);
        if let Some(config) = config {
            agree::check(&filter, &config, new, report);
        }
    }
    policies
}

fn filters(manifests: &Manifests) -> impl Iterator<Item = Filter<'_>> {
    manifests.of_kind("EnvoyExtensionPolicy").flat_map(|policy| {
        let entries = items(&policy.value, "/spec/wasm").iter().enumerate();
        let named = entries.map(move |(i, entry)| Filter { policy, key: format!("spec.wasm[{i}]"), entry });
        named.filter(Filter::is_ours)
    })
}

impl Filter<'_> {
    fn is_ours(&self) -> bool {
        let is_named = ["/name", "/rootID"].iter().any(|at| matches!(text(self.entry, at), "pd" | "pd-filter"));
        let has_key = |key: &&str| self.entry.pointer("/config").is_some_and(|config| config.get(key).is_some());
        is_named || self.image().contains("pd-filter") || OUR_KEYS.iter().any(has_key)
    }

    /// Where the module comes from.
    pub(super) fn image(&self) -> &str {
        match text(self.entry, "/code/image/url") {
            "" => text(self.entry, "/code/http/url"),
            url => url,
        }
    }

    /// One line about a key of the entry.
    pub(super) fn says(&self, key: &str, what: impl std::fmt::Display) -> String {
        self.policy.says(&format!("{}.{key}", self.key), what)
    }

    fn raw_config(&self) -> &Value {
        self.entry.get("config").unwrap_or(&Value::Null)
    }

    /// The configuration, as the filter reads it.
    fn config(&self, report: &mut Report) -> Option<Config> {
        let raw = self.raw_config();
        // One key a line, so that a line tells the key.
        let lines = if raw.is_null() { String::new() } else { format!("{raw:#}") };
        match Config::parse(lines.as_bytes()) {
            Ok(config) => Some(config),
            Err(error) => {
                let error = error.to_string();
                report.fault(match located(&error, &lines) {
                    Some((path, what)) => self.says(&["config", &path].join("."), what),
                    None if error.starts_with("plugin configuration") => self.says("config", error),
                    None => {
                        self.says(&format!("config.{}", error.split(": ").next().unwrap_or_default()), reason(&error))
                    }
                });
                None
            }
        }
    }

    fn check_entry(&self, report: &mut Report) {
        if self.entry.get("failOpen") == Some(&Value::Bool(true)) {
            report.fault(self.says("failOpen", "true sends requests to any engine while the filter is not there"));
        }
        let key = if self.entry.pointer("/code/http").is_some() { "code.http" } else { "code.image.url" };
        let is_pinned = text(self.entry, "/code/http/sha256").len() == 64 || digest(self.image()).is_some();
        if !is_pinned {
            let what =
                format!("{:?} has no sha256 digest; by a tag Envoy may go on with the code it has", self.image());
            report.fault(self.says(key, what));
        }
    }
}

/// The digest that an image is named by.
pub(super) fn digest(image: &str) -> Option<&str> {
    let (_, digest) = image.split_once("@sha256:")?;
    (digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(digest)
}

/// What follows the key.
fn reason(error: &str) -> &str {
    error.split_once(": ").map_or("", |(_, reason)| reason)
}

/// Key and reason of serde's "… at line 3 column 7", in text that has one key a line.
fn located(error: &str, lines: &str) -> Option<(String, String)> {
    let (what, place) = error.rsplit_once(" at line ")?;
    let line: usize = place.split(' ').next()?.parse().ok()?;
    let what = what.strip_prefix("plugin configuration: ").unwrap_or(what);
    let mut path = Vec::new();
    let mut indent = usize::MAX;
    let above: Vec<&str> = lines.lines().take(line).collect();
    for text in above.into_iter().rev() {
        let depth = text.len() - text.trim_start().len();
        if depth < indent
            && let Some((key, _)) = text.trim_start().strip_prefix('"').and_then(|rest| rest.split_once("\":"))
        {
            path.push(key);
            indent = depth;
        }
    }
    path.reverse();
    (!path.is_empty()).then(|| (path.join("."), what.to_owned()))
}

/// What the release that the image is of knows, and the one that runs until its pods are gone.
fn check_release(filter: &Filter<'_>, new: &Manifests, old: &Manifests, report: &mut Report) {
    let own = release::own();
    let of_image = match version(new, filter.image()) {
        None => {
            let what = format!(
                "which version it is stands nowhere (`make push … PIN=` writes it), so it was checked as {}",
                own.version
            );
            report.note(filter.says("code", what));
            own
        }
        Some(version) => match release::named(version) {
            Some(release) => release,
            None => {
                let what = format!(
                    "its version {version} is not known to pd-control {}: check with the pd-control of that version",
                    own.version
                );
                report.fault(filter.says("code", what));
                return;
            }
        },
    };
    for key in of_image.unknown_keys(filter.raw_config()) {
        let what = format!("filter {} does not know this key and would refuse the whole", of_image.version);
        report.fault(filter.says(&format!("config.{key}"), what));
    }
    let of_control = |manifests| super::control::versions(manifests);
    for (deployment, version) in of_control(new) {
        check_pair(filter, of_image, deployment, version, report);
    }
    let Some(before) = filters(old).find(|it| {
        (&it.policy.namespace, &it.policy.name, &it.key) == (&filter.policy.namespace, &filter.policy.name, &filter.key)
    }) else {
        return;
    };
    for (deployment, version) in of_control(old) {
        check_pair(filter, of_image, deployment, version, report);
    }
    if before.image() == filter.image() {
        return;
    }
    let Some(version) = version(old, before.image()) else {
        let what = "which version runs now stands nowhere, so whether it knows the new configuration was not checked";
        report.note(filter.says("code", what));
        return;
    };
    let Some(running) = release::named(version) else { return };
    for key in running.unknown_keys(filter.raw_config()) {
        let what = format!(
            "filter {version}, which runs until its pods are gone, does not know this key: \
             apply the image first, and the key when it has rolled out"
        );
        report.fault(filter.says(&format!("config.{key}"), what));
    }
}

fn check_pair(filter: &Filter<'_>, release: &Release, deployment: &Object, version: &str, report: &mut Report) {
    let Some(control) = release::named(version) else {
        let what = format!("its version {version} is not known to pd-control {}", release::own().version);
        report.fault(deployment.says("spec.template", what));
        return;
    };
    if control.wire != release.wire {
        let what = format!(
            "filter {} takes lists of wire version {}, pd-control {version} in {} sends {}: roll pd-control out first",
            release.version,
            release.wire,
            deployment.title(),
            control.wire
        );
        report.fault(filter.says("code", what));
    } else if !release::are_neighbours(control, release) {
        let what = format!(
            "filter {} and pd-control {version} in {} are not of neighbouring versions",
            release.version,
            deployment.title()
        );
        report.fault(filter.says("code", what));
    }
}

/// The version of an image, as the ConfigMap says that names it.
pub(super) fn version<'a>(manifests: &'a Manifests, image: &str) -> Option<&'a str> {
    let of_image = manifests.of_kind("ConfigMap").filter(|map| text(&map.value, "/data/image") == image);
    of_image.map(|map| text(&map.value, "/data/version")).find(|version| !version.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_of_a_wrong_value_is_found() {
        let lines = format!("{:#}", serde_json::json!({"a": {"b": [1, {"c": "x"}], "d": 1}, "e": 1}));
        let at = |needle: &str| lines.lines().position(|line| line.contains(needle)).unwrap() + 1;
        let path = |line: usize| located(&format!("plugin configuration: wrong at line {line} column 1"), &lines);
        assert_eq!(path(at("\"c\"")), Some(("a.b.c".to_owned(), "wrong".to_owned())));
        assert_eq!(path(at("\"d\"")).unwrap().0, "a.d");
        assert_eq!(path(at("\"e\"")).unwrap().0, "e");
        assert_eq!(located("no place", &lines), None);
        assert_eq!(located("x at line 9999999 column 1", ""), None);
    }

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
            [format!("{place}.config.revision: filter 0.0.1 does not know this key and would refuse the whole")]
        );
    }

    #[test]
    fn only_a_whole_digest_is_one() {
        assert!(digest(&format!("r.example/f@sha256:{}", "0".repeat(64))).is_some());
        assert!(digest("r.example/f:0.1.0").is_none() && digest("r.example/f@sha256:00").is_none());
    }
}
