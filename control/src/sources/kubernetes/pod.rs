//! What is read of a pod, and the endpoints that it is.
//!
//! | | llm-d | AIBrix | annotation of ours |
//! |---|---|---|---|
//! | role | `llm-d.ai/role` | `role-name` | `envoy-pd/role` |
//! | models | – | `model.aibrix.ai/name` | `envoy-pd/models`, with commas |
//! | port | the `InferencePool`'s | `model.aibrix.ai/port`, label or annotation | `envoy-pd/port` |
//! | engine | `llm-d.ai/engine-type` | `model.aibrix.ai/engine`, `model.aibrix.ai/kv-connector-type` | `envoy-pd/engine` |
//! | group | – | `roleset-name` | `envoy-pd/group` |
//! | prompt lengths | – | `promptLenBucketMinLength` and `Max` in annotation `model.aibrix.ai/config`, labels `prompt-len-bucket-min-length` and `max` | `envoy-pd/min-prompt-tokens`, `max-prompt-tokens` |
//!
//! and `envoy-pd/pool`, `weight`, `cache-tokens`, `bootstrap-port`, `ranks`, `state`. An annotation of ours wins over a
//! rule of the configuration, and that over labels. A pod that says something wrong is refused by itself.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use kube::api::DynamicObject;
use pd_core::wire::{Endpoint, Engine, Role, State};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::sources::allow::AllowedNetworks;
use crate::sources::kubernetes::config::{PortSource, Rule, Source};

/// Begins the names of our annotations.
pub const ANNOTATION_PREFIX: &str = "envoy-pd/";
/// Our annotations, without their prefix.
pub const ANNOTATIONS: &[&str] = &[
    "role",
    "pool",
    "models",
    "port",
    "engine",
    "group",
    "weight",
    "cache-tokens",
    "bootstrap-port",
    "min-prompt-tokens",
    "max-prompt-tokens",
    "ranks",
    "state",
    "ignore",
];
/// Port of an engine that says none: vLLM's own default, llm-d's and AIBrix's.
const DEFAULT_PORT: u16 = 8_000;
/// Data-parallel ranks that one pod may have.
const MAX_RANKS: u32 = 256;

const LLMD_ROLE: &str = "llm-d.ai/role";
const LLMD_ENGINE: &str = "llm-d.ai/engine-type";
const LLMD_SERVING: [&str; 2] = ["llm-d.ai/inferenceServing", "llm-d.ai/inference-serving"];
const AIBRIX_ROLE: &str = "role-name";
const AIBRIX_ROLESET: &str = "roleset-name";
const AIBRIX_MODEL: &str = "model.aibrix.ai/name";
const AIBRIX_PORT: &str = "model.aibrix.ai/port";
const AIBRIX_ENGINE: &str = "model.aibrix.ai/engine";
const AIBRIX_CONNECTOR: &str = "model.aibrix.ai/kv-connector-type";
/// Profiles of a pod as JSON; the one named `defaultProfile`, else `default`, says of which length prompts should be.
const AIBRIX_CONFIG: &str = "model.aibrix.ai/config";
/// Where AIBrix had them before.
const AIBRIX_MIN_LENGTH: &str = "prompt-len-bucket-min-length";
const AIBRIX_MAX_LENGTH: &str = "prompt-len-bucket-max-length";
/// Place of a pod in a group of several nodes; the first one takes the requests.
const AIBRIX_GROUP_INDEX: &str = "stormservice.orchestration.aibrix.ai/pod-group-index";

/// Names a pod for as long as it exists.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodName {
    /// Its namespace.
    pub namespace: String,
    /// Its name there.
    pub name: String,
}

/// What matters of a pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Pod {
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Its address, once it has one.
    pub ip: Option<IpAddr>,
    /// Name and number of its containers' TCP ports.
    pub ports: Vec<(Option<String>, u16)>,
    /// What its endpoints may do.
    pub state: State,
    /// Whether all of its containers have ended for good.
    pub is_finished: bool,
    /// Seconds of Unix time when it was made.
    pub created: i64,
}

