//! Places in a document.

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
pub(super) fn to_offset(offset: usize) -> u32 {
    u32::try_from(offset).unwrap_or(u32::MAX)
}
