//! The scanner's two inner loops: through the text of a string, and through an array of token ids.
//!
//! This is where a long body's time goes, so the filter has its own search in the 128-bit vectors that V8 maps to the
//! processor's. (The compiler vectorises a test of a whole block by itself, but not the search for the byte in it, and
//! text has a line break or an escaped quote in most blocks.)

/// Whether a byte of a string is something else than itself: the closing quote, an escape, or an error.
fn is_end(byte: u8) -> bool {
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

/// Passes over plain characters and escapes other than surrogates. Returns the rest, which starts with the end of the
/// string, a surrogate pair or an error.
///
/// `rest` starts with the byte before the text, which is no backslash. `non_ascii` becomes true if the text has a byte that
/// is not ASCII. It may also become true for one of the 63 bytes behind the text. That is harmless: they belong to the
/// same document.
#[inline]
pub(super) fn skip_text<'a>(mut rest: &'a [u8], non_ascii: &mut bool) -> &'a [u8] {
    let mut passed = vector::Passed::default();
    // Most strings of a body are names of a few bytes.
    if let Some([_, chunk @ ..]) = rest.first_chunk::<17>()
        && let Some(chunk) = chunk.first_chunk()
    {
        rest = rest.get(passed.ends(chunk).trailing_zeros() as usize..).unwrap_or_default();
        if let Some(end @ [b'"', ..]) = rest.get(1..) {
            *non_ascii |= passed.non_ascii();
            return end;
        }
    }
    while let Some(block) = rest.first_chunk::<65>() {
        // Text has a line break or an escaped quote in most blocks: only others are looked at one by one.
        if passed.plain(block) {
            rest = rest.get(64..).unwrap_or_default();
            continue;
        }
        let Some(block) = block.first_chunk() else { break };
        // The byte before belongs to the text if an escape begins with it.
        let mut ends = passed.all_ends(block) & !u64::from(block.first() != Some(&b'\\'));
        let mut last = 63;
        while ends != 0 {
            let index = ends.trailing_zeros();
            let here = rest.get(index as usize..).unwrap_or_default();
            let Some(after) = escape(here) else {
                *non_ascii |= passed.non_ascii();
                return here;
            };
            last = last.max(rest.len().wrapping_sub(after.len()).wrapping_sub(1));
            // Digits behind `\u` do not count as ends.
            ends &= !3_u64.wrapping_shl(index);
        }
        // A backslash that was passed must not be the byte before the next block: so one more byte is passed behind it.
        if rest.get(last) == Some(&b'\\') {
            last = last.wrapping_add(1);
            match rest.get(last..) {
                Some(&[byte, ..]) if byte == b'\\' || !is_end(byte) => *non_ascii |= !byte.is_ascii(),
                end => {
                    *non_ascii |= passed.non_ascii();
                    return end.unwrap_or_default();
                }
            }
        }
        rest = rest.get(last..).unwrap_or_default();
    }
    *non_ascii |= passed.non_ascii();
    // An escape may begin with the byte before.
    rest = if let [b'\\', ..] = rest { rest } else { rest.get(1..).unwrap_or_default() };
    while let Some((&byte, behind)) = rest.split_first() {
        if !is_end(byte) {
            *non_ascii |= !byte.is_ascii();
            rest = behind;
        } else if let Some(behind) = escape(rest) {
            rest = behind;
        } else {
            break;
        }
    }
    rest
}

