//! The file of `--kubernetes-config`: what to follow, and how to read pods with other labels.
//!
//! ```yaml
//! namespaces: [inference]              # else --namespace, else the pod's own
//! labels: true                         # follow the labels of llm-d and AIBrix
//! inference_pools: [{name: llama}]     # their selectors and target ports; the name becomes the pool's
//! inference_objects: [llm-d.ai]        # InferenceObjectives and InferenceModelRewrites of these API groups
//! selectors:
//!   - match: {matchLabels: {app: engine}}
//!     role: {label: tier, values: {front: prefill, back: decode}}
//!     port: {name: api}
//!     pool: big
//! allowed_cidrs: [10.244.0.0/16]
//! ```
//! A pod is read by the first selector that matches it, else by the first InferencePool, else by its labels.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use kube::core::Selector;
use serde::Deserialize;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Unexpected, Visitor};

use crate::sources::kubernetes::rule::{PortSource, Rule, Source};
use crate::sources::kubernetes::vocabulary::{engine_named, role_named};
use crate::sources::yaml::{self, FileError};

/// Longest list of the file, in entries.
const MAX_ENTRIES: usize = 1_000;

/// The content of the file.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KubernetesConfig {
    /// Namespaces to follow; empty: the pod's own.
    pub namespaces: Vec<String>,
    /// Whether the labels of llm-d and AIBrix make endpoints.
    pub labels: bool,
    /// InferencePools to follow.
    pub inference_pools: Vec<PoolReference>,
    /// API groups whose InferenceObjectives and InferenceModelRewrites are followed: those for `inference_pools`, where there
    /// are any.
    pub inference_objects: Vec<ObjectGroup>,
    /// Revision of pods whose selector names none.
    revision: Option<SourceConfig>,
    /// Selectors of the operator, in order.
    pub selectors: Vec<SelectorConfig>,
    /// Allow-list for the addresses of pods; empty: all but special networks.
    pub allowed_cidrs: Vec<IpNet>,
}

/// InferencePools to follow.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolReference {
    /// Name of an InferencePool, or `*` for all.
    pub name: String,
    /// Its namespace; absent: all namespaces that pd-control follows.
    pub namespace: Option<String>,
    /// Its API group.
    #[serde(default)]
    pub group: PoolGroup,
}

/// API groups that have InferencePools.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub enum PoolGroup {
    /// `inference.networking.k8s.io/v1`.
    #[default]
    #[serde(rename = "inference.networking.k8s.io")]
    V1,
    /// `inference.networking.x-k8s.io/v1alpha2`.
    #[serde(rename = "inference.networking.x-k8s.io")]
    Alpha,
}

/// API groups that have InferenceObjectives and InferenceModelRewrites, each in version `v1alpha2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub enum ObjectGroup {
    /// Of llm-d.
    #[serde(rename = "llm-d.ai")]
    LlmD,
    /// Of the Gateway API Inference Extension, before they moved to llm-d.
    #[serde(rename = "inference.networking.x-k8s.io")]
    Alpha,
}

impl ObjectGroup {
    /// Every group.
    pub const ALL: [Self; 2] = [Self::LlmD, Self::Alpha];

    /// API group and version.
    #[must_use]
    pub fn group_version(self) -> (&'static str, &'static str) {
        match self {
            Self::LlmD => ("llm-d.ai", "v1alpha2"),
            Self::Alpha => ("inference.networking.x-k8s.io", "v1alpha2"),
        }
    }
}

