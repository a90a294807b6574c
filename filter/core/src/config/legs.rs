//! What prefill legs have beside the client's request: headers, host and path. No route of the gateway changes a leg, so
//! what a route adds for engines has to be configured here.

use core::fmt;

use serde::Deserialize;

use super::error::ConfigError;
use super::names::{check_header_name, check_name};
use crate::headers::Headers;

/// Headers that carry credentials. Their values must not stand in a configuration, which Envoy and Kubernetes show.
const CREDENTIALS: &[&str] = &["authorization", "proxy-authorization", "cookie", "x-api-key", "api-key"];

/// How prefill legs differ from the client's request. Nothing by default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Legs {
    /// Headers, in the order in which they are applied.
    pub headers: Vec<LegHeader>,
    /// `:authority`; absent: the client's.
    pub authority: Option<String>,
    /// What stands before the path of the engine's API; empty: nothing.
    pub path_prefix: String,
}

/// A header of legs.
#[derive(Clone, Debug, PartialEq)]
pub struct LegHeader {
    /// Name in lower case.
    pub name: String,
    /// Its value.
    pub value: LegValue,
    /// Whether the client's own request gets it too, and so decode legs and whole requests.
    pub is_for_all: bool,
}

/// The value of a header of legs. It takes the place of all that the client sent under that name.
#[derive(Clone, PartialEq)]
pub enum LegValue {
    /// This text.
    Fixed(String),
    /// The text before it, and the value of an environment variable of the Envoy process.
    Env {
        /// Text before the value.
        prefix: String,
        /// Name of the variable.
        variable: String,
        /// Both; absent until the configuration is in force.
        text: Option<String>,
    },
    /// The client's values under another name; none where the client has none.
    From(String),
    /// None.
    Removed,
}

impl LegValue {
    /// The environment variable that it comes from.
    #[must_use]
    pub fn variable(&self) -> Option<&str> {
        if let Self::Env { variable, .. } = self { Some(variable) } else { None }
    }
}

impl fmt::Debug for LegValue {
    /// Without the value of a variable, which is a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(text) => f.debug_tuple("Fixed").field(text).finish(),
            Self::Env { variable, .. } => f.debug_tuple("Env").field(variable).finish(),
            Self::From(name) => f.debug_tuple("From").field(name).finish(),
            Self::Removed => f.write_str("Removed"),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawLegs {
    headers: Vec<RawHeader>,
    authority: Option<String>,
    path_prefix: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHeader {
    name: String,
    value: Option<String>,
    env: Option<String>,
    prefix: Option<String>,
    from: Option<String>,
    #[serde(default)]
    remove: bool,
    #[serde(default)]
    legs: Which,
}

#[derive(Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Which {
    #[default]
    Prefill,
    All,
}

impl Legs {
    pub(super) fn check(raw: RawLegs) -> Result<Self, ConfigError> {
        if let Some(authority) = &raw.authority {
            check_name("legs.authority", authority)?;
        }
        let prefix = &raw.path_prefix;
        if !prefix.is_empty() && (!prefix.starts_with('/') || prefix.ends_with('/') || prefix.contains(['?', '#', ' ']))
        {
            let why = "must be a path such as `/llm`, without a slash at its end";
            return Err(ConfigError::new("legs.path_prefix", why));
        }
        let named = raw.headers.into_iter().enumerate();
        let headers = named.map(|(i, header)| header.check(&format!("legs.headers[{i}]"))).collect::<Result<_, _>>()?;
        Ok(Self { headers, authority: raw.authority, path_prefix: raw.path_prefix })
    }

