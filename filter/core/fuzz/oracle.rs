//! What `serde_json` makes of a body, and the checks that `pd_core` makes the same of it. The property tests and the
//! fuzzer share this file; every check panics on a difference.

use core::fmt;

use pd_core::body::form;
use pd_core::body::json::{self, ErrorKind, ScanError};
use pd_core::body::splice::{Edits, HeadPlan, head_edit, rewrite};
use pd_core::body::{self, FORBIDDEN, Key, KeySet, Scan, is_content};
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

/// A document with its duplicates. (Not `serde_json::Value`, which drops them, and which takes one magic key as an
/// instruction when the feature `raw_value` is on.)
#[derive(Clone, Debug, PartialEq)]
pub enum Json {
    Null,
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    String(String),
    Array(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    pub fn parse(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }

    /// The value at a key or index as a parser that keeps the last duplicate sees it.
    fn step(&self, step: &str) -> Option<&Self> {
        match self {
            Self::Object(members) => members.iter().rev().find(|(key, _)| key == step).map(|(_, value)| value),
            Self::Array(elements) => elements.get(step.parse::<usize>().ok()?),
            _ => None,
        }
    }
}

/// What is left of a value where no client may name another server: forbidden members of every object that is no content
/// are gone. `gone` counts them.
pub fn without_forbidden(value: &Json, gone: &mut usize) -> Json {
    match value {
        Json::Array(elements) => Json::Array(elements.iter().map(|value| without_forbidden(value, gone)).collect()),
        Json::Object(members) => {
            let mut left = Vec::new();
            for (name, value) in members {
                if Key::of_name(name).is_some_and(|key| FORBIDDEN.contains(key)) {
                    *gone += 1;
                } else {
                    left.push((name.clone(), of_member(name, value, gone)));
                }
            }
            Json::Object(left)
        }
        other => other.clone(),
    }
}

fn of_member(name: &str, value: &Json, gone: &mut usize) -> Json {
    if is_content(name) { value.clone() } else { without_forbidden(value, gone) }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Build;

        impl<'de> Visitor<'de> for Build {
            type Value = Json;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("JSON")
            }
            fn visit_unit<E>(self) -> Result<Json, E> {
                Ok(Json::Null)
            }
            fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
                Ok(Json::Bool(value))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
                Ok(Json::Unsigned(value))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
                Ok(Json::Signed(value))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Json, E> {
                Ok(Json::Float(value))
            }
            fn visit_str<E>(self, value: &str) -> Result<Json, E> {
                Ok(Json::String(value.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
                let mut elements = Vec::new();
                while let Some(element) = seq.next_element()? {
                    elements.push(element);
                }
                Ok(Json::Array(elements))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Json::Object(members))
            }
        }

        deserializer.deserialize_any(Build)
    }
}

/// Checks the scan of any bytes. Returns the scan and the members if they are a valid body.
pub fn check_scan(bytes: &[u8]) -> Option<(Scan, Vec<(String, Json)>)> {
    let oracle = Json::parse(bytes);
    let validated = json::validate(bytes);
    assert_eq!(validated.is_ok(), oracle.is_ok(), "{validated:?} {oracle:?}");
    if let Ok(oracle) = &oracle {
        check_raw(bytes, oracle);
    }
    match (body::scan(bytes), oracle) {
        (Ok(scan), Ok(Json::Object(members))) => {
            check_members(bytes, &scan, &members);
            check_media(bytes, &scan);
            Some((scan, members))
        }
        (Err(error), Ok(Json::Object(members))) => {
            let known = members.iter().filter(|(key, _)| Key::of_name(key).is_some()).count();
            let mut gone = 0;
            without_forbidden(&Json::Object(members), &mut gone);
            assert_eq!(error.kind, ErrorKind::TooManyMembers);
            assert!(known.max(gone) > body::MAX_MEMBERS);
            None
        }
        (Err(error), Ok(_)) => {
            assert_eq!(error.kind, ErrorKind::NotAnObject);
            None
        }
        (Err(error), Err(_)) => {
            check_error(bytes, error);
            None
        }
        (scan, oracle) => panic!("{scan:?} {oracle:?}"),
    }
}

