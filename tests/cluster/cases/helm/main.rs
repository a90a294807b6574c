//! The chart from an OCI registry on a real cluster: installed with its defaults, upgraded, uninstalled. `make test-cluster`
//! runs it on a cluster of its own.

#[allow(dead_code, reason = "shared with the tests of the gateway")]
#[path = "../gateway/cluster.rs"]
mod cluster;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::SystemTime;

use k8s_openapi::api::core::v1::Secret;
use kube::api::{DynamicObject, ListParams};
use kube::discovery::{Discovery, verbs};
use kube::{Api, ResourceExt as _};
use pd_support::body::words;
use pd_support::client::{Client, Http};
use pd_support::places;
use tokio::process::Command;

use cluster::{Cluster, GATEWAY, OURS, served, until};

/// Kinds that come and go by themselves.
const PASSING: &[&str] = &["Event", "Lease", "EndpointSlice", "Endpoints", "Pod", "ReplicaSet", "ControllerRevision"];

async fn helm(arguments: &[&str]) -> Result<String, String> {
    let done = Command::new("helm").args(arguments).stdin(Stdio::null()).output().await.expect("helm");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if done.status.success() { Ok(text(&done.stdout)) } else { Err(text(&done.stderr)) }
}

/// Pushes the chart with the filter's image as its default, as `make release` does; returns its place.
async fn push_chart(cluster: &Cluster) -> String {
    let filter = cluster.pin(&fs::read(places::wasm()).expect("the module")).await;
    let folder = tempfile::tempdir().expect("a folder");
    let chart = folder.path().join("envoy-pd");
    copy(&places::root().join("charts/envoy-pd"), &chart);
    let values = fs::read_to_string(chart.join("values.yaml")).expect("values");
    let line = values.lines().find(|line| line.starts_with("  filter: ")).expect("the filter's image");
    fs::write(chart.join("values.yaml"), values.replace(line, &format!("  filter: {filter}"))).expect("written");
    let (chart, target) = (chart.display().to_string(), folder.path().display().to_string());
    helm(&["package", &chart, "--destination", &target]).await.expect("packed");
    let archive = folder.path().join("envoy-pd-0.1.0.tgz").display().to_string();
    let registry = std::env::var("PD_CLUSTER_REGISTRY").expect("PD_CLUSTER_REGISTRY");
    helm(&["push", &archive, &format!("oci://{registry}/charts"), "--plain-http"]).await.expect("pushed");
    format!("oci://{registry}/charts/envoy-pd")
}

/// Links are followed.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let (path, target) = {
            let entry = entry.expect("an entry");
            (entry.path(), to.join(entry.file_name()))
        };
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(path, target).expect("copied");
        }
    }
}

/// Kind, namespace and name of everything that the cluster has, without what passes.
async fn objects(cluster: &Cluster) -> BTreeSet<String> {
    let discovery = Discovery::new(cluster.client.clone()).run().await.expect("kinds");
    let mut found = BTreeSet::new();
    for (resource, capabilities) in discovery.groups().flat_map(kube::discovery::ApiGroup::recommended_resources) {
        if !capabilities.supports_operation(verbs::LIST) || PASSING.contains(&resource.kind.as_str()) {
            continue;
        }
        let api: Api<DynamicObject> = Api::all_with(cluster.client.clone(), &resource);
        for object in api.list(&ListParams::default()).await.expect("objects").items {
            let namespace = object.namespace().unwrap_or_default();
            found.insert(format!("{}/{} {namespace}/{}", resource.group, resource.kind, object.name_any()));
        }
    }
    found
}

/// Sends a new long prompt; returns whether a prefill server computed it.
async fn is_split(cluster: &Cluster) -> bool {
    let before = cluster.sum("app=prefill", |stats| stats.prefill_legs).await;
    let prompt = words(&format!("{:?}", SystemTime::now()), 4_000);
    let mut client = Client::connect(cluster.address, Http::One).await;
    let body = format!(r#"{{"model":"sim","max_tokens":4,"prompt":"{prompt}"}}"#);
    let answer = client.send(client.json("/v1/completions", body, &[])).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    cluster.sum("app=prefill", |stats| stats.prefill_legs).await > before
}

async fn token(cluster: &Cluster) -> Vec<u8> {
    let secrets: Api<Secret> = Api::namespaced(cluster.client.clone(), OURS);
    let secret = secrets.get("pd-control").await.expect("the token");
    secret.data.expect("data")["token"].0.clone()
}

#[tokio::test]
async fn the_chart_is_installed_upgraded_and_uninstalled() {
    let mut cluster = Cluster::new("sim").await;
    let chart = push_chart(&cluster).await;
    let chart = [chart.as_str(), "--version", "0.1.0", "--plain-http", "--namespace", OURS];
    let before = objects(&cluster).await;

    let wait = ["--wait", "--timeout", "3m"];
    helm(&[&["install", "pd", "--create-namespace"], &chart[..], &wait].concat()).await.expect("installed");
    cluster.address = cluster.gateway_address("pd").await;
    served(cluster.address).await;
    cluster.envoys_settled().await;
    assert!(is_split(&cluster).await, "with the defaults a request is split");
    let first = token(&cluster).await;
    let installed = objects(&cluster).await;
    assert!(installed.len() > before.len() + 10, "{installed:?}");

    helm(&[&["upgrade", "pd"], &chart[..], &["--reuse-values", "--set", "simulators.prefill=3"], &wait].concat())
        .await
        .expect("upgraded");
    cluster.settled(OURS, "prefill").await;
    assert_eq!(cluster.pods(OURS, "app=prefill").await.len(), 3);
    assert!(is_split(&cluster).await, "and after an upgrade");
    assert_eq!(token(&cluster).await, first, "an upgrade keeps the tokens");

    helm(&["uninstall", "pd", "--namespace", OURS, "--wait", "--timeout", "3m"]).await.expect("uninstalled");
    // What Kubernetes makes in each namespace.
    let of_namespace = |object: &&String| {
        [
            format!("/Namespace /{OURS}"),
            format!("/ServiceAccount {OURS}/default"),
            format!("/ConfigMap {OURS}/kube-root-ca.crt"),
        ]
        .contains(object)
    };
    until("nothing is left", async || {
        let now = objects(&cluster).await;
        let left: Vec<_> = now.difference(&before).filter(|object| !of_namespace(object)).cloned().collect();
        let pods = cluster.pods(OURS, "").await.len() + cluster.envoys().await.len();
        if !left.is_empty() {
            eprintln!("left: {left:?}");
        }
        (left.is_empty() && pods == 0).then_some(())
    })
    .await;
    assert!(!cluster.pods(GATEWAY, "control-plane=envoy-gateway").await.is_empty(), "Envoy Gateway stays");
}
