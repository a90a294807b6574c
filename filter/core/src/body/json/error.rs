//! Why a document is refused.

use core::fmt;

use super::span::to_offset;

/// Most objects and arrays that may be open at once; a document with more is refused. `serde_json` has the same limit.
pub const MAX_DEPTH: u32 = 127;

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
    /// An object has more members than [`crate::body::MAX_MEMBERS`] or [`Object::MAX_MEMBERS`](super::Object::MAX_MEMBERS) allow.
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
