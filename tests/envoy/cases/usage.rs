//! Token usage by model and tenant, in dynamic metadata: for the access log, for spans, and for a rate limit service that gets
//! the cost of each request as Envoy Gateway's BackendTrafficPolicy asks for it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use pd_support::body::{CHAT, chat, words};
use pd_support::client::Http;
use pd_support::config::{Config, block_of_document};
use pd_support::places;
use pd_support::wait::until;
use pd_tests::rig::{Rig, run};
use prost::Message;
use serde_json::{Value, json};
use tonic_prost::ProstCodec;

use crate::support::logged;

/// What Envoy asks the rate limit service; the numbers of its fields are those of `envoy/service/ratelimit/v3/rls.proto`.
#[derive(Clone, PartialEq, Message)]
struct RateLimitRequest {
    #[prost(string, tag = "1")]
    domain: String,
    #[prost(message, repeated, tag = "2")]
    descriptors: Vec<Descriptor>,
}

#[derive(Clone, PartialEq, Message)]
struct Descriptor {
    #[prost(message, repeated, tag = "1")]
    entries: Vec<DescriptorEntry>,
    #[prost(message, optional, tag = "3")]
    hits_addend: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
struct DescriptorEntry {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

/// 1: within the limit, 2: over it.
#[derive(Clone, PartialEq, Message)]
struct RateLimitResponse {
    #[prost(int32, tag = "1")]
    overall_code: i32,
}

/// Tokens by tenant and model. A tenant whose tokens are spent is over its limit.
#[derive(Clone, Debug, Default)]
struct Spent(Arc<Mutex<BTreeMap<(String, String), u64>>>);

/// Most tokens of a tenant and model.
const LIMIT: u64 = 3_000;

impl Spent {
    fn take(&self, request: &RateLimitRequest) -> RateLimitResponse {
        let mut spent = self.0.lock().unwrap();
        let mut is_over = false;
        for descriptor in &request.descriptors {
            let value = |key: &str| descriptor.entries.iter().find(|it| it.key == key).map(|it| it.value.clone());
            let (Some(tenant), Some(model)) = (value("tenant"), value("model")) else { continue };
            let of = spent.entry((tenant, model)).or_default();
            *of += descriptor.hits_addend.unwrap_or(1);
            is_over |= *of >= LIMIT;
        }
        RateLimitResponse { overall_code: if is_over { 2 } else { 1 } }
    }

    fn of(&self, tenant: &str) -> u64 {
        self.0.lock().unwrap().get(&(tenant.to_owned(), "sim".to_owned())).copied().unwrap_or(0)
    }

    /// Serves gRPC until the test ends.
    async fn serve(&self) -> SocketAddr {
        let router = axum::Router::new()
            .route("/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit", post(should_rate_limit))
            .with_state(self.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        address
    }
}

async fn should_rate_limit(State(spent): State<Spent>, request: Request) -> Response {
    let service = tower::service_fn(move |request: tonic::Request<RateLimitRequest>| {
        let answer = spent.take(&request.into_inner());
        async move { Ok::<_, tonic::Status>(tonic::Response::new(answer)) }
    });
    let mut grpc = tonic::server::Grpc::new(ProstCodec::<RateLimitResponse, RateLimitRequest>::default());
    grpc.unary(service, request).await.into_response()
}

/// Adds what `docs/observability.md` tells users to add.
fn show_usage(config: &mut Config) {
    let filters = block_of_document("observability.md", "# The first two of http_filters:");
    for filter in filters.as_array().unwrap().iter().rev() {
        config.http_filters().insert(0, filter.clone());
    }
}

/// Adds a rate limit by tenant and model as Envoy Gateway makes one of a rule with a cost: a check of each request that costs
/// nothing, and the cost at the end of its stream.
fn limit(config: &mut Config, service: SocketAddr) {
    let cluster = json!({
        "name": "ratelimit",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        }},
        "load_assignment": {"cluster_name": "ratelimit", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {
            "socket_address": {"address": service.ip().to_string(), "port_value": service.port()}}}}]}]},
    });
    let clusters = config.root.pointer_mut("/static_resources/clusters").and_then(Value::as_array_mut);
    clusters.unwrap().push(cluster);
    let header = |key: &str, name: &str| json!({"request_headers": {"descriptor_key": key, "header_name": name}});
    let actions = [header("tenant", "x-tenant"), header("model", "x-gateway-model-name")];
    let limits = json!([
        {"actions": actions, "hits_addend": {"number": 0}},
        {"actions": actions, "hits_addend": {"format": "%DYNAMIC_METADATA(pd.usage:total_tokens)%"}, "apply_on_stream_done": true},
    ]);
    config.http()["route_config"]["typed_per_filter_config"] = json!({"envoy.filters.http.ratelimit": {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.ratelimit.v3.RateLimitPerRoute",
        "rate_limits": limits,
    }});
    config.http_filters().insert(
        0,
        json!({"name": "envoy.filters.http.ratelimit", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.ratelimit.v3.RateLimit",
            "domain": "test",
            // Envoy drops the cost of a request when the service is later: 20 ms by default.
            "timeout": "10s",
            "rate_limit_service": {
                "transport_api_version": "V3",
                "grpc_service": {"envoy_grpc": {"cluster_name": "ratelimit"}},
            },
        }}),
    );
}

