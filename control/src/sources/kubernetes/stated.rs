//! Reads InferenceObjectives and InferenceModelRewrites: priorities, and aliases of models.
//!
//! If two objects state something about one name, the older object counts, as the API specifies.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use kube::api::DynamicObject;
use pd_core::wire::{MAX_STATED, Stated, Target};
use serde::Deserialize;

use crate::sources::kubernetes::config::PoolReference;
use crate::sources::kubernetes::pod::PodName;

/// Kinds of objects that define names in requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StatedKind {
    /// Priority of an objective, which is the object's name.
    Objective,
    /// Aliases of models.
    Rewrite,
}

impl StatedKind {
    /// Both kinds.
    pub const ALL: [Self; 2] = [Self::Objective, Self::Rewrite];

    /// Kind and plural of the API.
    #[must_use]
    pub fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Objective => ("InferenceObjective", "inferenceobjectives"),
            Self::Rewrite => ("InferenceModelRewrite", "inferencemodelrewrites"),
        }
    }
}

/// What one object states.
#[derive(Clone, Debug, PartialEq)]
pub struct StatedObject {
    /// Time of its creation, in seconds of Unix time.
    created: i64,
    pool: String,
    namespace: String,
    content: Content,
}

#[derive(Clone, Debug, PartialEq)]
enum Content {
    Objective(String, i64),
    Rules(Vec<Rule>),
}

