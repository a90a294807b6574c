//! The Kubernetes source: follows a cluster and sends lists of endpoints.
//!
//! It sends the first list when every watch has listed its objects: a list with half of the pods would take the others
//! out of service. Then it sends every change at once, and changes that arrive together in one list.

use std::sync::Arc;
use std::time::Duration;

use kube::Api;
use kube::Client;
use kube::api::ApiResource;
use kube::core::GroupVersionKind;
use pd_core::wire::{Endpoint, Stated};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::list::EndpointList;
use crate::publish::updates::{Update, Updates};
use crate::sources::kubernetes::cluster::{Cluster, Watched};
use crate::sources::kubernetes::config::KubernetesConfig;
use crate::sources::kubernetes::follow::{Follower, Limits};
use crate::sources::kubernetes::pods::Pods;
use crate::sources::kubernetes::rule::Rule;

/// Events that may wait. When as many wait, the watches pause.
const EVENTS: usize = 256;
/// Most events that one list takes in.
const MAX_BATCH: usize = 10_000;
/// Time limit of connecting to the API server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Field selector that leaves out pods that have ended.
const UNFINISHED: &str = "status.phase!=Succeeded,status.phase!=Failed";

/// The source of one cluster.
pub struct KubernetesSource {
    client: Client,
    config: KubernetesConfig,
    rules: Vec<Rule>,
    limits: Limits,
    pods: Arc<Pods>,
}

/// What the cluster says: endpoints with what objects state, once all are listed, and a problem.
type View = (Option<(Vec<Endpoint>, Stated)>, Option<String>);

impl KubernetesSource {
    /// A source that has not connected yet.
    ///
    /// Without namespaces in the configuration, it follows the default namespace of `cluster`: the pod's own, or the
    /// kubeconfig's.
    ///
    /// # Errors
    /// When `cluster` is no valid configuration of a client, or a selector is wrong.
    pub fn new(
        mut cluster: kube::Config,
        mut config: KubernetesConfig,
        limits: Limits,
        pods: Arc<Pods>,
    ) -> anyhow::Result<Self> {
        // `follow` paces and reports attempts.
        cluster.default_retry = false;
        cluster.connect_timeout = Some(CONNECT_TIMEOUT);
        if config.namespaces.is_empty() {
            config.namespaces.push(cluster.default_namespace.clone());
        }
        let rules = config.rules().map_err(anyhow::Error::msg)?;
        Ok(Self { client: Client::try_from(cluster)?, config, rules, limits, pods })
    }

    /// Name of the source with its namespaces, for people.
    #[must_use]
    pub fn name(&self) -> String {
        format!("kubernetes ({})", self.config.namespaces.join(", "))
    }

    /// Follows the cluster until the publisher has ended.
    pub async fn run(self, updates: Updates) {
        let mut cluster = Cluster::new(&self.config, self.rules);
        let (sender, mut events) = mpsc::channel(EVENTS);
        let mut followers = JoinSet::new();
        for watched in cluster.watched() {
            let follower = follower(watched, &self.client, self.limits);
            let watched = watched.clone();
            followers.spawn(follower.run(sender.clone(), move |event| (watched.clone(), event)));
        }
        drop(sender);
        let mut sent: Option<View> = None;
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
            for line in view.busy.iter().filter(|line| !self.pods.view().busy.contains(line)) {
                tracing::warn!("{line}");
            }
            for (pod, reason) in self.pods.set(view) {
                tracing::warn!(%pod, reason, "refused a pod");
            }
            let now = (cluster.is_listed().then(|| (endpoints, cluster.stated())), cluster.problem());
            if sent.as_ref() == Some(&now) {
                continue;
            }
            sent = Some(now.clone());
            let (endpoints, problem) = now;
            let list = endpoints.map(|(endpoints, stated)| EndpointList::new(endpoints)?.with_stated(stated));
            let update = match list.transpose() {
                Ok(list) => Update { list, problem },
                Err(error) => Update { list: None, problem: Some(error.to_string()) },
            };
            if updates.send(update).await.is_err() {
                return;
            }
        }
    }
}

fn follower(watched: &Watched, client: &Client, limits: Limits) -> Follower {
    match watched {
        Watched::Pods(namespace) => {
            let resource = resource("", "v1", "Pod", "pods");
            Follower::new(Api::namespaced_with(client.clone(), namespace, &resource), Some(UNFINISHED), limits)
        }
        Watched::Pools(group, namespace) => {
            let (group, version) = group.group_version();
            let resource = resource(group, version, "InferencePool", "inferencepools");
            Follower::new(Api::namespaced_with(client.clone(), namespace, &resource), None, limits)
        }
        Watched::Stated(group, kind, namespace) => {
            let ((group, version), (kind, plural)) = (group.group_version(), kind.names());
            let resource = resource(group, version, kind, plural);
            Follower::new(Api::namespaced_with(client.clone(), namespace, &resource), None, limits)
        }
    }
}

fn resource(group: &str, version: &str, kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
}