/// Adds the usage to each line of the access log.
fn log_usage(config: &mut Config) {
    let format = config.http().pointer_mut("/access_log/0/typed_config/log_format/json_format").unwrap();
    for name in ["input_tokens", "output_tokens", "total_tokens", "response_model"] {
        format[name] = format!("%DYNAMIC_METADATA(pd.usage:{name})%").into();
    }
}

#[test]
fn usage_is_in_metadata_and_a_rate_limit_counts_it_by_tenant_and_model() {
    run(async {
        let spent = Spent::default();
        let service = spent.serve().await;
        let rig = Rig::builder()
            .envoy(move |config| {
                show_usage(config);
                limit(config, service);
                log_usage(config);
            })
            .start()
            .await;
        let mut client = rig.client(Http::One).await;
        let usage = r#","max_tokens":8,"stream":true,"stream_options":{"include_usage":true}"#;
        // Split and whole, as a stream and as JSON. A split request's cost is that of its decode leg: the client sees no other usage.
        for (tenant, bytes, more) in [
            ("json-split", 8_000, r#","max_tokens":8"#),
            ("json-whole", 100, r#","max_tokens":8"#),
            ("stream-split", 8_000, usage),
            ("stream-whole", 100, usage),
        ] {
            let is_split = bytes > 1_000;
            let body = chat(&[&words(tenant, bytes)], more);
            let headers: &[(&str, &[u8])] = &[("x-tenant", tenant.as_bytes()), ("x-gateway-model-name", b"sim")];
            let (request, path) = logged(&client, CHAT, body.to_string(), headers);
            let answer = client.send(request).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
            let entry = rig.access_log_of(&path).await;
            let number = |name: &str| entry[name].as_u64().or_else(|| entry[name].as_str()?.parse().ok());
            let [input, output, total] =
                ["input_tokens", "output_tokens", "total_tokens"].map(|name| number(name).unwrap_or(0));
            assert_eq!((output, total), (8, input + 8), "{entry}");
            let least = if is_split { 1_000 } else { 10 };
            assert!(input > least, "{entry}");
            assert_eq!(entry["response_model"], "sim");
            assert_eq!(entry["decision"], if is_split { "split" } else { "decode_only" }, "{entry}");
            until(format_args!("the cost of {tenant}"), async || (spent.of(tenant) == total).then_some(())).await;
        }
        // A tenant whose tokens are spent gets 429, and another one does not.
        let body = chat(&[&words("much", 14_000)], r#","max_tokens":8"#);
        let mut statuses = Vec::new();
        for tenant in ["greedy", "greedy", "modest"] {
            let headers: &[(&str, &[u8])] = &[("x-tenant", tenant.as_bytes()), ("x-gateway-model-name", b"sim")];
            let before = spent.of(tenant);
            let status = client.send(client.json(CHAT, body.clone(), headers)).await.status;
            statuses.push(status);
            if status == 200 {
                until("the cost", async || (spent.of(tenant) > before).then_some(())).await;
            }
        }
        assert_eq!(statuses, [200, 429, 200]);
    });
}

/// The forms of `/v1/messages` and `/v1/responses`, and an answer without usage.
#[test]
fn usage_of_each_api_is_in_metadata() {
    run(async {
        let rig = Rig::builder()
            .envoy(|config| {
                show_usage(config);
                log_usage(config);
            })
            .start()
            .await;
        let client = rig.client(Http::One).await;
        let text = words("usage", 100);
        for (path, body) in [
            ("/v1/messages", json!({"model": "sim", "max_tokens": 8, "messages": [{"role": "user", "content": text}]})),
            ("/v1/responses", json!({"model": "sim", "max_output_tokens": 8, "input": text})),
            ("/v1/completions", json!({"model": "sim", "max_tokens": 8, "prompt": text})),
        ] {
            for is_stream in [false, true] {
                let mut body = body.clone();
                body["stream"] = is_stream.into();
                if path == "/v1/completions" && is_stream {
                    body["stream_options"] = json!({"include_usage": true});
                }
                let mut client = rig.client(Http::One).await;
                let (request, path) = logged(&client, path, body.to_string(), &[]);
                let answer = client.send(request).await;
                assert_eq!(answer.status, 200, "{path}: {}", answer.text());
                let entry = rig.access_log_of(&path).await;
                let number = |name: &str| entry[name].as_u64().or_else(|| entry[name].as_str()?.parse().ok());
                assert_eq!(number("output_tokens"), Some(8), "{path}, stream: {is_stream}: {entry} {}", answer.text());
                assert!(
                    number("input_tokens").is_some_and(|tokens| tokens > 5),
                    "{path}, stream: {is_stream}: {entry}"
                );
            }
        }
        drop(client);
        // Without usage there is no cost.
        let mut client = rig.client(Http::One).await;
        let (request, path) =
            logged(&client, CHAT, chat(&[&text], r#","max_tokens":8,"stream":true"#).to_string(), &[]);
        assert_eq!(client.send(request).await.status, 200);
        assert_eq!(rig.access_log_of(&path).await["total_tokens"], Value::Null);
    });
}

/// The manifest for Envoy Gateway adds the filters that the document shows and the tests above run.
#[test]
fn the_manifest_has_the_filters_of_the_document() {
    let path = places::root().join("gateway-manifests/usage/usage.yaml");
    let policy: Value = serde_saphyr::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let patches = policy["spec"]["jsonPatches"].as_array().unwrap();
    let added: Vec<Value> = patches.iter().map(|patch| patch["operation"]["value"].clone()).collect();
    assert_eq!(Value::from(added), block_of_document("observability.md", "# The first two of http_filters:"));
}