#[derive(Deserialize)]
struct Objective {
    spec: ObjectiveSpec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ObjectiveSpec {
    #[serde(default)]
    priority: i64,
    pool_ref: PoolRef,
}

#[derive(Deserialize)]
struct PoolRef {
    name: String,
}

#[derive(Deserialize)]
struct Rewrite {
    spec: RewriteSpec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RewriteSpec {
    pool_ref: PoolRef,
    rules: Vec<Rule>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
struct Rule {
    #[serde(default)]
    matches: Vec<Match>,
    #[serde(default)]
    targets: Vec<RuleTarget>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
struct Match {
    model: ModelMatch,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
struct ModelMatch {
    value: String,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RuleTarget {
    model_rewrite: String,
    weight: Option<u32>,
}

impl StatedObject {
    /// Reads an object.
    ///
    /// # Errors
    /// One line when it is none of its kind.
    pub fn read(kind: StatedKind, object: DynamicObject) -> Result<Self, String> {
        let DynamicObject { metadata, data, .. } = object;
        let name = metadata.name.ok_or("the object has no name")?;
        let created = metadata.creation_timestamp.map_or(0, |time| time.0.as_second());
        let (pool, content) = match kind {
            StatedKind::Objective => {
                let Objective { spec } = serde_json::from_value(data).map_err(|error| error.to_string())?;
                (spec.pool_ref.name, Content::Objective(name, spec.priority))
            }
            StatedKind::Rewrite => {
                let Rewrite { spec } = serde_json::from_value(data).map_err(|error| error.to_string())?;
                (spec.pool_ref.name, Content::Rules(spec.rules))
            }
        };
        Ok(Self { created, pool, namespace: metadata.namespace.unwrap_or_default(), content })
    }

    /// Whether the object is for one of `pools`. With no `pools`, every object is.
    fn is_for(&self, pools: &[PoolReference]) -> bool {
        let is_it = |pool: &PoolReference| {
            (pool.name == "*" || pool.name == self.pool)
                && pool.namespace.as_ref().is_none_or(|namespace| *namespace == self.namespace)
        };
        pools.is_empty() || pools.iter().any(is_it)
    }
}

/// Merges what the objects state. Leaves out objects of other pools, and values that a filter would refuse.
pub fn together<'a>(objects: impl Iterator<Item = (&'a PodName, &'a StatedObject)>, pools: &[PoolReference]) -> Stated {
    let mut objects: Vec<_> = objects.filter(|(_, object)| object.is_for(pools)).collect();
    // Older objects come last and so count.
    objects.sort_by_key(|(name, object)| Reverse((object.created, *name)));
    let mut stated = Stated::default();
    for (_, object) in objects {
        match &object.content {
            Content::Objective(name, priority) => {
                stated.objectives.insert(name.clone(), *priority);
            }
            // The first rule of an object counts.
            Content::Rules(rules) => rules.iter().rev().for_each(|rule| add(rule, &mut stated)),
        }
    }
    stated.objectives = stated.objectives.into_iter().take(MAX_STATED).collect();
    stated.aliases = stated.aliases.into_iter().take(MAX_STATED).collect::<BTreeMap<_, _>>();
    stated
}

fn add(rule: &Rule, stated: &mut Stated) {
    let target = |it: &RuleTarget| Target { model: it.model_rewrite.clone(), weight: it.weight.unwrap_or(1) };
    let targets: Vec<_> = rule.targets.iter().map(target).collect();
    let alone = Stated { others: targets.clone(), ..Stated::default() };
    if targets.is_empty() || alone.validate().is_err() {
        return;
    }
    if rule.matches.is_empty() {
        stated.others.clone_from(&targets);
    }
    for ModelMatch { value } in rule.matches.iter().map(|it| &it.model) {
        stated.aliases.insert(value.clone(), targets.clone());
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(kind: StatedKind, name: &str, created: &str, spec: Value) -> (PodName, StatedObject) {
        let object = json!({"metadata": {"name": name, "namespace": "n", "creationTimestamp": created}, "spec": spec});
        let object = StatedObject::read(kind, serde_json::from_value(object).unwrap()).unwrap();
        (PodName { namespace: "n".into(), name: name.into() }, object)
    }

    fn rewrite(name: &str, created: &str, rules: Value) -> (PodName, StatedObject) {
        read(StatedKind::Rewrite, name, created, json!({"poolRef": {"name": "llama"}, "rules": rules}))
    }

    fn all(objects: &[(PodName, StatedObject)], pools: &[PoolReference]) -> Stated {
        together(objects.iter().map(|(name, object)| (name, object)), pools)
    }

    fn to(models: &[(&str, u32)]) -> Vec<Target> {
        models.iter().map(|(model, weight)| Target { model: (*model).to_owned(), weight: *weight }).collect()
    }

    const EARLY: &str = "2026-01-01T00:00:00Z";
    const LATE: &str = "2026-02-01T00:00:00Z";

    #[test]
    fn an_objective_has_its_name_and_a_priority_of_0_unless_it_says_one() {
        let pool = json!({"name": "llama"});
        let objects = [
            read(StatedKind::Objective, "batch", EARLY, json!({"priority": -5, "poolRef": pool})),
            read(StatedKind::Objective, "plain", EARLY, json!({"poolRef": pool})),
        ];
        let stated = all(&objects, &[]);
        assert_eq!(stated.objectives, [("batch".to_owned(), -5), ("plain".to_owned(), 0)].into());
    }

    #[test]
    fn the_older_object_and_its_first_rule_count() {
        let by = |model: &str, target: &str| json!({"matches": [{"model": {"type": "Exact", "value": model}}], "targets": [{"modelRewrite": target}]});
        let objects = [
            rewrite("a-late", LATE, json!([by("x", "late"), by("y", "late")])),
            rewrite("b-early", EARLY, json!([by("x", "first"), by("x", "second")])),
        ];
        let stated = all(&objects, &[]);
        assert_eq!(
            stated.aliases,
            [("x".to_owned(), to(&[("first", 1)])), ("y".to_owned(), to(&[("late", 1)]))].into()
        );
    }

    #[test]
    fn a_rule_without_matches_is_for_every_other_model_and_weights_are_kept() {
        let targets = json!([{"modelRewrite": "a", "weight": 3}, {"modelRewrite": "b", "weight": 1}]);
        let stated = all(&[rewrite("r", EARLY, json!([{"targets": targets}]))], &[]);
        assert_eq!(stated.others, to(&[("a", 3), ("b", 1)]));
        let none = all(&[rewrite("r", EARLY, json!([{"targets": []}, {"targets": [{"modelRewrite": ""}]}]))], &[]);
        assert_eq!(none, Stated::default());
    }

    #[test]
    fn objects_of_pools_that_are_not_followed_are_left_out() {
        let rule = json!([{"targets": [{"modelRewrite": "a"}]}]);
        let objects = [rewrite("r", EARLY, rule)];
        let pool = |name: &str, namespace: Option<&str>| PoolReference {
            name: name.to_owned(),
            namespace: namespace.map(str::to_owned),
            group: Default::default(),
        };
        for (pools, is_there) in [
            (vec![], true),
            (vec![pool("*", None)], true),
            (vec![pool("other", None), pool("llama", Some("n"))], true),
            (vec![pool("other", None)], false),
            (vec![pool("llama", Some("m"))], false),
        ] {
            assert_eq!(!all(&objects, &pools).others.is_empty(), is_there, "{pools:?}");
        }
    }

    #[test]
    fn another_object_is_refused() {
        let object = |spec: Value| serde_json::from_value(json!({"metadata": {"name": "x"}, "spec": spec})).unwrap();
        for kind in StatedKind::ALL {
            assert!(StatedObject::read(kind, object(json!({}))).is_err());
        }
    }
}
