//! The view of a cluster: its pods and InferencePools, and the endpoints that result.

use std::collections::BTreeMap;

use kube::api::DynamicObject;
use kube::core::SelectorExt;
use pd_core::wire::{Endpoint, EndpointId, State, Stated};

use crate::sources::allow::AllowedNetworks;
use crate::sources::kubernetes::classify::{Defaults, PodClass, classify};
use crate::sources::kubernetes::config::{KubernetesConfig, ObjectGroup, PoolGroup, PoolReference};
use crate::sources::kubernetes::follow::Event;
use crate::sources::kubernetes::pod::{Pod, PodName};
use crate::sources::kubernetes::pods::{PodsView, WatchView};
use crate::sources::kubernetes::pools;
use crate::sources::kubernetes::readiness::{Owned, Readiness};
use crate::sources::kubernetes::rule::Rule;
use crate::sources::kubernetes::stated::{StatedKind, StatedObject, together};

/// The objects that one watch follows.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Watched {
    /// Pods of a namespace.
    Pods(String),
    /// InferencePools of a namespace.
    Pools(PoolGroup, String),
    /// InferenceObjectives or InferenceModelRewrites of a namespace.
    Stated(ObjectGroup, StatedKind, String),
}

/// The view of the cluster.
pub struct Cluster {
    defaults: Defaults,
    rules: Vec<Rule>,
    references: Vec<PoolReference>,
    pools: BTreeMap<(PoolGroup, PodName), Result<Rule, String>>,
    stated: BTreeMap<(ObjectGroup, StatedKind, PodName), Result<StatedObject, String>>,
    pods: BTreeMap<PodName, Known>,
    watches: BTreeMap<Watched, Health>,
    readiness: Readiness,
}

/// A pod and its class.
struct Known {
    pod: Result<Pod, String>,
    class: PodClass,
}

/// The state of a watch.
#[derive(Default)]
struct Health {
    is_listed: bool,
    problem: Option<String>,
}

impl std::fmt::Display for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pods(namespace) => write!(f, "pods in {namespace}"),
            Self::Pools(group, namespace) => write!(f, "inferencepools.{} in {namespace}", group.group_version().0),
            Self::Stated(group, kind, namespace) => {
                write!(f, "{}.{} in {namespace}", kind.names().1, group.group_version().0)
            }
        }
    }
}

impl Cluster {
    /// An empty view. `rules` are those of the selectors of `config`.
    #[must_use]
    pub fn new(config: &KubernetesConfig, rules: Vec<Rule>) -> Self {
        Self {
            defaults: Defaults {
                by_labels: config.labels,
                // The configuration was checked when it was read.
                revision: config.revision().unwrap_or_default(),
                networks: AllowedNetworks::new(config.allowed_cidrs.clone()),
            },
            rules,
            references: config.inference_pools.clone(),
            pools: BTreeMap::new(),
            stated: BTreeMap::new(),
            pods: BTreeMap::new(),
            watches: watches(config).into_iter().map(|watched| (watched, Health::default())).collect(),
            readiness: Readiness::default(),
        }
    }

    /// The watches that the view needs.
    pub fn watched(&self) -> impl Iterator<Item = &Watched> {
        self.watches.keys()
    }

    /// Takes an event of a watch.
    pub fn take(&mut self, watched: &Watched, event: Event) {
        if let Some(health) = self.watches.get_mut(watched) {
            match &event {
                Event::Listed(_) => *health = Health { is_listed: true, problem: None },
                Event::Current | Event::Applied(_) | Event::Deleted(_) => health.problem = None,
                Event::Stale(reason) => health.problem = Some(reason.clone()),
            }
        }
        match watched {
            Watched::Pods(namespace) => self.take_pod(namespace, event),
            Watched::Pools(group, namespace) => self.take_pool(*group, namespace, event),
            Watched::Stated(group, kind, namespace) => self.take_stated((*group, *kind), namespace, event),
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
            Event::Current | Event::Stale(_) => {}
        }
    }

