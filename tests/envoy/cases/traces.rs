//! Traces: Envoy's spans and the engines' parents, as a real OpenTelemetry Collector gets them.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use pd_sim::Handle;
use pd_support::body::CHAT;
use pd_support::client::Http;
use pd_support::config::{Config, block_of_document};
use pd_support::places;
use pd_support::port::Port;
use pd_support::process::Process;
use pd_support::spans::{self, Span};
use pd_tests::rig::{Rig, run};
use serde_json::{Value, json};

use crate::support::{long_chat, only};

/// How long a span may take to the collector: Envoy sends them every five seconds.
const PATIENCE: Duration = Duration::from_secs(30);
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CLIENT: &str = "b7ad6b7169203331";

fn start_collector(program: &Path, directory: &Path, address: SocketAddr) -> Process {
    let file = directory.join("collector.yaml");
    let config = json!({
        "receivers": {"otlp": {"protocols": {"grpc": {"endpoint": address.to_string()}}}},
        "exporters": {"debug": {"verbosity": "detailed"}},
        "service": {
            "telemetry": {"metrics": {"level": "none"}},
            "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["debug"]}},
        },
    });
    std::fs::write(&file, config.to_string()).expect("written");
    Process::start("collector", directory, program, &[format!("--config=file:{}", file.display())])
}

/// Adds what `docs/observability.md` tells users to add.
fn trace(config: &mut Config, collector: SocketAddr) {
    let block = |first_line: &str| block_of_document("observability.md", first_line);
    let manager = block("# In the HTTP connection manager:");
    config.http()["tracing"] = manager["tracing"].clone();
    let tags = config.http().pointer_mut("/tracing/custom_tags").and_then(Value::as_array_mut).expect("tags");
    tags.extend(block("# Beside the other custom_tags:").as_array().expect("tags").iter().cloned());
    for filter in block("# The first two of http_filters:").as_array().expect("filters").iter().rev() {
        config.http_filters().insert(0, filter.clone());
    }
    config.http_filters().insert(0, block("# The first of http_filters:"));
    let mut cluster = block("# A cluster of the collector:");
    let address = "/load_assignment/endpoints/0/lb_endpoints/0/endpoint/address/socket_address";
    let place = cluster.pointer_mut(address).expect("an address");
    *place = json!({"address": collector.ip().to_string(), "port_value": collector.port()});
    let clusters = config.root.pointer_mut("/static_resources/clusters").and_then(Value::as_array_mut);
    clusters.expect("clusters").push(cluster);
}

async fn until_spans(collector: &Process, count: usize) -> Vec<Span> {
    let begun = Instant::now();
    loop {
        let seen = spans::parse(&collector.log());
        if seen.len() >= count {
            return seen;
        }
        assert!(collector.is_running() && begun.elapsed() < PATIENCE, "{seen:#?}\n{}", collector.log_tail(40));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Trace and parent span that an engine was told.
fn told<'a>(engines: impl IntoIterator<Item = &'a Handle>) -> (String, String) {
    let request = only(engines);
    let parent = request.header("traceparent").expect("a traceparent").to_owned();
    let parts: Vec<_> = parent.split('-').map(str::to_owned).collect();
    let [_, trace, span, _] = <[String; 4]>::try_from(parts).unwrap_or_else(|_| panic!("{parent}"));
    (trace, span)
}

#[test]
fn a_request_is_one_trace_with_both_legs_and_what_was_decided() {
    run(async {
        let Some(program) = places::program("collector", "traces in an OpenTelemetry Collector") else { return };
        let directory = tempfile::tempdir().expect("a directory");
        let port = Port::reserve();
        let address = port.address();
        let collector = start_collector(&program, directory.path(), address);
        let rig = Rig::builder().envoy(move |config| trace(config, address)).start().await;
        for (is_traced, so_far) in [(true, 0), (false, 2)] {
            rig.engines().for_each(Handle::clear_requests);
            let mut client = rig.client(Http::One).await;
            let parent = format!("00-{TRACE}-{CLIENT}-01");
            let model: (&str, &[u8]) = ("x-gateway-model-name", b"sim");
            let headers: &[_] = if is_traced { &[model, ("traceparent", parent.as_bytes())] } else { &[model] };
            let answer = client.send(client.json(CHAT, long_chat(), headers)).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
            let usage = answer.json()["usage"].clone();
            let seen = until_spans(&collector, so_far + 2).await.split_off(so_far);
            let by_parent =
                |parent: &str| seen.iter().find(|span| span.parent == parent).unwrap_or_else(|| panic!("{seen:#?}"));
            let gateway = by_parent(if is_traced { CLIENT } else { "" });
            let decode = by_parent(&gateway.id);
            assert!(seen.iter().all(|span| span.trace == gateway.trace), "{seen:#?}");
            assert_eq!(gateway.trace == TRACE, is_traced);
            assert_eq!(told(&rig.prefill), (gateway.trace.clone(), gateway.id.clone()));
            assert_eq!(told(&rig.decode), (gateway.trace.clone(), decode.id.clone()));
            let of = |span: &Span, name: &str| span.attribute(name).to_owned();
            let address = |engines: &[Handle]| {
                engines.iter().find(|engine| !engine.requests().is_empty()).map(|engine| engine.addr().to_string())
            };
            for span in [gateway, decode] {
                assert_eq!(of(span, "pd.decision"), "split");
                assert_eq!(Some(of(span, "pd.prefill")), address(&rig.prefill));
                assert_eq!(Some(of(span, "pd.decode")), address(&rig.decode));
                for name in ["pd.matched_tokens", "pd.prefill_ms"] {
                    assert!(of(span, name).parse::<f64>().is_ok(), "{name}: {span:#?}");
                }
            }
            let server = address(&rig.decode).expect("a decode server");
            let (server, port) = server.rsplit_once(':').expect("address and port");
            // By the names of the conventions. The usage is that of the answer, so of the decode leg alone.
            for span in [gateway, decode] {
                for (name, value) in [
                    ("gen_ai.operation.name", "chat".to_owned()),
                    ("gen_ai.provider.name", "vllm".to_owned()),
                    ("gen_ai.request.model", "sim".to_owned()),
                    ("server.address", server.to_owned()),
                    ("server.port", port.to_owned()),
                ] {
                    assert_eq!(of(span, name), value, "{name}: {span:#?}");
                }
            }
            assert_eq!(of(gateway, "gen_ai.response.model"), "sim", "{gateway:#?}");
            assert_eq!(of(gateway, "gen_ai.usage.input_tokens"), usage["prompt_tokens"].to_string(), "{gateway:#?}");
            assert_eq!(of(gateway, "gen_ai.usage.output_tokens"), usage["completion_tokens"].to_string());
            let id = only(&rig.prefill).header("x-request-id").map(str::to_owned);
            assert_eq!(id, only(&rig.decode).header("x-request-id").map(str::to_owned));
            assert_eq!(id, Some(of(gateway, "guid:x-request-id")));
        }
    });
}
