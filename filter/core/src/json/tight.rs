//! The two tight loops of the scanner: through the text of a string, and through an array of token ids.
//!
//! This is where a long body's time goes, so the filter has its own search in the 128-bit vectors that V8 maps to the
//! processor's. (The compiler vectorises a test of a whole block by itself, but not the search for the byte in it, and
//! text has a line break or an escaped quote in most blocks.)

/// Whether a byte of a string is something else than itself: the closing quote, an escape, or an error.
fn ends(byte: u8) -> bool {
    (byte == b'"') | (byte == b'\\') | (byte < 0x20)
}

/// What is behind an escape, if one is here that is complete without another: not half a surrogate pair.
#[inline]
fn escape(bytes: &[u8]) -> Option<&[u8]> {
    match bytes {
        [b'\\', b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't', behind @ ..] => Some(behind),
        [b'\\', b'u', a, b, c, d, behind @ ..] => {
            let code = hex(*a).wrapping_shl(12) | hex(*b).wrapping_shl(8) | hex(*c).wrapping_shl(4) | hex(*d);
            (!(0xd800..=0xdfff).contains(&code) && code <= 0xffff).then_some(behind)
        }
        _ => None,
    }
}

/// Value of a hexadecimal digit; of any other byte a bit above those of four digits. A table, which makes text of `\u`
/// escapes nearly twice as fast as `to_digit`.
#[inline]
fn hex(byte: u8) -> u32 {
    const NONE: u32 = 0x1_0000;
    const VALUES: [u32; 256] = {
        let mut values = [NONE; 256];
        let mut rest = values.as_mut_slice();
        let mut byte = 0_u8;
        while let [value, behind @ ..] = rest {
            if let Some(digit) = (byte as char).to_digit(16) {
                *value = digit;
            }
            byte = byte.wrapping_add(1);
            rest = behind;
        }
        values
    };
    VALUES.get(usize::from(byte)).copied().unwrap_or(NONE)
}

/// What a string held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// An escape.
    pub(super) escape: bool,
    /// A byte that is not ASCII; perhaps one of the 63 bytes behind the text, which does no harm: they belong to the
    /// same document.
    pub(super) non_ascii: bool,
}

/// Passes over characters that stand for themselves and escapes that do; returns what is behind them: the end of the
/// string, a surrogate pair or an error.
#[inline]
pub(super) fn text<'a>(mut rest: &'a [u8], seen: &mut Seen) -> &'a [u8] {
    let mut high = vector::High::default();
    // Most strings of a body are names of a few bytes.
    if let Some((chunk, behind)) = rest.split_first_chunk::<16>() {
        let plain = high.ends(chunk).trailing_zeros() as usize;
        rest = rest.get(plain..).unwrap_or(behind);
        if rest.first() == Some(&b'"') {
            seen.non_ascii |= high.any();
            return rest;
        }
    }
    // Text has a line break or an escaped quote in most blocks: all of a block are found at once.
    'block: while let Some((block, behind)) = rest.split_first_chunk::<64>() {
        let mut ends = high.all_ends(block);
        while ends != 0 {
            let at = ends.trailing_zeros();
            let here = rest.get(at as usize..).unwrap_or_default();
            let Some(after) = escape(here) else {
                seen.non_ascii |= high.any();
                return here;
            };
            seen.escape = true;
            if at < 63 {
                // Digits behind `\u` do not count as ends.
                ends &= !3_u64.wrapping_shl(at);
                continue;
            }
            rest = after;
            continue 'block;
        }
        rest = behind;
    }
    seen.non_ascii |= high.any();
    while let Some((&byte, behind)) = rest.split_first() {
        if !ends(byte) {
            seen.non_ascii |= !byte.is_ascii();
            rest = behind;
        } else if let Some(behind) = escape(rest) {
            seen.escape = true;
            rest = behind;
        } else {
            break;
        }
    }
    rest
}

