//! Forms as bodies of requests: their fields, and the form without members that no client may send.
//!
//! Multipart forms carry audio and images, with parameters beside them; engines read a field `vllm_xargs` as JSON. The
//! filter refuses a form in which two parsers could find different fields. Sources: RFC 7578, RFC 2046, the URL standard,
//! and what Starlette with python-multipart reads.

use core::fmt;
use std::borrow::Cow;

use memchr::memmem;

use super::forbidden::{FORBIDDEN, cuts, is_content};
use super::key::Key;
use super::percent::decode_percent;
use crate::body::json::Span;

/// Most fields of one form; a form with more is refused.
const MAX_FIELDS: usize = 1_024;

/// How a form is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// `multipart/form-data` with this boundary.
    Multipart(Vec<u8>),
    /// `application/x-www-form-urlencoded`.
    Url,
}

/// Why a form is refused. Its `Display` is fit for the client; the answer is 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormError {
    /// The content type names no usable boundary, or another character set than UTF-8.
    ContentType,
    /// The parts are not where the boundary says, or parsers could read their headers differently.
    Malformed,
    /// A field begins as JSON and is not valid JSON.
    FieldNotJson,
    /// The form has more than 1,024 fields.
    TooManyFields,
}

impl fmt::Display for FormError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ContentType => "the form's content type must name one boundary and no character set but UTF-8",
            Self::Malformed => "the form is malformed",
            Self::FieldNotJson => "a field of the form begins as JSON and is not valid JSON",
            Self::TooManyFields => "the form has too many fields",
        })
    }
}

impl Encoding {
    /// The encoding of the form that a `content-type` names; `None` where it names something else.
    ///
    /// # Errors
    /// [`FormError::ContentType`] for a form that parsers could split differently.
    pub fn of(content_type: &[u8]) -> Result<Option<Self>, FormError> {
        let text = core::str::from_utf8(content_type).unwrap_or_default();
        let (essence, parameters) = text.split_once(';').unwrap_or((text, ""));
        let essence = essence.trim().to_ascii_lowercase();
        if !essence.starts_with("multipart/") && essence != "application/x-www-form-urlencoded" {
            return Ok(None);
        }
        let mut boundary = None;
        for (name, value) in Parameters(parameters) {
            let value = value.ok_or(FormError::ContentType)?;
            match name.as_str() {
                "charset" if !value.eq_ignore_ascii_case("utf-8") => return Err(FormError::ContentType),
                "boundary" if boundary.is_some() => return Err(FormError::ContentType),
                "boundary" => boundary = Some(value.into_owned()),
                name if name.contains('*') => return Err(FormError::ContentType),
                _ => {}
            }
        }
        if !essence.starts_with("multipart/") {
            return Ok(Some(Self::Url));
        }
        match boundary {
            Some(boundary) if essence == "multipart/form-data" && (1..=200).contains(&boundary.len()) => {
                Ok(Some(Self::Multipart(boundary.into_bytes())))
            }
            _ => Err(FormError::ContentType),
        }
    }
}

/// Parameters of a header: `; name=value; name="value"`. A value is `None` where it is not readable in one way only.
struct Parameters<'a>(&'a str);

impl<'a> Iterator for Parameters<'a> {
    type Item = (String, Option<Cow<'a, str>>);

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.0.trim_start_matches([';', ' ', '\t']);
        if rest.is_empty() {
            return None;
        }
        let end = rest.find(['=', ';']).unwrap_or(rest.len());
        let (name, rest) = rest.split_at_checked(end)?;
        let name = name.trim().to_ascii_lowercase();
        let Some(rest) = rest.strip_prefix('=') else {
            self.0 = rest;
            return Some((name, None));
        };
        let rest = rest.trim_start_matches([' ', '\t']);
        if let Some(quoted) = rest.strip_prefix('"') {
            let Some((value, rest)) = quoted.split_once('"') else {
                self.0 = "";
                return Some((name, None));
            };
            self.0 = rest;
            // A backslash escapes the quote to some parsers, to others not.
            let is_clear = !value.ends_with('\\') && (rest.is_empty() || rest.starts_with([';', ' ', '\t']));
            return Some((name, is_clear.then_some(Cow::Borrowed(value))));
        }
        let (value, rest) = rest.split_at_checked(rest.find(';').unwrap_or(rest.len()))?;
        self.0 = rest;
        let value = value.trim();
        Some((name, (!value.contains('"')).then_some(Cow::Borrowed(value))))
    }
}

/// One field.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Field {
    name: String,
    /// What goes when the field is dropped.
    whole: Span,
    /// The value as it is written.
    value: Span,
    is_file: bool,
}

/// Where the fields of a form are. Offsets count bytes of the body that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Form {
    encoding: Encoding,
    fields: Vec<Field>,
}

impl Form {
    /// Reads a whole form.
    ///
    /// # Errors
    /// [`FormError`] where parsers could read the body differently.
    pub fn read(body: &[u8], encoding: Encoding) -> Result<Self, FormError> {
        let fields = match &encoding {
            Encoding::Multipart(boundary) => multipart(body, boundary)?,
            Encoding::Url => url_encoded(body)?,
        };
        Ok(Self { encoding, fields })
    }

