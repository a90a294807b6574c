//! A validating scanner of JSON bytes. It finds where values begin and end, and builds no values.
//!
//! The scanner accepts what `serde_json::from_slice::<serde_json::Value>` accepts and refuses everything else, so every
//! engine reads as JSON what passes here. It checks UTF-8, control characters, escapes and surrogate pairs in strings, the
//! grammar and range of numbers (`1e999` is refused), the depth ([`MAX_DEPTH`]), and that only white space follows the value.
//!
//! The work is one forward pass. Strings, which are nearly all of a long body, are passed over in blocks of 64 bytes.

mod document;
mod error;
mod mark;
mod scanner;
mod span;
mod string;
mod text;

pub use document::{Object, elements, members, raw_member, validate, with_member};
pub use error::{ErrorKind, MAX_DEPTH, ScanError};
pub(in crate::body) use mark::{CACHE_MARKERS, Mark, MediaKey};
pub use mark::{MAX_MEDIA, MediaKind};
pub(crate) use scanner::{RawMember, Scanner};
pub use span::Span;
pub(crate) use span::slice;
pub use string::string;
pub(crate) use string::unescape;