/// Passes over integers of up to eight digits as long as a comma follows each; returns what is behind the last comma.
pub(super) fn skip_integers(mut rest: &[u8]) -> &[u8] {
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
        u8x16_bitmask, u8x16_eq, u8x16_lt, u8x16_min, u8x16_splat, u64x2, u64x2_splat, v128, v128_andnot,
        v128_any_true, v128_or, v128_xor,
    };

    /// What was passed over so far.
    pub(super) struct Passed {
        /// All bytes, ORed, for bit 7.
        bytes: v128,
    }

    impl Default for Passed {
        fn default() -> Self {
            Self { bytes: u64x2_splat(0) }
        }
    }

    impl Passed {
        pub(super) fn non_ascii(&self) -> bool {
            u8x16_bitmask(self.bytes) != 0
        }

        /// A bit for each byte that [`super::is_end`], the lowest for the first, and one behind them all.
        #[inline]
        pub(super) fn ends(&mut self, chunk: &[u8; 16]) -> u32 {
            let bytes = load(chunk);
            self.bytes = v128_or(self.bytes, bytes);
            u32::from(u8x16_bitmask(ends(bytes))) | 0x1_0000
        }

        /// A bit for each byte that [`super::is_end`], the lowest for the first.
        #[inline]
        pub(super) fn all_ends(&self, block: &[u8; 64]) -> u64 {
            let (chunks, _) = block.as_chunks();
            chunks.iter().rev().fold(0, |all, chunk| all.wrapping_shl(16) | u64::from(u8x16_bitmask(ends(load(chunk)))))
        }

        /// Whether all of the last 64 bytes of `block` are plain characters or escaped line breaks, tabs and quotes.
        #[inline]
        pub(super) fn plain(&mut self, block: &[u8; 65]) -> bool {
            let [_, text @ ..] = block;
            let (([a, b, c, d], _), ([e, f, g, h], _)) = (block.as_chunks(), text.as_chunks()) else { return false };
            let (e, f, g, h) = (load(e), load(f), load(g), load(h));
            self.bytes = v128_or(self.bytes, v128_or(v128_or(e, f), v128_or(g, h)));
            let least = u8x16_min(u8x16_min(e, f), u8x16_min(g, h));
            let (a, b, c, d) = (backslash(load(a)), backslash(load(b)), backslash(load(c)), backslash(load(d)));
            let others = v128_or(v128_or(others(a, e), others(b, f)), v128_or(others(c, g), others(d, h)));
            !v128_any_true(v128_or(others, control(least)))
        }
    }

    /// All ones for a quote without a backslash before it, and for an escaped byte other than a line break, tab or quote.
    #[inline]
    fn others(escaped: v128, bytes: v128) -> v128 {
        let letter = v128_or(u8x16_eq(bytes, u8x16_splat(b'n')), u8x16_eq(bytes, u8x16_splat(b't')));
        v128_andnot(v128_xor(escaped, quote(bytes)), letter)
    }

    #[inline]
    fn ends(bytes: v128) -> v128 {
        v128_or(v128_or(backslash(bytes), quote(bytes)), control(bytes))
    }

    #[inline]
    fn backslash(bytes: v128) -> v128 {
        u8x16_eq(bytes, u8x16_splat(b'\\'))
    }

    #[inline]
    fn quote(bytes: v128) -> v128 {
        u8x16_eq(bytes, u8x16_splat(b'"'))
    }

    #[inline]
    fn control(bytes: v128) -> v128 {
        u8x16_lt(bytes, u8x16_splat(0x20))
    }

    /// One load: the compiler sees through it.
    #[inline]
    fn load(chunk: &[u8; 16]) -> v128 {
        let ([low, high], _) = chunk.as_chunks() else { return u64x2_splat(0) };
        u64x2(u64::from_le_bytes(*low), u64::from_le_bytes(*high))
    }
}

#[cfg(not(all(target_arch = "wasm32", target_feature = "simd128")))]
mod vector {
    /// What was passed over so far.
    #[derive(Default)]
    pub(super) struct Passed {
        /// All bytes, ORed, for bit 7.
        bytes: u8,
    }

    impl Passed {
        pub(super) fn non_ascii(&self) -> bool {
            !self.bytes.is_ascii()
        }

        /// A bit for each byte that [`super::is_end`], the lowest for the first, and one behind them all.
        pub(super) fn ends(&mut self, chunk: &[u8; 16]) -> u32 {
            self.bytes = chunk.iter().fold(self.bytes, |all, byte| all | byte);
            bits(chunk, super::is_end) as u32 | 0x1_0000
        }

        /// A bit for each byte that [`super::is_end`], the lowest for the first.
        pub(super) fn all_ends(&self, block: &[u8; 64]) -> u64 {
            bits(block, super::is_end)
        }

        /// Whether all of the last 64 bytes of `block` are plain characters or escaped line breaks, tabs and quotes.
        pub(super) fn plain(&mut self, block: &[u8; 65]) -> bool {
            let [before @ .., _] = block;
            let [_, text @ ..] = block;
            self.bytes = text.iter().fold(self.bytes, |all, byte| all | byte);
            let escapes = bits(before, |byte| byte == b'\\');
            let letters = bits(text, |byte| (byte == b'n') | (byte == b't'));
            let others = (escapes ^ bits(text, |byte| byte == b'"')) & !letters;
            others | bits(text, |byte| byte < 0x20) == 0
        }
    }

    /// A bit for each byte of that kind.
    fn bits(bytes: &[u8], is: impl Fn(u8) -> bool) -> u64 {
        bytes.iter().rev().fold(0, |bits, byte| bits.wrapping_shl(1) | u64::from(is(*byte)))
    }
}

#[cfg(test)]
mod tests;