/// A selector, and how to read the pods that it selects.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SelectorConfig {
    r#match: LabelMatch,
    namespace: Option<String>,
    role: Option<SourceConfig>,
    pool: Option<SourceConfig>,
    engine: Option<SourceConfig>,
    group: Option<SourceConfig>,
    revision: Option<SourceConfig>,
    port: Option<PortConfig>,
    models: Option<Vec<String>>,
    models_closed: Option<bool>,
    weight: Option<f64>,
    cache_tokens: Option<u64>,
    bootstrap_port: Option<u16>,
    min_prompt_tokens: Option<u64>,
    max_prompt_tokens: Option<u64>,
    ranks: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct LabelMatch {
    #[serde(default)]
    match_labels: BTreeMap<String, String>,
    #[serde(default)]
    match_expressions: Vec<MatchExpression>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct MatchExpression {
    key: String,
    operator: String,
    #[serde(default)]
    values: Vec<String>,
}

#[derive(Clone, Debug, PartialEq)]
enum SourceConfig {
    Fixed(String),
    Found(Found),
}

#[derive(Clone, Debug, PartialEq)]
enum PortConfig {
    Numbers(Vec<u16>),
    Found(Found),
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Found {
    /// Name of a container port.
    name: Option<String>,
    label: Option<String>,
    annotation: Option<String>,
    #[serde(default)]
    values: BTreeMap<String, String>,
}

impl Default for KubernetesConfig {
    fn default() -> Self {
        Self {
            namespaces: Vec::new(),
            labels: true,
            inference_pools: Vec::new(),
            inference_objects: Vec::new(),
            revision: None,
            selectors: Vec::new(),
            allowed_cidrs: Vec::new(),
        }
    }
}

impl KubernetesConfig {
    /// Parses a file's bytes. `path` is for the error only.
    ///
    /// # Errors
    /// [`FileError`] for the first fault, with line and column where the parser found it.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, FileError> {
        let config: Self = yaml::parse(path, bytes)?;
        let refuse = |message| FileError { path: path.to_owned(), position: None, message };
        let lists = [
            ("namespaces", config.namespaces.len()),
            ("inference_pools", config.inference_pools.len()),
            ("inference_objects", config.inference_objects.len()),
            ("selectors", config.selectors.len()),
            ("allowed_cidrs", config.allowed_cidrs.len()),
        ];
        if let Some((key, _)) = lists.iter().find(|(_, len)| *len > MAX_ENTRIES) {
            return Err(refuse(format!("{key}: more than {MAX_ENTRIES}")));
        }
        let mut namespaces = BTreeSet::new();
        if let Some(twice) = config.namespaces.iter().find(|name| !namespaces.insert(*name)) {
            return Err(refuse(format!("namespaces: {twice} is listed twice")));
        }
        config.rules().map_err(refuse)?;
        config.revision().map_err(refuse)?;
        Ok(config)
    }

    /// The rules of its selectors, in order.
    ///
    /// # Errors
    /// One line for the first wrong selector; it begins with the key.
    pub fn rules(&self) -> Result<Vec<Rule>, String> {
        let named = |(index, selector): (usize, &SelectorConfig)| {
            selector.rule().map_err(|error| format!("selectors[{index}].{error}"))
        };
        self.selectors.iter().enumerate().map(named).collect()
    }

    /// Source of the revision of pods whose selector names none; `None`: the label of a DisaggregatedSet.
    ///
    /// # Errors
    /// One line that begins with the key.
    pub fn revision(&self) -> Result<Option<Source<String>>, String> {
        self.revision.as_ref().map(|source| source.read("revision", |text| Ok(text.to_owned()))).transpose()
    }
}

impl PoolGroup {
    /// API group and version.
    #[must_use]
    pub fn group_version(self) -> (&'static str, &'static str) {
        match self {
            Self::V1 => ("inference.networking.k8s.io", "v1"),
            Self::Alpha => ("inference.networking.x-k8s.io", "v1alpha2"),
        }
    }
}

impl SelectorConfig {
    fn rule(&self) -> Result<Rule, String> {
        let role = |text: &str| role_named(text).ok_or_else(|| format!("role: {text:?} is no role"));
        let engine = |text: &str| match engine_named(text) {
            Ok(Some(engine)) => Ok(engine),
            _ => Err(format!("engine: {text:?} is no engine's protocol")),
        };
        let text = |text: &str| Ok(text.to_owned());
        for known in self.role.iter().flat_map(SourceConfig::values) {
            role(known)?;
        }
        for known in self.engine.iter().flat_map(SourceConfig::values) {
            engine_named(known).map_err(|_| format!("engine: {known:?} is no engine known here"))?;
        }
        let ports = match &self.port {
            None => PortSource::Unsaid,
            Some(PortConfig::Numbers(ports)) => PortSource::Numbers(ports.clone()),
            Some(PortConfig::Found(Found { name: Some(name), label: None, annotation: None, .. })) => {
                PortSource::Named(name.clone())
            }
            Some(PortConfig::Found(found)) => PortSource::Text(found.source("port")?),
        };
        if let PortSource::Numbers(ports) = &ports
            && (ports.is_empty() || ports.contains(&0) || ports.len() > 64)
        {
            return Err("port: must be 1 to 64 numbers above 0".to_owned());
        }
        if self.weight.is_some_and(|weight| !(0.01..=100.0).contains(&weight)) {
            return Err("weight: must be between 0.01 and 100".to_owned());
        }
        Ok(Rule {
            namespace: self.namespace.clone(),
            selector: self.r#match.selector()?,
            role: self.role.as_ref().map(|source| source.read("role", role)).transpose()?,
            pool: self.pool.as_ref().map(|source| source.read("pool", text)).transpose()?,
            engine: self.engine.as_ref().map(|source| source.read("engine", engine)).transpose()?,
            group: self.group.as_ref().map(|source| source.read("group", text)).transpose()?,
            revision: self.revision.as_ref().map(|source| source.read("revision", text)).transpose()?,
            ports,
            models: self.models.clone(),
            models_closed: self.models_closed,
            weight: self.weight,
            cache_tokens: self.cache_tokens,
            bootstrap_port: self.bootstrap_port,
            min_prompt_tokens: self.min_prompt_tokens,
            max_prompt_tokens: self.max_prompt_tokens,
            ranks: self.ranks,
        })
    }
}

// Not derived: an untagged enum would read the keys of `values` as booleans and numbers, such as `no` and `1`.
impl<'de> Deserialize<'de> for SourceConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SourceVisitor;
        impl<'de> Visitor<'de> for SourceVisitor {
            type Value = SourceConfig;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text, {label: …} or {annotation: …}, with values: {…} or without")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<SourceConfig, E> {
                Ok(SourceConfig::Fixed(text.to_owned()))
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<SourceConfig, A::Error> {
                Found::deserialize(MapAccessDeserializer::new(map)).map(SourceConfig::Found)
            }
        }
        deserializer.deserialize_any(SourceVisitor)
    }
}

