//! The endpoints file: parses YAML or JSON into a checked list.
//!
//! ```yaml
//! endpoints:
//!   - address: 127.0.0.1:8100
//!     role: prefill
//! ```
//! The keys of an endpoint are those of [`pd_core::wire::Endpoint`]; any other key is refused. A list of thousands is
//! better written as JSON, which is read ten times faster.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;

use pd_core::wire::{self, Endpoint, WireError};
use serde::Deserialize;
use serde_json::Value;
use serde_path_to_error::Segment;
use serde_saphyr::{Location, Spanned};

use crate::list::EndpointList;
use crate::sources::yaml::{FileError, MAX_DEPTH, MAX_EVENTS, Node, Problem, syntax_problem, text_of};

/// Parses a file's bytes. `path` is for the error only.
///
/// # Errors
/// [`FileError`] with line and column of the first fault.
pub fn parse(path: &Path, bytes: &[u8]) -> Result<EndpointList, FileError> {
    let first = |problems: Vec<Problem>| problems.into_iter().next();
    parse_bytes(bytes, 1).map_err(|problems| match first(problems) {
        Some(problem) => problem.of(path),
        None => FileError { path: path.to_owned(), position: None, message: "refused".to_owned() },
    })
}

/// Parses a file's bytes and names every fault, up to `limit`.
///
/// # Errors
/// At least one [`FileError`] with line and column. For a syntax error it is the only one: the parser cannot read on.
pub fn parse_all(path: &Path, bytes: &[u8], limit: usize) -> Result<EndpointList, Vec<FileError>> {
    parse_bytes(bytes, limit).map_err(|problems| problems.into_iter().map(|problem| problem.of(path)).collect())
}

fn parse_bytes(bytes: &[u8], limit: usize) -> Result<EndpointList, Vec<Problem>> {
    let text = text_of(bytes).map_err(|problem| vec![problem])?;
    // The YAML parser reports faults in JSON, too: it knows the lines.
    if let Some(list) = text.trim_start().starts_with('{').then(|| parse_json(text)).flatten() {
        return Ok(list);
    }
    let budget = serde_saphyr::budget! {
        max_events: MAX_EVENTS,
        max_nodes: MAX_EVENTS,
        max_depth: MAX_DEPTH,
        max_merge_keys: wire::MAX_ENDPOINTS,
        max_aliases: wire::MAX_ENDPOINTS,
        // Operators write defaults as one anchor that every endpoint merges. The other limits bound the work.
        enforce_alias_anchor_ratio: false,
    };
    let options = serde_saphyr::options! { budget: budget };
    let root = serde_saphyr::from_str_with_options(text, options).map_err(|error| vec![syntax_problem(&error)])?;
    let mut reader = Reader { problems: Vec::new(), limit };
    let list = reader.list(&root);
    match list {
        Some(list) if reader.problems.is_empty() => Ok(list),
        _ => Err(reader.problems),
    }
}

/// Reads a valid JSON list, as programs write it, many times faster than the YAML parser.
fn parse_json(text: &str) -> Option<EndpointList> {
    #[derive(Deserialize)]
    struct Root {
        endpoints: Vec<Endpoint>,
    }
    let mut has_unknown_key = false;
    let mut reader = serde_json::Deserializer::from_str(text);
    let root: Root = serde_ignored::deserialize(&mut reader, |_| has_unknown_key = true).ok()?;
    reader.end().ok()?;
    EndpointList::new(root.endpoints).ok().filter(|_| !has_unknown_key)
}

/// Reads a list and collects its faults.
struct Reader {
    problems: Vec<Problem>,
    limit: usize,
}

impl Reader {
    fn refuse(&mut self, location: Location, message: impl Into<String>) {
        self.problems.push(Problem::at(location, message));
    }

    fn is_full(&self) -> bool {
        self.problems.len() >= self.limit
    }

