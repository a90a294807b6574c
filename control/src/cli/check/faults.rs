//! Finds all faults of a configuration with a parser that names the first one.
//!
//! It leaves out the part that the parser names and parses again, until the rest is valid.

use std::collections::HashSet;
use std::fmt::Write;

use serde_json::Value;
use serde_saphyr::Spanned;

use crate::sources::yaml::Node;

/// Most faults of one file that are named.
pub(super) const MAX_FAULTS: usize = 100;

/// A step from the root of a value to a part of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Step {
    Key(String),
    Index(usize),
}

/// The first fault, as the parser names it.
pub(super) struct Error {
    /// Line of the parsed text, from 1; none: the message begins with the key.
    pub(super) line: Option<usize>,
    pub(super) message: String,
}

/// A fault and its place.
#[derive(Debug, PartialEq)]
pub(super) struct Fault {
    /// Path to the part with the fault; empty: the whole value.
    pub(super) steps: Vec<Step>,
    pub(super) what: String,
}

/// A value from which parts can be left out while the others keep their index.
enum Tree {
    Leaf(Value),
    List(Vec<(usize, Tree)>),
    Map(Vec<(String, Tree)>),
}

/// The JSON text of a tree, with one key or item a line, and the path of each line.
#[derive(Default)]
struct Lines {
    text: String,
    steps: Vec<Vec<Step>>,
}

/// All faults of a value, at most [`MAX_FAULTS`] and one more. `read` parses JSON text and returns its first fault.
pub(super) fn all(value: &Value, read: impl Fn(&str) -> Option<Error>) -> Vec<Fault> {
    let mut tree = Tree::new(value);
    let mut left_out = HashSet::new();
    let mut faults = Vec::new();
    while faults.len() <= MAX_FAULTS {
        let lines = Lines::of(&tree);
        let Some(Error { line, message }) = read(&lines.text) else { break };
        let (steps, what) = match line {
            Some(line) => (lines.steps.get(line.saturating_sub(1)).cloned().unwrap_or_default(), message),
            None => {
                let (steps, rest) = tree.resolve(&message);
                (steps, rest.to_owned())
            }
        };
        // A key that is missing because it was left out is no fault.
        let missing = what.strip_prefix("missing field `").and_then(|rest| rest.split('`').next());
        let missing = missing.map(|key| [steps.as_slice(), &[Step::Key(key.to_owned())]].concat());
        if missing.is_none_or(|missing| !left_out.contains(&missing)) {
            faults.push(Fault { steps: steps.clone(), what });
        }
        if !tree.leave_out(&steps) {
            break;
        }
        left_out.insert(steps);
    }
    faults
}

impl Fault {
    /// The path as people write it: `pools.a.split`, `endpoints[3].role`.
    pub(super) fn key(&self) -> String {
        let mut text = String::new();
        for step in &self.steps {
            // Writing to a string cannot fail.
            let _ = match step {
                Step::Key(key) if text.is_empty() => write!(text, "{key}"),
                Step::Key(key) => write!(text, ".{key}"),
                Step::Index(index) => write!(text, "[{index}]"),
            };
        }
        text
    }

    /// Line and column of the fault in the file of the value.
    pub(super) fn position(&self, root: &Spanned<Node>) -> (u64, u64) {
        let mut place = (root.defined.line(), root.defined.column());
        let mut node = root;
        for (i, step) in self.steps.iter().enumerate() {
            let is_key = i + 1 == self.steps.len() && self.what.starts_with("unknown ");
            let next = match (step, &node.value) {
                (Step::Key(wanted), Node::Mapping(entries)) => {
                    let entry = entries.iter().find(|(key, _)| key.value == *wanted);
                    entry.map(|(key, node)| (if is_key { key.defined } else { node.defined }, node))
                }
                (Step::Index(index), Node::Sequence(items)) => items.get(*index).map(|node| (node.defined, node)),
                _ => None,
            };
            let Some((mark, next)) = next else { break };
            (place, node) = ((mark.line(), mark.column()), next);
        }
        place
    }
}

impl Tree {
    fn new(value: &Value) -> Self {
        match value {
            Value::Array(items) => Self::List(items.iter().map(Self::new).enumerate().collect()),
            Value::Object(members) => {
                Self::Map(members.iter().map(|(key, value)| (key.clone(), Self::new(value))).collect())
            }
            leaf => Self::Leaf(leaf.clone()),
        }
    }

    /// The longest path at the beginning of a message, and the rest of the message.
    fn resolve<'a>(&self, message: &'a str) -> (Vec<Step>, &'a str) {
        let (mut tree, mut rest, mut steps) = (self, message, Vec::new());
        loop {
            let next = match tree {
                Self::Leaf(_) => None,
                Self::List(items) => rest.strip_prefix('[').and_then(|inner| {
                    let (number, after) = inner.split_once(']')?;
                    // The parser counts the items that are left.
                    let (index, item) = items.get(number.parse::<usize>().ok()?)?;
                    Some((Step::Index(*index), item, after))
                }),
                Self::Map(members) => {
                    let inner = rest.strip_prefix('.').filter(|_| !steps.is_empty()).unwrap_or(rest);
                    let is_whole = |after: &str| after.is_empty() || after.starts_with(['.', '[', ':']);
                    let found = members.iter().filter_map(|(key, member)| {
                        let after = inner.strip_prefix(key.as_str()).filter(|after| is_whole(after))?;
                        Some((Step::Key(key.clone()), member, after))
                    });
                    found.min_by_key(|(_, _, after)| after.len())
                }
            };
            let Some((step, inner, after)) = next else { break };
            steps.push(step);
            (tree, rest) = (inner, after);
        }
        (steps, rest.strip_prefix(": ").unwrap_or(rest))
    }

    /// Leaves a part out; returns whether it was there.
    fn leave_out(&mut self, steps: &[Step]) -> bool {
        let Some((step, rest)) = steps.split_first() else { return false };
        match (self, step) {
            (Self::Map(members), Step::Key(key)) => {
                let Some(index) = members.iter().position(|(known, _)| known == key) else { return false };
                if rest.is_empty() {
                    members.remove(index);
                    return true;
                }
                members.get_mut(index).is_some_and(|(_, member)| member.leave_out(rest))
            }
            (Self::List(items), Step::Index(wanted)) => {
                let Some(index) = items.iter().position(|(known, _)| known == wanted) else { return false };
                if rest.is_empty() {
                    items.remove(index);
                    return true;
                }
                items.get_mut(index).is_some_and(|(_, item)| item.leave_out(rest))
            }
            _ => false,
        }
    }
}

