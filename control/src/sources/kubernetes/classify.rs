//! Classifies pods: which are engines, and which endpoints they have.
//!
//! | | llm-d | AIBrix | annotation of pd-control |
//! |---|---|---|---|
//! | role | `llm-d.ai/role` | `role-name` | `envoy-pd/role` |
//! | models | – | `model.aibrix.ai/name` | `envoy-pd/models`, with commas; `models-closed` |
//! | port | the `InferencePool`'s, the routing sidecar's | `model.aibrix.ai/port`, label or annotation | `envoy-pd/port` |
//! | engine | `llm-d.ai/engine-type` | `model.aibrix.ai/engine`, `model.aibrix.ai/kv-connector-type` | `envoy-pd/engine` |
//! | group | – | `roleset-name` | `envoy-pd/group` |
//! | revision | `disaggregatedset.x-k8s.io/revision` | – | `envoy-pd/revision` |
//! | prompt lengths | – | `promptLenBucketMinLength` and `Max` in annotation `model.aibrix.ai/config`, labels `prompt-len-bucket-min-length` and `max` | `envoy-pd/min-prompt-tokens`, `max-prompt-tokens` |
//!
//! Other values have annotations only: `envoy-pd/pool`, `weight`, `cache-tokens`, `bootstrap-port`, `ranks`, `state`.
//! An annotation of pd-control wins over a rule (a selector of the configuration file, or an InferencePool), and a rule
//! over labels. pd-control refuses a pod with a wrong value and keeps the other pods.

use std::net::{IpAddr, SocketAddr};

use pd_core::wire::{Endpoint, Engine, Role, State};

use crate::sources::allow::AllowedNetworks;
use crate::sources::kubernetes::aibrix;
use crate::sources::kubernetes::annotations::{ANNOTATION_PREFIX, ANNOTATIONS, Annotations};
use crate::sources::kubernetes::pod::Pod;
use crate::sources::kubernetes::rule::{PortSource, Rule, Source};
use crate::sources::kubernetes::vocabulary::{engine_named, role_named};

/// Port of an engine that states none: the default of vLLM, llm-d and AIBrix.
const DEFAULT_PORT: u16 = 8_000;
/// Data-parallel ranks that one pod may have.
const MAX_RANKS: u32 = 256;

/// Number of a pod in its group of a LeaderWorkerSet; the leader has 0.
const LWS_WORKER_INDEX: &str = "leaderworkerset.sigs.k8s.io/worker-index";
/// Revision of a DisaggregatedSet, the same on the pods of all its roles.
const SET_REVISION: &str = "disaggregatedset.x-k8s.io/revision";
const LLMD_ROLE: &str = "llm-d.ai/role";
const LLMD_ENGINE: &str = "llm-d.ai/engine-type";
const LLMD_SERVING: [&str; 2] = ["llm-d.ai/inferenceServing", "llm-d.ai/inference-serving"];

/// The class of a pod.
#[derive(Clone, Debug, PartialEq)]
pub enum PodClass {
    /// No engine, or an engine that serves no requests.
    Other,
    /// An engine without an address yet.
    Pending,
    /// An engine with these endpoints.
    Endpoints(Vec<Endpoint>),
    /// An engine with a wrong value. The reason begins with the label or annotation.
    Refused(String),
}

/// Settings for all pods.
#[derive(Clone, Debug, Default)]
pub struct Defaults {
    /// Whether the labels of llm-d and AIBrix make a pod an engine.
    pub by_labels: bool,
    /// Source of the revision of pods whose rule names none; none: the label of a DisaggregatedSet.
    pub revision: Option<Source<String>>,
    /// Allow-list for the addresses of pods.
    pub networks: AllowedNetworks,
}

/// A pod and the rule that selects it.
struct Reader<'a> {
    pod: &'a Pod,
    rule: Option<&'a Rule>,
    defaults: &'a Defaults,
    ours: Annotations<'a>,
}

/// Classifies a pod: by `rule`, if one selects it, else by the labels of llm-d and AIBrix, if the defaults say so.
#[must_use]
pub fn classify(pod: &Pod, rule: Option<&Rule>, defaults: &Defaults) -> PodClass {
    let reader = Reader { pod, rule, defaults, ours: Annotations(&pod.annotations) };
    let is_ignored = reader.ours.text("ignore") == Some("true") || pod.is_finished;
    let follows = pod.labels.get(aibrix::GROUP_INDEX).is_some_and(|index| index != "0");
    if is_ignored || follows || (rule.is_none() && !defaults.by_labels) {
        return PodClass::Other;
    }
    reader.endpoints().unwrap_or_else(PodClass::Refused)
}