    fn apply_pod(&mut self, object: DynamicObject) {
        let Some(name) = PodName::of(&object) else { return };
        let pod = Pod::read(object);
        let class = self.classify(&name, &pod);
        self.pods.insert(name, Known { pod, class });
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
            Event::Current | Event::Stale(_) => return,
        }
        // A pool may select other pods now. Pools are few and change rarely, so all pods are classified again.
        let mut pods = std::mem::take(&mut self.pods);
        for (name, known) in &mut pods {
            known.class = self.classify(name, &known.pod);
        }
        self.pods = pods;
    }

    fn take_stated(&mut self, (group, kind): (ObjectGroup, StatedKind), namespace: &str, event: Event) {
        let apply = |all: &mut BTreeMap<_, _>, object: DynamicObject| {
            if let Some(name) = PodName::of(&object) {
                all.insert((group, kind, name), StatedObject::read(kind, object));
            }
        };
        match event {
            Event::Listed(objects) => {
                self.stated.retain(|(of, what, name), _| (*of, *what) != (group, kind) || name.namespace != namespace);
                objects.into_iter().for_each(|object| apply(&mut self.stated, object));
            }
            Event::Applied(object) => apply(&mut self.stated, *object),
            Event::Deleted(object) => {
                if let Some(name) = PodName::of(&object) {
                    self.stated.remove(&(group, kind, name));
                }
            }
            Event::Current | Event::Stale(_) => {}
        }
    }

    /// What InferenceObjectives and InferenceModelRewrites state.
    #[must_use]
    pub fn stated(&self) -> Stated {
        let good = self.stated.iter().filter_map(|((_, _, name), object)| Some((name, object.as_ref().ok()?)));
        together(good, &self.references)
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

    fn classify(&self, name: &PodName, pod: &Result<Pod, String>) -> PodClass {
        let pod = match pod {
            Ok(pod) => pod,
            Err(reason) => return PodClass::Refused(reason.clone()),
        };
        let selects = |rule: &&Rule| {
            rule.namespace.as_ref().is_none_or(|namespace| *namespace == name.namespace)
                && rule.selector.matches(&pod.labels)
        };
        let pools = self.pools.values().filter_map(|rule| rule.as_ref().ok());
        let rule = self.rules.iter().chain(pools).find(selects);
        classify(pod, rule, &self.defaults)
    }

    /// Whether every watch has listed its objects. A failed watch of InferenceObjectives or InferenceModelRewrites
    /// counts as listed: pd-control sends endpoints even if the API group or a right for these objects is missing.
    #[must_use]
    pub fn is_listed(&self) -> bool {
        self.watches.iter().all(|(watched, health)| {
            health.is_listed || (matches!(watched, Watched::Stated(..)) && health.problem.is_some())
        })
    }

    /// Why the view may be old or incomplete; `None` when it is up to date.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let lost = self.watches.iter().filter_map(|(watched, health)| {
            let problem = health.problem.as_ref()?;
            let kept =
                if health.is_listed { "pd-control keeps the last list of them" } else { "they were never listed" };
            Some(format!("{watched}: {problem}; {kept}"))
        });
        let refused = self.pools.iter().filter_map(|((_, name), rule)| {
            let reason = rule.as_ref().err()?;
            Some(format!("InferencePool {name}: {reason}"))
        });
        let unread = self.stated.iter().filter_map(|((_, kind, name), object)| {
            let reason = object.as_ref().err()?;
            Some(format!("{} {name}: {reason}", kind.names().0))
        });
        let problems: Vec<_> = lost.chain(refused).chain(unread).collect();
        (!problems.is_empty()).then(|| problems.join("; "))
    }

    /// The endpoints of all pods, each name once, and the class of each pod.
    ///
    /// When two pods have the same address, the endpoint is the one that is ready, else the one that drains, else the
    /// newer pod's. [Busy](super::readiness) endpoints stay ready.
    #[must_use]
    pub fn endpoints(&mut self) -> (Vec<Endpoint>, PodsView) {
        let mut owners: BTreeMap<EndpointId, (&PodName, &Endpoint, i64)> = BTreeMap::new();
        let mut view = PodsView::default();
        let rank = |state: State| match state {
            State::Ready => 2,
            State::Draining => 1,
            State::Down => 0,
        };
        for (name, known) in &self.pods {
            match &known.class {
                PodClass::Other => {}
                PodClass::Pending => view.pending += 1,
                PodClass::Refused(reason) => {
                    view.refused.insert(name.clone(), reason.clone());
                }
                PodClass::Endpoints(endpoints) => {
                    let created = known.pod.as_ref().map_or(0, |pod| pod.created);
                    for endpoint in endpoints {
                        let (id, candidate) = (endpoint.id(), (name, endpoint, created));
                        let Some(present) = owners.get(&id) else {
                            owners.insert(id, candidate);
                            continue;
                        };
                        // Kubernetes may give an address to a new pod before the old one is deleted.
                        let key = |(_, endpoint, created): &(_, &Endpoint, i64)| (rank(endpoint.state), *created);
                        let (winner, loser) =
                            if key(&candidate) > key(present) { (candidate, *present) } else { (*present, candidate) };
                        if loser.1.state == State::Ready {
                            let reason = format!("pod {} has the address {id} already", winner.0);
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
        let owned = |(name, endpoint, _): (_, &Endpoint, _)| {
            let pod = self.pods.get(name)?.pod.as_ref().ok()?;
            Some(Owned { name, pod, endpoint: endpoint.clone() })
        };
        let mut all: Vec<_> = owners.into_values().filter_map(owned).collect();
        view.busy = self.readiness.settle(&mut all);
        (all.into_iter().map(|it| it.endpoint).collect(), view)
    }
}

/// The watches for a configuration.
fn watches(config: &KubernetesConfig) -> Vec<Watched> {
    let mut watches: Vec<_> = config.namespaces.iter().cloned().map(Watched::Pods).collect();
    for reference in &config.inference_pools {
        for namespace in &config.namespaces {
            if reference.namespace.as_ref().is_none_or(|named| named == namespace) {
                watches.push(Watched::Pools(reference.group, namespace.clone()));
            }
        }
    }
    for group in &config.inference_objects {
        for namespace in &config.namespaces {
            watches.extend(StatedKind::ALL.map(|kind| Watched::Stated(*group, kind, namespace.clone())));
        }
    }
    watches
}
