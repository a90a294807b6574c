//! Reader and writer of the binary messages: words of 8 bytes, little endian, no padding.
//!
//! The workers of one Envoy write these into shared data, and Envoys and `pd-control` send them to each other.
//!
//! ```text
//! word   8 bytes, little endian
//! bytes  word (their number), then the bytes
//! list   word (the number of items), then the items
//! time   word: nanoseconds
//! ```

use crate::time::Monotonic;

/// Writes a message.
#[derive(Default)]
pub(crate) struct Writer(pub(crate) Vec<u8>);

impl Writer {
    /// Writes a number.
    pub(crate) fn word(&mut self, word: u64) {
        self.0.extend_from_slice(&word.to_le_bytes());
    }

    /// Writes a time in nanoseconds; a time beyond 584 years becomes the largest number.
    pub(crate) fn time(&mut self, time: Monotonic) {
        self.word(time.as_nanos());
    }

    /// Writes bytes behind their number.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.word(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    /// Writes items behind their number.
    pub(crate) fn list<T>(&mut self, list: &[T], mut write: impl FnMut(&mut Self, &T)) {
        self.word(list.len() as u64);
        list.iter().for_each(|item| write(self, item));
    }
}

/// Reads what a [`Writer`] wrote. Every method returns `None` where the message is too short.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl Reader<'_> {
    /// Reads a byte.
    pub(crate) fn byte(&mut self) -> Option<u8> {
        let (byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*byte)
    }

    /// Reads a number.
    pub(crate) fn word(&mut self) -> Option<u64> {
        let (word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*word))
    }

    /// Reads a time.
    pub(crate) fn time(&mut self) -> Option<Monotonic> {
        self.word().map(Monotonic::from_nanos)
    }

    /// Reads bytes.
    pub(crate) fn bytes(&mut self) -> Option<Vec<u8>> {
        let length = usize::try_from(self.word()?).ok()?;
        let (bytes, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(bytes.to_vec())
    }

    /// Reads bytes that are UTF-8; `None` also where they are not.
    pub(crate) fn text(&mut self) -> Option<String> {
        String::from_utf8(self.bytes()?).ok()
    }

    /// Reads items. The list grows item by item, so a false length takes no memory.
    pub(crate) fn list<T>(&mut self, mut read: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        (0..self.word()?).map(|_| read(self)).collect()
    }

    /// As [`list`](Self::list); `None` also where there are more items than `most`.
    pub(crate) fn list_of_most<T>(&mut self, most: usize, read: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let count = Reader(self.0).word()?;
        if count > most as u64 { None } else { self.list(read) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_reads_what_a_writer_wrote() {
        let mut out = Writer::default();
        out.word(7);
        out.time(Monotonic::from_nanos(3_000));
        out.bytes("ä".as_bytes());
        out.list(&[1, 2], |out, item| out.word(*item));
        let mut rest = Reader(&out.0);
        assert_eq!((rest.word(), rest.time()), (Some(7), Some(Monotonic::from_nanos(3_000))));
        assert_eq!((rest.text().as_deref(), rest.list(Reader::word)), (Some("ä"), Some(vec![1, 2])));
        assert!(rest.0.is_empty() && rest.word().is_none());
    }

    #[test]
    fn a_length_beyond_the_message_is_refused() {
        let mut out = Writer::default();
        out.word(u64::MAX);
        assert_eq!(Reader(&out.0).bytes(), None);
        assert_eq!(Reader(&out.0).list(Reader::word), None);
        assert_eq!(Reader(&out.0).list_of_most(9, Reader::word), None);
    }
}