fn check_error(bytes: &[u8], error: ScanError) {
    assert!(error.offset as usize <= bytes.len());
    assert!(!error.to_string().is_empty());
}

fn check_members(bytes: &[u8], scan: &Scan, members: &[(String, Json)]) {
    assert_eq!(scan.len as usize, bytes.len());
    assert_eq!(bytes[scan.open as usize - 1], b'{');
    assert_eq!(scan.count as usize, members.len());
    let mut known = scan.members().iter();
    for (index, (name, value)) in members.iter().enumerate() {
        let Some(key) = Key::of_name(name) else { continue };
        let member = known.next().expect("a known member was not seen");
        assert_eq!((member.key, member.first, member.last), (key, index == 0, index + 1 == members.len()));
        assert_eq!(&Json::parse(member.value.get(bytes)).unwrap(), value);
        assert_eq!(bytes[member.span.start as usize], b'"');
        assert_eq!(member.span.end, member.value.end);
        let before = member.before as usize - usize::from(member.first);
        assert_eq!(bytes[before], if member.first { b'{' } else { b',' });
        assert_eq!(bytes[member.after as usize], if member.last { b'}' } else { b',' });
    }
    assert_eq!(known.next(), None);
    for &key in Key::ALL {
        let value = members.iter().rev().find(|(name, _)| name == key.name()).map(|(_, value)| value);
        assert_eq!(scan.has(key), value.is_some());
        let got = scan.get(key).map(|member| Json::parse(member.value.get(bytes)).unwrap());
        assert_eq!(got.as_ref(), value);
        let text = scan.str(bytes, key).map(|text| Json::String(text.into_owned()));
        assert_eq!(text.as_ref(), value.filter(|value| matches!(value, Json::String(_))));
        let flag = scan.bool(bytes, key).map(Json::Bool);
        assert_eq!(flag.as_ref(), value.filter(|value| matches!(value, Json::Bool(_))));
        let number = scan.u64(bytes, key).map(Json::Unsigned);
        assert_eq!(number.as_ref(), value.filter(|value| matches!(value, Json::Unsigned(_))));
    }
}

/// Each payload is a whole string of the prompt, behind the one before it.
fn check_media(bytes: &[u8], scan: &Scan) {
    let mut end = 0;
    for media in scan.media() {
        let (start, behind) = (media.payload.start as usize, media.payload.end as usize);
        assert!(start > end && start < behind && bytes[start - 1] == b'"' && bytes[behind] == b'"', "{media:?}");
        assert!(matches!(Json::parse(&bytes[start - 1..=behind]), Ok(Json::String(_))), "{media:?}");
        let inside =
            |member: &body::Member| member.value.start < media.payload.start && media.payload.end < member.value.end;
        assert!(scan.members().iter().any(inside), "{media:?}");
        end = behind;
    }
    assert!(scan.media().len() <= body::media::MAX_MEDIA);
}

/// Checks what takes raw values out of a document.
fn check_raw(bytes: &[u8], oracle: &Json) {
    let get = |path: &[&str]| json::raw_member(bytes, path).unwrap();
    let whole = get(&[]).expect("the document itself");
    assert_eq!(whole, bytes.trim_ascii());
    match oracle {
        Json::Object(members) => {
            let got: Vec<_> =
                json::members(whole).map(|(key, raw)| (key.into_owned(), Json::parse(raw).unwrap())).collect();
            assert_eq!(&got, members);
        }
        Json::Array(elements) => {
            let got: Vec<_> = json::elements(whole).map(|raw| Json::parse(raw).unwrap()).collect();
            assert_eq!(&got, elements);
        }
        _ => assert_eq!(json::members(whole).count() + json::elements(whole).count(), 0),
    }
    for path in [&["model"][..], &["0", "messages"], &["choices", "0", "disaggregated_params"], &["messages", "1"]] {
        let expected = path.iter().try_fold(oracle, |value, step| value.step(step));
        assert_eq!(get(path).map(|raw| Json::parse(raw).unwrap()).as_ref(), expected);
    }
}

