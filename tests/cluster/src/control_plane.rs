//! etcd, kube-apiserver and kube-controller-manager.

use std::path::Path;
use std::time::Duration;

use anyhow::bail;
use http::Request;
use kube::Client;
use tokio::process::Child;
use tokio::time::{Instant, sleep};

use crate::api;
use crate::network::{NODE, SERVICES};
use crate::pki::{AGGREGATOR, Pki};
use crate::program::{logged, tail};

/// How long the API server may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// What our manifests, Envoy Gateway's chart and autoscalers need.
const CONTROLLERS: &str = "deployment-controller,replicaset-controller,daemonset-controller,statefulset-controller,job-controller,\
    endpointslice-controller,serviceaccount-controller,serviceaccount-token-controller,namespace-controller,\
    garbage-collector-controller,root-ca-certificate-publisher-controller,disruption-controller,\
    horizontal-pod-autoscaler-controller";

/// The running control plane. Dropping it kills it.
#[derive(Debug)]
pub struct ControlPlane(#[expect(dead_code, reason = "held to run")] Vec<Child>);

impl ControlPlane {
    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    /// When a program is missing or the API server does not become ready.
    pub async fn start(programs: &Path, state: &Path, pki: &Pki) -> anyhow::Result<(Self, Client)> {
        let file = |name: &str| pki.path(name).display().to_string();
        let start = |name: &str, arguments: Vec<String>| -> anyhow::Result<Child> {
            Ok(logged(programs.join(name), &state.join(format!("{name}.log")))?.args(arguments).spawn()?)
        };
        let etcd = start(
            "etcd",
            vec![
                format!("--data-dir={}", state.join("etcd").display()),
                "--listen-client-urls=http://127.0.0.1:2379".to_owned(),
                "--advertise-client-urls=http://127.0.0.1:2379".to_owned(),
                "--listen-peer-urls=http://127.0.0.1:2380".to_owned(),
                // It is thrown away.
                "--unsafe-no-fsync".to_owned(),
            ],
        )?;
        let mut server = start(
            "kube-apiserver",
            vec![
                "--etcd-servers=http://127.0.0.1:2379".to_owned(),
                format!("--bind-address={NODE}"),
                format!("--advertise-address={NODE}"),
                "--secure-port=6443".to_owned(),
                format!("--tls-cert-file={}", file("api.crt")),
                format!("--tls-private-key-file={}", file("api.key")),
                format!("--client-ca-file={}", file("ca.crt")),
                format!("--token-auth-file={}", file("tokens.csv")),
                "--authorization-mode=RBAC".to_owned(),
                "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
                format!("--service-account-key-file={}", file("accounts.pub")),
                format!("--service-account-signing-key-file={}", file("accounts.key")),
                format!("--service-cluster-ip-range={SERVICES}"),
                "--allow-privileged=true".to_owned(),
                // The aggregation layer: autoscalers' metrics come from other servers, which know this one by its certificate.
                format!("--requestheader-client-ca-file={}", file("ca.crt")),
                format!("--requestheader-allowed-names={AGGREGATOR}"),
                "--requestheader-username-headers=X-Remote-User".to_owned(),
                "--requestheader-group-headers=X-Remote-Group".to_owned(),
                "--requestheader-extra-headers-prefix=X-Remote-Extra-".to_owned(),
                format!("--proxy-client-cert-file={}", file("aggregator.crt")),
                format!("--proxy-client-key-file={}", file("aggregator.key")),
            ],
        )?;
        let client = api::client(&pki.path("kubeconfig")).await?;
        let deadline = Instant::now() + PATIENCE;
        while !is_ready(&client).await {
            let ended = server.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                bail!("kube-apiserver is not ready: {}", tail(&state.join("kube-apiserver.log"), 5));
            }
            sleep(Duration::from_millis(100)).await;
        }
        let controllers = start(
            "kube-controller-manager",
            vec![
                format!("--kubeconfig={}", file("kubeconfig")),
                format!("--service-account-private-key-file={}", file("accounts.key")),
                format!("--root-ca-file={}", file("ca.crt")),
                format!("--controllers={CONTROLLERS}"),
                "--leader-elect=false".to_owned(),
                // 15 s by default: tests are impatient.
                "--horizontal-pod-autoscaler-sync-period=2s".to_owned(),
                "--bind-address=127.0.0.1".to_owned(),
            ],
        )?;
        Ok((Self(vec![etcd, server, controllers]), client))
    }
}

async fn is_ready(client: &Client) -> bool {
    let Ok(request) = Request::get("/readyz").body(Vec::new()) else { return false };
    client.request_text(request).await.is_ok_and(|text| text == "ok")
}
