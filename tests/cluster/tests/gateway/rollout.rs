//! New configurations and new versions of the filter, good and bad, with traffic flowing.

use std::fs;

use pd_tests::places;

use crate::cluster::{Cluster, served, until};
use crate::traffic::Traffic;

/// File and place of the plugin configuration that the tests change.
const FILTER: &str = "base/filter.yaml";
const SPLIT: &str = "split: {mode: threshold, uncached_tokens: 256}";
/// Labels of `pd_configs_total`.
const REFUSED: &str = r#"result="refused""#;
const ACCEPTED: &str = r#"result="accepted""#;

#[tokio::test]
async fn a_new_configuration_takes_effect() {
    let cluster = Cluster::ready().await;
    let traffic = Traffic::start(cluster.address).await;
    cluster.edit(FILTER, SPLIT, "split: {mode: never}");
    cluster.apply().await;
    until("nothing is split", async || {
        let before = cluster.sum("app=prefill", |stats| stats.requests).await;
        traffic.more(40).await;
        (cluster.sum("app=prefill", |stats| stats.requests).await == before).then_some(())
    })
    .await;
    cluster.edit(FILTER, "split: {mode: never}", SPLIT);
    cluster.apply().await;
    let before = cluster.sum("app=prefill", |stats| stats.prefill_legs).await;
    until("requests are split", async || {
        (cluster.sum("app=prefill", |stats| stats.prefill_legs).await > before).then_some(())
    })
    .await;
    traffic.stop_without_loss("two new configurations").await;
}

#[tokio::test]
async fn a_bad_configuration_leaves_the_last_good_one_in_force() {
    let cluster = Cluster::ready().await;
    let traffic = Traffic::start(cluster.address).await;
    cluster.edit(FILTER, SPLIT, "split: {mode: threshold, uncached_tokns: 256}");
    cluster.apply().await;
    until("a configuration is refused", async || {
        (cluster.metric("pd_configs_total", REFUSED).await > 0.0).then_some(())
    })
    .await;
    let before = cluster.sum("app=prefill", |stats| stats.prefill_legs).await;
    traffic.more(100).await;
    assert!(cluster.sum("app=prefill", |stats| stats.prefill_legs).await > before, "split as before");
    traffic.stop_without_loss("a bad configuration").await;
}

#[tokio::test]
async fn a_new_version_rolls_out_and_back() {
    let cluster = Cluster::ready().await;
    let old = fs::read(places::wasm()).expect("the module");
    let before = only_build(&cluster).await;
    let traffic = Traffic::start(cluster.address).await;

    let new = with_build(&old, &before);
    let image = cluster.pin(&new).await;
    cluster.apply().await;
    let after = rolled_out(&cluster, &before).await;
    assert_ne!(after, before, "{image}");
    traffic.more(50).await;

    cluster.pin(&old).await;
    cluster.apply().await;
    assert_eq!(rolled_out(&cluster, &after).await, before);
    traffic.more(50).await;
    traffic.stop_without_loss("a new version and back").await;
}

/// Old code refuses the configuration and keeps its last good one until the new code's pods are there.
#[tokio::test]
async fn a_new_version_comes_with_a_configuration_that_the_old_one_does_not_know() {
    let cluster = Cluster::ready().await;
    let old = fs::read(places::wasm()).expect("the module");
    let before = only_build(&cluster).await;
    let traffic = Traffic::start(cluster.address).await;

    // As if this version had another name for a key.
    let new = replaced(&with_build(&old, &before), "rendezvous_share", "rendezvous_parts");
    cluster.pin(&new).await;
    cluster.edit(FILTER, "rendezvous_share", "rendezvous_parts");
    cluster.apply().await;
    let after = rolled_out(&cluster, &before).await;
    assert_eq!(cluster.metric("pd_configs_total", REFUSED).await, 0.0, "the new code knows the key");
    assert!(cluster.metric("pd_configs_total", ACCEPTED).await > 0.0);
    traffic.more(50).await;

    cluster.pin(&old).await;
    cluster.edit(FILTER, "rendezvous_parts", "rendezvous_share");
    cluster.apply().await;
    assert_eq!(rolled_out(&cluster, &after).await, before);
    traffic.more(50).await;
    traffic.stop_without_loss("a new version with its configuration, and back").await;
}

/// Envoy Gateway answers 500 on routes whose policy names an image that it cannot fetch. So an image is checked before it
/// is applied; where that was left out, the policy's status names the image, and the good one brings everything back.
#[tokio::test]
async fn an_image_that_does_not_exist_is_stopped_by_the_check_and_told_by_the_status() {
    let cluster = Cluster::ready().await;
    let good = cluster.pin(&fs::read(places::wasm()).expect("the module")).await;
    cluster.check_image().await.expect("the good image");
    let digest = "1".repeat(64);
    let (name, _) = good.split_once('@').expect("by digest");
    cluster.pin_name(&format!("{name}@sha256:{digest}"));
    assert!(cluster.check_image().await.is_err());

    cluster.apply().await;
    let why = until("the policy is refused", async || {
        cluster.policy_accepted().await.filter(|(is_accepted, _)| !is_accepted).map(|(_, why)| why)
    })
    .await;
    assert!(why.contains(&digest) || why.contains("manifest"), "{why}");

    cluster.pin_name(&good);
    cluster.apply().await;
    until("the policy is accepted", async || cluster.policy_accepted().await.filter(|(is_accepted, _)| *is_accepted))
        .await;
    cluster.envoys_settled().await;
    served(cluster.address).await;
    Traffic::start(cluster.address).await.stop_without_loss("after an image that does not exist").await;
}

/// The build that all workers of all Envoys run.
async fn only_build(cluster: &Cluster) -> String {
    until("all Envoys run one build", async || {
        let mut builds = Vec::new();
        for envoy in cluster.envoys().await {
            let metrics = cluster.metrics(&envoy).await;
            let seen = metrics.lines().filter(|line| line.starts_with("pd_build_seen_seconds"));
            builds.extend(seen.filter_map(|line| Some(line.split_once("build=\"")?.1.split_once('"')?.0.to_owned())));
        }
        builds.sort();
        builds.dedup();
        (builds.len() == 1).then(|| builds.remove(0))
    })
    .await
}

/// Waits until Envoy's pods are new ones that run another build than `before`, and returns it.
async fn rolled_out(cluster: &Cluster, before: &str) -> String {
    until("another build runs", async || {
        cluster.envoys_settled().await;
        Some(only_build(cluster).await).filter(|build| build != before)
    })
    .await
}

/// The same module with another build in it: its name in the metric and the log, and so its digest.
fn with_build(module: &[u8], build: &str) -> Vec<u8> {
    let other: String = build.chars().rev().collect();
    assert_ne!(other, build);
    replaced(module, build, &other)
}

/// The same module with another text of the same length in its data.
fn replaced(module: &[u8], from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut new = module.to_vec();
    let mut count = 0;
    for at in 0..new.len().saturating_sub(from.len()) {
        if new[at..].starts_with(from.as_bytes()) {
            new[at..at + from.len()].copy_from_slice(to.as_bytes());
            count += 1;
        }
    }
    assert!(count > 0, "{from} in the module");
    new
}
