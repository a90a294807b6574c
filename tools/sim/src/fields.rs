//! JSON bodies read without copies, with Python's idea of repeated keys, null and truth.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::api_error::ApiError;

/// Text borrowed where it has no escapes.
#[derive(Deserialize)]
pub(crate) struct Text<'a>(#[serde(borrow)] pub(crate) Cow<'a, str>);

/// A JSON object as it stands: of a repeated key the last one counts, as in Python.
pub(crate) struct Fields<'a>(pub(crate) Vec<(Text<'a>, &'a RawValue)>);

impl<'a> Fields<'a> {
    pub(crate) fn parse(body: &'a [u8]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(body)
            .map_err(|_| ApiError::bad_request("There was an error parsing the body: it is not UTF-8"))?;
        serde_json::from_str(text).map_err(|error| {
            ApiError::bad_request(format!(
                "[{{'type': 'json_invalid', 'loc': ('body', {}), 'msg': 'JSON decode error', 'input': {{}}, \
                 'ctx': {{'error': '{error}'}}}}]",
                error.column()
            ))
        })
    }

    /// The value of a key that is there and not null.
    pub(crate) fn raw(&self, name: &str) -> Option<&'a RawValue> {
        let value = self.0.iter().rev().find(|(key, _)| key.0 == name).map(|(_, value)| *value)?;
        (value.get() != "null").then_some(value)
    }

    pub(crate) fn get<T: DeserializeOwned>(&self, name: &'static str) -> Result<Option<T>, ApiError> {
        self.borrowed(name)
    }

    pub(crate) fn borrowed<T: Deserialize<'a>>(&self, name: &'static str) -> Result<Option<T>, ApiError> {
        self.raw(name).map(|raw| serde_json::from_str(raw.get()).map_err(|_| wrong_type(name))).transpose()
    }

    pub(crate) fn required<T: DeserializeOwned>(&self, name: &'static str) -> Result<T, ApiError> {
        self.get(name)?.ok_or_else(|| missing(name))
    }

    /// Whether Python would take the value for true.
    pub(crate) fn truthy(&self, name: &str) -> bool {
        let Some(raw) = self.raw(name) else { return false };
        let text = raw.get();
        match text.as_bytes() {
            [b't', ..] => true,
            [b'f', ..] | b"\"\"" => false,
            [b'[' | b'{', inner @ .., _] => !inner.iter().all(u8::is_ascii_whitespace),
            [b'"', ..] => true,
            _ => text.parse::<f64>().is_ok_and(|number| number != 0.0),
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Fields(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// `content` of a message.
pub(crate) enum Content<'a> {
    Text(Cow<'a, str>),
    Parts(Vec<Fields<'a>>),
}

impl<'de: 'a, 'a> Deserialize<'de> for Content<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Content<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or content parts")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Content<'de>, E> {
                Ok(Content::Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Content<'de>, E> {
                Ok(Content::Text(Cow::Owned(text.to_owned())))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Content<'de>, A::Error> {
                let mut parts = Vec::new();
                while let Some(part) = seq.next_element()? {
                    parts.push(part);
                }
                Ok(Content::Parts(parts))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// JSON without the white space between its tokens.
pub(crate) fn push_compact(out: &mut Vec<u8>, json: &str) {
    let (mut in_string, mut escaped) = (false, false);
    for byte in json.bytes() {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
        } else if byte.is_ascii_whitespace() {
            continue;
        } else {
            in_string = byte == b'"';
        }
        out.push(byte);
    }
}

pub(crate) fn missing(param: &'static str) -> ApiError {
    ApiError::bad_field(param, format!("[{{'type': 'missing', 'loc': ('body', '{param}'), 'msg': 'Field required'}}]"))
}

pub(crate) fn wrong_type(param: &'static str) -> ApiError {
    ApiError::bad_field(
        param,
        format!("[{{'type': 'type_error', 'loc': ('body', '{param}'), 'msg': 'Input should be of a valid type'}}]"),
    )
}
