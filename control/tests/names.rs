//! Endpoints that the command line names.

use pd_control::sources::allow::AllowedNetworks;

use crate::support::*;

async fn start(named: &str, networks: &[&str]) -> Rig {
    let networks = networks.iter().map(|network| network.parse().unwrap()).collect();
    let named = named.split(' ').map(|text| text.parse().unwrap()).collect();
    Rig::start_without_file(|config| (config.named, config.networks) = (named, AllowedNetworks::new(networks))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_are_the_list_at_once() {
    let rig = start("127.0.0.1:1,role=prefill 127.0.0.1:2,role=decode,weight=2", &[]).await;
    assert_eq!(rig.client.get("/readyz").await.body, "ok\n");
    assert_eq!(rig.filter().await.table["127.0.0.1:2"], 2.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_resolved_within_the_allowed_networks() {
    let rig = start("localhost:1,role=both", &["127.0.0.0/8", "::1/128"]).await;
    until_true("it is resolved", || async { rig.client.get("/readyz").await.status == 200 }).await;
    assert!(rig.filter().await.table.contains_key("127.0.0.1:1"));

    let refused = start("localhost:1,role=both", &[]).await;
    until_true("it is resolved", || async { refused.client.get("/readyz").await.status == 200 }).await;
    let answer = refused.client.get("/readyz").await.body;
    assert!(answer.contains("where no engine is"), "{answer}");
    assert!(refused.filter().await.table.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_cannot_be_resolved_holds_the_list_back_and_is_said() {
    let rig = start("no-such-name.invalid:1,role=both", &[]).await;
    let is_said = || async {
        let answer = rig.client.get("/readyz").await;
        answer.status == 503 && answer.body.contains("no-such-name.invalid: ")
    };
    until_true("the reason is said", is_said).await;
}
