//! The Kubernetes source on a real kube-apiserver with etcd: where `PD_KUBE_BIN` names a folder that has both.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Namespace, Pod, Secret, ServiceAccount};
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};
use pd_control::control::Kubernetes;
use pd_control::sources::kubernetes::KubernetesConfig;
use pd_control::sources::kubernetes::follow::Limits;
use pd_core::wire::State;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::kubernetes::pod;
use crate::support::*;

pub const ADMIN_TOKEN: &str = "admin-of-the-test";
const RBAC: &str = include_str!("../../gateway-manifests/base/pd-control-rbac.yaml");

pub struct Cluster {
    directory: TempDir,
    binaries: PathBuf,
    ports: [u16; 3],
    _reserved: [Port; 3],
    _etcd: Process,
    api_server: Option<Process>,
}

/// Ends with its owner.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `None`, and a line that says so, where there are no binaries.
pub async fn cluster() -> Option<Cluster> {
    let Some(binaries) = std::env::var_os("PD_KUBE_BIN").map(PathBuf::from) else {
        println!("skipped: PD_KUBE_BIN names no folder with etcd and kube-apiserver");
        return None;
    };
    let directory = tempfile::tempdir().unwrap();
    let reserved = [Port::reserve(), Port::reserve(), Port::reserve()];
    let ports = reserved.each_ref().map(|port| port.address().port());
    let [client, peer, _] = ports.map(|port| format!("http://127.0.0.1:{port}"));
    let etcd = start(
        &binaries.join("etcd"),
        directory.path(),
        &[
            ("data-dir", &directory.path().join("etcd").display().to_string()),
            ("listen-client-urls", &client),
            ("advertise-client-urls", &client),
            ("listen-peer-urls", &peer),
            ("initial-advertise-peer-urls", &peer),
            ("initial-cluster", &format!("default={peer}")),
            ("unsafe-no-fsync", "true"),
        ],
    );
    let key = directory.path().join("sa.key");
    let made = Command::new("openssl").args(["genrsa", "-out"]).arg(&key).stderr(Stdio::null()).status().unwrap();
    assert!(made.success());
    let mut cluster = Cluster { directory, binaries, ports, _reserved: reserved, _etcd: etcd, api_server: None };
    cluster.start_api_server().await;
    Some(cluster)
}

fn start(program: &Path, directory: &Path, options: &[(&str, &str)]) -> Process {
    let name = program.file_name().unwrap().to_str().unwrap();
    let log = std::fs::File::create(directory.join(format!("{name}.log"))).unwrap();
    let options = options.iter().map(|(name, value)| format!("--{name}={value}"));
    let child = Command::new(program).args(options).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
    Process(child.unwrap_or_else(|error| panic!("{}: {error}", program.display())))
}

impl Cluster {
    pub fn stop_api_server(&mut self) {
        self.api_server = None;
    }

