//! Where the known members of a body are.

use std::borrow::Cow;

use super::forbidden;
use super::json::{self, ErrorKind, MAX_MEDIA, Mark, ScanError, Scanner, Span};
use super::key::{Key, KeySet, MAX_MEMBERS};
use super::media::Media;

/// A known member of the body's object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its key.
    pub key: Key,
    /// Whether it is the first member of the object, known or not.
    pub first: bool,
    /// Whether it is the last member of the object, known or not.
    pub last: bool,
    /// From the opening quote of the key to the end of the value.
    pub span: Span,
    /// The value.
    pub value: Span,
    /// Offset of the comma before the member; for the first member, the offset just past the object's opening brace.
    pub before: u32,
    /// Offset of the comma behind the member; for the last member, the offset of the object's closing brace.
    pub after: u32,
}

/// Where the known members of a body are. Offsets count bytes of the body that was scanned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scan {
    /// Bytes of the body.
    pub len: u32,
    /// Offset just past the object's opening brace.
    pub open: u32,
    /// Members of the object, unknown ones and duplicates included.
    pub count: u32,
    /// Whether an object inside a value has a cache marker, its name written without escapes.
    pub has_cache_marker: bool,
    known: KeySet,
    members: Vec<Member>,
    cuts: Vec<Span>,
    media: Vec<Media>,
}

/// Checks a body and finds its known top-level members.
///
/// Accepts exactly the objects that `serde_json` parses as a `Value`, except that [`MAX_MEMBERS`] bounds repetition.
///
/// # Errors
/// [`ScanError`] where the body is not such an object.
pub fn scan(body: &[u8]) -> Result<Scan, ScanError> {
    let mut scanner = Scanner::new(body)?;
    scanner.white_space();
    if !scanner.eat(b'{') {
        return Err(scanner.error(ErrorKind::NotAnObject));
    }
    let open = Span::new(scanner.offset(), scanner.offset()).start;
    let mut scan = Scan {
        len: Span::new(0, body.len()).end,
        open,
        count: 0,
        has_cache_marker: false,
        known: KeySet::EMPTY,
        members: Vec::with_capacity(12),
        cuts: Vec::new(),
        media: Vec::new(),
    };
    let mut before = open;
    let mut first = true;
    while let Some(member) = scanner.member(1, first)? {
        let key = Key::read(member.key.get(body));
        forbidden::find(body, &member, key, &mut scan.cuts).map_err(|kind| scanner.error(kind))?;
        let marks = scanner.take_marks();
        if key.is_some_and(|key| PROMPTS.contains(key)) {
            scan.add_media(body, &marks);
        }
        if let Some(key) = key {
            if scan.members.len() >= MAX_MEMBERS {
                return Err(scanner.error(ErrorKind::TooManyMembers));
            }
            scan.known = scan.known.with(key);
            let span = Span { start: member.key.start.saturating_sub(1), end: member.value.end };
            let last = !member.more;
            scan.members.push(Member { key, first, last, span, value: member.value, before, after: member.next });
        }
        scan.count = scan.count.saturating_add(1);
        before = member.next;
        first = false;
        if !member.more {
            break;
        }
    }
    scan.has_cache_marker = scanner.has_cache_marker();
    scanner.finish()?;
    Ok(scan)
}

/// Members whose values have the content that a model reads, and in it media.
const PROMPTS: KeySet = KeySet::of(&[Key::Messages, Key::Input, Key::System, Key::Prompt]);

impl Scan {
    /// Adds the payloads behind marks, as far as there is room, none inside another.
    fn add_media(&mut self, body: &[u8], marks: &[Mark]) {
        // A mark inside a payload that was read already is passed over. What was none may have media inside it, such as a
        // source of content parts: that is read again, as long as all of it is no more than the body.
        let (mut read_until, mut again) = (0, 0_u32);
        for mark in marks {
            if mark.value < read_until || self.media.len() >= MAX_MEDIA {
                continue;
            }
            let (end, media) = mark.read(body);
            again = again.saturating_add(if media.is_some() { 0 } else { end.saturating_sub(mark.value) });
            if media.is_some() || again > self.len {
                read_until = end;
            }
            self.media.extend(media);
        }
    }

    /// The media of the prompt, in the order of the body; [`MAX_MEDIA`] at most.
    #[must_use]
    pub fn media(&self) -> &[Media] {
        &self.media
    }

    /// The member of that key; the last one of several, as every engine's parser has it.
    #[must_use]
    pub fn get(&self, key: Key) -> Option<&Member> {
        if !self.has(key) {
            return None;
        }
        self.members.iter().rev().find(|member| member.key == key)
    }

    /// Whether there is a member of that key.
    #[must_use]
    pub fn has(&self, key: Key) -> bool {
        self.known.contains(key)
    }

    /// The keys of the known members.
    #[must_use]
    pub fn keys(&self) -> KeySet {
        self.known
    }

    /// The known members in the order of the body, duplicates included.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Spans that every edit leaves out, in the order of the body: [`FORBIDDEN`](super::FORBIDDEN) members of objects inside
    /// the values of other members, each with one of the commas beside it.
    #[must_use]
    pub fn cuts(&self) -> &[Span] {
        &self.cuts
    }

    /// The bytes of a member's value; `None` where the body has no such member.
    #[must_use]
    pub fn raw<'a>(&self, body: &'a [u8], key: Key) -> Option<&'a [u8]> {
        self.get(key).map(|member| member.value.get(body))
    }

    /// A member's value as a string, borrowed unless it has escapes; `None` where there is no such member or the value is
    /// not a string.
    #[must_use]
    pub fn str<'a>(&self, body: &'a [u8], key: Key) -> Option<Cow<'a, str>> {
        json::string(self.raw(body, key)?)
    }

    /// A member's value as a Boolean; `None` where there is no such member or the value is neither `true` nor `false`.
    #[must_use]
    pub fn bool(&self, body: &[u8], key: Key) -> Option<bool> {
        match self.raw(body, key)? {
            b"true" => Some(true),
            b"false" => Some(false),
            _ => None,
        }
    }

    /// A member's value as an integer; `None` where there is no such member or the value is anything else (negative, `1.0`,
    /// `1e3`, beyond 64 bits).
    #[must_use]
    pub fn u64(&self, body: &[u8], key: Key) -> Option<u64> {
        let raw = self.raw(body, key)?;
        core::str::from_utf8(raw).ok()?.parse().ok()
    }
}