/// What a pod is to us.
#[derive(Clone, Debug, PartialEq)]
pub enum Meaning {
    /// No engine, or none that serves requests.
    Other,
    /// An engine without an address yet.
    Pending,
    /// An engine with these endpoints.
    Endpoints(Vec<Endpoint>),
    /// An engine that says something wrong; the reason begins with the label or annotation.
    Refused(String),
}

#[derive(Deserialize)]
struct Body {
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    status: Status,
}

#[derive(Default, Deserialize)]
struct Spec {
    #[serde(default)]
    containers: Vec<Container>,
}

#[derive(Deserialize)]
struct Container {
    #[serde(default)]
    ports: Vec<ContainerPort>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort {
    name: Option<String>,
    container_port: u16,
    protocol: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(default)]
    conditions: Vec<Condition>,
}

#[derive(Deserialize)]
struct Condition {
    r#type: String,
    status: String,
}

impl PodName {
    /// The name of an object; `None` when it has none.
    #[must_use]
    pub fn of(object: &DynamicObject) -> Option<Self> {
        let name = object.metadata.name.clone()?;
        Some(Self { namespace: object.metadata.namespace.clone().unwrap_or_default(), name })
    }
}

impl std::fmt::Display for PodName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Pod {
    /// Reads an object.
    ///
    /// # Errors
    /// What is not as in a pod.
    pub fn read(object: DynamicObject) -> Result<Self, String> {
        let DynamicObject { metadata, data, .. } = object;
        let Body { spec, status } = serde_json::from_value(data).map_err(|error| format!("no pod: {error}"))?;
        let ip = match status.pod_ip.as_deref().filter(|text| !text.is_empty()) {
            None => None,
            Some(text) => Some(text.parse().map_err(|_| format!("status.podIP: {text:?} is no address"))?),
        };
        let is_ready = status.conditions.iter().any(|it| it.r#type == "Ready" && it.status == "True");
        let state = match (metadata.deletion_timestamp.is_some(), is_ready) {
            (true, _) => State::Draining,
            (false, true) => State::Ready,
            (false, false) => State::Down,
        };
        let ports = spec.containers.into_iter().flat_map(|container| container.ports);
        let is_tcp = |port: &ContainerPort| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
        Ok(Self {
            labels: metadata.labels.unwrap_or_default(),
            annotations: metadata.annotations.unwrap_or_default(),
            ip,
            ports: ports.filter(is_tcp).map(|port| (port.name, port.container_port)).collect(),
            state,
            is_finished: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            created: metadata.creation_timestamp.map_or(0, |time| time.0.as_second()),
        })
    }

    /// The endpoints of the pod: by `rule`, if one selects it, else by the labels of llm-d and AIBrix if `by_labels`.
    #[must_use]
    pub fn meaning(&self, rule: Option<&Rule>, by_labels: bool, networks: &AllowedNetworks) -> Meaning {
        let is_ignored = self.annotation("ignore") == Some("true") || self.is_finished;
        let follows = self.labels.get(AIBRIX_GROUP_INDEX).is_some_and(|index| index != "0");
        if is_ignored || follows || (rule.is_none() && !by_labels) {
            return Meaning::Other;
        }
        self.endpoints(rule, networks).unwrap_or_else(Meaning::Refused)
    }

    fn endpoints(&self, rule: Option<&Rule>, networks: &AllowedNetworks) -> Result<Meaning, String> {
        let Some(role) = self.role(rule)? else { return Ok(Meaning::Other) };
        if let Some(unknown) = self.unknown_annotation() {
            return Err(format!("{unknown}: no such annotation; there are {}", ANNOTATIONS.join(", ")));
        }
        let mut endpoint = Endpoint::new(SocketAddr::new(IpAddr::from([0, 0, 0, 0]), 0), role);
        if let Some(pool) = self.value("pool", rule.and_then(|rule| rule.pool.as_ref()))? {
            endpoint.pool = pool;
        }
        if let Some(models) = self.annotation("models") {
            endpoint.models = models.split(',').map(|model| model.trim().to_owned()).collect();
        } else if let Some(models) = rule.and_then(|rule| rule.models.clone()) {
            endpoint.models = models;
        } else if let Some(model) = self.labels.get(AIBRIX_MODEL) {
            endpoint.models = vec![model.clone()];
        }
        endpoint.engine = self.engine(rule)?;
        endpoint.group = self
            .value("group", rule.and_then(|rule| rule.group.as_ref()))?
            .or_else(|| self.labels.get(AIBRIX_ROLESET).cloned());
        endpoint.weight = self.number("weight")?.or(rule.and_then(|rule| rule.weight)).unwrap_or(endpoint.weight);
        endpoint.cache_tokens = self.number("cache-tokens")?.or(rule.and_then(|rule| rule.cache_tokens));
        endpoint.bootstrap_port = self.number("bootstrap-port")?.or(rule.and_then(|rule| rule.bootstrap_port));
        let (min, max) = self.aibrix_prompt_bounds()?;
        let of_rule = rule.map_or((None, None), |rule| (rule.min_prompt_tokens, rule.max_prompt_tokens));
        endpoint.min_prompt_tokens = self.number("min-prompt-tokens")?.or(of_rule.0).or(min);
        endpoint.max_prompt_tokens = self.number("max-prompt-tokens")?.or(of_rule.1).or(max);
        endpoint.state = match self.parsed::<State>("state")? {
            // A word of the operator may stop a pod, never wake one.
            Some(State::Draining) if self.state == State::Ready => State::Draining,
            Some(State::Down) => State::Down,
            _ => self.state,
        };
        let ranks: Option<u32> = self.number("ranks")?.or(rule.and_then(|rule| rule.ranks));
        if ranks.is_some_and(|ranks| ranks == 0 || ranks > MAX_RANKS) {
            return Err(format!("{ANNOTATION_PREFIX}ranks: must be between 1 and {MAX_RANKS}"));
        }
        let ports = self.serving_ports(rule)?;
        let Some(ip) = self.ip else { return Ok(Meaning::Pending) };
        networks.check(ip)?;
        let mut endpoints = Vec::new();
        for port in ports {
            endpoint.address = SocketAddr::new(ip, port);
            match ranks {
                None => endpoints.push(endpoint.clone()),
                Some(ranks) => {
                    endpoints.extend((0..ranks).map(|rank| Endpoint { rank: Some(rank), ..endpoint.clone() }));
                }
            }
        }
        // The rest of the checks are those that the filters make.
        match endpoints.iter().find_map(|endpoint| endpoint.validate().err()) {
            Some(error) => Err(error.to_string()),
            None => Ok(Meaning::Endpoints(endpoints)),
        }
    }

    /// The role, or `None` where the pod serves no requests.
    fn role(&self, rule: Option<&Rule>) -> Result<Option<Role>, String> {
        if let Some(role) = self.parsed("role")? {
            return Ok(Some(role));
        }
        match rule.and_then(|rule| rule.role.as_ref()) {
            Some(Source::Fixed(role)) => return Ok(Some(*role)),
            Some(source) => {
                if let Some((key, text)) = source.find(self) {
                    return role_named(text).map(Some).ok_or_else(|| format!("{key}: {text:?} is no role"));
                }
            }
            None => {}
        }
        if let Some(text) = self.labels.get(LLMD_ROLE) {
            // An encoder serves neither leg.
            if text == "encode" {
                return Ok(None);
            }
            return role_named(text).map(Some).ok_or_else(|| format!("{LLMD_ROLE}: {text:?} is no role"));
        }
        if let Some(text) = self.labels.get(AIBRIX_ROLE) {
            // StormServices have roles of their owner's making beside these two; they are none of ours.
            return Ok(match text.as_str() {
                "prefill" => Some(Role::Prefill),
                "decode" => Some(Role::Decode),
                _ => None,
            });
        }
        let is_engine = self.labels.contains_key(AIBRIX_MODEL)
            || LLMD_SERVING.iter().any(|key| self.labels.get(*key).is_some_and(|text| text == "true"));
        Ok((is_engine || rule.is_some()).then_some(Role::Both))
    }

    fn engine(&self, rule: Option<&Rule>) -> Result<Option<Engine>, String> {
        if let Some(engine) = self.parsed("engine")? {
            return Ok(Some(engine));
        }
        if let Some(source) = rule.and_then(|rule| rule.engine.as_ref()) {
            if let Source::Fixed(engine) = source {
                return Ok(Some(*engine));
            }
            if let Some((key, text)) = source.find(self) {
                return engine_named(text).map_err(|_| format!("{key}: {text:?} is no engine known here"));
            }
        }
        match self.labels.get(AIBRIX_CONNECTOR).map(String::as_str) {
            // AIBrix's names: its default shares blocks as vLLM's NIXL does, and what it calls nixl is Neuron's.
            Some("shfs") => return Ok(Some(Engine::VllmNixl)),
            Some("nixl") => return Ok(Some(Engine::Neuron)),
            Some(text) => return Err(format!("{AIBRIX_CONNECTOR}: {text:?} is no connector known here")),
            None => {}
        }
        for key in [LLMD_ENGINE, AIBRIX_ENGINE] {
            if let Some(text) = self.labels.get(key) {
                return engine_named(text).map_err(|_| format!("{key}: {text:?} is no engine known here"));
            }
        }
        Ok(None)
    }

    fn serving_ports(&self, rule: Option<&Rule>) -> Result<Vec<u16>, String> {
        if let Some(port) = self.number("port")? {
            return Ok(vec![port]);
        }
        match rule.map(|rule| &rule.ports) {
            Some(PortSource::Numbers(numbers)) => return Ok(numbers.clone()),
            Some(PortSource::Named(name)) => {
                let port = self.ports.iter().find(|(known, _)| known.as_ref() == Some(name));
                return port
                    .map(|(_, port)| vec![*port])
                    .ok_or_else(|| format!("no container has a port named {name:?}"));
            }
            Some(PortSource::Text(source)) => {
                if let Some((key, text)) = source.find(self) {
                    return text.parse().map(|port| vec![port]).map_err(|_| format!("{key}: {text:?} is no port"));
                }
            }
            Some(PortSource::Unsaid) | None => {}
        }
        if let Some(text) = self.annotations.get(AIBRIX_PORT).or_else(|| self.labels.get(AIBRIX_PORT)) {
            return text.parse().map(|port| vec![port]).map_err(|_| format!("{AIBRIX_PORT}: {text:?} is no port"));
        }
        let named = self.ports.iter().find(|(name, _)| name.as_deref() == Some("http"));
        Ok(vec![named.or(self.ports.first()).map_or(DEFAULT_PORT, |(_, port)| *port)])
    }

    /// Bounds that AIBrix knows, both included. Its 0 stands for none.
    fn aibrix_prompt_bounds(&self) -> Result<(Option<u64>, Option<u64>), String> {
        let bound = |value: Option<u64>| value.filter(|tokens| *tokens > 0);
        if let Some(text) = self.annotations.get(AIBRIX_CONFIG) {
            let profile = aibrix_profile(text).map_err(|error| format!("{AIBRIX_CONFIG}: {error}"))?;
            let AibrixProfile { routing_config, bounds } = profile.unwrap_or_default();
            let AibrixBounds { min, max } = routing_config.unwrap_or(bounds);
            return Ok((bound(min), bound(max)));
        }
        let label = |key: &str| {
            let Some(text) = self.labels.get(key) else { return Ok(None) };
            text.parse().map(Some).map_err(|_| format!("{key}: {text:?} is no such number"))
        };
        Ok((bound(label(AIBRIX_MIN_LENGTH)?), bound(label(AIBRIX_MAX_LENGTH)?)))
    }

    fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.get(&format!("{ANNOTATION_PREFIX}{name}")).map(String::as_str)
    }

