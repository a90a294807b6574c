//! A validating scanner of JSON bytes. It finds where values begin and end, and builds no values.
//!
//! The scanner accepts what `serde_json::from_slice::<serde_json::Value>` accepts and refuses everything else, so every
//! engine reads as JSON what passes here. It checks UTF-8, control characters, escapes and surrogate pairs in strings, the
//! grammar and range of numbers (`1e999` is refused), the depth ([`MAX_DEPTH`]), and that only white space follows the value.
//!
//! The work is one forward pass. Strings, which are nearly all of a long body, are passed over in blocks of 64 bytes.

use core::fmt;
use std::borrow::Cow;

mod mark;
mod scanner;
mod text;

pub use mark::{MAX_MEDIA, MediaKind};
pub(in crate::body) use mark::{Mark, MediaKey};
pub(crate) use scanner::{RawMember, Scanner};

/// Most objects and arrays that may be open at once; a document with more is refused. `serde_json` has the same limit.
pub const MAX_DEPTH: u32 = 127;

/// Bytes of a document that lie between two offsets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Offset of the first byte.
    pub start: u32,
    /// Offset just past the last byte.
    pub end: u32,
}

impl Span {
    /// A span of offsets that fit in 32 bits, as those of a scanned document do.
    pub(crate) fn new(start: usize, end: usize) -> Self {
        Self { start: to_offset(start), end: to_offset(end) }
    }

    /// The bytes of `body` in this span; empty when `body` is shorter than the document that was scanned.
    #[must_use]
    pub fn get<'a>(&self, body: &'a [u8]) -> &'a [u8] {
        slice(body, self.start, self.end)
    }

    /// Number of bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.end.saturating_sub(self.start) as usize
    }

    /// Whether the span has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// `body[start..end]`, empty when out of range.
pub(crate) fn slice(body: &[u8], start: u32, end: u32) -> &[u8] {
    body.get(start as usize..end as usize).unwrap_or_default()
}

/// An offset of a document whose length was checked to fit.
fn to_offset(offset: usize) -> u32 {
    u32::try_from(offset).unwrap_or(u32::MAX)
}

/// What is wrong with a document. The filter answers 400 to a request with such a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The document has 4 GiB or more.
    TooLarge,
    /// The document is valid or not, but does not begin as an object. Only [`crate::body::scan`] wants one.
    NotAnObject,
    /// The document ends inside a value.
    Truncated,
    /// A value should stand here.
    ExpectedValue,
    /// A quoted key should stand here.
    ExpectedKey,
    /// A colon should stand here.
    ExpectedColon,
    /// A comma or the end of the object or array should stand here.
    ExpectedComma,
    /// A string holds a character below U+0020 as it stands.
    ControlCharacter,
    /// A string holds an escape that does not exist, or half a surrogate pair.
    BadEscape,
    /// A number that is not one of JSON's.
    BadNumber,
    /// A number beyond what a 64-bit float holds.
    NumberOutOfRange,
    /// A string is not UTF-8.
    BadUtf8,
    /// More than [`MAX_DEPTH`] objects and arrays inside each other.
    TooDeep,
    /// Something follows the document.
    Trailing,
    /// An object has more members than [`crate::body::MAX_MEMBERS`] or [`Object::MAX_MEMBERS`] allow.
    TooManyMembers,
}

/// Where and why a document is refused. Its `Display` is fit for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanError {
    /// What is wrong.
    pub kind: ErrorKind,
    /// Offset of the byte at which the scanner noticed it.
    pub offset: u32,
}

impl ScanError {
    pub(crate) fn new(kind: ErrorKind, offset: usize) -> Self {
        Self { kind, offset: to_offset(offset) }
    }
}

impl fmt::Display for ScanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let why = match self.kind {
            ErrorKind::TooLarge => return f.write_str("the body is too large"),
            ErrorKind::NotAnObject => return f.write_str("the body must be a JSON object"),
            ErrorKind::TooManyMembers => return f.write_str("the body repeats its members too often"),
            ErrorKind::Truncated => "unexpected end",
            ErrorKind::ExpectedValue => "expected a value",
            ErrorKind::ExpectedKey => "expected a key in double quotes",
            ErrorKind::ExpectedColon => "expected a colon",
            ErrorKind::ExpectedComma => "expected a comma or a closing bracket",
            ErrorKind::ControlCharacter => "control character in a string",
            ErrorKind::BadEscape => "invalid escape in a string",
            ErrorKind::BadNumber => "invalid number",
            ErrorKind::NumberOutOfRange => "number out of range",
            ErrorKind::BadUtf8 => "not UTF-8",
            ErrorKind::TooDeep => "nested too deeply",
            ErrorKind::Trailing => "unexpected bytes after the end",
        };
        write!(f, "invalid JSON at byte {}: {why}", self.offset)
    }
}

impl std::error::Error for ScanError {}

/// Decodes what stands between the quotes of a string; `None` if it is not that of a valid string.
pub(crate) fn unescape(raw: &[u8]) -> Option<Cow<'_, str>> {
    let mut rest = simdutf8::basic::from_utf8(raw).ok()?;
    if memchr::memchr(b'\\', raw).is_none() {
        return Some(Cow::Borrowed(rest));
    }
    let mut text = String::with_capacity(raw.len());
    while let Some((plain, escape)) = rest.split_once('\\') {
        text.push_str(plain);
        let mut chars = escape.chars();
        text.push(match chars.next()? {
            'b' => '\u{8}',
            'f' => '\u{c}',
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            'u' => {
                let mut scanner = Scanner::new(chars.as_str().as_bytes()).ok()?;
                let decoded = scanner.unicode_escape()?;
                rest = chars.as_str().get(scanner.offset()..)?;
                text.push(decoded);
                continue;
            }
            same @ ('"' | '\\' | '/') => same,
            _ => return None,
        });
        rest = chars.as_str();
    }
    text.push_str(rest);
    Some(Cow::Owned(text))
}

/// Whether what stands between the quotes of a string means `name`, which holds no backslash.
fn means(raw: &[u8], name: &str) -> bool {
    // An escape is longer than what it stands for.
    let is_escaped = raw.len() > name.len() && raw.contains(&b'\\');
    if is_escaped { unescape(raw).is_some_and(|text| text == name) } else { raw == name.as_bytes() }
}

/// Decodes a JSON string, quotes included: borrowed when it holds no escape, `None` when it is no valid string.
#[must_use]
pub fn string(value: &[u8]) -> Option<Cow<'_, str>> {
    match value {
        [b'"', inner @ .., b'"'] => unescape(inner),
        _ => None,
    }
}

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

/// A JSON object with another value for every member of one key (without escapes), or with that member in front where it has
/// none. All other bytes stay. `None` where `object` is not a valid object.
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
