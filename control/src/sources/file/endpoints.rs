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
    fn refuse(&mut self, at: Location, message: impl Into<String>) {
        self.problems.push(Problem::at(at, message));
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
mod tests {
    use pd_core::wire::{Engine, Role, State};

    use super::*;

    fn parse_text(text: &str) -> Result<EndpointList, String> {
        parse(Path::new("e.yaml"), text.as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn every_key_of_an_endpoint_is_read() {
        let text = "
endpoints:
  - address: 10.0.0.1:8000
    rank: 3
    role: decode
    pool: big
    models: [llama, \"adapter\"]
    engine: vllm-nixl
    group: rack-1
    weight: 2
    cache_tokens: 500000
    min_prompt_tokens: 100
    max_prompt_tokens: 2000
    state: draining
  - {address: \"[::1]:80\", role: both}
";
        let full = Endpoint {
            rank: Some(3),
            pool: "big".into(),
            models: vec!["llama".into(), "adapter".into()],
            engine: Some(Engine::VllmNixl),
            group: Some("rack-1".into()),
            weight: 2.0,
            cache_tokens: Some(500_000),
            min_prompt_tokens: Some(100),
            max_prompt_tokens: Some(2_000),
            state: State::Draining,
            ..Endpoint::new("10.0.0.1:8000".parse().unwrap(), Role::Decode)
        };
        let short = Endpoint::new("[::1]:80".parse().unwrap(), Role::Both);
        assert_eq!(parse_text(text).unwrap().as_slice(), [full, short]);
    }

    #[test]
    fn json_is_read_with_tabs_and_escapes() {
        let text =
            "{\"endpoints\": [\n\t{\"address\": \"10.0.0.1:80\", \"role\": \"bo\\u0074h\", \"weight\": 1e1}\n]}\n";
        assert_eq!(parse_text(text).unwrap().as_slice()[0].weight, 10.0);
    }

    #[test]
    fn json_is_as_strict_as_yaml() {
        let endpoint = r#"{"address": "10.0.0.1:80", "role": "both""#;
        for (text, error) in [
            (format!(r#"{{"endpoints": [{endpoint}, "role": "both"}}]}}"#), "1:59: duplicate mapping key: role"),
            (format!(r#"{{"endpoints": [], "endpoints": [{endpoint}}}]}}"#), "1:19: duplicate mapping key: endpoints"),
            (
                format!("{{\"endpoints\": [\n{endpoint},\n \"weight\": 0}}]}}"),
                "3:12: endpoints[0].weight: must be between",
            ),
            (format!(r#"{{"endpoints": [{endpoint}, "x": 1}}]}}"#), "1:59: endpoints[0].x: unknown key"),
            (format!(r#"{{"endpoints": [{endpoint}}}], "x": 1}}"#), "1:61: x: unknown key"),
            (format!(r#"{{"endpoints": [{endpoint}}}"#), "1:15: unclosed bracket '['"),
        ] {
            let refused = parse_text(&text).unwrap_err();
            assert!(refused.starts_with(&format!("e.yaml:{error}")), "{refused}");
        }
    }

    #[test]
    fn json_and_yaml_of_one_list_are_equal() {
        let yaml = "endpoints:\n- {address: 10.0.0.1:80, role: both, weight: 2, models: [a], rank: 1, group: g}\n";
        let list = parse_text(yaml).unwrap();
        let json = serde_json::json!({"endpoints": list.as_slice()}).to_string();
        assert_eq!(parse_text(&json).unwrap(), list);
    }

    #[test]
    fn defaults_may_be_merged_from_an_anchor() {
        let text = "
endpoints:
  - &d {address: 10.0.0.1:80, role: prefill, pool: p}
  - {<<: *d, address: 10.0.0.2:80}
";
        let list = parse_text(text).unwrap();
        assert!(list.as_slice().iter().all(|endpoint| endpoint.pool == "p" && endpoint.role == Role::Prefill));
    }

    #[test]
    fn an_empty_list_has_to_be_written() {
        assert_eq!(parse_text("endpoints: []").unwrap(), EndpointList::default());
        for (text, error) in [
            ("", "e.yaml:1:1: must be a mapping with the key endpoints, not nothing"),
            ("# nothing\n", "e.yaml:2:1: must be a mapping with the key endpoints, not nothing"),
            ("{}", "e.yaml:1:1: endpoints: missing (`endpoints: []` is an empty list)"),
            ("endpoints:\n", "e.yaml:1:10: endpoints: must be a list (`[]` is an empty one), not nothing"),
        ] {
            assert_eq!(parse_text(text), Err(error.to_owned()));
        }
    }

    #[test]
    fn errors_name_line_column_endpoint_and_key() {
        let good = "endpoints:\n- address: 10.0.0.1:80\n  role: prefill\n";
        let second = "- address: 10.0.0.2:80\n  role: prefill\n";
        for (rest, error) in [
            (
                "- address: 10.0.0.2:80\n  role: boss\n",
                "5:9: endpoints[1].role: unknown variant `boss`, expected one of `prefill`, `decode`, `both`",
            ),
            ("- address: 10.0.0.2:80\n", "4:3: endpoints[1]: missing field `role`"),
            (
                "- address: engine:80\n  role: both\n",
                "4:12: endpoints[1].address: \"engine:80\" is not ip:port (host names are not resolved)",
            ),
            ("- address: 8000\n  role: both\n", "4:12: endpoints[1].address: invalid type: integer `8000`"),
            (
                "- address: 0.0.0.0:80\n  role: both\n",
                "4:12: endpoints[1].address: must not be the unspecified address",
            ),
            (
                "- address: 10.0.0.1:80\n  role: both\n",
                "4:12: endpoints[1].address: 10.0.0.1:80 is endpoints[0] in line 2 already",
            ),
            ("- 7\n", "4:3: endpoints[1]: must be a mapping of keys, not a single value"),
            ("extra: 1\n", "4:1: extra: unknown key; the only one is endpoints"),
        ] {
            let text = parse_text(&format!("{good}{rest}")).unwrap_err();
            assert!(text.starts_with(&format!("e.yaml:{error}")), "{text}");
        }
        for (rest, error) in [
            ("  weight: 1000\n", "6:11: endpoints[1].weight: must be between 0.01 and 100"),
            ("  weight: heavy\n", "6:11: endpoints[1].weight: invalid type: string \"heavy\", expected f64"),
            ("  weigth: 1\n", "6:3: endpoints[1].weigth: unknown key; known are address, rank, role, pool, models,"),
            ("  rank: -1\n", "6:9: endpoints[1].rank: invalid value: integer `-1`, expected u32"),
            (
                "  models:\n  - a\n  - 1.5\n",
                "8:5: endpoints[1].models[1]: invalid type: floating point `1.5`, expected a string",
            ),
            ("  models:\n  - a\n  - ''\n", "7:5: endpoints[1].models: names must have 1 to 256 bytes"),
            ("  role: decode\n", "6:3: duplicate mapping key: role"),
            ("  pool: [a\n", "6:9: unclosed bracket '['"),
        ] {
            let text = parse_text(&format!("{good}{second}{rest}")).unwrap_err();
            assert!(text.starts_with(&format!("e.yaml:{error}")), "{text}");
            assert!(!text.contains('\n'), "{text}");
        }
    }

    #[test]
    fn bytes_that_are_not_text_are_refused_with_their_place() {
        let error = parse(Path::new("e.yaml"), b"endpoints:\n- \xc3\xa4\xff").unwrap_err();
        assert_eq!(error.to_string(), "e.yaml:2:4: not UTF-8 text");
    }

    #[test]
    fn hostile_text_is_refused_within_bounds() {
        let bomb = "a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n\
                    d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e]\n\
                    g: &g [*f,*f,*f,*f,*f,*f,*f,*f]\nh: &h [*g,*g,*g,*g,*g,*g,*g,*g]\n";
        assert!(parse_text(bomb).is_err());
        assert!(parse_text(&"[".repeat(100_000)).is_err());
        assert!(parse_text(&"- ".repeat(100_000)).is_err());
    }

    #[test]
    fn as_many_endpoints_as_the_wire_takes_are_read() {
        let line = |n: usize| {
            let [_, a, b, c] = (n as u32).to_be_bytes();
            format!(r#"{{"address": "10.{a}.{b}.{c}:80", "role": "both", "pool": "p", "models": ["m"], "weight": 2}}"#)
        };
        let lines: Vec<_> = (0..=wire::MAX_ENDPOINTS).map(line).collect();
        let short = |line: &String| format!("- {}}}\n", line.split(", \"pool").next().unwrap_or(line));
        let yaml = |count: usize| format!("endpoints:\n{}", lines[..count].iter().map(short).collect::<String>());
        let json = |count: usize| format!("{{\"endpoints\": [{}]}}", lines[..count].join(",\n"));
        assert_eq!(parse_text(&yaml(wire::MAX_ENDPOINTS)).unwrap().as_slice().len(), wire::MAX_ENDPOINTS);
        assert_eq!(parse_text(&json(wire::MAX_ENDPOINTS)).unwrap().as_slice().len(), wire::MAX_ENDPOINTS);
        let error = parse_text(&json(wire::MAX_ENDPOINTS + 1)).unwrap_err();
        assert!(error.contains("more than 100000 endpoints"), "{error}");
    }
}
