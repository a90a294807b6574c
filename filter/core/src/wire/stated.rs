//! Objectives and aliases that objects of the cluster state.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::error::{MAX_NAME_BYTES, WireError};

/// Objectives, and aliases, that one snapshot may state; more is refused.
pub const MAX_STATED: usize = 4_096;
/// Targets that an alias of a snapshot may have; more is refused.
pub const MAX_TARGETS: usize = 64;

/// A model that an alias may become.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Name as endpoints list it.
    pub model: String,
    /// Share of the requests, against the sum of the alias's weights.
    pub weight: u32,
}

/// Objectives and aliases that objects of the cluster state. Those of the plugin configuration come first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stated {
    /// Priority of each objective.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub objectives: BTreeMap<String, i64>,
    /// Targets of each alias: one at least, and one with a weight.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub aliases: BTreeMap<String, Vec<Target>>,
    /// Targets of every other name; empty: other names are no aliases.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<Target>,
}

impl Stated {
    /// Targets of an alias; `None` if the name is no alias.
    #[must_use]
    pub fn targets(&self, name: &str) -> Option<&[Target]> {
        let others = || Some(&self.others).filter(|others| !others.is_empty());
        self.aliases.get(name).or_else(others).map(Vec::as_slice)
    }

    /// Whether it names a model: as an alias or as the target of one.
    #[must_use]
    pub fn names_model(&self, name: &str) -> bool {
        let mut targets = self.aliases.values().chain([&self.others]).flatten();
        self.aliases.contains_key(name) || targets.any(|target| target.model == name)
    }

    /// Checks what the types alone do not say; the error names the key.
    ///
    /// # Errors
    /// [`WireError::Malformed`]
    pub fn validate(&self) -> Result<(), WireError> {
        let is_name = |name: &str| !name.is_empty() && name.len() <= MAX_NAME_BYTES;
        let bad = |key: &str, name: &str| Err(WireError::Malformed(format!("stated.{key}: {name:.64}: is not valid")));
        if self.objectives.len() > MAX_STATED || self.aliases.len() > MAX_STATED {
            return Err(WireError::Malformed(format!("stated: more than {MAX_STATED} objectives or aliases")));
        }
        if let Some(name) = self.objectives.keys().find(|name| !is_name(name)) {
            return bad("objectives", name);
        }
        let is_good = |targets: &[Target]| {
            let has_weight = targets.iter().any(|target| target.weight > 0);
            has_weight && targets.len() <= MAX_TARGETS && targets.iter().all(|target| is_name(&target.model))
        };
        if let Some((name, _)) = self.aliases.iter().find(|(name, targets)| !is_name(name) || !is_good(targets)) {
            return bad("aliases", name);
        }
        if !self.others.is_empty() && !is_good(&self.others) {
            return bad("others", "");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::wire::Snapshot;

    #[test]
    fn what_the_cluster_states_is_bounded_and_names_models() {
        let read = |stated: &str| {
            let text = format!(r#"{{"wire":1,"epoch":"e","version":1,"stated":{stated}}}"#);
            Snapshot::parse(text.as_bytes()).map(|snapshot| snapshot.stated.unwrap())
        };
        let stated = read(r#"{"objectives":{"batch":-5},"aliases":{"a":[{"model":"x","weight":1}]},"new":1}"#).unwrap();
        assert_eq!(stated.objectives["batch"], -5);
        assert_eq!((stated.targets("a").unwrap()[0].model.as_str(), stated.targets("b")), ("x", None));
        assert!(stated.names_model("a") && stated.names_model("x") && !stated.names_model("b"));
        let others = read(r#"{"others":[{"model":"x","weight":1}]}"#).unwrap();
        assert_eq!(others.targets("b").unwrap()[0].model, "x");
        for bad in [
            r#"{"objectives":{"":1}}"#.to_owned(),
            format!(r#"{{"objectives":{{"{}":1}}}}"#, "n".repeat(300)),
            r#"{"aliases":{"a":[]}}"#.into(),
            r#"{"aliases":{"a":[{"model":"x","weight":0}]}}"#.into(),
            r#"{"aliases":{"a":[{"model":"","weight":1}]}}"#.into(),
            r#"{"others":[{"model":"x","weight":0}]}"#.into(),
        ] {
            assert!(read(&bad).is_err(), "{bad}");
        }
    }
}
