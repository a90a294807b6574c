//! Whole documents and the values in them.

use std::borrow::Cow;

use super::error::{ErrorKind, ScanError};
use super::scanner::Scanner;
use super::span::{Span, slice};
use super::string::{means, unescape};

/// Checks a whole document, of any type.
///
/// # Errors
/// [`ScanError`] where the document is not valid JSON.
pub fn validate(json: &[u8]) -> Result<(), ScanError> {
    let mut scanner = Scanner::new(json)?;
    scanner.value(0)?;
    scanner.finish()
}

/// Finds a value in a document and returns its bytes as they stand, after checking the whole document.
///
/// Each element of `path` is a key or, where the value there is an array, a decimal index. The last of several members
/// with the same key counts. `None` when there is no such value; an empty path names the document itself.
///
/// ```
/// use pd_core::body::json::raw_member;
/// let answer = br#"{"choices":[{"disaggregated_params": {"a":9007199254740993}}]}"#;
/// let params = raw_member(answer, &["choices", "0", "disaggregated_params"])?;
/// assert_eq!(params, Some(&br#"{"a":9007199254740993}"#[..]));
/// # Ok::<(), pd_core::body::json::ScanError>(())
/// ```
///
/// # Errors
/// [`ScanError`] when the document is not valid JSON, wherever the fault is.
pub fn raw_member<'a>(json: &'a [u8], path: &[&str]) -> Result<Option<&'a [u8]>, ScanError> {
    let mut scanner = Scanner::new(json)?;
    let mut found = scanner.value(0)?.get(json);
    scanner.finish()?;
    for step in path {
        let next = match found.first() {
            Some(b'{') => members(found).filter(|(key, _)| key == step).last().map(|(_, value)| value),
            Some(b'[') => step.parse().ok().and_then(|index| elements(found).nth(index)),
            _ => None,
        };
        match next {
            Some(value) => found = value,
            None => return Ok(None),
        }
    }
    Ok(Some(found))
}

/// A checked JSON document and, if it is an object, its members. The default is an empty document without members.
#[derive(Debug, Default)]
pub struct Object<'a> {
    json: &'a [u8],
    /// Keys, without their quotes, and values.
    members: Vec<(Span, Span)>,
}

impl<'a> Object<'a> {
    /// Most members of an object; an object with more is refused.
    pub const MAX_MEMBERS: usize = 1_024;

    /// Checks a whole document and notes its members. A document that is not an object has none.
    ///
    /// # Errors
    /// [`ScanError`] when the document is not valid JSON, or an object of too many members.
    pub fn read(json: &'a [u8]) -> Result<Self, ScanError> {
        let mut scanner = Scanner::new(json)?;
        let mut members = Vec::new();
        scanner.white_space();
        if scanner.eat(b'{') {
            members.reserve(12);
            while let Some(member) = scanner.member(1, members.is_empty())? {
                if members.len() >= Self::MAX_MEMBERS {
                    return Err(scanner.error(ErrorKind::TooManyMembers));
                }
                members.push((member.key, member.value));
                if !member.more {
                    break;
                }
            }
        } else {
            scanner.value(0)?;
        }
        scanner.finish()?;
        Ok(Self { json, members })
    }

    /// The document without the white space around it.
    #[must_use]
    pub fn text(&self) -> &'a [u8] {
        self.json.trim_ascii()
    }

    /// The bytes of the value of a key; of several, the last one. `None` where there is no such key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&'a [u8]> {
        let is_meant = |(found, _): &&(Span, Span)| means(found.get(self.json), key);
        self.members.iter().rev().find(is_meant).map(|(_, value)| value.get(self.json))
    }

    /// Writes the document with another value for every member of that key. All other bytes stay.
    pub(crate) fn write_with(&self, key: &str, value: &[u8], out: &mut Vec<u8>) {
        let mut copied = 0;
        for (_, old) in self.members.iter().filter(|(found, _)| means(found.get(self.json), key)) {
            out.extend_from_slice(slice(self.json, copied, old.start));
            out.extend_from_slice(value);
            copied = old.end;
        }
        out.extend_from_slice(self.json.get(copied as usize..).unwrap_or_default());
    }
}

/// The members of a JSON object in their order, duplicates included: decoded key and the bytes of the value.
///
/// `object` should be a value that [`raw_member`] or a scan returned. The iterator ends at the first byte that is not valid,
/// and at once where `object` is not an object.
pub fn members(object: &[u8]) -> impl Iterator<Item = (Cow<'_, str>, &[u8])> {
    let mut scanner = Scanner::new(object).ok().filter(|_| object.first() == Some(&b'{'));
    if let Some(scanner) = &mut scanner {
        scanner.advance(1);
    }
    let mut first = true;
    core::iter::from_fn(move || {
        let member = scanner.as_mut()?.member(1, core::mem::take(&mut first)).ok().flatten();
        if !member.is_some_and(|member| member.more) {
            scanner = None;
        }
        let member = member?;
        Some((unescape(member.key.get(object))?, member.value.get(object)))
    })
}

/// A JSON object with another value for every member of one key (without escapes), or with that member in front if the object
/// has none. All other bytes stay. `None` where `object` is not a valid object.
#[must_use]
pub fn with_member(object: &[u8], key: &str, value: &[u8]) -> Option<Vec<u8>> {
    let mut scanner = Scanner::new(object).ok().filter(|_| object.first() == Some(&b'{'))?;
    scanner.advance(1);
    let mut out = Vec::with_capacity(object.len().saturating_add(value.len()));
    let (mut copied, mut first, mut found) = (0, true, false);
    while let Some(member) = scanner.member(1, core::mem::take(&mut first)).ok()? {
        if means(member.key.get(object), key) {
            out.extend_from_slice(slice(object, copied, member.value.start));
            out.extend_from_slice(value);
            copied = member.value.end;
            found = true;
        }
        if !member.more {
            break;
        }
    }
    scanner.finish().ok()?;
    if !found {
        let comma: &[u8] = if members(object).next().is_some() { b"," } else { b"" };
        return Some([format!("{{\"{key}\":").as_bytes(), value, comma, object.get(1..)?].concat());
    }
    out.extend_from_slice(object.get(copied as usize..)?);
    Some(out)
}

/// The elements of a JSON array in their order, as [`members`] has those of an object.
pub fn elements(array: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut scanner = Scanner::new(array).ok().filter(|_| array.first() == Some(&b'['));
    if let Some(scanner) = &mut scanner {
        scanner.advance(1);
    }
    let mut first = true;
    core::iter::from_fn(move || {
        let element = scanner.as_mut()?.element(1, core::mem::take(&mut first)).ok().flatten();
        if !element.is_some_and(|(_, more)| more) {
            scanner = None;
        }
        element.map(|(value, _)| value.get(array))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_members_value_is_replaced_and_all_else_stays() {
        for (object, expected) in [
            (r#"{"a":1, "k" : [2],"b":1e5 }"#, r#"{"a":1, "k" : "v","b":1e5 }"#),
            (r#"{"\u006b":1,"k":2}"#, r#"{"\u006b":"v","k":"v"}"#),
            (r#"{"a":1}"#, r#"{"k":"v","a":1}"#),
            ("{ }", r#"{"k":"v" }"#),
        ] {
            let changed = with_member(object.as_bytes(), "k", br#""v""#).unwrap();
            assert_eq!(String::from_utf8(changed).unwrap(), expected);
        }
        for object in ["", "[]", "null", "{", r#"{"k":}"#, r#"{"k":1}x"#] {
            assert_eq!(with_member(object.as_bytes(), "k", b"1"), None, "{object}");
        }
    }
}