/// Checks one edit of a valid body.
pub fn check_splice(bytes: &[u8], scan: &Scan, members: &[(String, Json)], edits: &Edits<'_>) {
    let inserted = members_of(&[b"{", edits.insert, b"}"].concat());
    let whole = json::raw_member(bytes, &[]).unwrap().unwrap();
    let mut expected = inserted.clone();
    let mut raw: Vec<(String, Vec<u8>)> = Vec::new();
    let mut changed = !edits.insert.is_empty();
    let mut cut = false;
    for ((name, value), (_, bytes)) in members.iter().zip(json::members(whole)) {
        let key = Key::of_name(name);
        let replaced = edits.replace.iter().find(|(replaced, _)| Some(*replaced) == key);
        if key.is_some_and(|key| edits.drop.contains(key)) {
            changed = true;
        } else if let Some((_, value)) = replaced {
            changed = true;
            expected.push((name.clone(), Json::parse(value).unwrap()));
            raw.push((name.clone(), value.to_vec()));
        } else {
            let mut gone = 0;
            let is_whole = key.is_some_and(|key| FORBIDDEN.contains(key));
            let left = if is_whole { value.clone() } else { of_member(name, value, &mut gone) };
            changed |= gone > 0;
            cut |= gone > 0;
            let cuts = if gone > 0 { body::cuts(bytes).unwrap() } else { Vec::new() };
            let left_bytes = form::without(bytes, &cuts);
            assert_eq!(Json::parse(&left_bytes).unwrap(), left, "{:?}", String::from_utf8_lossy(bytes));
            expected.push((name.clone(), left));
            raw.push((name.clone(), left_bytes));
        }
    }

    let edited = rewrite(bytes, scan, edits);
    assert_eq!(edited.capacity(), edited.len());
    assert_eq!(members_of(&edited), expected, "{:?}", String::from_utf8_lossy(&edited));
    let whole = json::raw_member(&edited, &[]).unwrap().unwrap();
    let got: Vec<_> =
        json::members(whole).skip(inserted.len()).map(|(key, raw)| (key.into_owned(), raw.to_vec())).collect();
    assert_eq!(got, raw);

    let head = head_edit(bytes, scan, edits);
    assert_eq!([&head.head, &bytes[head.drain as usize..]].concat(), edited);
    assert_eq!(head.is_none(), !changed);
    let plan = HeadPlan::new(bytes, scan, &Edits { insert: b"", ..*edits });
    assert_eq!(plan.with_insert(edits.insert), head);
    if !changed {
        assert_eq!(edited, bytes);
    } else if raw.len() == members.len() && edits.replace.is_empty() && !cut {
        assert_eq!(head.drain, scan.open);
    }
}

fn members_of(bytes: &[u8]) -> Vec<(String, Json)> {
    match Json::parse(bytes) {
        Ok(Json::Object(members)) => members,
        other => panic!("{other:?}: {:?}", String::from_utf8_lossy(bytes)),
    }
}

/// Number of choices for [`check_body`] that differ in more than keys and values.
pub const CHOICES: u64 = 36;

/// Checks the scan of `bytes` and, if they are a valid body, the edit that `choice` names.
pub fn check_body(bytes: &[u8], choice: u64) {
    let Some((scan, members)) = check_scan(bytes) else { return };
    let inserts: [&[u8]; 3] = [b"", br#""max_tokens":1"#, br#" "stream" : false, "kv_transfer_params":{"a":[1]}"#];
    let values: [&[u8]; 3] = [b"1", br#"{"a":[1,"\""]}"#, b"false"];
    let keys = Key::ALL;
    let pick = |shift: u32, len: usize| (choice.rotate_right(shift) % len as u64) as usize;
    let some = |set: KeySet, &key: &Key| if pick(key as u32, 2) == 1 { set.with(key) } else { set };
    let kind = choice % CHOICES;
    let drop = match kind % 4 {
        0 => KeySet::EMPTY,
        1 => KeySet::of(&[Key::KvTransferParams]),
        2 => keys.iter().fold(KeySet::EMPTY, some),
        _ => KeySet::of(keys),
    };
    let replace = [(keys[pick(7, keys.len())], values[pick(13, 3)]), (Key::Messages, values[pick(17, 3)])];
    let edits = Edits { drop, replace: &replace[..(kind / 4 % 3) as usize], insert: inserts[(kind / 12) as usize] };
    check_splice(bytes, &scan, &members, &edits);
}
