//! Scan and splice equal what `serde_json` makes of the same bytes.

#[path = "../fuzz/oracle.rs"]
mod oracle;

use oracle::{CHOICES, check_body, check_scan};
use pd_core::body::Key;
use proptest::prelude::*;
use proptest::sample::{Index, select};

fn white_space() -> impl Strategy<Value = String> {
    prop_oneof![4 => Just(String::new()), 1 => "[ \t\r\n]{1,3}"]
}

/// What stands between the quotes of a string, mostly valid.
fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        8 => "[ -!#-\\[\\]-~]{0,40}",
        2 => "[^\\x00-\\x1f\"\\\\]{0,8}",
        2 => select(&["\\n", "\\\"", "\\\\", "\\/", "\\b", "\\f", "\\r", "\\t"][..]).prop_map(str::to_owned),
        1 => "\\\\u[0-9a-fA-F]{4}",
        1 => "\\\\ud[89ab][0-9a-f]{2}\\\\ud[c-f][0-9a-f]{2}",
    ];
    prop::collection::vec(piece, 0..5).prop_map(|pieces| pieces.concat())
}

fn number() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<u64>().prop_map(|number| number.to_string()),
        any::<i64>().prop_map(|number| number.to_string()),
        any::<f64>().prop_filter("JSON has no such numbers", |number| number.is_finite()).prop_map(|n| n.to_string()),
        "-?(0|[1-9][0-9]{0,25})(\\.[0-9]{1,25})?([eE][+-]?[0-9]{1,4})?",
        "[1-9][0-9]{195,320}(\\.[0-9]{1,3})?(e-?[0-9]{1,3})?",
    ]
}

/// A key of the filter's, perhaps written with escapes, or another.
fn key() -> impl Strategy<Value = String> {
    let escaped = (select(Key::ALL), any::<u64>()).prop_map(|(key, mask)| {
        let escape = |(index, byte): (usize, u8)| match mask >> (index % 64) & 1 {
            1 => format!("\\u00{byte:02x}"),
            _ => char::from(byte).to_string(),
        };
        key.name().bytes().enumerate().map(escape).collect()
    });
    prop_oneof![6 => select(Key::ALL).prop_map(|key| key.name().to_owned()), 1 => escaped, 2 => text()]
}

fn value() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        4 => text().prop_map(|text| format!("\"{text}\"")),
        3 => number(),
        2 => select(&["true", "false", "null", "{}", "[]"][..]).prop_map(str::to_owned),
    ];
    leaf.prop_recursive(5, 40, 5, |inner| {
        prop_oneof![
            (prop::collection::vec(inner.clone(), 0..5), white_space())
                .prop_map(|(elements, space)| format!("[{}]", elements.join(&format!("{space},")))),
            object(prop::collection::vec((key(), inner), 0..5)),
        ]
    })
}

fn object(members: impl Strategy<Value = Vec<(String, String)>>) -> impl Strategy<Value = String> {
    (members, white_space(), white_space(), white_space()).prop_map(|(members, a, b, c)| {
        let members: Vec<_> =
            members.into_iter().map(|(key, value)| format!("{a}\"{key}\"{b}:{c}{value}{a}")).collect();
        format!("{{{c}{}{b}}}", members.join(","))
    })
}

fn body() -> impl Strategy<Value = String> {
    (object(prop::collection::vec((key(), value()), 0..8)), white_space()).prop_map(|(body, space)| body + &space)
}

/// Every kind of edit, each with some set of keys.
fn check_every_edit(body: &[u8]) {
    for choice in 0..CHOICES {
        check_body(body, choice + CHOICES * 0x0123_4567_89ab_cdef);
    }
}

proptest! {
    #[test]
    fn generated_bodies(body in body(), choice: u64) {
        check_body(body.as_bytes(), choice);
    }

    #[test]
    fn mutated_bodies(
        body in body(),
        mutations in prop::collection::vec((any::<Index>(), prop_oneof![
            3 => select(b"\"\\{}[],:eE.-+01u\n\0 \x7f\x80\xff".as_slice()),
            1 => any::<u8>(),
        ]), 1..4),
        choice: u64,
    ) {
        let mut body = body.into_bytes();
        for (choice, byte) in mutations {
            let index = choice.index(body.len());
            body[index] = byte;
        }
        check_body(&body, choice);
    }

    #[test]
    fn truncated_bodies(body in body()) {
        for end in 0..body.len() {
            check_scan(&body.as_bytes()[..end]);
        }
    }

    #[test]
    fn arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..64), tail in "[\\[\\]{}\":,a\\\\0 ]{0,20}") {
        check_body(&bytes, 0);
        check_body(&[b"{\"", bytes.as_slice()].concat(), 1);
        check_body(tail.as_bytes(), 2);
    }

    #[test]
    fn numbers(number in number()) {
        check_body(format!("{{\"n\":{number}}}").as_bytes(), 3);
        check_scan(number.as_bytes());
    }
}

