//! Edits of the bytes of a scanned body: drop members, replace values, put members in front.
//!
//! All other bytes stay as the client wrote them: key order, white space, spelling of numbers, unknown members.
//!
//! - Inserted members come first in the object. Parsers take the last of several members with the same key, so a caller
//!   that inserts a key must also drop it.
//! - An edit drops or replaces every occurrence of a key. It drops a key that is in both lists.
//! - Every edit leaves out the [`Scan::cuts`] of values that stay.
//! - A dropped member goes with the comma before it; the first ones of an object go with the comma behind them.
//!
//! [`rewrite`] makes a whole new body. [`head_edit`] makes the shortest edit of the front, for a buffer whose
//! front alone can be replaced. [`HeadPlan`] is such an edit whose inserted members are known only after the body is gone.

use crate::body::json::slice;
use crate::body::{Key, KeySet, Scan};

/// What to change in the top-level object of a body.
#[derive(Clone, Copy, Debug, Default)]
pub struct Edits<'a> {
    /// Members to drop.
    pub drop: KeySet,
    /// Values to replace by other JSON values. A key that the body does not have changes nothing.
    pub replace: &'a [(Key, &'a [u8])],
    /// Members to put in front, without the braces: `"a":1,"b":2`. May be empty.
    pub insert: &'a [u8],
}

/// An edit of the front of a body. The default changes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeadEdit {
    /// First bytes of the body to remove.
    pub drain: u32,
    /// Bytes to put in their place.
    pub head: Vec<u8>,
}

impl HeadEdit {
    /// The length of an edited body that had `bytes` bytes.
    #[must_use]
    pub fn edited_bytes(&self, bytes: usize) -> usize {
        bytes.saturating_sub(self.drain as usize).saturating_add(self.head.len())
    }

    /// Whether the edit leaves the body as it is.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.drain == 0 && self.head.is_empty()
    }
}

/// A [`HeadEdit`] that waits for the members to insert. It owns the front of the body up to the last change: the opening
/// brace, if nothing is dropped or replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadPlan {
    /// First bytes of the body to remove.
    drain: u32,
    /// Bytes before the inserted members: the opening brace.
    front: Vec<u8>,
    /// Bytes behind the inserted members, up to `drain`: members known from the beginning, and the body's remaining ones.
    rest: Vec<u8>,
    /// Whether members follow the inserted ones.
    follow: bool,
    /// Whether the edit changes the body even without inserted members.
    changed: bool,
}

impl HeadPlan {
    /// Plans the edit. [`Edits::insert`] has the members that are known already; they come behind the ones that are inserted
    /// later.
    #[must_use]
    pub fn new(body: &[u8], scan: &Scan, edits: &Edits<'_>) -> Self {
        let front = slice(body, 0, scan.open).to_vec();
        let mut rest = Vec::new();
        let walk = walk(body, scan, edits, &mut |piece| rest.extend_from_slice(piece));
        let inserts = !edits.insert.is_empty();
        if inserts {
            rest = [edits.insert, comma(edits.insert, walk.follow), &rest].concat();
        }
        Self { drain: walk.drain, front, rest, follow: walk.follow || inserts, changed: walk.changed || inserts }
    }

    /// The length of the edited body with these members in front, of a body that had `bytes` bytes.
    #[must_use]
    pub fn edited_bytes(&self, insert: &[u8], bytes: usize) -> usize {
        if insert.is_empty() && !self.changed {
            return bytes;
        }
        let parts = [self.front.len(), insert.len(), comma(insert, self.follow).len(), self.rest.len()];
        parts.into_iter().fold(bytes.saturating_sub(self.drain as usize), usize::saturating_add)
    }

    /// The edit with these members in front; see [`Edits::insert`].
    #[must_use]
    pub fn with_insert(&self, insert: &[u8]) -> HeadEdit {
        if insert.is_empty() && !self.changed {
            return HeadEdit::default();
        }
        let comma = comma(insert, self.follow);
        HeadEdit { drain: self.drain, head: [self.front.as_slice(), insert, comma, &self.rest].concat() }
    }
}

/// The edited body, in a buffer of exactly its size.
///
/// `body` must be the body that was scanned. For another one the result is wrong; nothing panics.
#[must_use]
pub fn rewrite(body: &[u8], scan: &Scan, edits: &Edits<'_>) -> Vec<u8> {
    let mut edited_bytes = 0_usize;
    let walked = walk(body, scan, edits, &mut |piece| edited_bytes = edited_bytes.saturating_add(piece.len()));
    let comma = comma(edits.insert, walked.follow);
    let front = slice(body, 0, scan.open);
    let behind = slice(body, walked.drain, scan.len);
    let bytes = [front.len(), edits.insert.len(), comma.len(), edited_bytes, behind.len()];
    let mut out = Vec::with_capacity(bytes.into_iter().fold(0, usize::saturating_add));
    out.extend_from_slice(front);
    out.extend_from_slice(edits.insert);
    out.extend_from_slice(comma);
    walk(body, scan, edits, &mut |piece| out.extend_from_slice(piece));
    out.extend_from_slice(behind);
    out
}

/// The shortest edit of the front of `body` that makes the edited body. It is none where nothing changes.
#[must_use]
pub fn head_edit(body: &[u8], scan: &Scan, edits: &Edits<'_>) -> HeadEdit {
    HeadPlan::new(body, scan, edits).with_insert(b"")
}

/// The comma between the inserted members and the following ones; empty if either is absent.
fn comma(insert: &[u8], follow: bool) -> &'static [u8] {
    if follow && !insert.is_empty() { b"," } else { b"" }
}

/// How [`walk`] ended.
struct Walk {
    /// Where the last change ends: all behind it stays.
    drain: u32,
    /// Whether any of the body's members is left.
    follow: bool,
    /// Whether anything changed.
    changed: bool,
}

/// Emits the body from behind its opening brace up to the last change: without dropped members and cuts, with replaced
/// values.
fn walk<'a>(body: &'a [u8], scan: &Scan, edits: &Edits<'a>, emit: &mut impl FnMut(&'a [u8])) -> Walk {
    let mut drain = scan.open;
    let mut changed = false;
    let mut dropped = 0_u32;
    // Whether all members so far were dropped: the next to go takes the comma behind it along.
    let mut leading = true;
    let mut cuts = scan.cuts();
    // Leaves out the cuts before `end`, except those in what is gone or replaced.
    let mut cut_until = |end: u32, drain: &mut u32, emit: &mut dyn FnMut(&'a [u8])| {
        let mut any = false;
        while let Some((cut, rest)) = cuts.split_first().filter(|(cut, _)| cut.start < end) {
            cuts = rest;
            if cut.start >= *drain {
                emit(slice(body, *drain, cut.start));
                *drain = cut.end;
                any = true;
            }
        }
        any
    };
    for member in scan.members() {
        changed |= cut_until(member.span.start, &mut drain, emit);
        leading &= member.first || member.before < drain;
        if edits.drop.contains(member.key) {
            dropped = dropped.saturating_add(1);
            changed = true;
            if leading {
                drain = if member.last { member.after } else { member.after.saturating_add(1) };
            } else {
                emit(slice(body, drain, member.before));
                drain = member.span.end;
            }
        } else if let Some((_, value)) = edits.replace.iter().find(|(key, _)| *key == member.key) {
            changed = true;
            leading = false;
            emit(slice(body, drain, member.value.start));
            emit(value);
            drain = member.value.end;
        } else {
            leading = false;
        }
    }
    changed |= cut_until(u32::MAX, &mut drain, emit);
    Walk { drain, follow: dropped < scan.count, changed }
}
