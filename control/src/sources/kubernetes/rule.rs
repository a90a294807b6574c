//! Which pods are engines, and what their endpoints are.

use std::collections::BTreeMap;

use kube::core::Selector;
use pd_core::wire::{Engine, Role};

/// Labels or annotations of a pod.
pub type Texts = BTreeMap<String, String>;

/// Where a value of an endpoint comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source<T> {
    /// It is this.
    Fixed(T),
    /// A label's text, translated by the table where it is in there.
    Label(String, BTreeMap<String, String>),
    /// The same of an annotation.
    Annotation(String, BTreeMap<String, String>),
}

/// Where ports come from.
#[derive(Clone, Debug, PartialEq)]
pub enum PortSource {
    /// These, one endpoint each.
    Numbers(Vec<u16>),
    /// The container port of that name.
    Named(String),
    /// A label or an annotation.
    Text(Source<u16>),
    /// The pod's labels or its first container port.
    Unsaid,
}

/// Which pods are ours and what their endpoints are.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Namespace of the pods; none: any that is followed.
    pub namespace: Option<String>,
    /// Labels of the pods.
    pub selector: Selector,
    /// Role; none: the pod's labels say, else it is aggregated.
    pub role: Option<Source<Role>>,
    /// Pool; none: the default one.
    pub pool: Option<Source<String>>,
    /// Hand-over protocol; none: the pod's labels say, else its pool.
    pub engine: Option<Source<Engine>>,
    /// Pairing group.
    pub group: Option<Source<String>>,
    /// Ports.
    pub ports: PortSource,
    /// Models; none: the pod's labels say.
    pub models: Option<Vec<String>>,
    /// Speed relative to the pool's others.
    pub weight: Option<f64>,
    /// Tokens that the prefix cache holds.
    pub cache_tokens: Option<u64>,
    /// Port of the bootstrap server.
    pub bootstrap_port: Option<u16>,
    /// Prompts of fewer tokens go elsewhere, where they can.
    pub min_prompt_tokens: Option<u64>,
    /// Prompts of more tokens go elsewhere, where they can.
    pub max_prompt_tokens: Option<u64>,
    /// Data-parallel ranks behind each port.
    pub ranks: Option<u32>,
}

impl<T> Source<T> {
    /// Where these labels and annotations say it, and what; `None` for a fixed one and where they say nothing.
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
