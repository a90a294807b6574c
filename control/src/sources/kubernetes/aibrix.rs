//! Labels and annotations that AIBrix puts on pods.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::sources::kubernetes::pod::Pod;

/// Role of the pod in its role set.
pub const ROLE: &str = "role-name";
/// Role set of the pod; pods of one role set are a group.
pub const ROLESET: &str = "roleset-name";
/// StormService of the pod.
pub const STORM_SERVICE: &str = "storm-service-name";
/// The model that the pod serves.
pub const MODEL: &str = "model.aibrix.ai/name";
/// The port that the engine serves, as a label or an annotation.
pub const PORT: &str = "model.aibrix.ai/port";
/// The engine that the pod runs.
pub const ENGINE: &str = "model.aibrix.ai/engine";
/// The connector that moves its KV cache.
pub const CONNECTOR: &str = "model.aibrix.ai/kv-connector-type";
/// Profiles of a pod as JSON. The profile that `defaultProfile` names, else `default`, has bounds for the length of
/// prompts.
const CONFIG: &str = "model.aibrix.ai/config";
/// Labels in which older versions have these bounds.
const MIN_LENGTH: &str = "prompt-len-bucket-min-length";
const MAX_LENGTH: &str = "prompt-len-bucket-max-length";
/// Index of a pod in a group of several nodes. Pod 0 takes the requests of the group.
pub const GROUP_INDEX: &str = "stormservice.orchestration.aibrix.ai/pod-group-index";

/// The part of [`CONFIG`] that pd-control reads.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    #[serde(default)]
    default_profile: String,
    #[serde(default)]
    profiles: BTreeMap<String, Profile>,
}

#[derive(Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    routing_config: Option<Bounds>,
    /// Older versions have the bounds outside of `routingConfig`.
    #[serde(flatten)]
    bounds: Bounds,
}

#[derive(Clone, Copy, Default, Deserialize)]
struct Bounds {
    #[serde(rename = "promptLenBucketMinLength")]
    min: Option<u64>,
    #[serde(rename = "promptLenBucketMaxLength")]
    max: Option<u64>,
}

fn profile_of(text: &str) -> serde_json::Result<Option<Profile>> {
    if text.trim().is_empty() {
        return Ok(None);
    }
    let Config { default_profile, profiles } = serde_json::from_str(text)?;
    Ok(profiles.get(&default_profile).or_else(|| profiles.get("default")).cloned())
}

/// Bounds for the length of prompts, in tokens, both included: fewest and most. 0 and absent are none.
///
/// The annotation wins over the labels.
///
/// # Errors
/// One line that begins with the label or annotation.
pub fn prompt_bounds(pod: &Pod) -> Result<(Option<u64>, Option<u64>), String> {
    let bound = |value: Option<u64>| value.filter(|tokens| *tokens > 0);
    if let Some(text) = pod.annotations.get(CONFIG) {
        let profile = profile_of(text).map_err(|error| format!("{CONFIG}: {error}"))?;
        let Profile { routing_config, bounds } = profile.unwrap_or_default();
        let Bounds { min, max } = routing_config.unwrap_or(bounds);
        return Ok((bound(min), bound(max)));
    }
    let label = |key: &str| {
        let Some(text) = pod.labels.get(key) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| format!("{key}: {text:?} is no such number"))
    };
    Ok((bound(label(MIN_LENGTH)?), bound(label(MAX_LENGTH)?)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn bounds(labels: Value, annotations: Value) -> Result<(Option<u64>, Option<u64>), String> {
        let texts = |value| serde_json::from_value(value).unwrap();
        prompt_bounds(&Pod { labels: texts(labels), annotations: texts(annotations), ..Pod::default() })
    }

    #[test]
    fn aibrix_says_of_which_length_prompts_should_be() {
        let config =
            |profile: &str| json!({"model.aibrix.ai/config": format!(r#"{{"profiles":{{"default":{profile}}}}}"#)});
        let none = json!({});
        let nested = r#"{"routingStrategy":"pd","routingConfig":{"promptLenBucketMinLength":0,"promptLenBucketMaxLength":2048,"combined":true}}"#;
        assert_eq!(bounds(none.clone(), config(nested)).unwrap(), (None, Some(2_048)));
        assert_eq!(bounds(none.clone(), config(r#"{"promptLenBucketMinLength":2048}"#)).unwrap(), (Some(2_048), None));
        assert_eq!(bounds(none.clone(), config("{}")).unwrap(), (None, None));
        let named = json!({"model.aibrix.ai/config": r#"{"defaultProfile":"pd","profiles":{"pd":{"promptLenBucketMaxLength":9}}}"#});
        assert_eq!(bounds(none.clone(), named.clone()).unwrap(), (None, Some(9)));
        let labels = json!({"prompt-len-bucket-min-length": "5", "prompt-len-bucket-max-length": "0"});
        assert_eq!(bounds(labels.clone(), none.clone()).unwrap(), (Some(5), None));
        assert_eq!(bounds(labels, named).unwrap(), (None, Some(9)), "the annotation wins");
        let wrong = bounds(none, json!({"model.aibrix.ai/config": "{"}));
        assert!(wrong.unwrap_err().starts_with("model.aibrix.ai/config: "));
    }
}
