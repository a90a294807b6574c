//! Rate limits by tokens and traces through a real Envoy Gateway, with its rate limit service, a Redis and an OpenTelemetry
//! Collector. `make test-cluster` runs it on a cluster of its own.

#[allow(dead_code, reason = "shared with the tests of the gateway")]
#[path = "../gateway/cluster.rs"]
mod cluster;
mod install;

use std::fs;
use std::path::PathBuf;
use std::time::SystemTime;

use cluster::{Cluster, OURS, until};
use http::Request;
use pd_support::body::words;
use pd_support::client::{Answer, Client, Http};
use pd_support::spans::{self, Span};
use serde_json::Value;

/// A new prompt of about 2,000 tokens, as a stream or not.
async fn ask(client: &mut Client, model: &str, is_stream: bool, headers: &[(&str, &str)]) -> Answer {
    let prompt = words(&format!("{:?}", SystemTime::now()), 8_000);
    let stream = if is_stream { r#","stream":true,"stream_options":{"include_usage":true}"# } else { "" };
    let body = format!(r#"{{"model":"{model}","max_tokens":8,"ignore_eos":true{stream},"prompt":"{prompt}"}}"#);
    let mut all = vec![("x-gateway-model-name", model.as_bytes())];
    all.extend(headers.iter().map(|(name, value)| (*name, value.as_bytes())));
    client.send(client.json("/v1/completions", body, &all)).await
}

/// The answer's tokens, of JSON or of the stream's event with the usage.
fn total_tokens(answer: &Answer) -> u64 {
    let text = answer.text();
    let events = text.lines().map(|line| line.strip_prefix("data: ").unwrap_or(line));
    let usage = events.filter_map(|event| serde_json::from_str::<Value>(event).ok());
    let mut tokens = usage.filter_map(|value| value["usage"]["total_tokens"].as_u64());
    tokens.next_back().unwrap_or_else(|| panic!("no usage: {text}"))
}

#[tokio::test]
async fn a_tenant_whose_tokens_are_spent_gets_429() {
    let cluster = install::ready().await;
    let mut client = Client::connect(cluster.address, Http::One).await;
    let (greedy, modest) = ([("x-tenant", "greedy")], [("x-tenant", "modest")]);
    let (mut spent, mut most) = (0, 0);
    // The cost of an answer reaches the service after the answer, so requests may pass that come before it.
    until("the tokens are spent", async || {
        for is_stream in [false, true] {
            let answer = ask(&mut client, "sim", is_stream, &greedy).await;
            if answer.status == 429 {
                return Some(());
            }
            assert_eq!(answer.status, 200, "{}", answer.text());
            let tokens = total_tokens(&answer);
            spent += tokens;
            most = tokens.max(most);
        }
        assert!(spent < 5 * install::LIMIT, "{spent} tokens were let through");
        None
    })
    .await;
    eprintln!("429 after {spent} tokens of {}, {most} in one request at most", install::LIMIT);
    assert!(spent >= install::LIMIT, "{spent}");

    let legs = async || cluster.sum("app=prefill", |stats| stats.prefill_legs).await;
    let before = legs().await;
    for _ in 0..3 {
        assert_eq!(ask(&mut client, "sim", false, &greedy).await.status, 429);
    }
    assert_eq!(legs().await, before, "nothing is computed for what is refused");
    assert_eq!(ask(&mut client, "sim", false, &modest).await.status, 200, "another tenant");
    assert_eq!(ask(&mut client, "sim-aibrix", false, &greedy).await.status, 200, "another model");
}

/// The last requests that engines with a label got.
async fn requests(cluster: &Cluster, label: &str) -> String {
    let mut all = String::new();
    for pod in cluster.pod_names(OURS, label).await {
        let path = format!("/api/v1/namespaces/{OURS}/pods/{pod}:8000/proxy/requests");
        let request = Request::get(path).body(Vec::new()).expect("a request");
        all += &cluster.client.request::<Value>(request).await.expect("requests").to_string();
    }
    all
}

/// The spans of a trace that the collector has.
async fn spans_of(cluster: &Cluster, trace: &str) -> Vec<Span> {
    let state = PathBuf::from(std::env::var_os("PD_CLUSTER_STATE").expect("PD_CLUSTER_STATE"));
    let mut all = Vec::new();
    for pod in cluster.pod_names("monitoring", "app=collector").await {
        let log = fs::read_to_string(state.join(format!("{pod}.collector.log"))).unwrap_or_default();
        all.extend(spans::parse(&log).into_iter().filter(|span| span.trace == trace));
    }
    all
}

#[tokio::test]
async fn a_request_is_one_trace_with_both_legs() {
    let cluster = install::ready().await;
    let mut client = Client::connect(cluster.address, Http::One).await;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a time").as_nanos();
    let (trace, parent) = (format!("{now:032x}"), "b7ad6b7169203331");
    let traceparent = format!("00-{trace}-{parent}-01");
    let answer = ask(&mut client, "sim", false, &[("x-tenant", "traced"), ("traceparent", traceparent.as_str())]).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    // The checks of the rate limit are spans, too, without what the filter decided.
    let (gateway, decode) = until("both spans of Envoy", async || {
        let spans = spans_of(&cluster, &trace).await;
        let find = |parent: &str| {
            spans.iter().find(|span| span.parent == parent && !span.attribute("pd.decision").is_empty()).cloned()
        };
        let gateway = find(parent)?;
        find(&gateway.id).map(|decode| (gateway, decode))
    })
    .await;
    for (role, span) in [("prefill", &gateway), ("decode", &decode)] {
        let got = requests(&cluster, &format!("app={role}")).await;
        assert!(got.contains(&format!("00-{trace}-{}-01", span.id)), "the parent of {role}: {span:#?} {got}");
    }
    assert_eq!(gateway.attribute("pd.decision"), "split", "{gateway:#?}");
    assert_eq!(gateway.attribute("gen_ai.operation.name"), "text_completion", "{gateway:#?}");
    assert_eq!(gateway.attribute("gen_ai.response.model"), "sim", "{gateway:#?}");
    let [input, output] =
        ["input", "output"].map(|kind| gateway.attribute(&format!("gen_ai.usage.{kind}_tokens")).to_owned());
    let total: u64 = [&input, &output].iter().map(|tokens| tokens.parse::<u64>().unwrap_or(0)).sum();
    assert_eq!(total, total_tokens(&answer), "{gateway:#?}");
    let server = format!("{}:{}", decode.attribute("server.address"), decode.attribute("server.port"));
    assert_eq!(server, decode.attribute("pd.decode"), "{decode:#?}");
}
