//! Which endpoint a leg goes to.

use core::cell::Cell;

use serde_json::Value;

/// The endpoints of a role, one after the other: the filter spreads the legs of a bench over all of them, and every host
/// that Envoy talks to costs it something.
pub struct InTurn {
    addresses: Vec<String>,
    next: Cell<usize>,
}

impl InTurn {
    /// The endpoints of a role in a plugin configuration; `None` where it has none.
    #[must_use]
    pub fn of(config: &Value, role: &str) -> Option<Self> {
        let endpoints = config["endpoints"].as_array()?.iter().filter(|endpoint| endpoint["role"] == role);
        let addresses: Vec<_> =
            endpoints.filter_map(|endpoint| Some(endpoint["address"].as_str()?.to_owned())).collect();
        (!addresses.is_empty()).then_some(Self { addresses, next: Cell::new(0) })
    }

    /// Address of the endpoint whose turn it is.
    pub fn next_address(&self) -> &str {
        let index = self.next.get() % self.addresses.len();
        self.next.set(index + 1);
        &self.addresses[index]
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_endpoint_of_a_role_has_its_turn() {
        let endpoint = |address: &str, role: &str| json!({"address": address, "role": role});
        let config = json!({"endpoints": [
            endpoint("a:1", "prefill"), endpoint("b:1", "decode"), endpoint("c:1", "prefill"), endpoint("d:1", "decode"),
        ]});
        let prefill = InTurn::of(&config, "prefill").unwrap();
        assert_eq!([(); 5].map(|()| prefill.next_address()), ["a:1", "c:1", "a:1", "c:1", "a:1"]);
        assert_eq!(InTurn::of(&config, "decode").unwrap().next_address(), "b:1");
        assert!(InTurn::of(&config, "both").is_none() && InTurn::of(&Value::Null, "prefill").is_none());
    }
}
