//! Turns what the API server tells into lists.
//!
//! The first list is sent when everything has been listed once: a list with half of the pods would take the others out
//! of service. After that every change is sent at once, and changes that arrive together are sent together.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kube::Api;
use kube::Client;
use kube::api::{ApiResource, DynamicObject};
use kube::core::{GroupVersionKind, SelectorExt};
use pd_core::wire::{Endpoint, EndpointId, State};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::list::EndpointList;
use crate::publish::updates::{Update, Updates};
use crate::sources::allow::AllowedNetworks;
use crate::sources::kubernetes::config::{KubernetesConfig, PoolGroup, PoolReference, Rule};
use crate::sources::kubernetes::follow::{Event, Follower, Limits};
use crate::sources::kubernetes::pod::{Meaning, Pod, PodName};
use crate::sources::kubernetes::pods::{Pods, PodsView, WatchView};
use crate::sources::kubernetes::pools;

/// Events that may wait; the watches are read no faster than that.
const EVENTS: usize = 256;
/// Events that are taken before a list is made of them.
const MAX_BATCH: usize = 10_000;
/// How long a connection to the API server may take to stand.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Pods that have ended need not be told of.
const UNFINISHED: &str = "status.phase!=Succeeded,status.phase!=Failed";

/// One cluster.
pub struct KubernetesSource {
    client: Client,
    config: KubernetesConfig,
    rules: Vec<Rule>,
    limits: Limits,
    pods: Arc<Pods>,
}

/// What one watch follows.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Watched {
    Pods(String),
    Pools(PoolGroup, String),
}

/// Everything that is known of the cluster.
struct Cluster {
    networks: AllowedNetworks,
    by_labels: bool,
    rules: Vec<Rule>,
    references: Vec<PoolReference>,
    pools: BTreeMap<(PoolGroup, PodName), Result<Rule, String>>,
    pods: BTreeMap<PodName, Known>,
    watches: BTreeMap<Watched, Health>,
}

/// One pod.
struct Known {
    pod: Result<Pod, String>,
    meaning: Meaning,
}

/// What is known of a watch.
#[derive(Default)]
struct Health {
    is_listed: bool,
    problem: Option<String>,
}

impl KubernetesSource {
    /// Connects to nothing yet. Without namespaces in the configuration it is the cluster's default one: the pod's own,
    /// or the kubeconfig's.
    ///
    /// # Errors
    /// When no client can be made of what is said of the cluster, or a selector is wrong.
    pub fn new(
        mut cluster: kube::Config,
        mut config: KubernetesConfig,
        limits: Limits,
        pods: Arc<Pods>,
    ) -> anyhow::Result<Self> {
        // Attempts are paced and told here.
        cluster.default_retry = false;
        cluster.connect_timeout = Some(CONNECT_TIMEOUT);
        if config.namespaces.is_empty() {
            config.namespaces.push(cluster.default_namespace.clone());
        }
        let rules = config.rules().map_err(anyhow::Error::msg)?;
        Ok(Self { client: Client::try_from(cluster)?, config, rules, limits, pods })
    }

    /// The namespaces, for people.
    #[must_use]
    pub fn name(&self) -> String {
        format!("kubernetes ({})", self.config.namespaces.join(", "))
    }

    /// Follows the cluster until the publisher is gone.
    pub async fn run(self, updates: Updates) {
        let mut cluster = Cluster {
            networks: AllowedNetworks::new(self.config.allowed_cidrs.clone()),
            by_labels: self.config.labels,
            rules: self.rules,
            references: self.config.inference_pools.clone(),
            pools: BTreeMap::new(),
            pods: BTreeMap::new(),
            watches: watches(&self.config).into_iter().map(|watched| (watched, Health::default())).collect(),
        };
        let (sender, mut events) = mpsc::channel(EVENTS);
        let mut followers = JoinSet::new();
        for watched in cluster.watches.keys() {
            let follower = watched.follower(&self.client, self.limits);
            let watched = watched.clone();
            followers.spawn(follower.run(sender.clone(), move |event| (watched.clone(), event)));
        }
        drop(sender);
        let mut sent: Option<(Option<Vec<Endpoint>>, Option<String>)> = None;
        loop {
            let first = tokio::select! {
                () = updates.closed() => return,
                event = events.recv() => event,
            };
            let Some((watched, event)) = first else { return };
            cluster.take(&watched, event);
            for _ in 0..MAX_BATCH {
                let Ok((watched, event)) = events.try_recv() else { break };
                cluster.take(&watched, event);
            }
            let (endpoints, view) = cluster.endpoints();
            for (pod, reason) in self.pods.set(view) {
                tracing::warn!(%pod, reason, "left out");
            }
            let now = (cluster.is_listed().then_some(endpoints), cluster.problem());
            if sent.as_ref() == Some(&now) {
                continue;
            }
            sent = Some(now.clone());
            let (endpoints, problem) = now;
            let update = match endpoints.map(EndpointList::new).transpose() {
                Ok(list) => Update { list, problem },
                Err(error) => Update { list: None, problem: Some(error.to_string()) },
            };
            if updates.send(update).await.is_err() {
                return;
            }
        }
    }
}

