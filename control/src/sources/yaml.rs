//! Reads YAML and JSON files of an operator, within bounds. Every error has its line and column.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_saphyr::{Location, Spanned};

/// Longest file, in bytes: [`pd_core::wire::MAX_ENDPOINTS`] endpoints with every key fit.
pub const MAX_FILE_BYTES: u64 = 64 << 20;
/// Parser events that a file may cause, aliases included: [`pd_core::wire::MAX_ENDPOINTS`] endpoints of ten keys and a few
/// models fit.
pub const MAX_EVENTS: usize = 4_000_000;
/// Deepest nesting; an endpoints file has four levels.
pub const MAX_DEPTH: usize = 16;
/// Deepest nesting of Kubernetes objects. CustomResourceDefinitions, which may be in the same file, nest deepest.
const MAX_MANIFEST_DEPTH: usize = 256;

/// Why a file is refused: one line, `path:line:column: what`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileError {
    /// Path of the file, as the operator wrote it.
    pub path: PathBuf,
    /// Line and column, from 1; absent when the file could not be read.
    pub position: Option<(u64, u64)>,
    /// What is wrong, beginning with the key where there is one.
    pub message: String,
}

/// A fault in a text: a [`FileError`] without the path.
pub struct Problem {
    /// Line and column, from 1.
    pub position: (u64, u64),
    /// What is wrong, beginning with the key where there is one.
    pub message: String,
}

/// A YAML node with the position of each part.
pub enum Node {
    /// A string, number, boolean or null.
    Leaf(Value),
    /// A list.
    Sequence(Vec<Spanned<Node>>),
    /// A mapping: keys and values.
    Mapping(Vec<(Spanned<String>, Spanned<Node>)>),
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if let Some((line, column)) = self.position {
            write!(f, ":{line}:{column}")?;
        }
        write!(f, ": {}", self.message)
    }
}

impl std::error::Error for FileError {}

impl Problem {
    /// A fault at this location.
    #[must_use]
    pub fn at(location: Location, message: impl Into<String>) -> Self {
        Self { position: (location.line(), location.column()), message: message.into() }
    }

    /// Adds the path.
    #[must_use]
    pub fn of(self, path: &Path) -> FileError {
        FileError { path: path.to_owned(), position: Some(self.position), message: self.message }
    }
}

impl Node {
    /// The node as JSON, without positions.
    #[must_use]
    pub fn to_value(&self) -> Value {
        match self {
            Self::Leaf(value) => value.clone(),
            Self::Sequence(items) => items.iter().map(|item| item.value.to_value()).collect(),
            Self::Mapping(entries) => {
                entries.iter().map(|(key, node)| (key.value.clone(), node.value.to_value())).collect()
            }
        }
    }

    /// The kind of node, for error messages.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Leaf(Value::Null) => "nothing",
            Self::Leaf(_) => "a single value",
            Self::Sequence(_) => "a list",
            Self::Mapping(_) => "a mapping",
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }
    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Leaf(value.into()))
    }
    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Leaf(value.into()))
    }
    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Leaf(value.into()))
    }
    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Leaf(value.into()))
    }
    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Leaf(value.into()))
    }
    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Leaf(Value::Null))
    }
    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Leaf(Value::Null))
    }
    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        Node::deserialize(deserializer)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
        let mut sequence = Vec::new();
        while let Some(item) = items.next_element()? {
            sequence.push(item);
        }
        Ok(Node::Sequence(sequence))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Node, A::Error> {
        let mut mapping = Vec::new();
        while let Some(entry) = entries.next_entry()? {
            mapping.push(entry);
        }
        Ok(Node::Mapping(mapping))
    }
}

/// Reads a whole file; `-` is standard input.
///
/// # Errors
/// [`FileError`] without a position when the file cannot be read or is longer than [`MAX_FILE_BYTES`].
pub fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    let refuse = |message| FileError { path: path.to_owned(), position: None, message };
    let mut bytes = Vec::new();
    let open = || -> std::io::Result<Box<dyn Read>> {
        if path == Path::new("-") { Ok(Box::new(std::io::stdin())) } else { Ok(Box::new(std::fs::File::open(path)?)) }
    };
    open()
        .and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|error| refuse(format!("cannot be read: {error}")))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(refuse(format!("longer than {MAX_FILE_BYTES} bytes")));
    }
    Ok(bytes)
}

/// Parses a file's bytes. `path` is for the error only.
///
/// # Errors
/// [`FileError`] for the first fault.
pub fn parse<T: serde::de::DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T, FileError> {
    let budget = serde_saphyr::budget! { max_events: MAX_EVENTS, max_nodes: MAX_EVENTS, max_depth: MAX_DEPTH };
    let options = serde_saphyr::options! { budget: budget };
    let parsed = text_of(bytes)
        .and_then(|text| serde_saphyr::from_str_with_options(text, options).map_err(|error| syntax_problem(&error)));
    parsed.map_err(|problem| problem.of(path))
}

/// Parses a file of several documents and skips empty ones. `path` is for the error only.
///
/// # Errors
/// [`FileError`] with line and column of the first thing that is wrong.
pub fn parse_documents<T: serde::de::DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<Vec<T>, FileError> {
    let budget = serde_saphyr::budget! { max_events: MAX_EVENTS, max_nodes: MAX_EVENTS, max_depth: MAX_MANIFEST_DEPTH };
    let options = serde_saphyr::options! { budget: budget };
    let parsed = text_of(bytes).and_then(|text| {
        serde_saphyr::from_multiple_with_options(text, options).map_err(|error| syntax_problem(&error))
    });
    parsed.map_err(|problem| problem.of(path))
}

/// The bytes as text.
///
/// # Errors
/// Position of the first byte that is not UTF-8.
pub fn text_of(bytes: &[u8]) -> Result<&str, Problem> {
    std::str::from_utf8(bytes).map_err(|error| {
        let before = bytes.get(..error.valid_up_to()).unwrap_or_default();
        let line = before.rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
        let column = String::from_utf8_lossy(line).chars().count() as u64 + 1;
        let line = before.iter().filter(|byte| **byte == b'\n').count() as u64 + 1;
        Problem { position: (line, column), message: "not UTF-8 text".into() }
    })
}

/// The fault that the YAML parser reports.
#[must_use]
pub fn syntax_problem(error: &serde_saphyr::Error) -> Problem {
    let position = error.location().map_or((1, 1), |location| (location.line(), location.column()));
    let text = error.without_snippet().to_string();
    // The position is in front of the message already, and the hint names a setting of the parser, which operators
    // cannot set.
    let message = text.strip_suffix(&format!(" at line {}, column {}", position.0, position.1)).unwrap_or(&text);
    let message = message.split(", set DuplicateKeyPolicy").next().unwrap_or(message);
    Problem { position, message: message.replace('\n', " ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_is_named() {
        let error = read(Path::new("no/such.yaml")).unwrap_err().to_string();
        assert!(error.starts_with("no/such.yaml: cannot be read: "), "{error}");
    }
}
