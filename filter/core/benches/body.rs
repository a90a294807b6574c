//! `cargo bench -p pd-core --bench body`: what reading and editing a body costs, beside `serde_json` over the same bytes.

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use pd_core::body::splice::{Edits, head_edit, rewrite};
use pd_core::body::{Key, KeySet, scan};
use serde::Deserialize;
use serde_json::value::RawValue;

fn main() {
    divan::main();
}

/// What the text of a prompt is like, which decides the speed of reading it.
#[derive(Clone, Copy, Debug)]
enum Text {
    /// English, a line break or an escaped quote every 60 bytes or so.
    English,
    /// Three bytes per character.
    Chinese,
    /// The same as a client writes it that escapes what is not ASCII, as Python's `json` does by default.
    Escaped,
    /// No text but token ids.
    Ids,
}

const CASES: &[(Text, usize)] = &[
    (Text::English, 200),
    (Text::English, 4_000),
    (Text::English, 16_000),
    (Text::English, 220_000),
    (Text::Chinese, 16_000),
    (Text::Chinese, 220_000),
    (Text::Escaped, 16_000),
    (Text::Ids, 16_000),
];

fn body(text: Text, bytes: usize) -> Vec<u8> {
    let words = match text {
        Text::English => {
            "The quick brown fox jumps over the lazy dog, and then it says\\n \\\"nothing to see here,\\\" and goes. "
        }
        Text::Chinese => "敏捷的棕色狐狸跳过了懒狗，然后说没什么好看的，转身就走。\\n",
        Text::Escaped => "\\u654f\\u6377\\u7684\\u68d5\\u8272\\u72d0\\u72f8",
        Text::Ids => "12345, 678, 90123, 4, ",
    };
    let fill = |bytes: usize| words.repeat(bytes / words.len());
    let tail = r#""max_tokens": 128, "temperature": 0.7, "stream": true}"#;
    let body = if let Text::Ids = text {
        format!(r#"{{"model": "m", "prompt": [{}1], {tail}"#, fill(bytes))
    } else {
        let system = r#"{"role": "system", "content": "You help."}"#;
        let user = format!(r#"{{"role": "user", "content": "{}"}}"#, fill(bytes.saturating_sub(160)));
        format!(r#"{{"model": "m", "messages": [{system}, {user}], {tail}"#)
    };
    body.into_bytes()
}

#[divan::bench(args = CASES)]
fn scan_body(bencher: Bencher<'_, '_>, &(text, bytes): &(Text, usize)) {
    let body = body(text, bytes);
    bencher.counter(BytesCount::of_slice(&body)).bench(|| scan(black_box(&body)));
}

/// The baseline: serde's parse into borrowed raw values. It finds neither duplicates nor offsets.
#[derive(Deserialize)]
#[allow(dead_code)]
struct Raw<'a> {
    #[serde(borrow)]
    model: Option<&'a RawValue>,
    #[serde(borrow)]
    messages: Option<&'a RawValue>,
    #[serde(borrow)]
    prompt: Option<&'a RawValue>,
    #[serde(borrow)]
    max_tokens: Option<&'a RawValue>,
    #[serde(borrow)]
    stream: Option<&'a RawValue>,
}

#[divan::bench(args = CASES)]
fn serde_json_raw_values(bencher: Bencher<'_, '_>, &(text, bytes): &(Text, usize)) {
    let body = body(text, bytes);
    let parse = || serde_json::from_slice::<Raw<'_>>(black_box(&body)).is_ok();
    bencher.counter(BytesCount::of_slice(&body)).bench(parse);
}

const PARAMS: &[u8] = br#""kv_transfer_params":{"do_remote_prefill":true,"remote_block_ids":[[1,2,3]]}"#;

/// The prefill leg: limits dropped and set, the body copied.
#[divan::bench(args = &CASES[..4])]
fn rewrite_prefill_leg(bencher: Bencher<'_, '_>, &(text, bytes): &(Text, usize)) {
    let body = body(text, bytes);
    let scan = scan(&body).unwrap();
    let drop = KeySet::of(&[Key::Stream, Key::StreamOptions, Key::MaxTokens, Key::Stop, Key::KvTransferParams]);
    let edits = Edits { drop, insert: PARAMS, ..Edits::default() };
    bencher.counter(BytesCount::of_slice(&body)).bench(|| rewrite(black_box(&body), &scan, &edits));
}

/// The decode leg: one member put in front of a body that stays where it is.
#[divan::bench(args = &CASES[..4])]
fn head_edit_decode_leg(bencher: Bencher<'_, '_>, &(text, bytes): &(Text, usize)) {
    let body = body(text, bytes);
    let scan = scan(&body).unwrap();
    let edits = Edits { drop: KeySet::of(&[Key::KvTransferParams]), insert: PARAMS, ..Edits::default() };
    bencher.bench(|| head_edit(black_box(&body), &scan, &edits));
}
