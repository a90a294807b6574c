//! Whether an object is what its schema says: every field known, of its type, and none missing. What needs an API server
//! (rules in CEL, defaults) is not looked at.

use serde_json::{Map, Value};

/// What in a schema is looked at; the rest is left out where schemas are stored.
pub const KEYWORDS: [&str; 9] = [
    "additionalProperties",
    "enum",
    "items",
    "properties",
    "required",
    "type",
    "x-kubernetes-int-or-string",
    "x-kubernetes-preserve-unknown-fields",
    "maxItems",
];

/// What is wrong with `value`, as lines with their paths.
#[must_use]
pub fn faults(schema: &Value, value: &Value) -> Vec<String> {
    let mut faults = Vec::new();
    check(schema, value, "", &mut faults);
    faults
}

/// A schema with nothing but [`KEYWORDS`].
#[must_use]
pub fn reduced(schema: &Value) -> Value {
    let Value::Object(members) = schema else { return schema.clone() };
    let kept = members.iter().filter(|(key, _)| KEYWORDS.contains(&key.as_str()));
    let reduce = |(key, value): (&String, &Value)| {
        let value = match (key.as_str(), value) {
            ("properties", Value::Object(properties)) => {
                Value::Object(properties.iter().map(|(name, schema)| (name.clone(), reduced(schema))).collect())
            }
            ("items" | "additionalProperties", schema) => reduced(schema),
            (_, value) => value.clone(),
        };
        (key.clone(), value)
    };
    Value::Object(kept.map(reduce).collect())
}

fn check(schema: &Value, value: &Value, path: &str, faults: &mut Vec<String>) {
    let is_free = schema["x-kubernetes-preserve-unknown-fields"] == true;
    let mut fault = |what: String| faults.push(format!("{}: {what}", if path.is_empty() { "." } else { path }));
    if schema["x-kubernetes-int-or-string"] == true {
        if !(value.is_string() || value.is_i64() || value.is_u64()) {
            fault("must be a number or a text".to_owned());
        }
        return;
    }
    let is_type = match schema["type"].as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("boolean") => value.is_boolean(),
        Some("integer") => value.is_i64() || value.is_u64(),
        Some("number") => value.is_number(),
        _ => true,
    };
    if !is_type {
        return fault(format!("must be of type {}", schema["type"]));
    }
    if schema["enum"].as_array().is_some_and(|values| !values.contains(value)) {
        fault(format!("{value} is none of {}", schema["enum"]));
    }
    match value {
        Value::Object(members) => check_object(schema, members, is_free, path, faults),
        Value::Array(items) => {
            if schema["maxItems"].as_u64().is_some_and(|most| items.len() as u64 > most) {
                fault("too many items".to_owned());
            }
            if let Some(of) = schema.get("items") {
                items.iter().enumerate().for_each(|(at, item)| check(of, item, &format!("{path}[{at}]"), faults));
            }
        }
        _ => {}
    }
}

fn check_object(schema: &Value, members: &Map<String, Value>, is_free: bool, path: &str, faults: &mut Vec<String>) {
    for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        if !members.contains_key(name) {
            faults.push(format!("{path}.{name}: missing"));
        }
    }
    for (name, member) in members {
        let path = format!("{path}.{name}");
        match (schema["properties"].get(name), schema.get("additionalProperties")) {
            (Some(of), _) => check(of, member, &path, faults),
            (None, Some(of)) if of.is_object() => check(of, member, &path, faults),
            (None, Some(Value::Bool(true))) => {}
            _ if is_free => {}
            _ => faults.push(format!("{path}: unknown")),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_kind_of_fault_is_found() {
        let schema = json!({
            "type": "object", "required": ["a"], "description": "left out",
            "properties": {
                "a": {"type": "string", "enum": ["x", "y"]},
                "list": {"type": "array", "maxItems": 1, "items": {"type": "integer", "description": "left out"}},
                "map": {"type": "object", "additionalProperties": {"type": "boolean"}},
                "free": {"x-kubernetes-preserve-unknown-fields": true},
                "port": {"x-kubernetes-int-or-string": true},
                "description": {"type": "string"},
            },
        });
        let good = json!({"a": "x", "list": [1], "map": {"k": true}, "free": {"b": {"c": 1}}, "port": "http", "description": ""});
        for schema in [&schema, &reduced(&schema)] {
            assert_eq!(faults(schema, &good), Vec::<String>::new());
            for (bad, fault) in [
                (json!({}), ".a: missing"),
                (json!({"a": "z"}), ".a: \"z\" is none of [\"x\",\"y\"]"),
                (json!({"a": 1}), ".a: must be of type \"string\""),
                (json!({"a": "x", "b": 1}), ".b: unknown"),
                (json!({"a": "x", "list": ["1"]}), ".list[0]: must be of type \"integer\""),
                (json!({"a": "x", "list": [1, 2]}), ".list: too many items"),
                (json!({"a": "x", "map": {"k": 1}}), ".map.k: must be of type \"boolean\""),
                (json!({"a": "x", "port": true}), ".port: must be a number or a text"),
                (json!([]), ".: must be of type \"object\""),
            ] {
                assert!(
                    faults(schema, &bad).iter().any(|found| found.starts_with(fault)),
                    "{bad}: {:?}",
                    faults(schema, &bad)
                );
            }
        }
    }
}
