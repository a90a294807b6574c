//! New configurations and new versions of the filter, good and bad, with traffic flowing.

use std::fs;

use pd_support::places;

use crate::cluster::{Cluster, GATEWAY, NOT_FETCHED, OURS, until};
use crate::texts::{FILTER, PD_CONTROL, REPLICAS, SPLIT};
use crate::traffic::Traffic;

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
    let first = fs::read(places::wasm()).expect("the module");
    let before = only_build(&cluster).await;
    let traffic = Traffic::start(cluster.address).await;
    // Pods whose configuration has changed since they started put new code in force at once. These have not.
    let old = with_build(&first, &before);
    cluster.pin(&old).await;
    cluster.apply().await;
    let running = rolled_out(&cluster, &before).await;

    // As if this version had another name for a key.
    let new = replaced(&with_build(&old, &running), "rendezvous_share", "rendezvous_parts");
    let unknown = format!("rendezvous_parts: 0.5\n          {SPLIT}");
    cluster.pin(&new).await;
    cluster.edit(FILTER, SPLIT, &unknown);
    cluster.apply().await;
    until("the old code refuses it", async || (cluster.metric("pd_configs_total", REFUSED).await > 0.0).then_some(()))
        .await;
    let after = rolled_out(&cluster, &running).await;
    assert_eq!(cluster.metric("pd_configs_total", REFUSED).await, 0.0, "the new code knows the key");
    assert!(cluster.metric("pd_configs_total", ACCEPTED).await > 0.0);
    traffic.more(50).await;

    cluster.pin(&old).await;
    cluster.edit(FILTER, &unknown, SPLIT);
    cluster.apply().await;
    assert_eq!(rolled_out(&cluster, &after).await, running);
    traffic.more(50).await;
    traffic.stop_without_loss("a new version with its configuration, and back").await;
    cluster.pin(&first).await;
    cluster.apply().await;
    assert_eq!(rolled_out(&cluster, &running).await, before);
}

/// Envoy Gateway would answer 500 on routes whose policy names such an image, so the API server does not let it.
#[tokio::test]
async fn an_image_that_cannot_be_fetched_reaches_no_request() {
    let cluster = Cluster::ready().await;
    let good = cluster.pin(&fs::read(places::wasm()).expect("the module")).await;
    cluster.check_image().await.expect("the good image");
    let envoys = cluster.envoys().await;
    let traffic = Traffic::start(cluster.address).await;
    let (name, _) = good.split_once('@').expect("by digest");
    let digest = "1".repeat(64);
    // A digest that the registry does not have, and a registry that is not there.
    for bad in [format!("{name}@sha256:{digest}"), format!("127.0.0.1:1/pd-filter@sha256:{digest}")] {
        cluster.pin_name(&bad);
        assert!(cluster.check_image().await.is_err(), "the check finds it before it is applied");
        let why = cluster.apply_once().await.expect_err("refused");
        assert!(why.contains(NOT_FETCHED) && why.contains(&bad), "{why}");
        let why = until("the image was looked for", async || {
            let (is_accepted, why) = cluster.policy_accepted("pd-preflight").await?;
            (!is_accepted).then_some(why)
        })
        .await;
        assert!(why.contains("could not fetch Wasm OCI image"), "{why}");
        let why = cluster.apply_once().await.expect_err("refused still");
        assert!(why.contains(NOT_FETCHED), "{why}");
        let (is_accepted, why) = cluster.policy_accepted("pd").await.expect("a status");
        assert!(is_accepted, "{why}");
        traffic.more(200).await;
    }
    cluster.pin_name(&good);
    cluster.apply().await;
    traffic.more(100).await;
    assert_eq!(cluster.envoys().await, envoys, "Envoy's pods are those of before");
    traffic.stop_without_loss("images that cannot be fetched").await;
}

