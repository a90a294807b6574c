//! Reads InferencePools, in both versions of the API.

use std::collections::BTreeMap;

use kube::api::DynamicObject;
use kube::core::Expression;
use serde::Deserialize;

use crate::sources::kubernetes::config::PoolGroup;
use crate::sources::kubernetes::rule::{PortSource, Rule, Source};

/// Most target ports that the API allows.
const MAX_PORTS: usize = 8;

#[derive(Deserialize)]
struct V1 {
    spec: V1Spec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct V1Spec {
    selector: V1Selector,
    target_ports: Vec<V1Port>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct V1Selector {
    match_labels: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct V1Port {
    number: u16,
}

#[derive(Deserialize)]
struct Alpha {
    spec: AlphaSpec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AlphaSpec {
    selector: BTreeMap<String, String>,
    target_port_number: u16,
}

/// The rule for the pods of an InferencePool. The pool's name is the pool of their endpoints; the pods state their
/// role.
///
/// # Errors
/// One line when the object is no InferencePool, or would select every pod.
pub fn rule(group: PoolGroup, object: DynamicObject) -> Result<Rule, String> {
    let DynamicObject { metadata, data, .. } = object;
    let name = metadata.name.ok_or("the object has no name")?;
    let (labels, ports) = match group {
        PoolGroup::V1 => {
            let V1 { spec } = serde_json::from_value(data).map_err(|error| error.to_string())?;
            (spec.selector.match_labels, spec.target_ports.into_iter().map(|port| port.number).collect::<Vec<_>>())
        }
        PoolGroup::Alpha => {
            let Alpha { spec } = serde_json::from_value(data).map_err(|error| error.to_string())?;
            (spec.selector, vec![spec.target_port_number])
        }
    };
    if labels.is_empty() {
        return Err("spec.selector: is empty and would select every pod".to_owned());
    }
    if ports.is_empty() || ports.len() > MAX_PORTS || ports.contains(&0) {
        return Err(format!("the pool must have 1 to {MAX_PORTS} target ports above 0"));
    }
    Ok(Rule {
        namespace: metadata.namespace,
        selector: labels.into_iter().map(|(key, value)| Expression::Equal(key, value)).collect(),
        role: None,
        pool: Some(Source::Fixed(name)),
        engine: None,
        group: None,
        revision: None,
        ports: PortSource::Numbers(ports),
        models: None,
        models_closed: None,
        weight: None,
        cache_tokens: None,
        bootstrap_port: None,
        min_prompt_tokens: None,
        max_prompt_tokens: None,
        ranks: None,
    })
}

#[cfg(test)]
mod tests {
    use kube::core::SelectorExt;
    use serde_json::{Value, json};

    use super::*;

    fn read(group: PoolGroup, spec: Value) -> Result<Rule, String> {
        let object = json!({"metadata": {"name": "llama", "namespace": "n"}, "spec": spec});
        rule(group, serde_json::from_value(object).unwrap())
    }

    #[test]
    fn both_versions_say_selector_and_ports() {
        let v1 =
            json!({"selector": {"matchLabels": {"app": "x"}}, "targetPorts": [{"number": 8000}, {"number": 8001}]});
        let alpha = json!({"selector": {"app": "x"}, "targetPortNumber": 8000});
        for (group, spec, ports) in [(PoolGroup::V1, v1, vec![8_000, 8_001]), (PoolGroup::Alpha, alpha, vec![8_000])] {
            let rule = read(group, spec).unwrap();
            assert_eq!(rule.ports, PortSource::Numbers(ports));
            assert_eq!((rule.pool, rule.namespace.as_deref()), (Some(Source::Fixed("llama".into())), Some("n")));
            let labels = |value: &str| BTreeMap::from([("app".to_owned(), value.to_owned())]);
            assert!(rule.selector.matches(&labels("x")) && !rule.selector.matches(&labels("y")));
        }
    }

    #[test]
    fn a_pool_of_everything_or_without_ports_is_refused() {
        for spec in [
            json!({"selector": {"matchLabels": {}}, "targetPorts": [{"number": 1}]}),
            json!({"selector": {"matchLabels": {"a": "b"}}, "targetPorts": []}),
            json!({"selector": {"matchLabels": {"a": "b"}}, "targetPorts": [{"number": 0}]}),
            json!({"selector": {"matchLabels": {"a": "b"}}, "targetPorts": [{"number": 70_000}]}),
            json!({"selector": {"a": "b"}, "targetPortNumber": 1}),
            json!({}),
        ] {
            assert!(read(PoolGroup::V1, spec.clone()).is_err(), "{spec}");
        }
    }
}
