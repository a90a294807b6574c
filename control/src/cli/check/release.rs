//! Releases of filter and pd-control: wire version and configuration keys of each.

use serde_json::Value;

/// A release of filter and pd-control.
#[derive(Debug)]
pub(super) struct Release {
    /// Version of the workspace in `Cargo.toml`.
    pub(super) version: &'static str,
    /// Version of the wire format.
    pub(super) wire: u32,
    /// Keys of the plugin configuration, one a line; `*` stands for any name.
    keys: &'static str,
}

/// All releases, the present one last. A new version of the workspace gets a line here and a file of keys, which the
/// test below writes. The lines of released versions do not change.
const RELEASES: &[Release] = &[
    #[cfg(test)]
    Release { version: "0.0.1", wire: 0, keys: "cluster" },
    Release { version: "0.1.0", wire: 1, keys: include_str!("releases/0.1.0.keys") },
];

/// The release of this pd-control.
pub(super) fn own() -> &'static Release {
    static UNKNOWN: Release = Release { version: env!("CARGO_PKG_VERSION"), wire: 0, keys: "" };
    RELEASES.last().unwrap_or(&UNKNOWN)
}

/// The release of this version; `None` when it is unknown.
pub(super) fn named(version: &str) -> Option<&'static Release> {
    RELEASES.iter().find(|release| release.version == version)
}

/// Whether two releases are the same or adjacent.
pub(super) fn are_neighbours(one: &Release, other: &Release) -> bool {
    let place = |of: &Release| RELEASES.iter().position(|release| release.version == of.version);
    place(one).zip(place(other)).is_some_and(|(one, other)| one.abs_diff(other) <= 1)
}

impl Release {
    /// Keys of a configuration that this release does not have. Of nested keys, the outermost.
    pub(super) fn unknown_keys(&self, config: &Value) -> Vec<String> {
        let mut unknown = Vec::new();
        self.walk(config, "", "", &mut unknown);
        unknown
    }

    fn walk(&self, value: &Value, path: &str, pattern: &str, unknown: &mut Vec<String>) {
        let join = |parent: &str, key: &str| if parent.is_empty() { key.to_owned() } else { format!("{parent}.{key}") };
        match value {
            Value::Object(members) => {
                for (key, member) in members {
                    let named = [join(pattern, key), join(pattern, "*")];
                    match named.iter().find(|pattern| self.keys.lines().any(|known| known == *pattern)) {
                        Some(pattern) => self.walk(member, &join(path, key), pattern, unknown),
                        None => unknown.push(join(path, key)),
                    }
                }
            }
            Value::Array(items) => {
                for (i, item) in items.iter().enumerate() {
                    self.walk(item, &format!("{path}[{i}]"), pattern, unknown);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use pd_core::config::Config;
    use pd_core::wire::{ENDPOINT_KEYS, WIRE_VERSION};
    use serde_json::json;

    use super::*;

    /// The keys that the present parser has, which its own errors list.
    fn keys() -> BTreeSet<String> {
        let mut keys = BTreeSet::new();
        descend(&mut keys, "", &|inner| inner);
        keys.extend(ENDPOINT_KEYS.iter().map(|key| format!("endpoints.{key}")));
        keys
    }

    fn descend(keys: &mut BTreeSet<String>, parent: &str, wrap: &dyn Fn(Value) -> Value) {
        let expected = |value: Value| {
            let error = Config::parse(wrap(value).to_string().as_bytes()).err()?.to_string();
            let (_, list) = error.split_once("unknown field `?`, expected ")?;
            Some(list.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>())
        };
        let unknown = json!({"?": 0});
        for key in expected(unknown.clone()).unwrap_or_default() {
            let name = if parent.is_empty() { key.clone() } else { format!("{parent}.{key}") };
            keys.insert(name.clone());
            // A member, an item of a list, a map of names.
            descend(keys, &name, &|inner| wrap(json!({ &*key: inner })));
            descend(keys, &name, &|inner| wrap(json!({ &*key: [inner] })));
            if expected(json!({ &*key: {"any": unknown} })).is_some() && expected(json!({ &*key: unknown })).is_none() {
                keys.insert(format!("{name}.*"));
                descend(keys, &format!("{name}.*"), &|inner| wrap(json!({ &*key: {"any": inner} })));
            }
        }
    }

    #[test]
    fn the_present_release_is_the_last_and_its_keys_are_the_parsers() {
        assert_eq!((own().version, own().wire), (env!("CARGO_PKG_VERSION"), WIRE_VERSION), "add the new version");
        let list: String = keys().iter().map(|key| format!("{key}\n")).collect();
        let file = concat!("src/cli/check/releases/", env!("CARGO_PKG_VERSION"), ".keys");
        if std::env::var_os("PD_WRITE_GOLDENS").is_some() {
            std::fs::write(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file), &list).unwrap();
        }
        assert_eq!(own().keys, list, "PD_WRITE_GOLDENS=1 writes {file}; that of a released version never changes");
    }

    #[test]
    fn unknown_keys_are_found_wherever_they_are() {
        let config = json!({
            "cluster": "c",
            "x": {"y": 1},
            "pools": {"a": {"split": {"mode": "never", "z": 1}}, "b": {"w": 1}},
            "models": {"m": {"targets": [{"model": "a"}, {"model": "b", "v": 1}]}},
            "endpoints": [{"address": "10.0.0.1:80", "role": "both", "u": 1}],
        });
        let expected = ["endpoints[0].u", "models.m.targets[1].v", "pools.a.split.z", "pools.b.w", "x"];
        let mut unknown = own().unknown_keys(&config);
        unknown.sort();
        assert_eq!(unknown, expected);
    }
}
