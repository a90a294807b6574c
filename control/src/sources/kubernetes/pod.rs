//! Reads pod objects.

use std::collections::BTreeMap;
use std::net::IpAddr;

use kube::api::DynamicObject;
use pd_core::wire::State;
use serde::Deserialize;
use serde::de::IgnoredAny;
use xxhash_rust::xxh3::xxh3_64;

/// Namespace and name of a pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodName {
    /// Its namespace.
    pub namespace: String,
    /// Its name there.
    pub name: String,
}

/// The parts of a pod that pd-control reads.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pod {
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Its address, once it has one.
    pub ip: Option<IpAddr>,
    /// Name and number of its containers' TCP ports.
    pub ports: Vec<(Option<String>, u16)>,
    /// Port of llm-d's routing sidecar, if the pod has one. It stands in front of the engine, which has another port.
    pub sidecar_port: Option<u16>,
    /// State of its endpoints: draining when it is being deleted, down when it is not ready.
    pub state: State,
    /// Whether all of its containers run, as far as the pod says.
    pub is_running: bool,
    /// Id of each container, or else its number of starts, where it runs, and the ports that the container names.
    pub containers: Vec<(Option<String>, Vec<u16>)>,
    /// Number of times that a container of the pod was started again.
    pub restarts: u64,
    /// Whether all of its containers have ended for good.
    pub is_finished: bool,
    /// Time of its creation, in seconds of Unix time.
    pub created: i64,
}

#[derive(Deserialize)]
struct Body {
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    status: Status,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    #[serde(default)]
    containers: Vec<Container>,
    #[serde(default)]
    init_containers: Vec<Container>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Container {
    #[serde(default)]
    name: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    ports: Vec<ContainerPort>,
    restart_policy: Option<String>,
}

/// Flags by which a container is llm-d's routing sidecar: each names the engine's port.
const SIDECAR_FLAGS: [&str; 2] = ["--vllm-port", "--model-server-port"];

impl Container {
    /// Port of a routing sidecar: its flag `--port`, else its container port. `None` for another container.
    fn sidecar_port(&self) -> Option<u16> {
        let is_one = SIDECAR_FLAGS.iter().any(|flag| self.flag(flag).is_some());
        let declared = self.ports.first().map(|port| port.container_port);
        let port = || self.flag("--port").and_then(|text| text.parse().ok()).or(declared);
        is_one.then(port).flatten()
    }

    /// Value of a flag: `--flag=value`, or the argument behind `--flag`.
    fn flag(&self, name: &str) -> Option<&str> {
        let mut args = self.args.iter();
        while let Some(arg) = args.next() {
            match arg.strip_prefix(name) {
                Some("") => return args.next().map(String::as_str),
                Some(rest) => {
                    if let Some(value) = rest.strip_prefix('=') {
                        return Some(value);
                    }
                }
                None => {}
            }
        }
        None
    }
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
    #[serde(default)]
    container_statuses: Vec<ContainerStatus>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerStatus {
    #[serde(default)]
    name: String,
    #[serde(default, rename = "containerID")]
    container_id: Option<String>,
    #[serde(default)]
    restart_count: u64,
    /// One member: `waiting`, `running` or `terminated`.
    #[serde(default)]
    state: BTreeMap<String, IgnoredAny>,
}

#[derive(Deserialize)]
struct Condition {
    r#type: String,
    status: String,
}

impl PodName {
    /// The name of an object; `None` when the object has none.
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
    /// Names the containers that serve a port, or all of them where none names it: another name is another process. `None`
    /// where an id is not known.
    #[must_use]
    pub fn container(&self, port: u16) -> Option<String> {
        let has_port = |(_, ports): &&(Option<String>, Vec<u16>)| ports.contains(&port);
        let is_named = self.containers.iter().any(|container| has_port(&container));
        let serving = self.containers.iter().filter(|container| !is_named || has_port(container));
        let mut ids = serving.map(|(id, _)| id.as_deref()).collect::<Option<Vec<_>>>().filter(|ids| !ids.is_empty())?;
        ids.sort_unstable();
        Some(format!("{:016x}", xxh3_64(ids.join(" ").as_bytes())))
    }

    /// Reads an object.
    ///
    /// # Errors
    /// One line when the object is no pod or its address is none.
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
        let ports_of = |name: &str| {
            let own = spec.containers.iter().filter(|container| container.name == name);
            own.flat_map(|container| &container.ports).map(|port| port.container_port).collect()
        };
        // A kubelet that is none (a virtual node) may give no ids.
        let run =
            |it: &ContainerStatus| it.state.contains_key("running").then(|| format!("restart {}", it.restart_count));
        let id = |it: &ContainerStatus| it.container_id.clone().filter(|id| !id.is_empty()).or_else(|| run(it));
        let containers = status.container_statuses.iter().map(|it| (id(it), ports_of(&it.name))).collect();
        let lives_on = |container: &&Container| container.restart_policy.as_deref() == Some("Always");
        let mut sidecars = spec.init_containers.iter().filter(lives_on).chain(&spec.containers);
        let sidecar_port = sidecars.find_map(Container::sidecar_port);
        let ports = spec.containers.into_iter().flat_map(|container| container.ports);
        let is_tcp = |port: &ContainerPort| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
        Ok(Self {
            labels: metadata.labels.unwrap_or_default(),
            annotations: metadata.annotations.unwrap_or_default(),
            ip,
            ports: ports.filter(is_tcp).map(|port| (port.name, port.container_port)).collect(),
            sidecar_port,
            state,
            is_running: status
                .container_statuses
                .iter()
                .all(|it| it.state.is_empty() || it.state.contains_key("running")),
            containers,
            restarts: status.container_statuses.iter().fold(0, |sum, it| sum.saturating_add(it.restart_count)),
            is_finished: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            created: metadata.creation_timestamp.map_or(0, |time| time.0.as_second()),
        })
    }
}
