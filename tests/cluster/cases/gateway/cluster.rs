//! The cluster, our manifests on it, and what it says.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::Request;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client, ResourceExt as _};
use pd_image::manifest::Image;
use pd_image::registry::Registry;
use pd_sim::Stats;
use pd_support::client::{self, Http};
use pd_support::places;
use pd_support::wait::within;
use serde_json::json;
use tempfile::TempDir;

/// Namespace of what is ours.
pub const OURS: &str = "llm";
/// Namespace of Envoy Gateway and its Envoys.
pub const GATEWAY: &str = "envoy-gateway-system";
/// How long a cluster may take over anything.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(25);
/// What the API server says of an image that Envoy Gateway does not have.
pub const NOT_FETCHED: &str = "Envoy Gateway has not fetched";
/// Label of Envoy's pods.
const ENVOY: &str = "gateway.envoyproxy.io/owning-gateway-name=pd";

/// The cluster with the manifests of overlay `sim` applied.
pub struct Cluster {
    pub client: Client,
    /// Where clients send requests.
    pub address: SocketAddr,
    manifests: TempDir,
    overlay: &'static str,
}

impl Cluster {
    /// Pushes the module's image, applies the manifests as they are in the repository, and waits until a request is served.
    pub async fn ready() -> Self {
        let mut cluster = Self::new("sim").await;
        cluster.up().await;
        served(cluster.address).await;
        cluster
    }

    /// The cluster, with a copy of the manifests of which nothing is applied yet.
    pub async fn new(overlay: &'static str) -> Self {
        let client = kube_client().await;
        let manifests = tempfile::tempdir().expect("a folder");
        copy(&places::root().join("gateway-manifests"), manifests.path());
        Self { client, address: ([0, 0, 0, 0], 0).into(), manifests, overlay }
    }

    /// Pushes the module's image, applies the manifests and waits until all pods are ready.
    pub async fn up(&mut self) {
        self.up_with(&["prefill", "decode", "aibrix-prefill", "aibrix-decode"]).await;
    }

    /// The same for manifests with these deployments of engines.
    pub async fn up_with(&mut self, engines: &[&str]) {
        let cluster = self;
        cluster.pin(&fs::read(places::wasm()).expect("the module")).await;
        cluster.pin_control().await;
        cluster.apply().await;
        for name in engines.iter().chain(&["pd-control"]) {
            cluster.settled(OURS, name).await;
        }
        cluster.address = cluster.gateway_address("pd").await;
        cluster.envoys_settled().await;
    }

    /// The folder with the copy of the manifests.
    #[allow(dead_code, reason = "the tests beside AI Gateway share this file")]
    pub fn manifests(&self) -> &Path {
        self.manifests.path()
    }

    /// Pushes a module and names its image in the manifests; returns the name.
    pub async fn pin(&self, module: &[u8]) -> String {
        let image = Image::new(module).expect("a module");
        let name = format!("{}/pd-filter:test", registry());
        let name = Registry::new(&name, true).expect("a registry").push(&image).await.expect("pushed");
        self.pin_name(&name);
        name
    }

    /// Pushes pd-control's image and names it in the manifests, where `make image-control` has written one; else the
    /// cluster has its own.
    async fn pin_control(&self) {
        let Ok(image) = pd_image::layout::read(&places::root().join("target/image-control")) else { return };
        let name = format!("{}/pd-control:test", registry());
        let name = Registry::new(&name, true).expect("a registry").push(&image).await.expect("pushed");
        fs::write(self.manifests.path().join("base/control-image.env"), format!("image={name}\n")).expect("written");
    }

    /// Names an image in the manifests.
    pub fn pin_name(&self, name: &str) {
        fs::write(self.manifests.path().join("base/filter-image.env"), format!("image={name}\n")).expect("written");
    }

    /// Whether the image that the manifests name could be taken, by the check that the manual asks for.
    pub async fn check_image(&self) -> anyhow::Result<()> {
        let text = fs::read_to_string(self.manifests.path().join("base/filter-image.env"))?;
        let name = text.trim().trim_start_matches("image=");
        Registry::new(name, true)?.pull().await?.module().map(drop)
    }