/// What there is to watch.
fn watches(config: &KubernetesConfig) -> Vec<Watched> {
    let mut watches: Vec<_> = config.namespaces.iter().cloned().map(Watched::Pods).collect();
    for reference in &config.inference_pools {
        for namespace in &config.namespaces {
            if reference.namespace.as_ref().is_none_or(|named| named == namespace) {
                watches.push(Watched::Pools(reference.group, namespace.clone()));
            }
        }
    }
    watches
}

impl Watched {
    fn follower(&self, client: &Client, limits: Limits) -> Follower {
        match self {
            Self::Pods(namespace) => {
                let resource = resource("", "v1", "Pod", "pods");
                Follower::new(Api::namespaced_with(client.clone(), namespace, &resource), Some(UNFINISHED), limits)
            }
            Self::Pools(group, namespace) => {
                let (group, version) = group.group_version();
                let resource = resource(group, version, "InferencePool", "inferencepools");
                Follower::new(Api::namespaced_with(client.clone(), namespace, &resource), None, limits)
            }
        }
    }
}

impl std::fmt::Display for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pods(namespace) => write!(f, "pods in {namespace}"),
            Self::Pools(group, namespace) => write!(f, "inferencepools.{} in {namespace}", group.group_version().0),
        }
    }
}

fn resource(group: &str, version: &str, kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
}

impl Cluster {
    fn take(&mut self, watched: &Watched, event: Event) {
        if let Some(health) = self.watches.get_mut(watched) {
            match &event {
                Event::Listed(_) => *health = Health { is_listed: true, problem: None },
                Event::Found | Event::Applied(_) | Event::Deleted(_) => health.problem = None,
                Event::Lost(reason) => health.problem = Some(reason.clone()),
            }
        }
        match watched {
            Watched::Pods(namespace) => self.take_pod(namespace, event),
            Watched::Pools(group, namespace) => self.take_pool(*group, namespace, event),
        }
    }

    fn take_pod(&mut self, namespace: &str, event: Event) {
        match event {
            Event::Listed(objects) => {
                self.pods.retain(|name, _| name.namespace != namespace);
                for object in objects {
                    self.apply_pod(object);
                }
            }
            Event::Applied(object) => self.apply_pod(*object),
            Event::Deleted(object) => {
                if let Some(name) = PodName::of(&object) {
                    self.pods.remove(&name);
                }
            }
            Event::Found | Event::Lost(_) => {}
        }
    }

    fn apply_pod(&mut self, object: DynamicObject) {
        let Some(name) = PodName::of(&object) else { return };
        let pod = Pod::read(object);
        let meaning = self.meaning(&name, &pod);
        self.pods.insert(name, Known { pod, meaning });
    }

    fn take_pool(&mut self, group: PoolGroup, namespace: &str, event: Event) {
        let is_in = |name: &PodName| name.namespace == namespace;
        match event {
            Event::Listed(objects) => {
                self.pools.retain(|(of, name), _| *of != group || !is_in(name));
                for object in objects {
                    self.apply_pool(group, object);
                }
            }
            Event::Applied(object) => self.apply_pool(group, *object),
            Event::Deleted(object) => {
                if let Some(name) = PodName::of(&object) {
                    self.pools.remove(&(group, name));
                }
            }
            Event::Found | Event::Lost(_) => return,
        }
        // Pools are few and change rarely; pods may have become others'.
        let mut pods = std::mem::take(&mut self.pods);
        for (name, known) in &mut pods {
            known.meaning = self.meaning(name, &known.pod);
        }
        self.pods = pods;
    }

