use super::*;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

/// Length of the text, and whether something else than ASCII was seen.
fn run(bytes: &[u8]) -> (usize, bool) {
    let mut non_ascii = false;
    let rest = skip_text(&[b"\"", bytes].concat(), &mut non_ascii).len();
    (bytes.len() - rest, non_ascii)
}

#[test]
fn text_ends_at_the_first_byte_that_is_something_else() {
    for len in (0..20).chain(60..85).chain([130]) {
        for index in 0..len {
            for byte in 0..=u8::MAX {
                let mut bytes = vec![b'x'; len];
                bytes[index] = byte;
                let non_ascii = !byte.is_ascii();
                let end = |otherwise: usize| if is_end(byte) { index } else { otherwise };
                assert_eq!(run(&bytes), (end(len), non_ascii), "{byte} at {index} of {len}");
                // A borrow must not hide the next byte, nor invent one.
                for (next, otherwise) in [(b'"', index + 1), (b'!', len), (b'#', len), (b'[', len), (b' ', len)] {
                    if index + 1 < len && byte != b'\\' {
                        bytes[index + 1] = next;
                        assert_eq!(run(&bytes), (end(otherwise), non_ascii), "{byte} at {index} of {len}, then {next}");
                    }
                }
            }
        }
    }
}

#[test]
fn text_passes_over_escapes_of_two_bytes() {
    for len in (2..20).chain(60..85).chain([130]) {
        for index in 0..len - 1 {
            for byte in 0..=u8::MAX {
                let mut bytes = vec![b'x'; len];
                bytes[index] = b'\\';
                bytes[index + 1] = byte;
                let escape = b"\"\\/bfnrt".contains(&byte);
                let expected = if escape { len } else { index };
                assert_eq!(run(&bytes).0, expected, "{byte} at {index} of {len}");
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
        assert_eq!(run(bytes.as_bytes()), (end, false), "{bytes}");
        let padded = format!("{bytes}{}", "\"".repeat(16));
        assert_eq!(run(padded.as_bytes()).0, end, "{padded}");
    }
}

/// Characters and escapes.
const COMMON: &[&[u8]] =
    &[b"\\\\", b"\\\"", b"\\n", b"\\t", b"\\r", b"\\/", b"\\u00e9", b"n", b"t", b"u", b"x", b"xxxxxxxx", b"\xc3"];
/// Ends and errors.
const RARE: &[&[u8]] = &[b"\\", b"\"", b"\\u12"];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(50_000))]

    /// Against one character at a time. Ends and errors are rarer in some than in others.
    #[test]
    fn text_is_what_it_is_one_character_at_a_time(
        pieces in (1_u32..200).prop_flat_map(|common| {
            vec(prop_oneof![common => select(COMMON), 1 => select(RARE)], 0..120)
        }),
    ) {
        let bytes = pieces.concat();
        let (mut rest, mut non_ascii) = (bytes.as_slice(), false);
        while let Some((&byte, mut behind)) = rest.split_first() {
            if is_end(byte) {
                let Some(escaped) = escape(rest) else { break };
                behind = escaped;
            }
            non_ascii |= !byte.is_ascii();
            rest = behind;
        }
        let (end, found) = run(&bytes);
        prop_assert_eq!(end, bytes.len() - rest.len());
        prop_assert!(found || !non_ascii);
        prop_assert!(!found || !bytes.is_ascii());
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
        assert_eq!(bytes.len() - skip_integers(bytes.as_bytes()).len(), end, "{bytes:?}");
    }
}

#[test]
fn digits_are_counted() {
    for index in 0..8 {
        for byte in 0..=u8::MAX {
            for others in [b'0', b'9', b'5'] {
                let mut bytes = [others; 8];
                bytes[index] = byte;
                let expected = if byte.is_ascii_digit() { 8 } else { index };
                assert_eq!(digits(u64::from_le_bytes(bytes)), expected, "{byte} at {index}");
            }
        }
    }
}
