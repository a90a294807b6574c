//! The API server and pd-control die and come back while requests flow through a real Envoy. Where `PD_KUBE_BIN` names a
//! folder with the API server; `tests/envoy/cases/chaos.rs` does the same to pd-control alone.

use std::path::Path;
use std::time::Duration;

use kube::Client;
use pd_sim::Handle;
use pd_support::places;
use pd_support::process::Process;
use pd_tests::rig::Rig;
use pd_tests::traffic::Traffic;
use serde_json::json;

use crate::cluster::{ADMIN_TOKEN, Cluster, cluster, create, set_status};
use crate::kubernetes::pod;

/// How soon requests go by the cluster again once everything is back: watches are tried again every five seconds at the
/// latest, the filter polls every second.
const SOON: Duration = Duration::from_secs(10);

async fn create_engine(admin: &Client, name: &str, role: &str, engine: &Handle) {
    let mut object = pod(role, "127.0.0.1");
    object["metadata"]["name"] = name.into();
    object["metadata"]["annotations"] = json!({"envoy-pd/port": engine.addr().port().to_string()});
    let status = object["status"].take();
    create::<k8s_openapi::api::core::v1::Pod>(admin, object).await;
    set_status(admin, name, &json!({"status": status})).await;
}

/// Makes one decode pod unready and the other one ready, in the order that leaves one ready at any time.
async fn only_without(cluster: &Cluster, out: usize) {
    let admin = cluster.client(ADMIN_TOKEN).await;
    for (i, ready) in [(1 - out, "True"), (out, "False")] {
        let status = json!({"status": {"conditions": [{"type": "Ready", "status": ready}]}});
        set_status(&admin, &format!("decode-{i}"), &status).await;
    }
}

/// A pd-control that follows the cluster, in the place of the rig's own.
fn start(rig: &Rig, kubeconfig: &Path, directory: &Path) -> Process {
    let arguments = [
        format!("KUBECONFIG={}", kubeconfig.display()),
        places::control().display().to_string(),
        "--kubernetes".into(),
        "--namespace=inference".into(),
        "--allowed-cidr=127.0.0.0/8".into(),
        format!("--listen={}", rig.control_address()),
    ];
    Process::start("pd-control", directory, Path::new("/usr/bin/env"), &arguments)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_server_and_pd_control_die_under_load() {
    let Some(mut cluster) = cluster().await else { return };
    let admin = cluster.client(ADMIN_TOKEN).await;
    let token = cluster.token(&admin).await;
    let mut rig = Rig::start().await;
    for (role, engines) in [("prefill", &rig.prefill), ("decode", &rig.decode)] {
        for (i, engine) in engines.iter().enumerate() {
            create_engine(&admin, &format!("{role}-{i}"), role, engine).await;
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let kubeconfig = directory.path().join("kubeconfig");
    std::fs::write(&kubeconfig, cluster.kubeconfig(&token).to_string()).unwrap();
    rig.kill_control();
    let traffic = Traffic::start(rig.address(), 4);
    let mut control = start(&rig, &kubeconfig, directory.path());
    let mut longest = Duration::ZERO;
    for round in 0..5 {
        let out = round % 2;
        match round {
            0 => only_without(&cluster, out).await,
            1 => {
                drop(control);
                only_without(&cluster, out).await;
                traffic.more(40).await;
                control = start(&rig, &kubeconfig, directory.path());
            }
            2 => {
                control.signal("STOP");
                only_without(&cluster, out).await;
                traffic.more(100).await;
                control.signal("CONT");
            }
            3 => {
                cluster.stop_api_server();
                traffic.more(100).await;
                cluster.start_api_server().await;
                only_without(&cluster, out).await;
            }
            // Both: the new pd-control has no list, and the filters go on with theirs.
            _ => {
                cluster.stop_api_server();
                drop(control);
                control = start(&rig, &kubeconfig, directory.path());
                traffic.more(100).await;
                cluster.start_api_server().await;
                only_without(&cluster, out).await;
            }
        }
        let took = traffic.until_spared(&rig.decode[out]).await;
        println!("round {round}: current again after {took:?}");
        longest = longest.max(took);
    }
    let answered = traffic.stop().await;
    println!("{answered} requests, none failed; the list was current again within {longest:?}");
    assert!(longest < SOON, "{longest:?}: {}", control.log_tail(20));
}
