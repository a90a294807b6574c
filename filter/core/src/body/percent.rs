//! Percent-encoding.

/// Percent-encoding undone; an escape that is none stays as it stands.
pub(crate) fn decode_percent(text: &[u8]) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, tail)) = rest.split_first() {
        let digit = |index: usize| char::from(*tail.get(index)?).to_digit(16);
        let hex = digit(0).zip(digit(1)).and_then(|(high, low)| u8::try_from(high.wrapping_shl(4) | low).ok());
        let (byte, next) = match (first, hex, tail.get(2..)) {
            (b'%', Some(byte), Some(next)) => (byte, next),
            _ => (*first, tail),
        };
        decoded.push(byte);
        rest = next;
    }
    decoded
}