    pub async fn start_api_server(&mut self) {
        let directory = self.directory.path();
        let path = |name: &str| directory.join(name).display().to_string();
        std::fs::write(path("tokens.csv"), format!("{ADMIN_TOKEN},admin,1,\"system:masters\"\n")).unwrap();
        let process = start(
            &self.binaries.join("kube-apiserver"),
            directory,
            &[
                ("etcd-servers", &format!("http://127.0.0.1:{}", self.ports[0])),
                ("bind-address", "127.0.0.1"),
                ("advertise-address", "127.0.0.1"),
                ("secure-port", &self.ports[2].to_string()),
                ("cert-dir", &path("certificates")),
                ("token-auth-file", &path("tokens.csv")),
                ("authorization-mode", "RBAC"),
                ("service-account-issuer", "https://kubernetes.default.svc"),
                ("service-account-key-file", &path("sa.key")),
                ("service-account-signing-key-file", &path("sa.key")),
                ("service-cluster-ip-range", "10.96.0.0/16"),
                ("endpoint-reconciler-type", "none"),
                ("disable-admission-plugins", "ServiceAccount"),
            ],
        );
        self.api_server = Some(process);
        let start = Instant::now();
        while !self.is_ready().await {
            let log = std::fs::read_to_string(path("kube-apiserver.log")).unwrap();
            assert!(start.elapsed() < Duration::from_secs(120), "{log}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn is_ready(&self) -> bool {
        if !self.directory.path().join("certificates/apiserver.crt").exists() {
            return false;
        }
        let client = self.client(ADMIN_TOKEN).await;
        let ready = client.request_text(axum::http::Request::get("/readyz").body(Vec::new()).unwrap()).await;
        ready.is_ok_and(|text| text == "ok") && Api::<Namespace>::all(client).get("default").await.is_ok()
    }

    pub fn kubeconfig(&self, token: &str) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {
                "server": format!("https://127.0.0.1:{}", self.ports[2]),
                "certificate-authority": self.directory.path().join("certificates/apiserver.crt"),
            }}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "inference"}}],
            "current-context": "x",
        })
    }

    async fn config(&self, token: &str) -> kube::Config {
        let kubeconfig: Kubeconfig = serde_json::from_value(self.kubeconfig(token)).unwrap();
        kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap()
    }

    pub async fn client(&self, token: &str) -> Client {
        Client::try_from(self.config(token).await).unwrap()
    }

    /// A token of pd-control's service account, which may do what the shipped manifest says.
    pub async fn token(&self, admin: &Client) -> String {
        for name in ["inference", "elsewhere"] {
            let namespace = serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
            Api::<Namespace>::all(admin.clone()).create(&PostParams::default(), &namespace).await.unwrap();
        }
        let documents: Vec<Value> = serde_saphyr::from_multiple(RBAC).unwrap();
        let mut kinds = Vec::new();
        for document in documents {
            let kind = document["kind"].as_str().unwrap().to_owned();
            match kind.as_str() {
                "ServiceAccount" => create::<ServiceAccount>(admin, document).await,
                "Role" => create::<Role>(admin, document).await,
                "RoleBinding" => create::<RoleBinding>(admin, without_subject_namespace(document)).await,
                other => panic!("{other}"),
            }
            kinds.push(kind);
        }
        assert_eq!(kinds, ["ServiceAccount", "Role", "RoleBinding"]);
        let accounts = Api::<ServiceAccount>::namespaced(admin.clone(), "inference");
        let request = TokenRequest {
            spec: TokenRequestSpec { audiences: Vec::new(), ..Default::default() },
            ..Default::default()
        };
        let token = accounts.create_token_request("pd-control", &PostParams::default(), &request).await.unwrap();
        token.status.unwrap().token
    }
}

/// kustomize sets the namespace of a subject; this is what it does.
fn without_subject_namespace(mut binding: Value) -> Value {
    binding["subjects"][0]["namespace"] = "inference".into();
    binding
}

pub async fn create<K>(client: &Client, document: Value)
where
    K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + serde::Serialize
        + DeserializeOwned,
{
    let object: K = serde_json::from_value(document).unwrap();
    Api::namespaced(client.clone(), "inference").create(&PostParams::default(), &object).await.unwrap();
}

/// Makes a pod, and its status, which a node would.
async fn create_pod(client: &Client, name: &str, role: &str, ip: &str) {
    let mut object = pod(role, ip);
    object["metadata"]["name"] = name.into();
    let status = object["status"].take();
    create::<Pod>(client, object).await;
    set_status(client, name, &json!({"status": status})).await;
}

