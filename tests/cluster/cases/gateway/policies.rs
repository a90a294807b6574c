//! Policies of Envoy Gateway for clients' requests, on the route of the filter and on its Gateway.

use pd_support::body::words;
use pd_support::client::{Answer, Client, Http};

use crate::cluster::{Cluster, GATEWAY, OURS, kubectl, served, until};
use crate::texts::{LAST, LIMIT, POLICIES};

const LIMITED: &str = "  rateLimit:
    type: Local
    local:
      rules:
      - clientSelectors: [{headers: [{name: x-limited, value: 'yes'}]}]
        limit: {requests: 1, unit: Hour}
";
const KEYS: &str = "---
apiVersion: gateway.envoyproxy.io/v1alpha1
kind: SecurityPolicy
metadata: {name: test-keys, namespace: llm}
spec:
  targetRefs:
  - {group: gateway.networking.k8s.io, kind: Gateway, name: pd}
  apiKeyAuth:
    credentialRefs: [{name: test-keys}]
    extractFrom: [{headers: [x-api-key]}]
---
apiVersion: v1
kind: Secret
metadata: {name: test-keys, namespace: llm}
stringData: {client: good}
";

async fn ask(client: &mut Client, headers: &[(&str, &[u8])]) -> Answer {
    let prompt = words(&format!("{:?}", std::time::SystemTime::now()), 4_000);
    let body = format!(r#"{{"model":"sim","max_tokens":2,"prompt":"{prompt}"}}"#);
    let request = client.json("/v1/completions", body, headers);
    client.send(request).await
}

/// Neither a missing key nor a rate limit costs a prefill, and the readiness of Envoy's pods is asked without a key.
#[tokio::test]
async fn what_is_refused_is_not_computed() {
    let cluster = Cluster::ready().await;
    cluster.edit(POLICIES, LIMIT, &format!("{LIMITED}{LIMIT}"));
    cluster.edit(POLICIES, LAST, &format!("{LAST}{KEYS}"));
    cluster.apply().await;
    let mut client = Client::connect(cluster.address, Http::One).await;
    until("a key is asked for", async || (ask(&mut client, &[]).await.status == 401).then_some(())).await;
    let key: (&str, &[u8]) = ("x-api-key", b"good");
    until("the limit is in force", async || {
        let limited = ask(&mut client, &[key, ("x-limited", b"yes")]).await;
        (limited.status == 429).then_some(())
    })
    .await;

    let legs = async || cluster.sum("app=prefill", |stats| stats.prefill_legs).await;
    let before = legs().await;
    for _ in 0..5 {
        assert_eq!(ask(&mut client, &[]).await.status, 401);
        assert_eq!(ask(&mut client, &[("x-api-key", b"bad")]).await.status, 401);
        assert_eq!(ask(&mut client, &[key, ("x-limited", b"yes")]).await.status, 429);
    }
    assert_eq!(legs().await, before, "nothing was computed");
    assert_eq!(ask(&mut client, &[key]).await.status, 200);
    assert_eq!(legs().await, before + 1, "what is let through is split");

    let old = cluster.envoys().await;
    for envoy in &old {
        cluster.kill(GATEWAY, envoy).await;
    }
    cluster.envoys_settled().await;
    assert!(cluster.envoys().await.iter().all(|envoy| !old.contains(envoy)), "new ones are ready");

    cluster.edit(POLICIES, KEYS, "");
    cluster.edit(POLICIES, LIMITED, "");
    cluster.apply().await;
    for kind in ["securitypolicy", "secret"] {
        kubectl(&["delete", kind, "test-keys", "--namespace", OURS]).await.expect("deleted");
    }
    served(cluster.address).await;
}

/// Coding agents name their session in such headers.
#[tokio::test]
async fn headers_with_underscores_pass() {
    let cluster = Cluster::ready().await;
    let mut client = Client::connect(cluster.address, Http::One).await;
    assert_eq!(ask(&mut client, &[("session_id", b"a")]).await.status, 200);
}
