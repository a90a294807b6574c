//! What happens to a running system, with traffic flowing.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::cluster::{Cluster, GATEWAY, OURS, until};
use crate::traffic::{CLIENTS, Traffic};

#[tokio::test]
async fn pools_grow_and_shrink() {
    let cluster = Cluster::ready().await;
    let traffic = Traffic::start(cluster.address).await;
    for name in ["decode", "prefill"] {
        let label = format!("app={name}");
        let old: BTreeSet<_> = cluster.pod_names(OURS, &label).await.into_iter().collect();
        cluster.scale(OURS, name, 4).await;
        cluster.settled(OURS, name).await;
        let ready = Instant::now();
        let new: Vec<_> = cluster.pod_names(OURS, &label).await.into_iter().filter(|pod| !old.contains(pod)).collect();
        assert_eq!(new.len(), 2);
        for pod in &new {
            until(format!("{pod} works"), async || (cluster.stats(pod).await.requests > 0).then_some(())).await;
        }
        let took = ready.elapsed();
        assert!(took < Duration::from_secs(1), "new {name} pods took work after {took:?}");
        cluster.scale(OURS, name, 2).await;
        cluster.settled(OURS, name).await;
        traffic.more(50).await;
    }
    traffic.stop_without_loss("pools grow and shrink").await;
}

/// KV caches that no decode engine has fetched yet are gone with it, and vLLM answers 500 for those (unless its
/// `kv_load_failure_policy` is `recompute`). Everything else is computed elsewhere.
#[tokio::test]
async fn a_killed_prefill_engine_costs_what_lies_between_the_legs() {
    let cluster = Cluster::ready().await;
    let traffic = Traffic::start(cluster.address).await;
    let pod = &cluster.pod_names(OURS, "app=prefill").await[0];
    cluster.kill(OURS, pod).await;
    traffic.more(100).await;
    cluster.settled(OURS, "prefill").await;
    traffic.more(100).await;
    let (served, lost) = traffic.stop().await;
    eprintln!("a prefill engine killed: {served} requests, {} lost", lost.len());
    assert!(lost.len() <= CLIENTS && lost.iter().all(|why| why.contains("KV transfer failed")), "{lost:#?}");
}

/// What it has under way is gone with it: a stream that has begun cannot begin again elsewhere.
#[tokio::test]
async fn a_killed_decode_engine_costs_what_it_had_under_way() {
    let cluster = Cluster::ready().await;
    let traffic = Traffic::start(cluster.address).await;
    let pod = &cluster.pod_names(OURS, "app=decode").await[0];
    cluster.kill(OURS, pod).await;
    traffic.more(100).await;
    cluster.settled(OURS, "decode").await;
    traffic.more(100).await;
    let (served, lost) = traffic.stop().await;
    eprintln!("a decode engine killed: {served} requests, {} lost", lost.len());
    assert!(lost.len() <= CLIENTS, "{lost:#?}");
}

#[tokio::test]
async fn without_pd_control_the_last_list_serves() {
    let cluster = Cluster::ready().await;
    let traffic = Traffic::start(cluster.address).await;
    cluster.scale(OURS, "pd-control", 0).await;
    cluster.settled(OURS, "pd-control").await;
    traffic.more(200).await;
    cluster.scale(OURS, "pd-control", 1).await;
    cluster.settled(OURS, "pd-control").await;
    // It is followed again.
    cluster.scale(OURS, "decode", 3).await;
    cluster.settled(OURS, "decode").await;
    for pod in cluster.pod_names(OURS, "app=decode").await {
        let before = cluster.stats(&pod).await.requests;
        until(format!("{pod} works"), async || (cluster.stats(&pod).await.requests > before).then_some(())).await;
    }
    traffic.more(50).await;
    traffic.stop_without_loss("pd-control away").await;
}

#[tokio::test]
async fn without_envoy_gateway_requests_are_served() {
    let cluster = Cluster::ready().await;
    let traffic = Traffic::start(cluster.address).await;
    for pod in cluster.pod_names(GATEWAY, "control-plane=envoy-gateway").await {
        cluster.kill(GATEWAY, &pod).await;
    }
    traffic.more(200).await;
    cluster.settled(GATEWAY, "envoy-gateway").await;
    cluster.scale(OURS, "decode", 3).await;
    cluster.settled(OURS, "decode").await;
    for pod in cluster.pod_names(OURS, "app=decode").await {
        let before = cluster.stats(&pod).await.requests;
        until(format!("{pod} works"), async || (cluster.stats(&pod).await.requests > before).then_some(())).await;
    }
    traffic.stop_without_loss("Envoy Gateway killed").await;
}
