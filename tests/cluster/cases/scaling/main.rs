//! Autoscaling of each role on a real cluster: KEDA by pd-control's external scaler and by a real Prometheus, and plain
//! HorizontalPodAutoscalers by prometheus-adapter. `make test-cluster` runs it on a cluster of its own.
//!
//! Windows and pauses of the manifests are shortened to seconds; everything else is as in the repository.

#[allow(dead_code, reason = "shared with the tests of the gateway")]
#[path = "../gateway/cluster.rs"]
mod cluster;
mod install;
mod load;
mod replicas;

use std::time::Duration;

use cluster::{Cluster, OURS, until};
use load::{ANSWERS, Load, PROMPTS, REPEATED};
use replicas::Watch;

/// A load that turns from long prompts to long answers and back. Both roles follow, each by itself.
async fn follows(cluster: &Cluster) {
    let watch = Watch::start(cluster);
    let load = Load::start(cluster.address, PROMPTS).await;
    until("prefill grows", async || (watch.now()[0] >= 3).then_some(())).await;
    assert_eq!(watch.most()[1], 1, "decode grew for prompts: {}", watch.series());
    load.turn(ANSWERS);
    until("decode grows", async || (watch.now()[1] >= 2).then_some(())).await;
    until("prefill shrinks", async || (watch.now()[0] == 1).then_some(())).await;
    load.turn(PROMPTS);
    until("prefill grows again", async || (watch.now()[0] >= 3).then_some(())).await;
    until("decode shrinks", async || (watch.now()[1] == 1).then_some(())).await;
    load.stop_without_loss().await;
    eprintln!("replicas: {}", watch.series());
    let turns = watch.turns();
    assert!(turns.iter().all(|turns| *turns <= 2), "{turns:?}: {}", watch.series());
}

#[tokio::test]
async fn keda_scales_each_role_by_pd_control() {
    let mut cluster = Cluster::new("test").await;
    install::keda(&cluster).await;
    install::ready(&mut cluster, "keda").await;
    install::has_external_metrics(&cluster).await;
    follows(&cluster).await;

    // The same prompt again and again: prefill is skipped.
    let watch = Watch::start(&cluster);
    until("prefill has shrunk", async || (watch.now() == [1, 1]).then_some(())).await;
    let watch = Watch::start(&cluster);
    let load = Load::start(cluster.address, REPEATED).await;
    until("decode grows", async || (watch.now()[1] >= 2).then_some(())).await;
    load.stop_without_loss().await;
    assert_eq!(watch.most()[0], 1, "prefill grew: {}", watch.series());
    eprintln!("replicas with one prompt: {}", watch.series());
}

#[tokio::test]
async fn keda_scales_to_zero_and_back_while_requests_wait() {
    let mut cluster = Cluster::new("test").await;
    install::keda(&cluster).await;
    cluster.edit(
        "base/filter.yaml",
        "          split: {mode: threshold, uncached_tokens: 256}",
        "          split: {mode: threshold, uncached_tokens: 256}\n          queue: {no_endpoint_ms: 120000}",
    );
    let file = "autoscaling/keda/scaledobjects.yaml";
    install::replace_all(&cluster, file, "  minReplicaCount: 1", "  minReplicaCount: 0\n  cooldownPeriod: 5");
    install::ready(&mut cluster, "keda").await;
    let watch = Watch::start(&cluster);
    // An unknown load is not a load of zero.
    let load = Load::start(cluster.address, ANSWERS).await;
    until("decode grows", async || (watch.now()[1] >= 2).then_some(())).await;
    cluster.scale(OURS, "pd-control", 0).await;
    load.stop_without_loss().await;
    cluster.settled(OURS, "pd-control").await;
    let before = watch.now();
    tokio::time::sleep(install::SETTLED).await;
    assert_eq!(watch.now(), before, "without pd-control: {}", watch.series());
    cluster.scale(OURS, "pd-control", 1).await;
    cluster.settled(OURS, "pd-control").await;
    until("both roles are at zero", async || (watch.now() == [0, 0]).then_some(())).await;
    until("all engines are gone", async || cluster.pods(OURS, "llm-d.ai/role").await.is_empty().then_some(())).await;
    let begun = std::time::Instant::now();
    let answers = load::ask_at_once(cluster.address, 5).await;
    eprintln!("5 requests waited for servers to start, {:.1} s", begun.elapsed().as_secs_f64());
    assert_eq!(answers, [200; 5]);
    assert!(begun.elapsed() > Duration::from_secs(1), "they waited");
}

#[tokio::test]
async fn keda_scales_each_role_by_a_prometheus() {
    let mut cluster = Cluster::new("test").await;
    install::keda(&cluster).await;
    install::prometheus(&cluster).await;
    install::ready(&mut cluster, "keda-prometheus").await;
    follows(&cluster).await;
}

#[tokio::test]
async fn plain_autoscalers_scale_each_role_by_an_adapter() {
    let mut cluster = Cluster::new("test").await;
    install::prometheus(&cluster).await;
    install::ready(&mut cluster, "hpa").await;
    install::adapter(&cluster).await;
    follows(&cluster).await;
}