/// Passes over integers of up to eight digits as long as a comma follows each; returns what is behind the last comma.
pub(super) fn integers(mut rest: &[u8]) -> &[u8] {
    loop {
        let number = rest.strip_prefix(b" ").unwrap_or(rest);
        let Some(word) = number.first_chunk().map(|word| u64::from_le_bytes(*word)) else { return rest };
        let digits = digits(word);
        let leading_zero = digits > 1 && number.first() == Some(&b'0');
        match number.get(digits..) {
            Some([b',', behind @ ..]) if digits > 0 && !leading_zero => rest = behind,
            _ => return rest,
        }
    }
}

/// A word of eight times the same byte.
const fn every(byte: u8) -> u64 {
    u64::from_le_bytes([byte; 8])
}

/// Number of digits before the first other byte, lowest first; 8 when all are digits.
fn digits(word: u64) -> usize {
    // The high half of a byte is 3 both before and after adding 6. A carry comes from a byte that is no digit.
    let no_digit = |word: u64| word & every(0xf0) ^ every(0x30);
    ((no_digit(word) | no_digit(word.wrapping_add(every(6)))).trailing_zeros() / 8) as usize
}

#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
mod vector {
    use core::arch::wasm32::{
        u8x16, u8x16_bitmask, u8x16_eq, u8x16_lt, u8x16_splat, u64x2_splat, v128, v128_any_true, v128_or,
    };

    /// All bytes so far, ORed, for bit 7.
    pub(super) struct High(v128);

    impl Default for High {
        fn default() -> Self {
            Self(u64x2_splat(0))
        }
    }

    impl High {
        pub(super) fn any(&self) -> bool {
            u8x16_bitmask(self.0) != 0
        }

        /// A bit for each byte that [`super::ends`], the lowest for the first, and one behind them all.
        #[inline]
        pub(super) fn ends(&mut self, chunk: &[u8; 16]) -> u32 {
            u32::from(u8x16_bitmask(self.found(chunk))) | 0x1_0000
        }

        /// A bit for each byte that [`super::ends`], the lowest for the first.
        #[inline]
        pub(super) fn all_ends(&mut self, block: &[u8; 64]) -> u64 {
            let ([a, b, c, d], _) = block.as_chunks() else { return 0 };
            let (a, b, c, d) = (self.found(a), self.found(b), self.found(c), self.found(d));
            if !v128_any_true(v128_or(v128_or(a, b), v128_or(c, d))) {
                return 0;
            }
            let bits = |found: v128| u64::from(u8x16_bitmask(found));
            bits(a) | bits(b).wrapping_shl(16) | bits(c).wrapping_shl(32) | bits(d).wrapping_shl(48)
        }

        /// All ones for each byte that [`super::ends`].
        #[inline]
        fn found(&mut self, chunk: &[u8; 16]) -> v128 {
            // One load: the compiler sees through it.
            let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *chunk;
            let bytes = u8x16(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p);
            self.0 = v128_or(self.0, bytes);
            let quote = u8x16_eq(bytes, u8x16_splat(b'"'));
            let escape = u8x16_eq(bytes, u8x16_splat(b'\\'));
            let control = u8x16_lt(bytes, u8x16_splat(0x20));
            v128_or(v128_or(quote, escape), control)
        }
    }
}

#[cfg(not(all(target_arch = "wasm32", target_feature = "simd128")))]
mod vector {
    use super::every;

    /// All bytes so far, ORed, for bit 7.
    #[derive(Default)]
    pub(super) struct High(u64);

    impl High {
        pub(super) fn any(&self) -> bool {
            self.0 & every(0x80) != 0
        }

        /// A bit for each byte that [`super::ends`], the lowest for the first, and one behind them all.
        #[inline]
        pub(super) fn ends(&mut self, chunk: &[u8; 16]) -> u32 {
            self.bits(chunk) as u32 | 0x1_0000
        }

        /// A bit for each byte that [`super::ends`], the lowest for the first.
        #[inline]
        pub(super) fn all_ends(&mut self, block: &[u8; 64]) -> u64 {
            self.bits(block)
        }

        fn bits(&mut self, bytes: &[u8]) -> u64 {
            let (words, _) = bytes.as_chunks::<8>();
            words.iter().rev().fold(0, |bits, word| {
                let word = u64::from_le_bytes(*word);
                self.0 |= word;
                bits.wrapping_shl(8) | ends(word)
            })
        }
    }

