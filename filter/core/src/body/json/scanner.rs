//! A position in a document, which moves forward over its values.

use super::error::{ErrorKind, MAX_DEPTH, ScanError};
use super::mark::{MAX_MEDIA, Mark, is_cache_marker};
use super::span::{Span, to_offset};
use super::text;

/// One member of an object.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawMember {
    /// The key, without its quotes.
    pub(crate) key: Span,
    /// The value.
    pub(crate) value: Span,
    /// Offset of the comma or closing brace behind the value.
    pub(crate) next: u32,
    /// Whether `next` is a comma.
    pub(crate) more: bool,
}

/// The kinds of the containers that are open inside the value being passed over.
struct Open {
    /// Lowest bit: the innermost one; 1 for an object.
    kinds: u128,
    /// How many there are.
    count: u32,
    /// How many may be opened.
    limit: u32,
}

impl Open {
    /// False when it would be one too many.
    fn push(&mut self, object: bool) -> bool {
        let room = self.count < self.limit;
        self.count = self.count.saturating_add(1);
        self.kinds = self.kinds.wrapping_shl(1) | u128::from(object);
        room
    }

    fn pop(&mut self) {
        self.count = self.count.saturating_sub(1);
        self.kinds = self.kinds.wrapping_shr(1);
    }

    fn in_object(&self) -> bool {
        self.kinds & 1 == 1
    }
}

/// A position in a document, and facts about the bytes before it.
pub(crate) struct Scanner<'a> {
    bytes: &'a [u8],
    offset: usize,
    /// Whether a string so far may hold something else than ASCII.
    non_ascii: bool,
    /// Members inside the values so far that may have media; see [`Scanner::take_marks`].
    marks: Vec<Mark>,
    /// Whether an object inside a value so far has a member that is a cache marker.
    has_cache_marker: bool,
}