    fn list(&mut self, root: &Spanned<Node>) -> Option<EndpointList> {
        let Node::Mapping(entries) = &root.value else {
            let message = format!("must be a mapping with the key endpoints, not {}", root.value.kind());
            self.refuse(root.defined, message);
            return None;
        };
        for (key, _) in entries.iter().filter(|(key, _)| key.value != "endpoints") {
            self.refuse(key.defined, format!("{}: unknown key; the only one is endpoints", key.value));
        }
        let Some(node) = value_of(root, "endpoints") else {
            if entries.is_empty() {
                self.refuse(root.defined, "endpoints: missing (`endpoints: []` is an empty list)");
            }
            return None;
        };
        let Node::Sequence(items) = &node.value else {
            let message = format!("endpoints: must be a list (`[]` is an empty one), not {}", node.value.kind());
            self.refuse(node.defined, message);
            return None;
        };
        if items.len() > wire::MAX_ENDPOINTS {
            self.refuse(node.defined, format!("endpoints: {}", WireError::TooMany));
            return None;
        }
        let mut seen = HashMap::with_capacity(items.len());
        let mut endpoints = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            if self.is_full() {
                return None;
            }
            let Some(endpoint) = self.endpoint(index, item) else { continue };
            let address = value_of(item, "address").map_or(item.defined, |node| node.defined);
            if let Some((first, line)) = seen.insert(endpoint.id(), (index, address.line())) {
                let id = endpoint.id();
                let message = format!("endpoints[{index}].address: {id} is endpoints[{first}] in line {line} already");
                self.refuse(address, message);
            }
            endpoints.push(endpoint);
        }
        if !self.problems.is_empty() {
            return None;
        }
        let list = EndpointList::new(endpoints);
        list.map_err(|error| self.refuse(node.defined, format!("endpoints: {error}"))).ok()
    }

    /// Reads an endpoint and leaves wrong values out; `None` when its address is wrong.
    fn endpoint(&mut self, index: usize, item: &Spanned<Node>) -> Option<Endpoint> {
        let Node::Mapping(entries) = &item.value else {
            let message = format!("endpoints[{index}]: must be a mapping of keys, not {}", item.value.kind());
            self.refuse(item.defined, message);
            return None;
        };
        let mut draft = Draft { value: item.value.to_value(), has_address: true };
        while let Some(unknown) = draft.value.as_object().and_then(wire::unknown_endpoint_key).map(str::to_owned) {
            let key = entries.iter().find(|(key, _)| key.value == unknown).map_or(item.defined, |(key, _)| key.defined);
            let known = wire::ENDPOINT_KEYS.join(", ");
            self.refuse(key, format!("endpoints[{index}].{unknown}: unknown key; known are {known}"));
            draft.leave_out(&unknown);
        }
        if let Some(text) = draft.value.get("address").and_then(Value::as_str)
            && text.parse::<SocketAddr>().is_err()
        {
            let location = value_of(item, "address").map_or(item.defined, |node| node.defined);
            let message = format!("endpoints[{index}].address: {text:?} is not ip:port (host names are not resolved)");
            self.refuse(location, message);
            draft.leave_out("address");
        }
        // Each round names one fault and leaves its key out, until the rest is valid.
        loop {
            if self.is_full() {
                return None;
            }
            match serde_path_to_error::deserialize::<_, Endpoint>(&draft.value) {
                Err(error) => {
                    let key = self.refuse_value(index, item, &error);
                    draft.leave_out(&key?);
                }
                Ok(endpoint) => match endpoint.validate() {
                    Ok(()) => return draft.has_address.then_some(endpoint),
                    Err(WireError::BadEndpoint { key, why, .. }) => {
                        let location = value_of(item, key).map_or(item.defined, |node| node.defined);
                        self.refuse(location, format!("endpoints[{index}].{key}: {why}"));
                        draft.leave_out(key);
                    }
                    Err(other) => {
                        self.refuse(item.defined, format!("endpoints[{index}]: {other}"));
                        return None;
                    }
                },
            }
        }
    }

    /// Names the fault of a value; returns its key, or the key that is missing.
    fn refuse_value(
        &mut self,
        index: usize,
        item: &Spanned<Node>,
        error: &serde_path_to_error::Error<serde_json::Error>,
    ) -> Option<String> {
        let path = error.path();
        let key = path.iter().next().and_then(|first| match first {
            Segment::Map { key } => Some(key.clone()),
            _ => None,
        });
        let text = error.inner().to_string();
        let named = if key.is_some() { format!(".{path}") } else { String::new() };
        self.refuse(locate(item, path), format!("endpoints[{index}]{named}: {text}"));
        let missing =
            || text.strip_prefix("missing field `").and_then(|rest| rest.split('`').next()).map(str::to_owned);
        key.or_else(missing)
    }
}

/// The keys of an endpoint. The reader leaves wrong ones out to read the others.
struct Draft {
    value: Value,
    /// Whether the address is the one of the file.
    has_address: bool,
}

impl Draft {
    fn leave_out(&mut self, key: &str) {
        let Some(object) = self.value.as_object_mut() else { return };
        object.remove(key);
        match key {
            "address" => {
                object.insert(key.to_owned(), "192.0.2.1:1".into());
                self.has_address = false;
            }
            "role" => drop(object.insert(key.to_owned(), "both".into())),
            _ => {}
        }
    }
}

fn value_of<'a>(item: &'a Spanned<Node>, wanted: &str) -> Option<&'a Spanned<Node>> {
    match &item.value {
        Node::Mapping(entries) => entries.iter().find(|(key, _)| key.value == wanted).map(|(_, node)| node),
        _ => None,
    }
}

/// Location of the deepest part of a path that the text has.
fn locate(item: &Spanned<Node>, path: &serde_path_to_error::Path) -> Location {
    let mut node = item;
    for segment in path {
        let next = match (segment, &node.value) {
            (Segment::Map { key }, _) => value_of(node, key),
            (Segment::Seq { index }, Node::Sequence(items)) => items.get(*index),
            _ => None,
        };
        match next {
            Some(next) => node = next,
            None => break,
        }
    }
    node.defined
}

#[cfg(test)]
mod tests;
