//! A plain parser finds the same fields in a form before and after its edit, except the fields that no client may send. The
//! fuzz target of the same name searches further.

#[path = "../fuzz/form.rs"]
mod form;
#[path = "../fuzz/oracle.rs"]
#[allow(dead_code)]
mod oracle;

use std::fs;

use proptest::prelude::*;
use proptest::sample::select;

/// Pieces of forms.
const PIECES: &[&str] = &[
    "--B",
    "--B--",
    "\r\n",
    "\r\n\r\n",
    "\r\n--B\r\nContent-Disposition: form-data; name=\"",
    "\"\r\n\r\n",
    "\"; filename=\"a.wav\"\r\nContent-Type: audio/wav\r\n\r\n",
    "content-disposition : form-data;name=",
    "model",
    "kv_transfer_params",
    "vllm_xargs",
    "messages",
    "{\"kv_transfer_params\":0,\"a\":1}",
    "[{\"a\":{\"ec_transfer_params\":{}}}]",
    "[",
    "\"",
    "\\",
    "=",
    "&",
    ";",
    "+",
    "%",
    "%6bv_transfer_params",
    "%7B%22kv_transfer_params%22%3A1%7D",
    "x",
];

fn pieces() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        8 => select(PIECES).prop_map(|piece| piece.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..4),
    ];
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

/// Parts that a client could send, in any order.
fn parts() -> impl Strategy<Value = Vec<u8>> {
    let name = select(&["model", "file", "kv_transfer_params", "vllm_xargs", "ec_transfer_params", "prompt"][..]);
    let file = any::<bool>();
    let value = prop_oneof![
        select(&["{\"kv_transfer_params\":0}", "{\"a\":[{\"kv_hints\":1,\"b\":2}]}", "m", "", "RIFF\r\n--X"][..])
            .prop_map(|value| value.as_bytes().to_vec()),
        prop::collection::vec(any::<u8>(), 0..12),
    ];
    let part = (name, file, value).prop_map(|(name, is_file, value)| {
        let file = if is_file { "; filename=\"f\"" } else { "" };
        let head = format!("--B\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\n\r\n");
        [head.as_bytes(), &value, b"\r\n"].concat()
    });
    prop::collection::vec(part, 0..6).prop_map(|parts| [parts.concat(), b"--B--\r\n".to_vec()].concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]
    #[test]
    fn any_bytes_are_no_form_or_one_that_is_freed(choice in 0..2_u8, body in prop_oneof![pieces(), parts()]) {
        form::run(&[&[choice][..], &body].concat());
    }
}

#[test]
fn the_fuzzers_seeds_are_forms_that_change() {
    let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds/form");
    let mut count = 0;
    for entry in fs::read_dir(seeds).unwrap() {
        let seed = fs::read(entry.unwrap().path()).unwrap();
        form::run(&seed);
        for end in 0..seed.len() {
            form::run(&seed[..end]);
            let mut other = seed.clone();
            other[end] ^= 0x20;
            form::run(&other);
        }
        count += 1;
    }
    assert_eq!(count, 3);
}
