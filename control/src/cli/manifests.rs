//! Kubernetes objects as `kubectl kustomize` or `kubectl get -o yaml` prints them.

use std::path::{Path, PathBuf};

use serde_json::Value;
use serde_saphyr::Spanned;

use crate::sources::yaml::{self, FileError};

/// The objects of all files.
#[derive(Debug, Default)]
pub(in crate::cli) struct Manifests(Vec<Object>);

/// An object and its place in a file.
#[derive(Debug)]
pub(in crate::cli) struct Object {
    pub(in crate::cli) file: PathBuf,
    /// First line of its document, from 1.
    line: u64,
    pub(in crate::cli) kind: String,
    pub(in crate::cli) namespace: String,
    pub(in crate::cli) name: String,
    pub(in crate::cli) value: Value,
}

impl Manifests {
    /// Adds the objects of a file, those of a `List` one by one.
    pub(in crate::cli) fn read(&mut self, path: &Path, bytes: &[u8]) -> Result<(), FileError> {
        for document in yaml::parse_documents::<Spanned<Value>>(path, bytes)? {
            self.take(path, document.defined.line(), document.value);
        }
        Ok(())
    }

    fn take(&mut self, path: &Path, line: u64, mut value: Value) {
        if text(&value, "/kind").ends_with("List")
            && let Some(Value::Array(items)) = value.get_mut("items").map(Value::take)
        {
            items.into_iter().for_each(|item| self.take(path, line, item));
            return;
        }
        let of = |pointer: &str| text(&value, pointer).to_owned();
        let (kind, namespace, name) = (of("/kind"), of("/metadata/namespace"), of("/metadata/name"));
        self.0.push(Object { file: path.to_owned(), line, kind, namespace, name, value });
    }

    pub(in crate::cli) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number of objects of a file.
    pub(in crate::cli) fn count(&self, path: &Path) -> usize {
        self.0.iter().filter(|object| object.file == path).count()
    }

    pub(in crate::cli) fn of_kind(&self, kind: &str) -> impl Iterator<Item = &Object> {
        self.0.iter().filter(move |object| object.kind == kind)
    }

    pub(in crate::cli) fn find(&self, kind: &str, namespace: &str, name: &str) -> Option<&Object> {
        self.of_kind(kind).find(|object| object.namespace == namespace && object.name == name)
    }
}

impl Object {
    /// Kind, namespace and name: `Deployment llm/pd-control`.
    pub(in crate::cli) fn title(&self) -> String {
        match self.namespace.as_str() {
            "" => format!("{} {}", self.kind, self.name),
            namespace => format!("{} {namespace}/{}", self.kind, self.name),
        }
    }

    /// One line about a key of the object.
    pub(in crate::cli) fn says(&self, key: &str, what: impl std::fmt::Display) -> String {
        format!("{}:{}: {}: {key}: {what}", self.file.display(), self.line, self.title())
    }

    /// Whether the object's `targetRefs` name `other` or a part of it, or its `targetSelectors` find it.
    pub(in crate::cli) fn targets(&self, other: &Self) -> bool {
        self.targets_kind(&other.kind, other)
    }

    /// The same of an object of another kind that has this one's name and labels.
    pub(in crate::cli) fn targets_kind(&self, kind: &str, other: &Self) -> bool {
        let is_it = |target: &Value| text(target, "/kind") == kind && text(target, "/name") == other.name;
        let is_found = |selector: &Value| text(selector, "/kind") == kind && other.has_labels_of(selector);
        let selectors = items(&self.value, "/spec/targetSelectors");
        self.namespace == other.namespace && (self.targets_by_name().any(is_it) || selectors.iter().any(is_found))
    }

    /// Its `targetRefs`, or its `targetRef`.
    fn targets_by_name(&self) -> impl Iterator<Item = &Value> {
        items(&self.value, "/spec/targetRefs").iter().chain(self.value.pointer("/spec/targetRef"))
    }

    /// Whether the object has the `matchLabels` of a selector. A selector without labels selects every object.
    fn has_labels_of(&self, selector: &Value) -> bool {
        let labels = self.value.pointer("/metadata/labels");
        let mut wanted = selector.get("matchLabels").and_then(Value::as_object).into_iter().flatten();
        wanted.all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
    }
}

/// The string at a JSON pointer; empty when there is none.
pub(in crate::cli) fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// The items of the list at a JSON pointer; none when there is no list.
pub(in crate::cli) fn items<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects(text: &str) -> Manifests {
        let mut manifests = Manifests::default();
        manifests.read(Path::new("m.yaml"), text.as_bytes()).unwrap();
        manifests
    }

    #[test]
    fn a_policy_is_for_what_it_names_or_selects() {
        let all = objects(
            "kind: HTTPRoute\nmetadata: {name: a, namespace: ns, labels: {app: x, tier: y}}\n---\n\
             kind: HTTPRoute\nmetadata: {name: b, namespace: ns}\n---\n\
             kind: HTTPRoute\nmetadata: {name: a, namespace: m, labels: {app: x}}\n",
        );
        let routes = |policy: &str| {
            let text = format!("kind: Policy\nmetadata: {{name: p, namespace: ns}}\nspec: {{{policy}}}\n");
            let policy = objects(&text);
            let policy = policy.of_kind("Policy").next().unwrap();
            let found: Vec<_> =
                all.of_kind("HTTPRoute").filter(|route| policy.targets(route)).map(Object::title).collect();
            found.join(", ")
        };
        assert_eq!(routes("targetRefs: [{kind: HTTPRoute, name: a}]"), "HTTPRoute ns/a");
        assert_eq!(routes("targetRef: {kind: HTTPRoute, name: b}"), "HTTPRoute ns/b");
        assert_eq!(routes("targetRefs: [{kind: Gateway, name: a}]"), "");
        assert_eq!(routes("targetSelectors: [{kind: HTTPRoute, matchLabels: {app: x}}]"), "HTTPRoute ns/a");
        assert_eq!(routes("targetSelectors: [{kind: HTTPRoute, matchLabels: {app: z}}]"), "");
        assert_eq!(routes("targetSelectors: [{kind: Gateway, matchLabels: {app: x}}]"), "");
    }
}
