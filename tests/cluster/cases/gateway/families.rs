//! Engines at IPv6 addresses, beside others at IPv4 addresses, behind one Gateway.

use pd_support::body::words;
use pd_support::client::{Client, Http};

use crate::cluster::{Cluster, OURS, kubectl, served};
use crate::texts::{ENGINES, HEADLESS};

const REQUESTS: u64 = 10;

#[tokio::test]
async fn engines_at_ipv6_addresses_are_split_beside_others_at_ipv4_addresses() {
    let mut cluster = Cluster::new("sim").await;
    let path = cluster.manifests().join("overlays/sim/engines.yaml");
    let text = std::fs::read_to_string(&path).expect("engines.yaml");
    // llm-d's engines: their first address is of IPv6, and they listen there alone. AIBrix' stay as they are.
    let six = text
        .replace(
            "annotations: {envoy-pd/models: sim}",
            "annotations: {envoy-pd/models: sim, pd-cluster/ip-family: IPv6}",
        )
        .split("# AIBrix's labels.")
        .enumerate()
        .map(|(i, part)| if i == 0 { part.replace("'$(POD_IP):8000'", "'[$(POD_IP)]:8000'") } else { part.to_owned() })
        .collect::<Vec<_>>()
        .join("# AIBrix's labels.");
    assert_ne!(six, text);
    std::fs::write(&path, six).expect("engines.yaml");
    cluster.edit(ENGINES, HEADLESS, &format!("{HEADLESS}  ipFamilyPolicy: RequireDualStack\n"));
    cluster.up().await;
    served(cluster.address).await;

    let ip = cluster.pods(OURS, "app=decode").await[0].status.as_ref().and_then(|status| status.pod_ip.clone());
    assert!(ip.as_ref().is_some_and(|ip| ip.contains(':')), "{ip:?}");
    for (model, prefill, decode) in
        [("sim", "app=prefill", "app=decode"), ("sim-aibrix", "app=aibrix-prefill", "app=aibrix-decode")]
    {
        let counts = async || {
            let prefills = cluster.sum(prefill, |stats| stats.prefill_legs).await;
            let decodes = cluster.sum(decode, |stats| stats.decode_legs).await;
            (prefills, decodes, cluster.sum(decode, |stats| stats.local_prefills + stats.wrong_text).await)
        };
        let before = counts().await;
        let mut client = Client::connect(cluster.address, Http::One).await;
        for number in 0..REQUESTS {
            let prompt = words(&format!("{model} {number} {before:?}"), 4_000);
            let body = format!(r#"{{"model":"{model}","max_tokens":4,"prompt":"{prompt}"}}"#);
            let answer = client.post("/v1/completions", body).await;
            assert_eq!(answer.status, 200, "{model}: {}", answer.text());
        }
        let after = counts().await;
        let done = (after.0 - before.0, after.1 - before.1, after.2 - before.2);
        assert_eq!(done, (REQUESTS, REQUESTS, 0), "{model}: prefill legs, decode legs, faults");
    }
    // A Service does not lose a family again by what is applied.
    kubectl(&["delete", "service", "engines", "--namespace", OURS]).await.expect("deleted");
    Cluster::ready().await;
}
