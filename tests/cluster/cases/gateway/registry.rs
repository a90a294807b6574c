//! The filter's image in a registry that speaks TLS, with a certificate of an authority that Envoy Gateway does not know.

use std::fs;
use std::path::PathBuf;

use pd_support::places;

use crate::cluster::{Cluster, NOT_FETCHED, OURS, kubectl, until};
use crate::rollout::{only_build, rolled_out, with_build};
use crate::texts::{FILTER, IMAGE, PREFLIGHT};
use crate::traffic::Traffic;

const WITH_AUTHORITY: &str =
    "image: {url: set-by-kustomize, tls: {caCertificateRef: {kind: ConfigMap, name: test-authority}}}";

/// The policies name the authority; without it the image is refused, and no request is lost.
#[tokio::test]
async fn an_image_is_fetched_over_tls_when_the_policies_name_the_authority() {
    let (Ok(registry), Some(state)) =
        (std::env::var("PD_CLUSTER_REGISTRY_TLS"), std::env::var_os("PD_CLUSTER_STATE").map(PathBuf::from))
    else {
        eprintln!("skipped: PD_CLUSTER_REGISTRY_TLS names no registry with TLS");
        return;
    };
    let cluster = Cluster::ready().await;
    let module = fs::read(places::wasm()).expect("the module");
    let before = only_build(&cluster).await;
    let traffic = Traffic::start(cluster.address).await;
    let plain = cluster.pin(&with_build(&module, &before)).await;
    let (_, path) = plain.split_once('/').expect("a registry's name");
    cluster.pin_name(&format!("{registry}/{path}"));

    let why = cluster.apply_once().await.expect_err("refused");
    assert!(why.contains(NOT_FETCHED), "{why}");
    let why = until("the image was looked for", async || {
        let (is_accepted, why) = cluster.policy_accepted("pd-preflight").await?;
        (!is_accepted).then_some(why)
    })
    .await;
    assert!(why.contains("certificate signed by unknown authority"), "{why}");

    let authority = format!("--from-file=ca.crt={}", state.join("pki/ca.crt").display());
    kubectl(&["create", "configmap", "test-authority", "--namespace", OURS, &authority]).await.expect("created");
    for file in [FILTER, PREFLIGHT] {
        cluster.edit(file, IMAGE, WITH_AUTHORITY);
    }
    cluster.apply().await;
    let after = rolled_out(&cluster, &before).await;
    traffic.more(50).await;

    for file in [FILTER, PREFLIGHT] {
        cluster.edit(file, WITH_AUTHORITY, IMAGE);
    }
    cluster.pin(&module).await;
    cluster.apply().await;
    assert_eq!(rolled_out(&cluster, &after).await, before);
    traffic.stop_without_loss("an image over TLS").await;
    kubectl(&["delete", "configmap", "test-authority", "--namespace", OURS]).await.expect("deleted");
}
