//! Header maps as the proxy-wasm ABI serialises them, read in place.
//!
//! Layout (ABI 0.2.1, "serialized map", little endian): `u32` count, then per pair `u32` name length and `u32` value
//! length, then per pair the name, NUL, the value, NUL. Names and values are any bytes but are never copied to be read.

/// A header map in its serialised form: one allocation for any number of headers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers {
    wire: Vec<u8>,
    /// A bit for each name; see [`bit`]. A name whose bit is not set is not here: most names that are asked for are not.
    names: u64,
}

impl Headers {
    /// Takes the bytes that the host returned. Of malformed bytes the pairs up to the fault count.
    #[must_use]
    pub fn from_wire(wire: Vec<u8>) -> Self {
        let mut headers = Self { wire, names: 0 };
        headers.names = headers.iter().fold(0, |names, (name, _)| names | bit(name));
        headers
    }

    /// Serialises pairs, in their order; equal names stay apart.
    pub fn from_pairs<'a, N, V>(pairs: impl IntoIterator<Item = (&'a N, &'a V)>) -> Self
    where
        N: AsRef<[u8]> + ?Sized + 'a,
        V: AsRef<[u8]> + ?Sized + 'a,
    {
        let (mut wire, mut text) = (Vec::with_capacity(1_024), Vec::with_capacity(512));
        wire.extend_from_slice(&[0; 4]);
        let (mut count, mut names): (u32, u64) = (0, 0);
        for (name, value) in pairs {
            let (name, value) = (name.as_ref(), value.as_ref());
            wire.extend_from_slice(&length(name).to_le_bytes());
            wire.extend_from_slice(&length(value).to_le_bytes());
            text.extend_from_slice(name);
            text.push(0);
            text.extend_from_slice(value);
            text.push(0);
            count = count.saturating_add(1);
            names |= bit(name);
        }
        if let Some(head) = wire.first_chunk_mut() {
            *head = count.to_le_bytes();
        }
        wire.append(&mut text);
        Self { wire, names }
    }

    /// The serialised form.
    #[must_use]
    pub fn into_wire(self) -> Vec<u8> {
        self.wire
    }

    /// Pairs in the order in which they arrived.
    pub fn iter(&self) -> Pairs<'_> {
        let count = read_u32(&self.wire, 0).unwrap_or(0);
        let lengths = (count as usize).saturating_mul(8).saturating_add(4);
        Pairs { wire: &self.wire, left: count, lengths: 4, data: lengths }
    }

    /// First value of `name`, which must be in lower case (Envoy lower-cases names).
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        if self.names & bit(name.as_bytes()) == 0 {
            return None;
        }
        let mut pairs = self.iter();
        // Most names are of another length: they are passed over unread.
        while let Some(bytes) = pairs.name_bytes() {
            if bytes == name.len() {
                let (key, value) = pairs.next()?;
                if key == name.as_bytes() {
                    return Some(value);
                }
            } else {
                pairs.pass();
            }
        }
        None
    }
}

/// Iterator over the pairs of [`Headers`].
#[derive(Clone)]
pub struct Pairs<'a> {
    wire: &'a [u8],
    left: u32,
    lengths: usize,
    data: usize,
}

impl Pairs<'_> {
    /// Length of the next name.
    fn name_bytes(&self) -> Option<usize> {
        if self.left == 0 { None } else { Some(read_u32(self.wire, self.lengths)? as usize) }
    }

    /// Passes over a pair.
    fn pass(&mut self) {
        let bytes = |offset| read_u32(self.wire, offset).unwrap_or(0) as usize;
        let (name, value) = (bytes(self.lengths), bytes(self.lengths.saturating_add(4)));
        self.left = self.left.saturating_sub(1);
        self.lengths = self.lengths.saturating_add(8);
        self.data = self.data.saturating_add(name).saturating_add(value).saturating_add(2);
    }
}

impl<'a> Iterator for Pairs<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let name_bytes = read_u32(self.wire, self.lengths)? as usize;
        let value_bytes = read_u32(self.wire, self.lengths.checked_add(4)?)? as usize;
        self.lengths = self.lengths.checked_add(8)?;
        let name_end = self.data.checked_add(name_bytes)?;
        let value_start = name_end.checked_add(1)?;
        let value_end = value_start.checked_add(value_bytes)?;
        let pair = (self.wire.get(self.data..name_end)?, self.wire.get(value_start..value_end)?);
        self.data = value_end.checked_add(1)?;
        Some(pair)
    }
}

/// The bit of a name, by its length, its last byte and the one in its middle: names of headers often begin alike.
fn bit(name: &[u8]) -> u64 {
    let byte = |index: usize| u32::from(name.get(index).copied().unwrap_or(0));
    let length = name.len();
    let mixed = (length as u32).wrapping_mul(7)
        ^ byte(length.wrapping_sub(1)).wrapping_mul(3)
        ^ byte(length / 2).wrapping_mul(5);
    1_u64.wrapping_shl(mixed)
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}

fn read_u32(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pairs_survive_in_order() {
        let pairs: [(&[u8], &[u8]); 3] = [(b":path", b"/v1"), (b"x", b"\xff\0"), (b"empty", b"")];
        let headers = Headers::from_pairs(pairs);
        assert_eq!(headers.iter().collect::<Vec<_>>(), pairs);
        assert_eq!(headers.get("x"), Some(&b"\xff\0"[..]));
        assert_eq!(headers.get("y"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            let headers = Headers::from_wire(bytes);
            prop_assert!(headers.iter().count() < 1_000_000);
            prop_assert_eq!(headers.get("x").is_some(), headers.iter().any(|(name, _)| name == b"x"));
        }
    }
}
