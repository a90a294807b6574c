//! More than one Envoy.

use std::time::Duration;

use http::Request;
use pd_support::body::{CHAT, chat, words};
use pd_tests::answer::text;
use tokio::time::sleep;

use crate::cluster::{Cluster, GATEWAY, until};
use crate::traffic::Traffic;

/// A few ticks of the exchange, on a machine that is busy.
const HEARD: Duration = Duration::from_millis(500);
/// Calls of the exchange; an Envoy that is alone makes one a second, one that is not twenty.
const EXCHANGED: &str = r#"result="ok""#;

impl Cluster {
    /// Sets how many Envoys there are and waits for them.
    async fn replicas(&self, from: u32, to: u32) {
        let path = "/spec/provider/kubernetes/envoyDeployment/replicas, value: ";
        self.edit("overlays/sim/kustomization.yaml", &format!("{path}{from}"), &format!("{path}{to}"));
        self.apply().await;
        until(format!("there are {to} Envoys"), async || (self.envoys().await.len() == to as usize).then_some(()))
            .await;
        self.envoys_settled().await;
    }

    /// A request to one Envoy, by the API server; the answer's text.
    async fn ask(&self, envoy: &str, body: String) -> String {
        let path = format!("/api/v1/namespaces/{GATEWAY}/pods/{envoy}:10080/proxy{CHAT}");
        let request = Request::post(path).header("content-type", "application/json").body(body.into_bytes());
        text(self.client.request_text(request.expect("a request")).await.expect("an answer").as_bytes())
    }

    /// A metric of one Envoy, over its lines with `with`.
    async fn metric_of(&self, envoy: &str, name: &str, with: &str) -> f64 {
        let metrics = self.metrics(envoy).await;
        let lines = metrics.lines().filter(|line| line.starts_with(name) && line.contains(with));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }
}

#[tokio::test]
async fn a_second_envoy_comes_and_goes() {
    let cluster = Cluster::ready().await;
    let traffic = Traffic::start(cluster.address).await;
    cluster.replicas(1, 2).await;
    traffic.more(100).await;
    // Clients that come now are spread over both.
    let more = Traffic::start(cluster.address).await;
    for envoy in cluster.envoys().await {
        until(format!("{envoy} splits requests"), async || {
            (cluster.metric_of(&envoy, "pd_requests_total", "\"split\"").await > 0.0).then_some(())
        })
        .await;
    }
    more.stop_without_loss("a second Envoy").await;
    cluster.replicas(2, 1).await;
    traffic.more(100).await;
    traffic.stop_without_loss("a second Envoy came and went").await;
}

/// The turns of a conversation come through different Envoys and go to the server that has the earlier ones, as its own
/// counters say.
#[tokio::test]
async fn two_envoys_keep_conversations_where_their_prefixes_are() {
    const CONVERSATIONS: usize = 6;
    const TURNS: usize = 4;
    let cluster = Cluster::ready().await;
    cluster.replicas(1, 2).await;
    let envoys = cluster.envoys().await;
    for envoy in &envoys {
        let calls = async || cluster.metric_of(envoy, "pd_exchanges_total", EXCHANGED).await;
        let before = calls().await;
        until(format!("{envoy} knows of the other"), async || (calls().await >= before + 4.0).then_some(())).await;
    }
    let (mut held, mut hit) = (0, 0);
    for conversation in 0..CONVERSATIONS {
        let new = |turn: usize| words(&format!("{conversation}/{turn}/{:?}", std::time::SystemTime::now()), 4_000);
        let mut turns = vec![new(0)];
        for turn in 0..TURNS {
            let cached = async || cluster.sum("app=prefill", |stats| stats.cached_tokens).await;
            let before = cached().await;
            let texts: Vec<&str> = turns.iter().map(String::as_str).collect();
            let envoy = &envoys[(conversation + turn) % envoys.len()];
            let answer = cluster.ask(envoy, chat(&texts, r#","max_tokens":10"#)).await;
            if turn > 0 {
                // Four bytes are a token; the last block of each turn may be incomplete.
                let bytes: usize = turns[..turns.len() - 2].iter().map(String::len).sum();
                held += (bytes as u64 / 4).saturating_sub(20 * turn as u64);
                hit += cached().await - before;
            }
            turns.extend([answer, new(turn + 1)]);
            sleep(HEARD).await;
        }
    }
    eprintln!("two Envoys: {hit} of {held} tokens that were cached somewhere were found");
    assert!(hit >= held, "{hit} of {held}");
    cluster.replicas(2, 1).await;
}