    /// What Envoy Gateway says of a policy's newest text: status and message of its condition `Accepted`.
    pub async fn policy_accepted(&self, name: &str) -> Option<(bool, String)> {
        let kind = GroupVersionKind::gvk("gateway.envoyproxy.io", "v1alpha1", "EnvoyExtensionPolicy");
        let resource = ApiResource::from_gvk_with_plural(&kind, "envoyextensionpolicies");
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), OURS, &resource);
        let policy = api.get(name).await.ok()?;
        let conditions = policy.data["status"]["ancestors"][0]["conditions"].as_array()?;
        let accepted = conditions.iter().find(|condition| condition["type"] == "Accepted")?;
        if accepted["observedGeneration"].as_i64() != policy.metadata.generation {
            return None;
        }
        Some((accepted["status"] == "True", accepted["message"].as_str()?.to_owned()))
    }

    /// Changes one file of the manifests, which must hold `from` once.
    pub fn edit(&self, file: &str, from: &str, to: &str) {
        let path = self.manifests.path().join(file);
        let text = fs::read_to_string(&path).expect(file);
        assert_eq!(text.matches(from).count(), 1, "{from} in {file}");
        fs::write(path, text.replace(from, to)).expect(file);
    }

    /// `kubectl apply -k`, again while an image has to be fetched first, as the manual says.
    pub async fn apply(&self) {
        until("the manifests are taken", async || match self.apply_once().await {
            Ok(()) => Some(()),
            Err(why) => {
                assert!(why.contains(NOT_FETCHED), "{why}");
                None
            }
        })
        .await;
    }

    /// `kubectl apply -k`, or what it says.
    pub async fn apply_once(&self) -> Result<(), String> {
        kubectl(&["apply", "--validate=strict", "-k", &self.overlay().display().to_string()]).await
    }

    /// The folder of the overlay that is applied.
    pub fn overlay(&self) -> PathBuf {
        self.manifests.path().join("overlays").join(self.overlay)
    }

    /// Sets a deployment's number of pods.
    pub async fn scale(&self, namespace: &str, name: &str, replicas: u32) {
        let api: Api<Deployment> = Api::namespaced(self.client.clone(), namespace);
        let patch = Patch::Merge(json!({"spec": {"replicas": replicas}}));
        api.patch(name, &PatchParams::default(), &patch).await.expect("scaled");
    }

    /// Waits until a deployment has the pods it should have, all ready and new, and no others.
    pub async fn settled(&self, namespace: &str, name: &str) {
        let api: Api<Deployment> = Api::namespaced(self.client.clone(), namespace);
        until(format!("{name} has settled"), async || {
            let deployment = api.get(name).await.ok()?;
            let wanted = deployment.spec.as_ref()?.replicas?;
            let status = deployment.status.as_ref()?;
            let is_seen = status.observed_generation == deployment.metadata.generation;
            let counts = [status.replicas, status.ready_replicas, status.updated_replicas, status.available_replicas];
            let is_settled = is_seen && counts.iter().all(|count| count.unwrap_or(0) == wanted);
            is_settled.then_some(())
        })
        .await;
    }

    /// Waits until Envoy's deployment has settled; returns its name.
    pub async fn envoys_settled(&self) -> String {
        let api: Api<Deployment> = Api::namespaced(self.client.clone(), GATEWAY);
        let name = until("Envoy is deployed", async || {
            Some(api.list(&ListParams::default().labels(ENVOY)).await.ok()?.items.first()?.name_any())
        })
        .await;
        self.settled(GATEWAY, &name).await;
        name
    }

    /// Pods with a label that are not leaving.
    pub async fn pods(&self, namespace: &str, label: &str) -> Vec<Pod> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let pods = api.list(&ListParams::default().labels(label)).await.expect("pods").items;
        pods.into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()).collect()
    }

    /// Whether a pod is ready.
    pub async fn is_ready(&self, namespace: &str, name: &str) -> bool {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let status = api.get(name).await.ok().and_then(|pod| pod.status);
        let conditions = status.and_then(|status| status.conditions).unwrap_or_default();
        conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
    }

    /// Names of pods with a label that are not leaving.
    pub async fn pod_names(&self, namespace: &str, label: &str) -> Vec<String> {
        self.pods(namespace, label).await.iter().map(kube::ResourceExt::name_any).collect()
    }

    /// Ends a pod at once, as the failure of a machine does.
    pub async fn kill(&self, namespace: &str, name: &str) {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        api.delete(name, &DeleteParams::default().grace_period(0)).await.expect("deleted");
    }

    /// What an engine counted.
    pub async fn stats(&self, pod: &str) -> Stats {
        self.stats_at(pod, 8_000).await
    }

    /// What the engine at a port of a pod counted.
    pub async fn stats_at(&self, pod: &str, port: u16) -> Stats {
        let path = format!("/api/v1/namespaces/{OURS}/pods/{pod}:{port}/proxy/stats");
        self.client.request(Request::get(path).body(Vec::new()).expect("a request")).await.expect("stats")
    }

    /// What engines with a label counted, in sum.
    pub async fn sum(&self, label: &str, of: impl Fn(&Stats) -> u64) -> u64 {
        let mut sum = 0;
        for pod in self.pod_names(OURS, label).await {
            sum += of(&self.stats(&pod).await);
        }
        sum
    }

    /// Names of Envoy's pods.
    pub async fn envoys(&self) -> Vec<String> {
        self.pod_names(GATEWAY, ENVOY).await
    }

    /// Metrics of an Envoy; empty while it does not answer.
    pub async fn metrics(&self, envoy: &str) -> String {
        let path = format!("/api/v1/namespaces/{GATEWAY}/pods/{envoy}:19001/proxy/stats/prometheus");
        self.client.request_text(Request::get(path).body(Vec::new()).expect("a request")).await.unwrap_or_default()
    }

    /// Values of a metric over all Envoys, in sum. `with` must stand in its line.
    pub async fn metric(&self, name: &str, with: &str) -> f64 {
        let mut sum = 0.0;
        for envoy in self.envoys().await {
            let metrics = self.metrics(&envoy).await;
            let lines = metrics.lines().filter(|line| line.starts_with(name) && line.contains(with));
            sum += lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>();
        }
        sum
    }

    /// Where a Gateway listens.
    pub async fn gateway_address(&self, name: &str) -> SocketAddr {
        if let Ok(address) = std::env::var("PD_CLUSTER_GATEWAY") {
            return address.parse().expect("PD_CLUSTER_GATEWAY: ip:port");
        }
        let kind = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", "Gateway");
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), OURS, &ApiResource::from_gvk(&kind));
        until("the gateway has an address", async || {
            let gateway = api.get(name).await.ok()?;
            let ip = gateway.data["status"]["addresses"][0]["value"].as_str()?.parse().ok()?;
            Some(SocketAddr::new(ip, 80))
        })
        .await
    }
}