impl Reader<'_> {
    fn endpoints(&self) -> Result<PodClass, String> {
        let Some(role) = self.role()? else { return Ok(PodClass::Other) };
        if let Some(unknown) = self.ours.unknown() {
            return Err(format!("{unknown}: no such annotation; there are {}", ANNOTATIONS.join(", ")));
        }
        let mut endpoint = Endpoint::new(SocketAddr::new(IpAddr::from([0, 0, 0, 0]), 0), role);
        if let Some(pool) = self.value("pool", self.rule.and_then(|rule| rule.pool.as_ref()))? {
            endpoint.pool = pool;
        }
        if let Some(models) = self.ours.text("models") {
            endpoint.models = models.split(',').map(|model| model.trim().to_owned()).collect();
        } else if let Some(models) = self.rule.and_then(|rule| rule.models.clone()) {
            endpoint.models = models;
        } else if let Some(model) = self.pod.labels.get(aibrix::MODEL) {
            endpoint.models = vec![model.clone()];
        }
        let is_closed = self.ours.flag("models-closed")?;
        endpoint.models_closed = is_closed.or(self.rule.and_then(|rule| rule.models_closed)).unwrap_or(false);
        endpoint.engine = self.engine()?;
        endpoint.group = self
            .value("group", self.rule.and_then(|rule| rule.group.as_ref()))?
            .or_else(|| self.pod.labels.get(aibrix::ROLESET).cloned());
        endpoint.revision = self.revision()?;
        endpoint.weight =
            self.ours.number("weight")?.or(self.rule.and_then(|rule| rule.weight)).unwrap_or(endpoint.weight);
        endpoint.cache_tokens = self.ours.number("cache-tokens")?.or(self.rule.and_then(|rule| rule.cache_tokens));
        endpoint.bootstrap_port =
            self.ours.number("bootstrap-port")?.or(self.rule.and_then(|rule| rule.bootstrap_port));
        let (min, max) = aibrix::prompt_bounds(self.pod)?;
        let of_rule = self.rule.map_or((None, None), |rule| (rule.min_prompt_tokens, rule.max_prompt_tokens));
        endpoint.min_prompt_tokens = self.ours.number("min-prompt-tokens")?.or(of_rule.0).or(min);
        endpoint.max_prompt_tokens = self.ours.number("max-prompt-tokens")?.or(of_rule.1).or(max);
        endpoint.state = match self.ours.parsed::<State>("state")? {
            // The annotation may take a pod out of service, but not put an unready one into service.
            Some(State::Draining) if self.pod.state == State::Ready => State::Draining,
            Some(State::Down) => State::Down,
            _ => self.pod.state,
        };
        let ranks: Option<u32> = self.ours.number("ranks")?.or(self.rule.and_then(|rule| rule.ranks));
        if ranks.is_some_and(|ranks| ranks == 0 || ranks > MAX_RANKS) {
            return Err(format!("{ANNOTATION_PREFIX}ranks: must be between 1 and {MAX_RANKS}"));
        }
        let ports = self.serving_ports()?;
        if self.is_silent_worker(&ports) {
            return Ok(PodClass::Other);
        }
        let Some(ip) = self.pod.ip else { return Ok(PodClass::Pending) };
        self.defaults.networks.check(ip)?;
        let mut endpoints = Vec::new();
        for port in ports {
            endpoint.address = SocketAddr::new(ip, port);
            endpoint.container = self.pod.container(port);
            match ranks {
                None => endpoints.push(endpoint.clone()),
                Some(ranks) => {
                    endpoints.extend((0..ranks).map(|rank| Endpoint { rank: Some(rank), ..endpoint.clone() }));
                }
            }
        }
        // The filters make the same checks.
        match endpoints.iter().find_map(|endpoint| endpoint.validate().err()) {
            Some(error) => Err(error.to_string()),
            None => Ok(PodClass::Endpoints(endpoints)),
        }
    }

    fn revision(&self) -> Result<Option<String>, String> {
        let source = self.rule.and_then(|rule| rule.revision.as_ref()).or(self.defaults.revision.as_ref());
        let named = self.value("revision", source)?;
        Ok(if source.is_some() { named } else { named.or_else(|| self.pod.labels.get(SET_REVISION).cloned()) })
    }

    /// Whether the pod is a worker of a LeaderWorkerSet that serves no HTTP: its containers do not have the port. The
    /// workers of a group that all serve have it, as the leader has.
    fn is_silent_worker(&self, serving: &[u16]) -> bool {
        let is_worker = self.pod.labels.get(LWS_WORKER_INDEX).is_some_and(|index| index != "0");
        let all = || self.pod.ports.iter().map(|(_, port)| *port).chain(self.pod.sidecar_port);
        let has_port = |port: &u16| all().any(|known| known == *port);
        is_worker && !serving.iter().any(has_port)
    }

    /// The role; `None` when the pod serves no requests.
    fn role(&self) -> Result<Option<Role>, String> {
        if let Some(role) = self.ours.parsed("role")? {
            return Ok(Some(role));
        }
        match self.rule.and_then(|rule| rule.role.as_ref()) {
            Some(Source::Fixed(role)) => return Ok(Some(*role)),
            Some(source) => {
                if let Some((key, text)) = source.find(&self.pod.labels, &self.pod.annotations) {
                    return role_named(text).map(Some).ok_or_else(|| format!("{key}: {text:?} is no role"));
                }
            }
            None => {}
        }
        if let Some(text) = self.pod.labels.get(LLMD_ROLE) {
            // An encoder serves neither leg.
            if text == "encode" {
                return Ok(None);
            }
            return role_named(text).map(Some).ok_or_else(|| format!("{LLMD_ROLE}: {text:?} is no role"));
        }
        if let Some(text) = self.pod.labels.get(aibrix::ROLE) {
            // The owner of a StormService may define other roles. pd-control ignores their pods.
            return Ok(match text.as_str() {
                "prefill" => Some(Role::Prefill),
                "decode" => Some(Role::Decode),
                _ => None,
            });
        }
        let is_engine = self.pod.labels.contains_key(aibrix::MODEL)
            || LLMD_SERVING.iter().any(|key| self.pod.labels.get(*key).is_some_and(|text| text == "true"));
        Ok((is_engine || self.rule.is_some()).then_some(Role::Both))
    }

    fn engine(&self) -> Result<Option<Engine>, String> {
        if let Some(engine) = self.ours.parsed("engine")? {
            return Ok(Some(engine));
        }
        if let Some(source) = self.rule.and_then(|rule| rule.engine.as_ref()) {
            if let Source::Fixed(engine) = source {
                return Ok(Some(*engine));
            }
            if let Some((key, text)) = source.find(&self.pod.labels, &self.pod.annotations) {
                return engine_named(text).map_err(|_| format!("{key}: {text:?} is no engine known here"));
            }
        }
        match self.pod.labels.get(aibrix::CONNECTOR).map(String::as_str) {
            // In AIBrix, `shfs`, its default, hands over as vLLM's NIXL connector does, and `nixl` is Neuron's
            // connector.
            Some("shfs") => return Ok(Some(Engine::VllmNixl)),
            Some("nixl") => return Ok(Some(Engine::Neuron)),
            Some(text) => return Err(format!("{}: {text:?} is no connector known here", aibrix::CONNECTOR)),
            None => {}
        }
        for key in [LLMD_ENGINE, aibrix::ENGINE] {
            if let Some(text) = self.pod.labels.get(key) {
                return engine_named(text).map_err(|_| format!("{key}: {text:?} is no engine known here"));
            }
        }
        Ok(None)
    }

    fn serving_ports(&self) -> Result<Vec<u16>, String> {
        if let Some(port) = self.ours.number("port")? {
            return Ok(vec![port]);
        }
        match self.rule.map(|rule| &rule.ports) {
            Some(PortSource::Numbers(numbers)) => return Ok(numbers.clone()),
            Some(PortSource::Named(name)) => {
                let port = self.pod.ports.iter().find(|(known, _)| known.as_ref() == Some(name));
                return port
                    .map(|(_, port)| vec![*port])
                    .ok_or_else(|| format!("no container has a port named {name:?}"));
            }
            Some(PortSource::Text(source)) => {
                if let Some((key, text)) = source.find(&self.pod.labels, &self.pod.annotations) {
                    return text.parse().map(|port| vec![port]).map_err(|_| format!("{key}: {text:?} is no port"));
                }
            }
            Some(PortSource::Unsaid) | None => {}
        }
        if let Some(port) = self.pod.sidecar_port {
            return Ok(vec![port]);
        }
        if let Some(text) = self.pod.annotations.get(aibrix::PORT).or_else(|| self.pod.labels.get(aibrix::PORT)) {
            return text.parse().map(|port| vec![port]).map_err(|_| format!("{}: {text:?} is no port", aibrix::PORT));
        }
        let named = self.pod.ports.iter().find(|(name, _)| name.as_deref() == Some("http"));
        Ok(vec![named.or(self.pod.ports.first()).map_or(DEFAULT_PORT, |(_, port)| *port)])
    }

    /// Value of a key: this project's annotation, or else the rule's source. `None` if neither has it.
    fn value(&self, name: &str, source: Option<&Source<String>>) -> Result<Option<String>, String> {
        if let Some(text) = self.ours.text(name) {
            return Ok(Some(text.to_owned()));
        }
        Ok(match source {
            Some(Source::Fixed(text)) => Some(text.clone()),
            Some(source) => source.find(&self.pod.labels, &self.pod.annotations).map(|(_, text)| text.to_owned()),
            None => None,
        })
    }
}

#[cfg(test)]
mod tests;
