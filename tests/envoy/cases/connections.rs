//! Connections between Envoy and the engines, and what passes through them.

use std::time::Duration;

use pd_support::body::CHAT;
use pd_support::client::{BOTH, Http};
use pd_tests::builder::Builder;
use pd_tests::rig::{Rig, run};
use serde_json::{Value, json};

use crate::support::{ask, logged_chat, only, short_chat, sum};

const OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
/// Connections that Envoy closed because they were idle.
const CLOSED: &str = "envoy_cluster_upstream_cx_idle_timeout{envoy_cluster_name=\"engines\"}";

/// One decode engine that closes idle connections, and Envoy's own limit; `null`: none.
fn rig(keep_alive: Duration, idle_timeout: Value) -> Builder {
    let builder = Rig::builder().engines(1, 1).every_engine(move |config| config.keep_alive = Some(keep_alive));
    builder.envoy(move |config| {
        let options = &mut config.cluster("engines")["typed_extension_protocol_options"][OPTIONS];
        options["common_http_protocol_options"]["idle_timeout"] = idle_timeout;
    })
}

/// uvicorn closes them after 5 s.
/// llm-d/llm-d-benchmark#1675, ray-project/ray#54127: the client must close first.
#[test]
fn envoy_closes_an_idle_connection_before_an_engine_does() {
    run(async {
        let rig = Rig::builder().engines(1, 1).every_engine(|config| config.keep_alive = Some(Duration::from_secs(5)));
        let rig = rig.start().await;
        let mut client = rig.client(Http::One).await;
        for turn in 1..=2 {
            ask(&mut client, &short_chat()).await;
            rig.until_metric(CLOSED, |value| value >= f64::from(turn)).await;
            assert_eq!(sum(rig.engines(), |stats| stats.idle_closed), 0);
        }
    });
}

#[test]
fn a_request_that_meets_the_close_of_its_connection_is_lost() {
    run(async {
        let rig = rig(Duration::from_millis(200), Value::Null).start().await;
        let mut client = rig.client(Http::One).await;
        ask(&mut client, &short_chat()).await;
        rig.decode[0].wait_for(|stats| stats.idle_closed == 1).await;
        assert_eq!(client.post(CHAT, short_chat()).await.status, 503);
    });
}

#[test]
fn with_a_shorter_limit_of_envoys_none_is() {
    run(async {
        let rig = rig(Duration::from_secs(2), json!("0.1s")).start().await;
        let mut client = rig.client(Http::One).await;
        for turn in 1..=5 {
            ask(&mut client, &short_chat()).await;
            rig.until_metric(CLOSED, |value| value >= f64::from(turn)).await;
        }
        assert_eq!(sum(rig.engines(), |stats| stats.idle_closed), 0);
    });
}

#[test]
fn the_access_log_names_the_cluster_and_the_destination() {
    run(async {
        let rig = Rig::start().await;
        let mut client = rig.client(Http::One).await;
        let (request, path) = logged_chat(&client, &short_chat(), &[]);
        assert_eq!(client.send(request).await.status, 200);
        let entry = rig.access_log_of(&path).await;
        assert_eq!(entry["cluster"], "engines");
        let destination = entry["destination"].as_str().expect("a destination");
        assert_eq!(destination.split(',').next(), entry["upstream"].as_str(), "{entry}");
    });
}

/// Coding agents name their session so.
#[test]
fn headers_with_underscores_reach_the_engine() {
    run(async {
        let rig = Rig::start().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            let request = client.json(CHAT, short_chat(), &[("session_id", b"a-b"), ("x_other", b"1")]);
            assert_eq!(client.send(request).await.status, 200);
            let got = only(&rig.decode);
            assert_eq!(got.header("session_id"), Some("a-b"));
            assert_eq!(got.header("x_other"), Some("1"));
            rig.decode.iter().for_each(pd_sim::Handle::clear_requests);
        }
    });
}