    fn unknown_annotation(&self) -> Option<&str> {
        let ours = self.annotations.keys().filter_map(|key| Some((key, key.strip_prefix(ANNOTATION_PREFIX)?)));
        ours.filter(|(_, name)| !ANNOTATIONS.contains(name)).map(|(key, _)| key.as_str()).next()
    }

    /// An annotation, read as the text of a JSON string is.
    fn parsed<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, String> {
        let Some(text) = self.annotation(name) else { return Ok(None) };
        let value = serde_json::from_value(Value::String(text.to_owned()));
        value.map(Some).map_err(|error| format!("{ANNOTATION_PREFIX}{name}: {error}"))
    }

    fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, String> {
        let Some(text) = self.annotation(name) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| format!("{ANNOTATION_PREFIX}{name}: {text:?} is no such number"))
    }

    fn value(&self, name: &str, source: Option<&Source<String>>) -> Result<Option<String>, String> {
        if let Some(text) = self.annotation(name) {
            return Ok(Some(text.to_owned()));
        }
        Ok(match source {
            Some(Source::Fixed(text)) => Some(text.clone()),
            Some(source) => source.find(self).map(|(_, text)| text.to_owned()),
            None => None,
        })
    }
}

/// The part of AIBrix's configuration of a pod that is read here.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AibrixConfig {
    #[serde(default)]
    default_profile: String,
    #[serde(default)]
    profiles: BTreeMap<String, AibrixProfile>,
}