    /// The value of a field with text; the last one of several. `None` where there is no such field or it is not UTF-8.
    #[must_use]
    pub fn text<'a>(&self, body: &'a [u8], name: &str) -> Option<Cow<'a, str>> {
        let field = self.fields.iter().rev().find(|field| field.name == name && !field.is_file)?;
        match self.value(body, field) {
            Cow::Borrowed(value) => core::str::from_utf8(value).ok().map(Cow::Borrowed),
            Cow::Owned(value) => String::from_utf8(value).ok().map(Cow::Owned),
        }
    }

    fn value<'a>(&self, body: &'a [u8], field: &Field) -> Cow<'a, [u8]> {
        let raw = field.value.get(body);
        match self.encoding {
            Encoding::Multipart(_) => Cow::Borrowed(raw),
            Encoding::Url => url_decoded(raw),
        }
    }

    /// The form without forbidden fields, without forbidden members in fields that hold JSON, and with another model where
    /// `model` is given. `None` where nothing changes.
    ///
    /// # Errors
    /// [`FormError::FieldNotJson`] for a field that an engine could read as JSON and this parser cannot.
    pub fn edited(&self, body: &[u8], model: Option<&str>) -> Result<Option<Vec<u8>>, FormError> {
        let mut out: Vec<u8> = Vec::new();
        let (mut copied, mut changed) = (0, false);
        let mut replace = |span: Span, with: &[u8]| {
            if out.is_empty() {
                out.reserve(body.len());
            }
            out.extend_from_slice(crate::body::json::slice(body, copied, span.start));
            out.extend_from_slice(with);
            (copied, changed) = (span.end, true);
        };
        for field in &self.fields {
            if Key::of_name(&field.name).is_some_and(|key| FORBIDDEN.contains(key)) {
                replace(field.whole, b"");
                continue;
            }
            if field.is_file {
                continue;
            }
            if let Some(model) = model.filter(|_| field.name == "model") {
                let model = self.encoded(model.as_bytes());
                // A pair may be a name alone.
                let before = (field.value.start as usize).checked_sub(1).and_then(|index| body.get(index));
                let is_bare = self.encoding == Encoding::Url && before != Some(&b'=');
                replace(field.value, &if is_bare { [b"=", &*model].concat() } else { model.into_owned() });
                continue;
            }
            let value = self.value(body, field);
            if is_content(&field.name) || !matches!(value.trim_ascii_start().first(), Some(b'{' | b'[')) {
                continue;
            }
            let cuts = cuts(&value).map_err(|_| FormError::FieldNotJson)?;
            if !cuts.is_empty() {
                replace(field.value, &self.encoded(&without(&value, &cuts)));
            }
        }
        if !changed {
            return Ok(None);
        }
        out.extend_from_slice(body.get(copied as usize..).unwrap_or_default());
        Ok(Some(out))
    }

    fn encoded<'a>(&self, value: &'a [u8]) -> Cow<'a, [u8]> {
        match self.encoding {
            Encoding::Multipart(_) => Cow::Borrowed(value),
            Encoding::Url => Cow::Owned(url_encode(value)),
        }
    }
}

/// `json` without the spans `cuts`, which are in order and do not overlap. A span that begins beyond the end cuts nothing.
#[must_use]
pub fn without(json: &[u8], cuts: &[Span]) -> Vec<u8> {
    let mut out = Vec::with_capacity(json.len());
    let mut copied = 0;
    for cut in cuts {
        out.extend_from_slice(crate::body::json::slice(json, copied, cut.start));
        copied = cut.end;
    }
    out.extend_from_slice(json.get(copied as usize..).unwrap_or_default());
    out
}

/// The parts of a multipart form.
fn multipart(body: &[u8], boundary: &[u8]) -> Result<Vec<Field>, FormError> {
    let delimiter = [b"\r\n--", boundary].concat();
    let finder = memmem::Finder::new(&delimiter);
    let rest_of = |offset: usize| body.get(offset..).unwrap_or_default();
    // Empty lines before the first delimiter are passed over by every parser, other text by some.
    let mut start = 0_usize;
    while rest_of(start).starts_with(b"\r\n") {
        start = start.saturating_add(2);
    }
    if !rest_of(start).starts_with(delimiter.get(2..).unwrap_or_default()) {
        return Err(FormError::Malformed);
    }
    let mut fields = Vec::new();
    loop {
        let mut offset = start.saturating_add(delimiter.len()).saturating_sub(2);
        let rest = rest_of(offset);
        if let Some(after) = rest.strip_prefix(b"--") {
            // To some parsers a delimiter with more behind it does not end the form.
            return if after.trim_ascii().is_empty() { Ok(fields) } else { Err(FormError::Malformed) };
        }
        if !rest.starts_with(b"\r\n") {
            return Err(FormError::Malformed);
        }
        offset = offset.saturating_add(2);
        let (name, is_file, header_bytes) = part_headers(rest_of(offset), boundary)?;
        let value_start = offset.saturating_add(header_bytes);
        // The empty line before a value is also the line break of a delimiter, to parsers that look for delimiters first.
        if rest_of(value_start).starts_with(delimiter.get(2..).unwrap_or_default()) {
            return Err(FormError::Malformed);
        }
        let found = finder.find(rest_of(value_start)).ok_or(FormError::Malformed)?;
        let value_end = value_start.saturating_add(found);
        let next = value_end.saturating_add(2);
        if fields.len() >= MAX_FIELDS {
            return Err(FormError::TooManyFields);
        }
        fields.push(Field { name, whole: Span::new(start, next), value: Span::new(value_start, value_end), is_file });
        start = next;
    }
}