/// Envoy Gateway takes everything that begins as a module does. New pods of Envoy with such a filter do not become ready, so
/// the old ones stay. (Those here are new, too: a pod whose configuration has changed since it started puts new code in force
/// at once, so the tools that make and check images refuse such modules.)
#[tokio::test]
async fn a_module_that_does_not_start_replaces_no_envoy() {
    let cluster = Cluster::ready().await;
    let old = fs::read(places::wasm()).expect("the module");
    let before = only_build(&cluster).await;
    let traffic = Traffic::start(cluster.address).await;
    let good = with_build(&old, &before);
    cluster.pin(&good).await;
    cluster.apply().await;
    let after = rolled_out(&cluster, &before).await;
    let envoys = cluster.envoys().await;
    cluster.pin(b"\0asm\x01\0\0\0").await;
    cluster.apply().await;
    let new = until("a new Envoy has started", async || {
        let new = cluster.envoys().await.into_iter().find(|envoy| !envoys.contains(envoy))?;
        cluster.metrics(&new).await.contains("envoy_listener_manager_total_listeners_active").then_some(new)
    })
    .await;
    traffic.more(1_000).await;
    assert!(!cluster.is_ready(GATEWAY, &new).await, "{new}");
    for envoy in &envoys {
        assert!(cluster.is_ready(GATEWAY, envoy).await, "{envoy}");
    }

    cluster.pin(&good).await;
    cluster.apply().await;
    cluster.envoys_settled().await;
    assert_eq!(only_build(&cluster).await, after);
    traffic.more(50).await;
    traffic.stop_without_loss("a module that does not start").await;
    cluster.pin(&old).await;
    cluster.apply().await;
    assert_eq!(rolled_out(&cluster, &after).await, before);
}

/// A new Envoy is ready when it has a list of endpoints. Without pd-control it gets none, so it replaces no Envoy.
#[tokio::test]
async fn without_pd_control_no_envoy_is_replaced() {
    let cluster = Cluster::ready().await;
    let old = fs::read(places::wasm()).expect("the module");
    let before = only_build(&cluster).await;
    let envoys = cluster.envoys().await;
    let traffic = Traffic::start(cluster.address).await;
    cluster.scale(OURS, "pd-control", 0).await;
    cluster.settled(OURS, "pd-control").await;
    cluster.edit(PD_CONTROL, REPLICAS, "replicas: 0");
    cluster.pin(&with_build(&old, &before)).await;
    cluster.apply().await;
    let new = until("a new Envoy runs the filter", async || {
        let new = cluster.envoys().await.into_iter().find(|envoy| !envoys.contains(envoy))?;
        cluster.metrics(&new).await.contains("pd_build_seen_seconds").then_some(new)
    })
    .await;
    traffic.more(500).await;
    assert!(!cluster.is_ready(GATEWAY, &new).await, "{new}");

    cluster.edit(PD_CONTROL, "replicas: 0", REPLICAS);
    cluster.apply().await;
    let after = rolled_out(&cluster, &before).await;
    cluster.pin(&old).await;
    cluster.apply().await;
    assert_eq!(rolled_out(&cluster, &after).await, before);
    traffic.stop_without_loss("a new version while pd-control is away").await;
}

/// The build that all workers of all Envoys run.
pub async fn only_build(cluster: &Cluster) -> String {
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
pub async fn rolled_out(cluster: &Cluster, before: &str) -> String {
    until("another build runs", async || {
        cluster.envoys_settled().await;
        Some(only_build(cluster).await).filter(|build| build != before)
    })
    .await
}

/// The same module with another build in it: its name in the metric and the log, and so its digest.
pub fn with_build(module: &[u8], build: &str) -> Vec<u8> {
    let other: String = build.chars().rev().collect();
    assert_ne!(other, build);
    replaced(module, build, &other)
}

/// The same module with another text of the same length in its data.
fn replaced(module: &[u8], from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut new = module.to_vec();
    let mut count = 0;
    for index in 0..new.len().saturating_sub(from.len()) {
        if new[index..].starts_with(from.as_bytes()) {
            new[index..index + from.len()].copy_from_slice(to.as_bytes());
            count += 1;
        }
    }
    assert!(count > 0, "{from} in the module");
    new
}
