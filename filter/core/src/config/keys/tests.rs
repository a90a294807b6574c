use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::super::Config;
use super::*;
use crate::wire::{ENDPOINT_KEYS, Endpoint};

/// The smallest configuration that has every object.
fn with_every_object() -> Value {
    json!({"control": {"cluster": "c"}, "models": {"NAME": {"targets": [{"model": "m"}]}}, "pools": {"NAME": {}}})
}

fn with(key: Key, value: Value) -> Result<Config, String> {
    let mut text = with_every_object();
    let mut place = &mut text;
    for part in key.path().split('.') {
        place = &mut place[part];
    }
    *place = value;
    Config::parse(text.to_string().as_bytes()).map_err(|error| error.to_string())
}

/// A whole number without a fraction, as a key of whole numbers wants it.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 { json!(value as i64) } else { json!(value) }
}

/// Every key that the parser takes: the refusal of a key that does not exist lists them.
fn known_keys(path: &str, found: &mut BTreeSet<String>) {
    let mut probe = json!({"?": 1});
    for part in path.split('.').rev().filter(|part| !part.is_empty()) {
        probe = json!({part: probe});
    }
    let refusal = Config::parse(probe.to_string().as_bytes()).unwrap_err().to_string();
    let Some((_, expected)) = refusal.split_once("unknown field `?`, expected ") else { return };
    for key in expected.split('`').skip(1).step_by(2) {
        let key = if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
        known_keys(&key, found);
        // A map of any names, not an object of known keys.
        known_keys(&format!("{key}.NAME"), found);
        found.insert(key);
    }
}

#[test]
fn the_table_has_every_key_that_the_parser_takes() {
    let mut known = BTreeSet::new();
    known_keys("", &mut known);
    let of_objects = |key: &String| known.iter().any(|other| other.starts_with(&format!("{key}.")));
    // Objects are described by their keys, but for those that may be absent.
    let wanted: BTreeSet<_> = known
        .iter()
        .filter(|key| !of_objects(key) || ["control", "models", "pools"].contains(&key.as_str()))
        .map(String::as_str)
        .collect();
    assert!(wanted.len() > 30, "{wanted:?}");
    assert_eq!(Key::ALL.iter().map(|key| key.path()).collect::<BTreeSet<_>>(), wanted);
}

#[test]
fn headers_that_may_be_trusted_are_listed() {
    let Values::Described(text) = Key::TrustedHeaders.values() else { panic!("a list of headers") };
    let listed: BTreeSet<_> = text.split('`').skip(1).step_by(2).collect();
    assert_eq!(listed, super::super::TRUSTABLE_HEADERS.iter().copied().collect());
}

#[test]
fn every_default_is_the_one_in_force() {
    let absent = Config::parse(with_every_object().to_string().as_bytes()).unwrap();
    for key in Key::ALL.iter().filter(|key| key.default_value() != REQUIRED) {
        let value: Value = serde_json::from_str(key.default_value()).unwrap();
        match key {
            Key::Control => assert_eq!((value, Config::parse(b"{}").unwrap().control), (Value::Null, None)),
            Key::Models => assert!(value == json!({}) && Config::parse(b"{}").unwrap().models.is_empty()),
            Key::Pools => assert_eq!(value, json!({})),
            key => assert_eq!(with(*key, value), Ok(absent.clone()), "{}", key.path()),
        }
    }
}

#[test]
fn allowed_values_are_taken_and_others_refused() {
    for key in Key::ALL {
        match key.values() {
            Values::Between { low, high, .. } => {
                for value in [low, high] {
                    assert!(with(*key, number(value)).is_ok(), "{} {value}", key.path());
                }
                for value in [low - 1.0, high + 1.0] {
                    assert!(with(*key, number(value)).is_err(), "{} {value}", key.path());
                }
            }
            Values::OneOf(words) => {
                for word in words {
                    let value = serde_json::from_str(word).unwrap_or_else(|_| json!(word));
                    assert!(with(*key, value).is_ok(), "{} {word}", key.path());
                }
                let refusal = with(*key, json!("?")).unwrap_err();
                if let Some((_, expected)) = refusal.split_once("unknown variant `?`, expected ") {
                    assert_eq!(expected.split('`').skip(1).step_by(2).collect::<Vec<_>>(), words, "{}", key.path());
                }
            }
            Values::Described(_) => {}
        }
    }
}

#[test]
fn endpoint_keys_have_their_defaults_and_values() {
    assert_eq!(ENDPOINT.iter().map(|key| key.key).collect::<Vec<_>>(), ENDPOINT_KEYS);
    let read = |key: &str, value: Value| {
        let mut text = json!({"address": "10.0.0.1:80", "role": "decode"});
        text[key] = value;
        let endpoint: Endpoint = serde_json::from_value(text).map_err(|error| error.to_string())?;
        endpoint.validate().map_err(|error| error.to_string())?;
        Ok::<_, String>(endpoint)
    };
    let plain = read("weight", json!(1)).unwrap();
    for key in ENDPOINT {
        if key.default_value != REQUIRED {
            let value = serde_json::from_str(key.default_value).unwrap();
            assert_eq!(read(key.key, value), Ok(plain.clone()), "{}", key.key);
        }
        match key.values {
            Values::Between { low, high, .. } => {
                assert!([low, high].iter().all(|value| read(key.key, number(*value)).is_ok()), "{}", key.key);
                let beyond = [low - 1.0, high + 1.0];
                assert!(beyond.iter().all(|value| read(key.key, number(*value)).is_err()), "{}", key.key);
            }
            BOOLEAN => {
                assert!([true, false].iter().all(|value| read(key.key, json!(value)).is_ok()), "{}", key.key);
            }
            Values::OneOf(words) => {
                assert!(words.iter().all(|word| read(key.key, json!(word)).is_ok()), "{}", key.key);
                let refusal = read(key.key, json!("?")).unwrap_err();
                assert_eq!(refusal.split('`').skip(3).step_by(2).collect::<Vec<_>>(), words, "{refusal}");
            }
            Values::Described(_) => {}
        }
    }
}