#[test]
fn numbers_at_the_edges() {
    let digits = |count: usize| "9".repeat(count);
    let zeros = "0".repeat(400);
    let numbers = [
        "0",
        "-0",
        "00",
        "01",
        "-",
        "-a",
        "1.",
        ".1",
        "1.e1",
        "1e",
        "1e+",
        "1E-0",
        "0e999",
        "1e308",
        "1e309",
        "-1e309",
        "1e999",
        "1e-999",
        "1e99999999999",
        "0e99999999999",
        "1e-99999999999",
        "0.1e309",
        "0.01e310",
        "1.7976931348623157e308",
        "1.7976931348623158e308",
        "1.7976931348623159e308",
        "17976931348623157e292",
        "179769313486231580e291",
        "18446744073709551615",
        "18446744073709551616",
        "9007199254740993",
        "-9223372036854775808",
        "-9223372036854775809",
        "1 ",
        "1x",
        "+1",
        "NaN",
        "Infinity",
        "0x1",
        "1e0308",
        "1e+0000000001",
    ];
    let long = [
        digits(200),
        digits(201),
        digits(308),
        digits(309),
        digits(310),
        format!("1{zeros}"),
        format!("1{zeros}e-400"),
        format!("0.{zeros}1e401"),
        format!("0.{zeros}1e708"),
        format!("0.{zeros}1e710"),
        format!("1{zeros}e-9"),
    ];
    for number in numbers.into_iter().map(str::to_owned).chain(long) {
        check_every_edit(format!("{{\"n\":{number}}}").as_bytes());
        check_scan(number.as_bytes());
    }
}

#[test]
fn every_byte_in_every_place_of_a_string() {
    for len in 0..40 {
        for index in 0..=len {
            for byte in 0..=u8::MAX {
                let mut body = format!("{{\"prompt\":\"{}\",\"n\":1}}", "x".repeat(len)).into_bytes();
                body[11 + index.min(len.saturating_sub(1))] = byte;
                check_scan(&body);
            }
        }
    }
}

#[test]
fn every_escape() {
    for code in 0..=0xffff_u32 {
        let body = format!("{{\"model\":\"\\u{code:04X}\"}}");
        check_scan(body.as_bytes());
        for first in ["d800", "dbff"] {
            check_scan(format!("{{\"model\":\"\\u{first}\\u{code:04x}\"}}").as_bytes());
        }
    }
    for pair in [
        "\\ud800\\udc00",
        "\\udbff\\udfff",
        "\\ud800",
        "\\ud800x",
        "\\ud800\\n",
        "\\ud800\\ud800",
        "\\udc00",
        "\\ud800\\u",
        "\\ud800\\u00",
        "\\u12",
        "\\u123g",
        "\\x",
        "\\",
        "\\\u{e9}",
        "\\ud83d\\ude00\\n",
        "\\U0000",
    ] {
        check_scan(format!("{{\"model\":\"{pair}\"}}").as_bytes());
        check_scan(format!("{{\"{pair}\":1}}").as_bytes());
        check_scan(format!("{{\"model\":\"{pair}").as_bytes());
    }
    for escape in 0..=u8::MAX {
        check_scan(&[b"{\"model\":\"\\", &[escape][..], b"\"}"].concat());
    }
}

#[test]
fn nesting_up_to_the_limit() {
    for depth in 120..135 {
        let nested = |open: &str, inner: &str, close: &str| {
            let text = open.repeat(depth) + inner + &close.repeat(depth);
            check_scan(text.as_bytes());
            check_every_edit(format!("{{\"n\":{text}}}").as_bytes());
            check_scan(format!("{{\"n\":[{text},{text}]}}").as_bytes());
        };
        nested("[", "", "]");
        nested("[", "1", "]");
        nested("{\"n\":", "1", "}");
        nested("{\"n\":", "{}", "}");
        nested("[{\"a\":[1,", "2", "]}]");
        nested("[", "", "");
        nested("{\"a\":", "", "");
    }
    check_scan(&b"[".repeat(100_000));
    check_scan(&b"{\"a\":".repeat(100_000));
}

#[test]
fn white_space_is_jsons() {
    for byte in 0..=u8::MAX {
        for spaces in 0..10 {
            let mut body = b"{\"n\":[1],\"model\":{\"a\":1}}".to_vec();
            for place in [0, 1, 4, 5, 6, 7, 8, 9, 25][..spaces.min(9)].iter().rev() {
                body.insert(*place, byte);
            }
            check_every_edit(&body);
        }
    }
    check_scan("\u{feff}{}".as_bytes());
}

#[test]
fn one_known_member_too_many_is_refused() {
    let body = |count: usize| format!("{{{}\"x\":1}}", "\"n\":1,".repeat(count));
    assert!(check_scan(body(pd_core::body::MAX_MEMBERS).as_bytes()).is_some());
    assert!(check_scan(body(pd_core::body::MAX_MEMBERS + 1).as_bytes()).is_none());
}

#[test]
fn a_real_body_truncated_anywhere() {
    let body = r#" {"model":"m\u00e9","messages":[{"role":"user","content":[{"type":"text","text":"é \ud83d\ude00 \"x\""}]}],
        "seed":9007199254740993,"temperature":-1.5e-3,"stream":true,"stop":null,"stream":false,"logit_bias":{}} "#;
    for end in 0..=body.len() {
        check_every_edit(&body.as_bytes()[..end]);
    }
}

#[test]
fn the_fuzzers_seeds_have_nested_members_and_media() {
    let seed = |name: &str| std::fs::read(format!("{}/fuzz/seeds/body/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    for name in ["forbidden", "media", "messages", "generate"] {
        let seed = seed(name);
        for end in 0..=seed.len() {
            check_every_edit(&seed[..end]);
        }
    }
    assert_eq!(pd_core::body::scan(&seed("media")).unwrap().media().len(), 5);
    // The parameters of a tool stay.
    assert_eq!(pd_core::body::cuts(&seed("forbidden")).unwrap().len(), 5);
}
