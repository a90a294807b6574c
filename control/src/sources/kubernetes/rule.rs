//! Rules: which pods are engines, and where the values of their endpoints come from.

use std::collections::BTreeMap;

use kube::core::Selector;
use pd_core::wire::{Engine, Role};

/// Labels or annotations of a pod.
pub type Texts = BTreeMap<String, String>;

/// The source of a value of an endpoint.
#[derive(Clone, Debug, PartialEq)]
pub enum Source<T> {
    /// This value.
    Fixed(T),
    /// The text of this label, or the table's entry for it.
    Label(String, BTreeMap<String, String>),
    /// The text of this annotation, or the table's entry for it.
    Annotation(String, BTreeMap<String, String>),
}

/// The source of an endpoint's port.
#[derive(Clone, Debug, PartialEq)]
pub enum PortSource {
    /// These ports, with an endpoint for each.
    Numbers(Vec<u16>),
    /// The container port of this name.
    Named(String),
    /// A label or an annotation with the number.
    Text(Source<u16>),
    /// Not stated: AIBrix's label, else the container port named `http`, else the first one, else 8000.
    Unsaid,
}

/// A rule: the pods that it selects, and the values of their endpoints.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Namespace of the pods; none: all that pd-control follows.
    pub namespace: Option<String>,
    /// Labels of the pods.
    pub selector: Selector,
    /// Role; none: from the pod's labels, else `both`.
    pub role: Option<Source<Role>>,
    /// Pool; none: `default`.
    pub pool: Option<Source<String>>,
    /// Hand-over protocol; none: from the pod's labels, else the pool's.
    pub engine: Option<Source<Engine>>,
    /// Pairing group.
    pub group: Option<Source<String>>,
    /// Revision of model and engine; none: as for pods without a rule.
    pub revision: Option<Source<String>>,
    /// Ports.
    pub ports: PortSource,
    /// Models; none: from the pod's labels.
    pub models: Option<Vec<String>>,
    /// Whether pd-control adds no model from the engine's answer; none: pd-control adds them.
    pub models_closed: Option<bool>,
    /// Speed relative to the pool's others.
    pub weight: Option<f64>,
    /// Tokens that the prefix cache holds.
    pub cache_tokens: Option<u64>,
    /// Port of the bootstrap server.
    pub bootstrap_port: Option<u16>,
    /// Fewest tokens of a prompt. Shorter prompts go to other endpoints, if there are any.
    pub min_prompt_tokens: Option<u64>,
    /// Most tokens of a prompt. Longer prompts go to other endpoints, if there are any.
    pub max_prompt_tokens: Option<u64>,
    /// Data-parallel ranks behind each port.
    pub ranks: Option<u32>,
}

impl<T> Source<T> {
    /// Key and text of the label or annotation; `None` for a fixed value and when the pod has no such label or
    /// annotation.
    #[must_use]
    pub fn find<'a>(&'a self, labels: &'a Texts, annotations: &'a Texts) -> Option<(&'a str, &'a str)> {
        let (key, texts, values) = match self {
            Self::Fixed(_) => return None,
            Self::Label(key, values) => (key, labels, values),
            Self::Annotation(key, values) => (key, annotations, values),
        };
        let text = texts.get(key)?;
        Some((key, values.get(text).unwrap_or(text)))
    }
}
