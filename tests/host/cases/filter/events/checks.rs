//! What must hold of every leg and of every decision.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use pd_host::Callout;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::gateway::*;

/// Stands in every parameter and header that a client may not send.
pub(super) const EVIL: &str = "203.0.113.9:1";

/// Addresses with their roles; with several, where it is not known which of some lists is in force.
pub(super) type Listed = BTreeMap<String, BTreeSet<String>>;

/// Roles that a decision may send a request to.
pub(super) fn roles(decision: &str) -> &'static [&'static str] {
    match decision {
        "split" | "decode_only" => &["decode", "both"],
        "prefill_only" => &["prefill"],
        _ => &["prefill", "decode", "both"],
    }
}

#[track_caller]
pub(super) fn check_listed(addresses: &[String], roles: &[&str], listed: &Listed) {
    let has_role = |role: &&str, address: &String| listed.get(address).is_some_and(|its| its.contains(*role));
    assert!(!addresses.is_empty());
    for address in addresses {
        assert!(roles.iter().any(|role| has_role(role, address)), "{address} as {roles:?} of {listed:?}");
    }
}

pub(super) fn check_leg(call: &Callout, listed: &Listed) {
    assert!(call.headers.iter().all(|(_, value)| value != EVIL.as_bytes()));
    if call.header(":path") == Some(b"/metrics") {
        // The filter asks the engine of a leg whether a KV lease has expired. The list may have changed since the leg.
        assert_eq!((call.header("x-any"), call.body.as_slice()), (None, &[][..]));
        return;
    }
    check_listed(&addresses(call.header("x-pd-destination")), &["prefill"], listed);
    assert_eq!(call.header("x-any"), Some(&[0xff, 0xc3, b'a'][..]));
    let body: Value = serde_json::from_slice(&call.body).unwrap();
    assert_eq!((&body["stream"], &body["max_tokens"]), (&Value::Bool(false), &Value::from(1)));
    assert!(body.get("n").is_none() && body.get("stop").is_none());
    check_parameters(&call.body);
}

/// Checks that no member of a body, duplicates included, holds a client's parameters.
pub(super) fn check_parameters(body: &[u8]) {
    let Ok(Members(members)) = serde_json::from_slice(body) else { return };
    for (key, value) in members.iter().filter(|(key, _)| key == "kv_transfer_params" || key == "bootstrap_room") {
        assert!(!value.get().contains(EVIL), "{key}: {value}");
    }
}

/// The members of an object, duplicates included.
struct Members(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Object)
    }
}