    /// A bit for each byte that [`super::ends`].
    fn ends(word: u64) -> u64 {
        // Bit 7 of each byte that is zero; no carry leaves a byte.
        let zero = |word: u64| !((word & every(0x7f)).wrapping_add(every(0x7f)) | word | every(0x7f));
        let control = zero(word & every(0xe0));
        let found = zero(word ^ every(b'"')) | zero(word ^ every(b'\\')) | control;
        // The eight bits 7 side by side.
        found.wrapping_shr(7).wrapping_mul(0x0102_0408_1020_4080).wrapping_shr(56)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Length of the text, and what was seen.
    fn run(bytes: &[u8]) -> (usize, Seen) {
        let mut seen = Seen::default();
        let rest = text(bytes, &mut seen).len();
        (bytes.len() - rest, seen)
    }

    #[test]
    fn text_ends_at_the_first_byte_that_is_something_else() {
        for len in (0..20).chain(60..85).chain([130]) {
            for at in 0..len {
                for byte in 0..=u8::MAX {
                    let mut bytes = vec![b'x'; len];
                    bytes[at] = byte;
                    let seen = Seen { escape: false, non_ascii: !byte.is_ascii() };
                    let end = |otherwise: usize| if ends(byte) { at } else { otherwise };
                    assert_eq!(run(&bytes), (end(len), seen), "{byte} at {at} of {len}");
                    // A borrow must not hide the next byte, nor invent one.
                    for (next, otherwise) in [(b'"', at + 1), (b'!', len), (b'#', len), (b'[', len), (b' ', len)] {
                        if at + 1 < len && byte != b'\\' {
                            bytes[at + 1] = next;
                            assert_eq!(run(&bytes), (end(otherwise), seen), "{byte} at {at} of {len}, then {next}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn text_passes_over_escapes_of_two_bytes() {
        for len in (2..20).chain(60..85).chain([130]) {
            for at in 0..len - 1 {
                for byte in 0..=u8::MAX {
                    let mut bytes = vec![b'x'; len];
                    bytes[at] = b'\\';
                    bytes[at + 1] = byte;
                    let escape = b"\"\\/bfnrt".contains(&byte);
                    let (end, seen) = run(&bytes);
                    assert_eq!((end, seen.escape), (if escape { len } else { at }, escape), "{byte} at {at} of {len}");
                }
            }
        }
    }

    #[test]
    fn text_passes_over_characters_by_number() {
        for (bytes, end) in [
            ("a\\u0000\\uFFFFb\\ud7ff\\ue000", 26),
            ("a\\ud800\\udc00", 1),
            ("\\u00e9\\uDFFF", 6),
            ("\\u00e9\\u00g9", 6),
            ("\\u00e9\\ug000", 6),
            ("\\u00e9\\u00e", 6),
            ("\\u00e9\\U00e9", 6),
        ] {
            assert_eq!(run(bytes.as_bytes()), (end, Seen { escape: end > 1, non_ascii: false }), "{bytes}");
            let padded = format!("{bytes}{}", "\"".repeat(16));
            assert_eq!(run(padded.as_bytes()).0, end, "{padded}");
        }
    }

    #[test]
    fn integers_end_behind_the_last_comma() {
        for (bytes, end) in [
            ("1,2, 3,4444444,0,12,        ", 20),
            ("1,12345678,123456789,        ", 11),
            ("1,01,        ", 2),
            ("1,  2,        ", 2),
            ("1,-2,        ", 2),
            ("1,2.5,        ", 2),
            ("1,,        ", 2),
            ("1,2]        ", 2),
            ("1,2,3", 0),
            (",        ", 0),
            ("", 0),
        ] {
            assert_eq!(bytes.len() - integers(bytes.as_bytes()).len(), end, "{bytes:?}");
        }
    }

    #[test]
    fn digits_are_counted() {
        for at in 0..8 {
            for byte in 0..=u8::MAX {
                for others in [b'0', b'9', b'5'] {
                    let mut bytes = [others; 8];
                    bytes[at] = byte;
                    let expected = if byte.is_ascii_digit() { 8 } else { at };
                    assert_eq!(digits(u64::from_le_bytes(bytes)), expected, "{byte} at {at}");
                }
            }
        }
    }
}
