//! The list of endpoints in pd-control's file.

use pd_sim::Handle;
use serde_json::{Value, json};

/// The list's entries for some engines.
pub fn entries<'a>(engines: impl IntoIterator<Item = &'a Handle>, role: &str) -> impl Iterator<Item = Value> {
    engines.into_iter().map(move |engine| {
        let mut entry = json!({"address": engine.addr().to_string(), "role": role});
        if role == "prefill" {
            entry["bootstrap_port"] = engine.bootstrap_addr().port().into();
        }
        entry
    })
}

/// Text of pd-control's file.
#[must_use]
pub fn endpoints_file(list: &[Value]) -> String {
    json!({"endpoints": list}).to_string()
}
