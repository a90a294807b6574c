//! pd-control's own annotations of a pod: `envoy-pd/…`.

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::sources::kubernetes::rule::Texts;

/// Prefix of pd-control's annotations.
pub const ANNOTATION_PREFIX: &str = "envoy-pd/";
/// Names of pd-control's annotations, without the prefix.
pub const ANNOTATIONS: &[&str] = &[
    "role",
    "pool",
    "models",
    "models-closed",
    "port",
    "engine",
    "group",
    "revision",
    "weight",
    "cache-tokens",
    "bootstrap-port",
    "min-prompt-tokens",
    "max-prompt-tokens",
    "ranks",
    "state",
    "ignore",
];

/// The annotations of one pod, pd-control's and others.
#[derive(Clone, Copy, Debug)]
pub struct Annotations<'a>(pub &'a Texts);

impl<'a> Annotations<'a> {
    /// The text of one of pd-control's annotations; `None` when the pod has none of that name.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<&'a str> {
        self.0.get(&format!("{ANNOTATION_PREFIX}{name}")).map(String::as_str)
    }

    /// The first annotation with the prefix whose name is unknown; with its prefix.
    #[must_use]
    pub fn unknown(&self) -> Option<&'a str> {
        let ours = self.0.keys().filter_map(|key| Some((key, key.strip_prefix(ANNOTATION_PREFIX)?)));
        ours.filter(|(_, name)| !ANNOTATIONS.contains(name)).map(|(key, _)| key.as_str()).next()
    }

    /// One of pd-control's annotations, deserialised from a JSON string.
    ///
    /// # Errors
    /// One line that begins with the annotation.
    pub fn parsed<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, String> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let value = serde_json::from_value(Value::String(text.to_owned()));
        value.map(Some).map_err(|error| format!("{ANNOTATION_PREFIX}{name}: {error}"))
    }

    /// One of pd-control's annotations, `true` or `false`.
    ///
    /// # Errors
    /// One line that begins with the annotation.
    pub fn flag(&self, name: &str) -> Result<Option<bool>, String> {
        let Some(text) = self.text(name) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| format!("{ANNOTATION_PREFIX}{name}: {text:?} is neither true nor false"))
    }

    /// One of pd-control's annotations, parsed as a number.
    ///
    /// # Errors
    /// One line that begins with the annotation.
    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, String> {
        let Some(text) = self.text(name) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| format!("{ANNOTATION_PREFIX}{name}: {text:?} is no such number"))
    }
}