pub async fn set_status(client: &Client, name: &str, status: &Value) {
    let pods = Api::<Pod>::namespaced(client.clone(), "inference");
    pods.patch_status(name, &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
}

async fn is_forbidden<K>(client: &Client, namespace: &str) -> bool
where
    K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned,
{
    let listed = Api::<K>::namespaced(client.clone(), namespace).list(&ListParams::default()).await;
    matches!(listed, Err(kube::Error::Api(status)) if status.code == 403)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_api_server_is_followed_with_exactly_the_shipped_role() {
    let Some(mut cluster) = cluster().await else { return };
    let admin = cluster.client(ADMIN_TOKEN).await;
    let token = cluster.token(&admin).await;
    create_pod(&admin, "prefill-0", "prefill", "10.244.0.1").await;
    create_pod(&admin, "decode-0", "decode", "10.244.0.2").await;

    let ours = cluster.client(&token).await;
    assert!(is_forbidden::<Secret>(&ours, "inference").await);
    assert!(is_forbidden::<Pod>(&ours, "elsewhere").await);
    let pods = Api::<Pod>::namespaced(ours, "inference");
    let deleted = pods.delete("decode-0", &DeleteParams::default()).await;
    assert!(matches!(deleted, Err(kube::Error::Api(status)) if status.code == 403));

    let limits = Limits { watch_seconds: 2, margin: Duration::from_secs(2), ..Limits::default() };
    let (config, follow) = (KubernetesConfig::default(), cluster.config(&token).await);
    let rig = Rig::start_without_file(|it| it.kubernetes = Some(Kubernetes { config, cluster: Some(follow), limits }));
    let rig = rig.await;
    until_true("both pods are listed", || async { rig.client.get("/readyz").await.body == "ok\n" }).await;
    let mut filter = rig.filter().await;
    assert_eq!(filter.table.keys().collect::<Vec<_>>(), ["10.244.0.1:8000", "10.244.0.2:8000"]);

    // How fast a readiness change is known, the API server's own time included.
    let mut latencies = Vec::new();
    for round in 0..40 {
        let ready = if round % 2 == 0 { "False" } else { "True" };
        let status = json!({"status": {"conditions": [{"type": "Ready", "status": ready}]}});
        let (client, mut next) = (rig.client.clone(), filter.clone());
        let poll = tokio::spawn(async move {
            let snapshot = next.poll(&client, PATIENCE).await.unwrap();
            (next, snapshot, Instant::now())
        });
        until_true("the poll waits", || async { rig.client.metric("pd_control_pollers").await == 1.0 }).await;
        let start = Instant::now();
        set_status(&admin, "decode-0", &status).await;
        let (next, snapshot, end) = poll.await.unwrap();
        let state = if ready == "True" { State::Ready } else { State::Down };
        assert_eq!((snapshot.endpoints.len(), snapshot.endpoints[0].state), (1, state));
        filter = next;
        latencies.push(end - start);
    }
    latencies.sort_unstable();
    println!("status to answered poll, 40 changes: median {:?}, worst {:?}", latencies[20], latencies[39]);

    // The API server dies and comes back. pd-control follows the changes that it gets then.
    cluster.api_server = None;
    until_true("the loss is said", || async { rig.client.metric("pd_control_degraded").await == 1.0 }).await;
    assert_eq!(rig.filter().await.table.len(), 2, "the last list is kept");
    cluster.start_api_server().await;
    let admin = cluster.client(ADMIN_TOKEN).await;
    create_pod(&admin, "decode-1", "decode", "10.244.0.3").await;
    until_true("the new pod is listed", || async { rig.filter().await.table.contains_key("10.244.0.3:8000") }).await;
    until_true("all is well", || async { rig.client.metric("pd_control_degraded").await == 0.0 }).await;

    // Pods that are deleted without a node to end them are gone at once.
    let parameters = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    Api::<Pod>::namespaced(admin.clone(), "inference").delete("decode-0", &parameters).await.unwrap();
    until_true("it is gone", || async { !rig.filter().await.table.contains_key("10.244.0.2:8000") }).await;

    // Without the Role, pd-control says which right is missing.
    let bindings = Api::<RoleBinding>::namespaced(admin, "inference");
    bindings.delete("pd-control", &DeleteParams::default()).await.unwrap();
    let is_said = || async { rig.client.get("/readyz").await.body.contains("cannot watch resource \"pods\"") };
    until_true("the missing right is said", is_said).await;
    assert_eq!(rig.filter().await.table.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_follows_the_cluster_that_kubeconfig_names() {
    let Some(cluster) = cluster().await else { return };
    let admin = cluster.client(ADMIN_TOKEN).await;
    let token = cluster.token(&admin).await;
    create_pod(&admin, "decode-0", "decode", "10.244.0.2").await;
    let path = cluster.directory.path().join("kubeconfig");
    std::fs::write(&path, cluster.kubeconfig(&token).to_string()).unwrap();
    let variables = [("KUBECONFIG", path.to_str().unwrap())];
    let (child, client) = crate::process::spawn_with(&["--kubernetes"], &variables);
    let _child = Process(child);
    until_true("the pod is listed", || async { client.get("/v1/endpoints").await.body.contains("10.244.0.2:8000") })
        .await;
}