    fn apply_pool(&mut self, group: PoolGroup, object: DynamicObject) {
        let Some(name) = PodName::of(&object) else { return };
        let is_followed = self.references.iter().any(|reference| {
            reference.group == group
                && (reference.name == "*" || reference.name == name.name)
                && reference.namespace.as_ref().is_none_or(|namespace| *namespace == name.namespace)
        });
        if is_followed {
            let rule = pools::rule(group, object);
            self.pools.insert((group, name), rule);
        }
    }

    fn meaning(&self, name: &PodName, pod: &Result<Pod, String>) -> Meaning {
        let pod = match pod {
            Ok(pod) => pod,
            Err(reason) => return Meaning::Refused(reason.clone()),
        };
        let selects = |rule: &&Rule| {
            rule.namespace.as_ref().is_none_or(|namespace| *namespace == name.namespace)
                && rule.selector.matches(&pod.labels)
        };
        let pools = self.pools.values().filter_map(|rule| rule.as_ref().ok());
        let rule = self.rules.iter().chain(pools).find(selects);
        pod.meaning(rule, self.by_labels, &self.networks)
    }

    /// Whether everything has been listed once.
    fn is_listed(&self) -> bool {
        self.watches.values().all(|health| health.is_listed)
    }

    /// What may be old or missing.
    fn problem(&self) -> Option<String> {
        let lost = self.watches.iter().filter_map(|(watched, health)| {
            let problem = health.problem.as_ref()?;
            let kept = if health.is_listed { "the last list of them is kept" } else { "they were never listed" };
            Some(format!("{watched}: {problem}; {kept}"))
        });
        let refused = self.pools.iter().filter_map(|((_, name), rule)| {
            let reason = rule.as_ref().err()?;
            Some(format!("InferencePool {name}: {reason}"))
        });
        let problems: Vec<_> = lost.chain(refused).collect();
        (!problems.is_empty()).then(|| problems.join("; "))
    }

    /// The endpoints of all pods, each name once, and what became of each pod.
    fn endpoints(&self) -> (Vec<Endpoint>, PodsView) {
        let mut owners: BTreeMap<EndpointId, (&PodName, &Endpoint, i64)> = BTreeMap::new();
        let mut view = PodsView::default();
        let rank = |state: State| match state {
            State::Ready => 2,
            State::Draining => 1,
            State::Down => 0,
        };
        for (name, known) in &self.pods {
            match &known.meaning {
                Meaning::Other => {}
                Meaning::Pending => view.pending += 1,
                Meaning::Refused(reason) => {
                    view.refused.insert(name.clone(), reason.clone());
                }
                Meaning::Endpoints(endpoints) => {
                    let created = known.pod.as_ref().map_or(0, |pod| pod.created);
                    for endpoint in endpoints {
                        let (id, candidate) = (endpoint.id(), (name, endpoint, created));
                        let Some(present) = owners.get(&id) else {
                            owners.insert(id, candidate);
                            continue;
                        };
                        // An address may be given to a new pod before the old one is gone.
                        let key = |(_, endpoint, created): &(_, &Endpoint, i64)| (rank(endpoint.state), *created);
                        let (winner, loser) =
                            if key(&candidate) > key(present) { (candidate, *present) } else { (*present, candidate) };
                        if loser.1.state == State::Ready {
                            let reason = format!("{id} is pod {}'s already", winner.0);
                            view.refused.insert(loser.0.clone(), reason);
                        }
                        owners.insert(id, winner);
                    }
                }
            }
        }
        view.names = owners.iter().map(|(id, (name, _, _))| (*id, (*name).clone())).collect();
        view.watches = self
            .watches
            .iter()
            .map(|(watched, health)| WatchView {
                name: watched.to_string(),
                is_listed: health.is_listed,
                problem: health.problem.clone(),
            })
            .collect();
        (owners.into_values().map(|(_, endpoint, _)| endpoint.clone()).collect(), view)
    }
}
