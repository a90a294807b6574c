//! What a string says.

use std::borrow::Cow;

use super::scanner::Scanner;

/// Decodes the bytes between the quotes of a string; `None` if they are not those of a valid string.
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

/// Whether the bytes between the quotes of a string mean `name`. `name` holds no backslash.
pub(super) fn means(raw: &[u8], name: &str) -> bool {
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