#[derive(Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct AibrixProfile {
    routing_config: Option<AibrixBounds>,
    /// Older ones have them outside.
    #[serde(flatten)]
    bounds: AibrixBounds,
}

#[derive(Clone, Copy, Default, Deserialize)]
struct AibrixBounds {
    #[serde(rename = "promptLenBucketMinLength")]
    min: Option<u64>,
    #[serde(rename = "promptLenBucketMaxLength")]
    max: Option<u64>,
}

fn aibrix_profile(text: &str) -> serde_json::Result<Option<AibrixProfile>> {
    if text.trim().is_empty() {
        return Ok(None);
    }
    let AibrixConfig { default_profile, profiles } = serde_json::from_str(text)?;
    Ok(profiles.get(&default_profile).or_else(|| profiles.get("default")).cloned())
}

/// The role that llm-d, AIBrix and we call by a name.
#[must_use]
pub fn role_named(text: &str) -> Option<Role> {
    match text {
        "prefill" | "encode-prefill" => Some(Role::Prefill),
        "decode" => Some(Role::Decode),
        "both" | "prefill-decode" | "encode-prefill-decode" => Some(Role::Both),
        _ => None,
    }
}

/// No engine here has that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownEngine;

/// The protocol that an engine's name stands for; none for plain vLLM, whose connector the pool's policy says.
///
/// # Errors
/// [`UnknownEngine`].
pub fn engine_named(text: &str) -> Result<Option<Engine>, UnknownEngine> {
    match text {
        "vllm" => Ok(None),
        "trtllm-serve" | "tensorrt-llm" | "trt-llm" => Ok(Some(Engine::Trtllm)),
        _ => serde_json::from_value(Value::String(text.to_owned())).map(Some).map_err(|_| UnknownEngine),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(labels: Value, annotations: Value) -> Pod {
        read(json!({
            "metadata": {"name": "p", "namespace": "n", "labels": labels, "annotations": annotations},
            "spec": {"containers": [{"name": "engine", "ports": [{"containerPort": 8100}]}]},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
        }))
        .unwrap()
    }

    fn read(value: Value) -> Result<Pod, String> {
        Pod::read(serde_json::from_value(value).unwrap())
    }

    fn meaning(pod: &Pod) -> Meaning {
        pod.meaning(None, true, &AllowedNetworks::default())
    }

    fn one(pod: &Pod) -> Endpoint {
        match meaning(pod) {
            Meaning::Endpoints(endpoints) if endpoints.len() == 1 => endpoints.into_iter().next().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    fn refusal(pod: &Pod) -> String {
        match meaning(pod) {
            Meaning::Refused(reason) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn llmd_labels_say_role_and_engine() {
        for (role, expected) in [
            ("prefill", Role::Prefill),
            ("decode", Role::Decode),
            ("both", Role::Both),
            ("prefill-decode", Role::Both),
            ("encode-prefill-decode", Role::Both),
        ] {
            let endpoint = one(&pod(json!({"llm-d.ai/role": role, "llm-d.ai/engine-type": "vllm"}), json!({})));
            assert_eq!((endpoint.role, endpoint.engine), (expected, None), "{role}");
        }
        let sglang = one(&pod(json!({"llm-d.ai/role": "decode", "llm-d.ai/engine-type": "sglang"}), json!({})));
        assert_eq!(sglang.engine, Some(Engine::Sglang));
        let aggregated = one(&pod(json!({"llm-d.ai/inferenceServing": "true"}), json!({})));
        assert_eq!((aggregated.role, aggregated.address), (Role::Both, "10.0.0.1:8100".parse().unwrap()));
        assert_eq!(meaning(&pod(json!({"llm-d.ai/role": "encode"}), json!({}))), Meaning::Other);
        assert_eq!(refusal(&pod(json!({"llm-d.ai/role": "boss"}), json!({}))), "llm-d.ai/role: \"boss\" is no role");
    }

    #[test]
    fn aibrix_labels_say_all_of_an_endpoint() {
        let labels = json!({
            "role-name": "prefill",
            "model.aibrix.ai/name": "llama",
            "model.aibrix.ai/port": "9000",
            "model.aibrix.ai/engine": "vllm",
            "model.aibrix.ai/kv-connector-type": "nixl",
            "roleset-name": "set-1",
        });
        let expected = Endpoint {
            models: vec!["llama".into()],
            engine: Some(Engine::Neuron),
            group: Some("set-1".into()),
            ..Endpoint::new("10.0.0.1:9000".parse().unwrap(), Role::Prefill)
        };
        assert_eq!(one(&pod(labels.clone(), json!({}))), expected);
        let moved = one(&pod(labels, json!({"model.aibrix.ai/port": "9001"})));
        assert_eq!(moved.address.port(), 9_001, "the annotation wins");
        assert_eq!(one(&pod(json!({"model.aibrix.ai/name": "m"}), json!({}))).role, Role::Both);
        assert_eq!(meaning(&pod(json!({"role-name": "router"}), json!({}))), Meaning::Other);
        let second = json!({"role-name": "decode", "stormservice.orchestration.aibrix.ai/pod-group-index": "1"});
        assert_eq!(meaning(&pod(second, json!({}))), Meaning::Other, "the first of a group serves for all");
    }

    #[test]
    fn annotations_win_over_labels() {
        let labels = json!({"llm-d.ai/role": "both", "llm-d.ai/engine-type": "sglang", "roleset-name": "x"});
        let annotations = json!({
            "envoy-pd/role": "decode",
            "envoy-pd/pool": "big",
            "envoy-pd/models": "a, b",
            "envoy-pd/port": "1234",
            "envoy-pd/engine": "vllm-shared",
            "envoy-pd/group": "g",
            "envoy-pd/weight": "2.5",
            "envoy-pd/cache-tokens": "1000",
            "envoy-pd/bootstrap-port": "77",
            "envoy-pd/min-prompt-tokens": "2000",
            "envoy-pd/max-prompt-tokens": "8000",
            "envoy-pd/state": "draining",
        });
        let expected = Endpoint {
            rank: None,
            pool: "big".into(),
            models: vec!["a".into(), "b".into()],
            engine: Some(Engine::VllmShared),
            group: Some("g".into()),
            weight: 2.5,
            cache_tokens: Some(1_000),
            bootstrap_port: Some(77),
            min_prompt_tokens: Some(2_000),
            max_prompt_tokens: Some(8_000),
            state: State::Draining,
            ..Endpoint::new("10.0.0.1:1234".parse().unwrap(), Role::Decode)
        };
        assert_eq!(one(&pod(labels, annotations)), expected);
    }

    #[test]
    fn what_is_wrong_is_named_and_refuses_the_pod() {
        for (name, text, why) in [
            ("role", "boss", "envoy-pd/role: unknown variant `boss`"),
            ("weight", "heavy", "envoy-pd/weight: \"heavy\" is no such number"),
            ("weight", "0", "endpoint 10.0.0.1:8100: weight: must be between 0.01 and 100"),
            ("weight", "NaN", "endpoint 10.0.0.1:8100: weight: must be"),
            ("port", "70000", "envoy-pd/port: \"70000\" is no such number"),
            ("port", "0", "endpoint 10.0.0.1:0: address: port must not be 0"),
            ("models", "a,,b", "endpoint 10.0.0.1:8100: models: names must have"),
            ("ranks", "0", "envoy-pd/ranks: must be between 1 and 256"),
            ("cache_tokens", "1", "envoy-pd/cache_tokens: no such annotation"),
            ("engine", "x", "envoy-pd/engine: unknown variant `x`"),
            ("max-prompt-tokens", "-1", "envoy-pd/max-prompt-tokens: \"-1\" is no such number"),
        ] {
            let reason = refusal(&pod(json!({"llm-d.ai/role": "both"}), json!({ format!("envoy-pd/{name}"): text })));
            assert!(reason.starts_with(why), "{reason}");
        }
        let connector = json!({"role-name": "decode", "model.aibrix.ai/kv-connector-type": "carrier-pigeon"});
        assert!(refusal(&pod(connector, json!({}))).starts_with(AIBRIX_CONNECTOR));
    }

    #[test]
    fn aibrix_says_of_which_length_prompts_should_be() {
        let bounds = |labels: Value, annotations: Value| {
            let mut all = json!({"model.aibrix.ai/name": "m"});
            all.as_object_mut().unwrap().extend(labels.as_object().unwrap().clone());
            let endpoint = one(&pod(all, annotations));
            (endpoint.min_prompt_tokens, endpoint.max_prompt_tokens)
        };
        let config =
            |profile: &str| json!({"model.aibrix.ai/config": format!(r#"{{"profiles":{{"default":{profile}}}}}"#)});
        let none = json!({});
        let nested = r#"{"routingStrategy":"pd","routingConfig":{"promptLenBucketMinLength":0,"promptLenBucketMaxLength":2048,"combined":true}}"#;
        assert_eq!(bounds(none.clone(), config(nested)), (None, Some(2_048)));
        assert_eq!(bounds(none.clone(), config(r#"{"promptLenBucketMinLength":2048}"#)), (Some(2_048), None));
        assert_eq!(bounds(none.clone(), config("{}")), (None, None));
        let named = json!({"model.aibrix.ai/config": r#"{"defaultProfile":"pd","profiles":{"pd":{"promptLenBucketMaxLength":9}}}"#});
        assert_eq!(bounds(none.clone(), named.clone()), (None, Some(9)));
        let labels = json!({"prompt-len-bucket-min-length": "5", "prompt-len-bucket-max-length": "0"});
        assert_eq!(bounds(labels.clone(), none.clone()), (Some(5), None));
        assert_eq!(bounds(labels, named), (None, Some(9)), "the annotation wins");
        let wrong = pod(json!({"model.aibrix.ai/name": "m"}), json!({"model.aibrix.ai/config": "{"}));
        assert!(refusal(&wrong).starts_with("model.aibrix.ai/config: "));
        let crossed = json!({"envoy-pd/min-prompt-tokens": "9", "envoy-pd/max-prompt-tokens": "8"});
        let reason = refusal(&pod(json!({"model.aibrix.ai/name": "m"}), crossed));
        assert!(reason.contains("max_prompt_tokens: must not be below"), "{reason}");
    }

    #[test]
    fn ranks_are_endpoints_of_their_own() {
        let labelled = pod(json!({"llm-d.ai/role": "both"}), json!({"envoy-pd/ranks": "3"}));
        let Meaning::Endpoints(endpoints) = meaning(&labelled) else { panic!() };
        let ranks: Vec<_> = endpoints.iter().map(|endpoint| endpoint.rank).collect();
        assert_eq!(ranks, [Some(0), Some(1), Some(2)]);
    }

    #[test]
    fn readiness_and_deletion_make_the_state() {
        let state = |deletion: Option<&str>, ready: &str, annotation: Option<&str>| {
            let annotations = annotation.map_or(json!({}), |text| json!({"envoy-pd/state": text}));
            let pod = read(json!({
                "metadata": {"name": "p", "deletionTimestamp": deletion, "annotations": annotations,
                             "labels": {"llm-d.ai/role": "both"}},
                "status": {"podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": ready}]},
            }));
            one(&pod.unwrap()).state
        };
        let deleted = Some("2026-01-01T00:00:00Z");
        assert_eq!(state(None, "True", None), State::Ready);
        assert_eq!(state(None, "False", None), State::Down);
        assert_eq!(state(None, "Unknown", None), State::Down);
        assert_eq!(state(deleted, "True", None), State::Draining);
        assert_eq!(state(deleted, "False", None), State::Draining);
        assert_eq!(state(None, "True", Some("draining")), State::Draining);
        assert_eq!(state(None, "True", Some("down")), State::Down);
        assert_eq!(state(None, "False", Some("ready")), State::Down, "nobody is woken");
        assert_eq!(state(deleted, "True", Some("ready")), State::Draining);
    }

    #[test]
    fn pods_without_an_address_or_at_their_end_are_no_endpoints() {
        let labels = json!({"llm-d.ai/role": "both"});
        let pending = read(json!({"metadata": {"name": "p", "labels": labels}, "status": {"podIP": ""}})).unwrap();
        assert_eq!(meaning(&pending), Meaning::Pending);
        for phase in ["Succeeded", "Failed"] {
            let finished = json!({"metadata": {"name": "p", "labels": labels},
                                  "status": {"podIP": "10.0.0.1", "phase": phase}});
            assert_eq!(meaning(&read(finished).unwrap()), Meaning::Other);
        }
        let other = json!({"metadata": {"name": "p", "labels": {"app": "web"}}, "status": {"podIP": "10.0.0.1"}});
        assert_eq!(meaning(&read(other).unwrap()), Meaning::Other);
        assert!(read(json!({"metadata": {"name": "p"}, "status": {"podIP": "pod"}})).is_err());
        assert!(read(json!({"metadata": {"name": "p"}, "spec": {"containers": 3}})).is_err());
    }

    #[test]
    fn the_port_named_http_is_taken_before_the_first_one() {
        let value = json!({
            "metadata": {"name": "p", "labels": {"llm-d.ai/role": "both"}},
            "spec": {"containers": [
                {"ports": [{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 5557, "name": "zmq"}]},
                {"ports": [{"containerPort": 8200, "name": "http"}]},
            ]},
            "status": {"podIP": "10.0.0.1"},
        });
        assert_eq!(one(&read(value).unwrap()).address.port(), 8_200);
        let bare =
            json!({"metadata": {"name": "p", "labels": {"llm-d.ai/role": "both"}}, "status": {"podIP": "10.0.0.1"}});
        assert_eq!(one(&read(bare).unwrap()).address.port(), DEFAULT_PORT);
    }

    #[test]
    fn addresses_that_are_no_engines_are_refused() {
        let value =
            |ip: &str| json!({"metadata": {"name": "p", "labels": {"llm-d.ai/role": "both"}}, "status": {"podIP": ip}});
        for ip in ["127.0.0.1", "169.254.169.254", "::1"] {
            assert!(refusal(&read(value(ip)).unwrap()).starts_with(ip), "{ip}");
        }
    }
}
