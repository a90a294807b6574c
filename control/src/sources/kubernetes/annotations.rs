//! pd-control's own annotations of a pod: `envoy-pd/…`.

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::sources::kubernetes::rule::Texts;

/// Begins the names of our annotations.
pub const ANNOTATION_PREFIX: &str = "envoy-pd/";
/// Our annotations, without their prefix.
pub const ANNOTATIONS: &[&str] = &[
    "role",
    "pool",
    "models",
    "port",
    "engine",
    "group",
    "weight",
    "cache-tokens",
    "bootstrap-port",
    "min-prompt-tokens",
    "max-prompt-tokens",
    "ranks",
    "state",
    "ignore",
];

/// Those of one pod.
#[derive(Clone, Copy, Debug)]
pub struct Annotations<'a>(pub &'a Texts);

impl<'a> Annotations<'a> {
    /// The text of one of them.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<&'a str> {
        self.0.get(&format!("{ANNOTATION_PREFIX}{name}")).map(String::as_str)
    }

    /// The first one that pd-control does not know, with its prefix.
    #[must_use]
    pub fn unknown(&self) -> Option<&'a str> {
        let ours = self.0.keys().filter_map(|key| Some((key, key.strip_prefix(ANNOTATION_PREFIX)?)));
        ours.filter(|(_, name)| !ANNOTATIONS.contains(name)).map(|(key, _)| key.as_str()).next()
    }

    /// One of them, read as the text of a JSON string is.
    ///
    /// # Errors
    /// What is wrong with it, after its name.
    pub fn parsed<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, String> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let value = serde_json::from_value(Value::String(text.to_owned()));
        value.map(Some).map_err(|error| format!("{ANNOTATION_PREFIX}{name}: {error}"))
    }

    /// One of them, read as a number.
    ///
    /// # Errors
    /// What is wrong with it, after its name.
    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, String> {
        let Some(text) = self.text(name) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| format!("{ANNOTATION_PREFIX}{name}: {text:?} is no such number"))
    }
}