impl<'a> Scanner<'a> {
    /// A scanner at the start of a document.
    pub(crate) fn new(bytes: &'a [u8]) -> Result<Self, ScanError> {
        match u32::try_from(bytes.len()) {
            Ok(len) if len < u32::MAX => {
                Ok(Self { bytes, offset: 0, non_ascii: false, marks: Vec::new(), has_cache_marker: false })
            }
            _ => Err(ScanError { kind: ErrorKind::TooLarge, offset: u32::MAX }),
        }
    }

    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.offset).copied()
    }

    pub(super) fn advance(&mut self, bytes: usize) {
        self.offset = self.offset.wrapping_add(bytes);
    }

    /// An error here, or [`ErrorKind::Truncated`] when there is nothing here.
    pub(crate) fn error(&self, kind: ErrorKind) -> ScanError {
        let kind = if self.offset < self.bytes.len() { kind } else { ErrorKind::Truncated };
        ScanError::new(kind, self.offset)
    }

    /// Passes over `byte` if it stands here.
    pub(crate) fn eat(&mut self, byte: u8) -> bool {
        let here = self.peek() == Some(byte);
        self.advance(usize::from(here));
        here
    }

    pub(crate) fn white_space(&mut self) {
        while let Some(b' ' | b'\n' | b'\t' | b'\r') = self.peek() {
            self.advance(1);
        }
    }

    /// Checks that nothing but white space is left and that all of it was UTF-8.
    pub(crate) fn finish(mut self) -> Result<(), ScanError> {
        self.white_space();
        if self.offset < self.bytes.len() {
            return Err(self.error(ErrorKind::Trailing));
        }
        if self.non_ascii && simdutf8::basic::from_utf8(self.bytes).is_err() {
            let valid = core::str::from_utf8(self.bytes).map_or_else(|error| error.valid_up_to(), str::len);
            return Err(ScanError::new(ErrorKind::BadUtf8, valid));
        }
        Ok(())
    }

    /// Passes over one value, white space before it included, with `outer` containers open around it.
    pub(crate) fn value(&mut self, outer: u32) -> Result<Span, ScanError> {
        self.white_space();
        let start = self.offset;
        let mut open = Open { kinds: 0, count: 0, limit: MAX_DEPTH.saturating_sub(outer) };
        loop {
            // Here a value begins.
            match self.peek() {
                Some(b'"') => {
                    self.string()?;
                }
                Some(b'-' | b'0'..=b'9') => self.number()?,
                Some(b't') => self.literal(b"true")?,
                Some(b'f') => self.literal(b"false")?,
                Some(b'n') => self.literal(b"null")?,
                Some(byte @ (b'{' | b'[')) => {
                    let object = byte == b'{';
                    if !open.push(object) {
                        return Err(self.error(ErrorKind::TooDeep));
                    }
                    self.advance(1);
                    self.white_space();
                    if !self.eat(if object { b'}' } else { b']' }) {
                        if object {
                            self.marked_key()?;
                        } else {
                            self.go_to(text::skip_integers(self.rest()));
                            self.white_space();
                        }
                        continue;
                    }
                    open.pop();
                }
                _ => return Err(self.error(ErrorKind::ExpectedValue)),
            }
            // Here a value has ended, and with it perhaps the containers it was the last one of.
            loop {
                if open.count == 0 {
                    return Ok(Span::new(start, self.offset));
                }
                self.white_space();
                match (self.peek(), open.in_object()) {
                    (Some(b','), object) => {
                        self.advance(1);
                        self.white_space();
                        if object {
                            self.marked_key()?;
                        }
                        break;
                    }
                    (Some(b'}'), true) | (Some(b']'), false) => {
                        self.advance(1);
                        open.pop();
                    }
                    _ => return Err(self.error(ErrorKind::ExpectedComma)),
                }
            }
        }
    }

    /// Passes over the next member of an object, the comma behind it included, with `outer` containers open around
    /// its value. `None`, with the brace passed over, when the object is empty; do not call it again when
    /// [`RawMember::more`] is false.
    pub(crate) fn member(&mut self, outer: u32, first: bool) -> Result<Option<RawMember>, ScanError> {
        self.white_space();
        if first && self.eat(b'}') {
            return Ok(None);
        }
        let key = self.key()?;
        let value = self.value(outer)?;
        self.white_space();
        let next = to_offset(self.offset);
        let more = self.eat(b',');
        if more || self.eat(b'}') {
            return Ok(Some(RawMember { key, value, next, more }));
        }
        Err(self.error(ErrorKind::ExpectedComma))
    }

    /// Passes over the next element of an array as [`Scanner::member`] does for objects; the flag says whether more
    /// follow.
    pub(super) fn element(&mut self, outer: u32, first: bool) -> Result<Option<(Span, bool)>, ScanError> {
        self.white_space();
        if first && self.eat(b']') {
            return Ok(None);
        }
        let value = self.value(outer)?;
        self.white_space();
        let more = self.eat(b',');
        if more || self.eat(b']') {
            return Ok(Some((value, more)));
        }
        Err(self.error(ErrorKind::ExpectedComma))
    }

    /// Passes over a key, its colon and the white space behind it; what lies between its quotes.
    pub(crate) fn key(&mut self) -> Result<Span, ScanError> {
        if self.peek() != Some(b'"') {
            return Err(self.error(ErrorKind::ExpectedKey));
        }
        let key = self.string()?;
        self.white_space();
        if !self.eat(b':') {
            return Err(self.error(ErrorKind::ExpectedColon));
        }
        self.white_space();
        Ok(key)
    }

    /// As [`key`](Self::key), of an object inside a value.
    fn marked_key(&mut self) -> Result<(), ScanError> {
        let key = self.key()?.get(self.bytes);
        self.has_cache_marker |= is_cache_marker(key);
        if let Some(mark) = Mark::of_key(key, self.offset)
            && self.marks.len() < MAX_MEDIA
        {
            self.marks.push(mark);
        }
        Ok(())
    }

    /// Members that may have media, inside the values since the last call; [`MAX_MEDIA`] at most.
    pub(crate) fn take_marks(&mut self) -> Vec<Mark> {
        core::mem::take(&mut self.marks)
    }

    /// Whether an object inside a value so far has a member that is a cache marker, its name written without escapes.
    pub(crate) fn has_cache_marker(&self) -> bool {
        self.has_cache_marker
    }

    /// The bytes from here on.
    fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.offset..).unwrap_or_default()
    }

    /// Goes on where `rest`, an end of the document, begins.
    fn go_to(&mut self, rest: &[u8]) {
        self.offset = self.bytes.len().wrapping_sub(rest.len());
    }

    /// Passes over a string, from its opening quote. Returns the span between its quotes.
    fn string(&mut self) -> Result<Span, ScanError> {
        self.advance(1);
        let start = self.offset;
        loop {
            // The byte before is the opening quote or the last digit of an escape.
            let from = self.bytes.get(self.offset.wrapping_sub(1)..).unwrap_or_default();
            let behind = text::skip_text(from, &mut self.non_ascii);
            self.go_to(behind);
            match self.peek() {
                Some(b'"') => {
                    let span = Span::new(start, self.offset);
                    self.advance(1);
                    return Ok(span);
                }
                Some(b'\\') => self.long_escape()?,
                _ => return Err(self.error(ErrorKind::ControlCharacter)),
            }
        }
    }

    /// Passes over `\u` and what belongs to it, or an error. The backslash is here.
    fn long_escape(&mut self) -> Result<(), ScanError> {
        let start = self.offset;
        self.advance(1);
        if self.eat(b'u') {
            return self.unicode_escape().map(|_| ()).ok_or(ScanError::new(ErrorKind::BadEscape, start));
        }
        Err(self.error(ErrorKind::BadEscape))
    }

    /// Reads the four digits behind `\u`, and the other half where they are one of a surrogate pair.
    pub(super) fn unicode_escape(&mut self) -> Option<char> {
        let first = self.hex4()?;
        let code = match first {
            0xd800..=0xdbff => {
                if !(self.eat(b'\\') && self.eat(b'u')) {
                    return None;
                }
                let second = self.hex4()?;
                if !(0xdc00..=0xdfff).contains(&second) {
                    return None;
                }
                0x1_0000_u32.wrapping_add((first & 0x3ff).wrapping_shl(10) | (second & 0x3ff))
            }
            code => code,
        };
        char::from_u32(code)
    }

    fn hex4(&mut self) -> Option<u32> {
        let mut code = 0_u32;
        for _ in 0..4 {
            let digit = char::from(self.peek()?).to_digit(16)?;
            code = code.wrapping_shl(4) | digit;
            self.advance(1);
        }
        Some(code)
    }

    /// Passes over a number, from its first byte.
    fn number(&mut self) -> Result<(), ScanError> {
        let start = self.offset;
        self.eat(b'-');
        if self.eat(b'0') {
            if let Some(b'0'..=b'9') = self.peek() {
                return Err(self.error(ErrorKind::BadNumber));
            }
        } else {
            self.digits()?;
        }
        if self.eat(b'.') {
            self.digits()?;
        }
        let mut exponent_digits = 0;
        if self.eat(b'e') || self.eat(b'E') {
            if !self.eat(b'+') {
                self.eat(b'-');
            }
            exponent_digits = self.digits()?;
        }
        // Below these lengths nothing comes near 1e308. Above, the edge is where serde_json's arithmetic puts it.
        let long = self.offset.wrapping_sub(start) > 200;
        if (long || exponent_digits > 2)
            && let Some(number) = self.bytes.get(start..self.offset)
            && serde_json::from_slice::<f64>(number).is_err()
        {
            return Err(ScanError::new(ErrorKind::NumberOutOfRange, start));
        }
        Ok(())
    }

    /// Passes over digits, at least one, and counts them.
    fn digits(&mut self) -> Result<usize, ScanError> {
        let count = self.rest().iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.advance(count);
        if count == 0 { Err(self.error(ErrorKind::BadNumber)) } else { Ok(count) }
    }

    fn literal(&mut self, word: &[u8]) -> Result<(), ScanError> {
        for &byte in word {
            if !self.eat(byte) {
                return Err(self.error(ErrorKind::ExpectedValue));
            }
        }
        Ok(())
    }
}