/// Reads the headers of a part: its name, whether it is a file, and the bytes up to its value.
///
/// A header line that begins as a delimiter ends the part to parsers that look for delimiters first, and is a header to those
/// that read line by line. A name of a header that is no token is a header to some parsers only.
fn part_headers(part: &[u8], boundary: &[u8]) -> Result<(String, bool, usize), FormError> {
    let end = memmem::find(part, b"\r\n\r\n").ok_or(FormError::Malformed)?;
    let block = core::str::from_utf8(part.get(..end).unwrap_or_default()).map_err(|_| FormError::Malformed)?;
    let mut found = None;
    for line in block.split("\r\n") {
        let (name, value) = line.split_once(':').ok_or(FormError::Malformed)?;
        let is_delimiter = line.as_bytes().strip_prefix(b"--").is_some_and(|rest| rest.starts_with(boundary));
        if is_delimiter || !is_token(name) || line.contains(['\r', '\n', '\0']) {
            return Err(FormError::Malformed);
        }
        if name.eq_ignore_ascii_case("content-disposition") {
            if found.is_some() {
                return Err(FormError::Malformed);
            }
            found = Some(disposition(value)?);
        }
        // Deprecated in forms (RFC 7578, section 4.7): some parsers decode by it.
        let is_encoding = name.eq_ignore_ascii_case("content-transfer-encoding");
        let is_plain = |value: &str| ["7bit", "8bit", "binary"].iter().any(|plain| value.eq_ignore_ascii_case(plain));
        if is_encoding && !is_plain(value.trim()) {
            return Err(FormError::Malformed);
        }
    }
    let (name, is_file) = found.ok_or(FormError::Malformed)?;
    Ok((name, is_file, end.saturating_add(4)))
}

/// Whether `name` is a token (RFC 9110, section 5.6.2), as names of headers are.
fn is_token(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

/// Reads `form-data; name="…"; filename="…"`.
fn disposition(value: &str) -> Result<(String, bool), FormError> {
    let (kind, parameters) = value.split_once(';').ok_or(FormError::Malformed)?;
    if !kind.trim().eq_ignore_ascii_case("form-data") {
        return Err(FormError::Malformed);
    }
    let (mut name, mut is_file) = (None, false);
    for (key, value) in Parameters(parameters) {
        let value = value.ok_or(FormError::Malformed)?;
        match key.as_str() {
            "name" if name.is_some() || value.contains('\\') => return Err(FormError::Malformed),
            "name" => name = Some(value.into_owned()),
            "filename" | "filename*" => is_file = true,
            // RFC 2231 spells a name in pieces, or encoded; nobody needs it for one.
            key if key.contains('*') => return Err(FormError::Malformed),
            _ => {}
        }
    }
    Ok((name.ok_or(FormError::Malformed)?, is_file))
}

/// The pairs of a URL-encoded form. Some parsers take `;` for `&`: what either of them would read is a field here.
fn url_encoded(body: &[u8]) -> Result<Vec<Field>, FormError> {
    let mut fields = Vec::new();
    let mut start = 0_usize;
    for pair in body.split(|byte| matches!(byte, b'&' | b';')) {
        let end = start.saturating_add(pair.len());
        let name_bytes = pair.iter().position(|byte| *byte == b'=').unwrap_or(pair.len());
        let name = String::from_utf8_lossy(&url_decoded(pair.get(..name_bytes).unwrap_or_default())).into_owned();
        if fields.len() >= MAX_FIELDS {
            return Err(FormError::TooManyFields);
        }
        let value_start = start.saturating_add(name_bytes).saturating_add(1).min(end);
        let whole_end = end.saturating_add(1).min(body.len());
        fields.push(Field {
            name,
            whole: Span::new(start, whole_end),
            value: Span::new(value_start, end),
            is_file: false,
        });
        start = end.saturating_add(1);
    }
    Ok(fields)
}

fn url_decoded(raw: &[u8]) -> Cow<'_, [u8]> {
    if !raw.iter().any(|byte| matches!(byte, b'+' | b'%')) {
        return Cow::Borrowed(raw);
    }
    let spaced: Vec<u8> = raw.iter().map(|byte| if *byte == b'+' { b' ' } else { *byte }).collect();
    Cow::Owned(decode_percent(&spaced))
}

fn url_encode(value: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(value.len());
    for &byte in value {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(byte);
        } else {
            out.extend_from_slice(format!("%{byte:02X}").as_bytes());
        }
    }
    out
}

#[cfg(test)]
mod tests;