    /// Takes the values of variables from the environment of the Envoy process.
    ///
    /// # Errors
    /// [`ConfigError`] names the first header whose variable is not set or cannot stand in a header.
    pub(crate) fn resolve(&mut self, variable_of: impl Fn(&str) -> Option<String>) -> Result<(), ConfigError> {
        for (i, header) in self.headers.iter_mut().enumerate() {
            let LegValue::Env { prefix, variable, text } = &mut header.value else { continue };
            let refuse = |why: &str| ConfigError::new(&format!("legs.headers[{i}].env"), format!("{variable} {why}"));
            let value =
                variable_of(variable).ok_or_else(|| refuse("is not set, or Envoy does not pass it to the filter"))?;
            // Files that become variables often end in a line break.
            let value = value.trim_end_matches(['\r', '\n']);
            if value.is_empty() || !is_value(value) {
                return Err(refuse("must be visible ASCII characters and spaces"));
            }
            *text = Some(format!("{prefix}{value}"));
        }
        Ok(())
    }

    /// Headers of a leg: those of a request, changed.
    #[must_use]
    pub(crate) fn apply(&self, headers: Headers) -> Headers {
        let mut changed = headers;
        for header in &self.headers {
            let values = header.values(&changed);
            let kept = changed.iter().filter(|(name, _)| *name != header.name.as_bytes());
            let new = values.iter().map(|value| (header.name.as_bytes(), value.as_slice()));
            changed = Headers::from_pairs(kept.chain(new));
        }
        changed
    }
}

impl RawHeader {
    fn check(self, key: &str) -> Result<LegHeader, ConfigError> {
        check_header_name(&format!("{key}.name"), &self.name)?;
        let Self { name, value, env, prefix, from, remove, legs } = self;
        if matches!(name.as_str(), "host" | "content-length" | "transfer-encoding" | "connection") {
            return Err(ConfigError::new(&format!("{key}.name"), format!("{name} is Envoy's to set")));
        }
        if prefix.is_some() && env.is_none() {
            return Err(ConfigError::new(&format!("{key}.prefix"), "stands before the value of `env`"));
        }
        for (part, text) in [("value", &value), ("prefix", &prefix)] {
            if text.as_ref().is_some_and(|text| !is_value(text)) {
                let why = "must be visible ASCII characters and spaces";
                return Err(ConfigError::new(&format!("{key}.{part}"), why));
            }
        }
        let value = match (value, env, from, remove) {
            (Some(_), None, None, false) if CREDENTIALS.contains(&name.as_str()) => {
                let why = "a credential must not stand here: name a variable with `env`";
                return Err(ConfigError::new(&format!("{key}.value"), why));
            }
            (Some(value), None, None, false) => LegValue::Fixed(value),
            (None, Some(variable), None, false) => {
                check_name(&format!("{key}.env"), &variable)?;
                LegValue::Env { prefix: prefix.unwrap_or_default(), variable, text: None }
            }
            (None, None, Some(from), false) => {
                check_header_name(&format!("{key}.from"), &from)?;
                LegValue::From(from)
            }
            (None, None, None, true) => LegValue::Removed,
            _ => return Err(ConfigError::new(key, "must have one of `value`, `env`, `from` and `remove`")),
        };
        Ok(LegHeader { name, value, is_for_all: legs == Which::All })
    }
}

impl LegHeader {
    /// Its values for a request with these headers.
    #[must_use]
    pub(crate) fn values(&self, headers: &Headers) -> Vec<Vec<u8>> {
        match &self.value {
            LegValue::Fixed(text) => vec![text.clone().into_bytes()],
            LegValue::Env { text, .. } => text.iter().map(|text| text.clone().into_bytes()).collect(),
            LegValue::From(from) => {
                headers.iter().filter(|(name, _)| *name == from.as_bytes()).map(|(_, value)| value.to_vec()).collect()
            }
            LegValue::Removed => Vec::new(),
        }
    }
}

/// Whether a text may be a header's value.
fn is_value(text: &str) -> bool {
    text.len() <= 8_192 && text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ')
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use super::*;

    fn legs(text: &str) -> Result<Legs, String> {
        Config::parse(format!(r#"{{"legs":{text}}}"#).as_bytes()).map(|config| config.legs).map_err(|it| it.to_string())
    }

    fn applied(text: &str, headers: &[(&str, &str)]) -> Vec<(String, String)> {
        let mut legs = legs(text).unwrap();
        legs.resolve(|name| (name == "KEY").then(|| "s3cret\n".to_owned())).unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let headers = legs.apply(Headers::from_pairs(headers.iter().copied()));
        headers.iter().map(|(name, value)| (text(name), text(value))).collect()
    }

    #[test]
    fn headers_are_fixed_copied_removed_or_from_the_environment() {
        let config = r#"{"headers":[
            {"name":"x-a","value":"fixed text"},
            {"name":"authorization","env":"KEY","prefix":"Bearer "},
            {"name":"x-user","from":"x-forwarded-user"},
            {"name":"x-forwarded-user","remove":true},
            {"name":"x-forged","from":"x-absent"}
        ]}"#;
        let client = [
            ("authorization", "Bearer client"),
            ("x-user", "forged"),
            ("x-forwarded-user", "a"),
            ("x-forwarded-user", "b"),
            ("x-forged", "1"),
            ("x-kept", "2"),
        ];
        let expected = [
            ("x-kept", "2"),
            ("x-a", "fixed text"),
            ("authorization", "Bearer s3cret"),
            ("x-user", "a"),
            ("x-user", "b"),
        ];
        assert_eq!(applied(config, &client), expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    #[test]
    fn a_variable_must_be_there_and_its_value_is_never_shown() {
        let mut legs = legs(r#"{"headers":[{"name":"x","value":"1"},{"name":"authorization","env":"KEY"}]}"#).unwrap();
        let refusal =
            |legs: &mut Legs, value: Option<&str>| legs.resolve(|_| value.map(str::to_owned)).unwrap_err().to_string();
        let unset = refusal(&mut legs, None);
        assert_eq!(unset, "legs.headers[1].env: KEY is not set, or Envoy does not pass it to the filter");
        for wrong in ["", "\n", "s3cret\r\nx: y", "s3crét"] {
            let shown = refusal(&mut legs, Some(wrong));
            assert_eq!(shown, "legs.headers[1].env: KEY must be visible ASCII characters and spaces");
        }
        legs.resolve(|_| Some("s3cret".to_owned())).unwrap();
        assert!(!format!("{legs:?}").contains("s3cret"));
    }

    #[test]
    fn what_cannot_be_sent_or_should_not_be_shown_is_refused_with_its_key() {
        for (text, why) in [
            (r#"{"headers":[{"name":"X-A","value":"1"}]}"#, "legs.headers[0].name: must be"),
            (r#"{"headers":[{"name":"x"}]}"#, "legs.headers[0]: must have one of"),
            (r#"{"headers":[{"name":"x","value":"1","from":"y"}]}"#, "legs.headers[0]: must have one of"),
            (r#"{"headers":[{"name":"x","value":"a\nb"}]}"#, "legs.headers[0].value: must be visible"),
            (r#"{"headers":[{"name":"x","value":"a","prefix":"b"}]}"#, "legs.headers[0].prefix: stands before"),
            (r#"{"headers":[{"name":"authorization","value":"Bearer x"}]}"#, "legs.headers[0].value: a credential"),
            (r#"{"headers":[{"name":"host","value":"x"}]}"#, "legs.headers[0].name: host is Envoy's"),
            (r#"{"authority":""}"#, "legs.authority: must be"),
            (r#"{"path_prefix":"llm"}"#, "legs.path_prefix: must be a path"),
            (r#"{"path_prefix":"/llm/"}"#, "legs.path_prefix: must be a path"),
            (r#"{"header":[]}"#, "plugin configuration: unknown field `header`"),
        ] {
            let error = legs(text).unwrap_err();
            assert!(error.starts_with(why), "{text}: {error}");
        }
        assert_eq!(legs("{}").unwrap(), Legs::default());
    }
}