impl Lines {
    fn of(tree: &Tree) -> Self {
        let mut lines = Self { text: String::new(), steps: vec![Vec::new()] };
        lines.add(tree, &mut Vec::new());
        lines
    }

    fn add(&mut self, tree: &Tree, steps: &mut Vec<Step>) {
        match tree {
            Tree::Leaf(value) => self.text += &value.to_string(),
            Tree::List(items) => {
                self.text.push('[');
                for (i, (index, item)) in items.iter().enumerate() {
                    self.inner(i, Step::Index(*index), "", item, steps);
                }
                self.end(']', items.is_empty(), steps);
            }
            Tree::Map(members) => {
                self.text.push('{');
                for (i, (key, member)) in members.iter().enumerate() {
                    let name = format!("{}: ", Value::from(key.as_str()));
                    self.inner(i, Step::Key(key.clone()), &name, member, steps);
                }
                self.end('}', members.is_empty(), steps);
            }
        }
    }

    fn inner(&mut self, i: usize, step: Step, name: &str, tree: &Tree, steps: &mut Vec<Step>) {
        self.text += if i == 0 { "\n" } else { ",\n" };
        steps.push(step);
        self.steps.push(steps.clone());
        self.text += name;
        self.add(tree, steps);
        steps.pop();
    }

    fn end(&mut self, bracket: char, is_empty: bool, steps: &[Step]) {
        if !is_empty {
            self.text.push('\n');
            self.steps.push(steps.to_vec());
        }
        self.text.push(bracket);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Refuses numbers, the first in the text, by its line.
    fn by_line(text: &str) -> Option<Error> {
        let is_number = |line: &str| line.trim_end_matches(',').rsplit(' ').next().unwrap().parse::<f64>().is_ok();
        let line = text.lines().position(is_number)? + 1;
        Some(Error { line: Some(line), message: "a number".to_owned() })
    }

    fn keys(faults: &[Fault]) -> Vec<String> {
        faults.iter().map(Fault::key).collect()
    }

    #[test]
    fn every_fault_is_found_by_its_line() {
        let value = json!({"a": {"b.c": [1, "x", 2, {"d": 3}]}, "e": 4, "f": {}, "g": []});
        let mut found = keys(&all(&value, by_line));
        found.sort();
        assert_eq!(found, ["a.b.c[0]", "a.b.c[2]", "a.b.c[3].d", "e"]);
        assert!(all(&json!({"a": "b"}), by_line).is_empty());
        assert_eq!(all(&json!(1), by_line), [Fault { steps: Vec::new(), what: "a number".into() }]);
    }

    #[test]
    fn a_message_that_begins_with_the_key_is_resolved_also_after_others_were_left_out() {
        let value = json!({"a": [{"b": 1}, {"b": 2}, {"b.c": 3}]});
        let read = |text: &str| {
            let value: Value = serde_json::from_str(text).unwrap();
            let items = value["a"].as_array().unwrap();
            let bad = |item: &Value| item.get("b").map_or("b.c", |_| "b");
            let index = items.iter().position(|item| item.as_object().is_some_and(|it| !it.is_empty()))?;
            let message = format!("a[{index}].{}: is wrong: very", bad(&items[index]));
            Some(Error { line: None, message })
        };
        let found = all(&value, read);
        assert_eq!(keys(&found), ["a[0].b", "a[1].b", "a[2].b.c"]);
        assert_eq!(found[0].what, "is wrong: very");
        let unknown = all(&value, |_| Some(Error { line: None, message: "nowhere: wrong".into() }));
        assert_eq!(unknown, [Fault { steps: Vec::new(), what: "nowhere: wrong".into() }]);
    }

    #[test]
    fn a_key_that_was_left_out_is_not_called_missing() {
        let read = |text: &str| {
            let value: Value = serde_json::from_str(text).unwrap();
            let item = value["a"].get(0)?;
            let line = text.lines().position(|line| line.contains("\"b\"")).map(|index| index + 1);
            match item.get("b") {
                Some(_) => Some(Error { line, message: "wrong".into() }),
                None => Some(Error { line: Some(3), message: "missing field `b`".into() }),
            }
        };
        assert_eq!(keys(&all(&json!({"a": [{"b": 1, "c": 2}]}), read)), ["a[0].b"]);
        assert_eq!(keys(&all(&json!({"a": [{"c": 2}]}), read)), ["a[0]"]);
    }

    #[test]
    fn faults_are_bounded() {
        let value: Value = (0..1_000).collect();
        assert_eq!(all(&value, by_line).len(), MAX_FAULTS + 1);
    }
}