/// Runs kubectl, or returns what it says.
pub async fn kubectl(arguments: &[&str]) -> Result<(), String> {
    let program = std::env::var("KUBECTL").unwrap_or_else(|_| "kubectl".to_owned());
    let done = tokio::process::Command::new(program).args(arguments).output().await.expect("kubectl");
    if done.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&done.stderr).into_owned()) }
}

/// Waits until a request is served.
pub async fn served(address: SocketAddr) {
    until("a request is served", async || {
        let mut client = client::Client::try_connect(address, Http::One).await.ok()?;
        let request = client.json("/v1/completions", r#"{"model":"sim","prompt":"a","max_tokens":1}"#, &[]);
        client.try_send(request).await.ok().filter(|answer| answer.status == 200)
    })
    .await;
}

/// Waits until `look` finds something.
pub async fn until<T>(what: impl std::fmt::Display, look: impl AsyncFnMut() -> Option<T>) -> T {
    within(PATIENCE, PAUSE, what, look).await
}

fn registry() -> String {
    std::env::var("PD_CLUSTER_REGISTRY").expect("PD_CLUSTER_REGISTRY: a registry that the cluster reaches")
}

async fn kube_client() -> Client {
    let path = std::env::var("KUBECONFIG").expect("KUBECONFIG: run `make test-cluster`");
    pd_cluster::api::client(&PathBuf::from(path)).await.expect("a client")
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("copied");
        }
    }
}