impl<'de> Deserialize<'de> for PortConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PortVisitor;
        impl<'de> Visitor<'de> for PortVisitor {
            type Value = PortConfig;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port, a list of them, {name: …}, {label: …} or {annotation: …}")
            }
            fn visit_u64<E: de::Error>(self, port: u64) -> Result<PortConfig, E> {
                let port = u16::try_from(port).map_err(|_| E::invalid_value(Unexpected::Unsigned(port), &self))?;
                Ok(PortConfig::Numbers(vec![port]))
            }
            fn visit_i64<E: de::Error>(self, port: i64) -> Result<PortConfig, E> {
                let port = u16::try_from(port).map_err(|_| E::invalid_value(Unexpected::Signed(port), &self))?;
                Ok(PortConfig::Numbers(vec![port]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<PortConfig, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(items)).map(PortConfig::Numbers)
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<PortConfig, A::Error> {
                Found::deserialize(MapAccessDeserializer::new(map)).map(PortConfig::Found)
            }
        }
        deserializer.deserialize_any(PortVisitor)
    }
}

impl LabelMatch {
    fn selector(&self) -> Result<Selector, String> {
        if self.match_labels.is_empty() && self.match_expressions.is_empty() {
            return Err("match: selects every pod; name a label".to_owned());
        }
        let expressions = self.match_expressions.iter().map(|expression| LabelSelectorRequirement {
            key: expression.key.clone(),
            operator: expression.operator.clone(),
            values: Some(expression.values.clone()),
        });
        let selector = LabelSelector {
            match_labels: Some(self.match_labels.clone()),
            match_expressions: Some(expressions.collect()),
        };
        Selector::try_from(selector).map_err(|error| format!("match: {error}"))
    }
}

impl SourceConfig {
    fn read<T>(&self, key: &str, fixed: impl Fn(&str) -> Result<T, String>) -> Result<Source<T>, String> {
        match self {
            Self::Fixed(text) => fixed(text).map(Source::Fixed),
            Self::Found(found) => found.source(key),
        }
    }

    fn values(&self) -> impl Iterator<Item = &String> {
        let found = if let Self::Found(found) = self { Some(found) } else { None };
        found.into_iter().flat_map(|found| found.values.values())
    }
}

impl Found {
    fn source<T>(&self, key: &str) -> Result<Source<T>, String> {
        match (&self.label, &self.annotation) {
            _ if self.name.is_some() => Err(format!("{key}: name stands alone, and for ports only")),
            (Some(label), None) => Ok(Source::Label(label.clone(), self.values.clone())),
            (None, Some(annotation)) => Ok(Source::Annotation(annotation.clone(), self.values.clone())),
            _ => Err(format!("{key}: either label or annotation")),
        }
    }
}
