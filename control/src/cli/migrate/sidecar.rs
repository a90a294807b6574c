//! The routing sidecar of llm-d, by its flags.

use serde_json::{Value, json};

use super::report::Report;
use super::values::Values;
use crate::cli::manifests::{Manifests, Object, items, text};

/// Flags by which a container is a routing sidecar.
const TELLING: &[&str] = &["kv-connector", "connector", "vllm-port", "model-server-port"];

pub(super) fn read(manifests: &Manifests, values: &mut Values, report: &mut Report) {
    for (object, key, container) in containers(manifests) {
        let flags = flags(container);
        let is_named = text(container, "/name").contains("routing") || text(container, "/image").contains("sidecar");
        if is_named && !flags.is_empty() || flags.iter().any(|(name, _)| TELLING.contains(&name.as_str())) {
            let what = "the filter runs the prefill leg itself: take the container out";
            report.carried(object, &key, what);
            flags.iter().for_each(|(name, value)| flag(object, &key, name, value, values, report));
        }
    }
}

fn flag(object: &Object, container: &str, name: &str, value: &str, values: &mut Values, report: &mut Report) {
    let key = format!("{container}.args --{name}");
    match name {
        "kv-connector" | "connector" => match engine(value) {
            Some(engine) => {
                values.pool.insert("engine".to_owned(), json!(engine));
                report.carried(object, &key, format!("filter.config.pools.default.engine: {engine}"));
            }
            None => report.dropped(object, &key, format!("no engine of the filter hands over as {value:?}")),
        },
        "port" => report.carried(object, &key, "without the sidecar, the engine listens on this port"),
        "vllm-port" | "model-server-port" => {
            let why = format!("start the engine on engines.port instead of {value}");
            report.dropped(object, &key, why);
        }
        "data-parallel-size" => {
            let why = format!("set `ranks: {value}` for these pods in a selector of kubernetesConfig");
            report.dropped(object, &key, why);
        }
        "prefill-max-retries" => match value.parse::<u64>() {
            Ok(retries) if retries < 8 => {
                values.pool.insert("prefill_attempts".to_owned(), json!(retries + 1));
                report.carried(
                    object,
                    &key,
                    "filter.config.pools.default.prefill_attempts, which counts the first try",
                );
            }
            _ => report.dropped(object, &key, "prefill_attempts is at most 8"),
        },
        "mooncake-bootstrap-port" => match value.parse::<u16>() {
            Ok(port) => {
                values.pool.insert("bootstrap_port".to_owned(), json!(port));
                report.carried(object, &key, "filter.config.pools.default.bootstrap_port");
            }
            Err(_) => report.dropped(object, &key, "is no port"),
        },
        "enable-ssrf-protection" | "inference-pool" | "pool-group" => {
            report.carried(object, &key, "clients cannot name an endpoint: the filter removes such headers");
        }
        "secure-proxy" if value == "false" => report.carried(object, &key, "Envoy speaks plain HTTP to the engines"),
        "secure-proxy" | "enable-tls" | "prefiller-use-tls" | "decoder-use-tls" | "cert-path" => {
            report.dropped(object, &key, "engines behind TLS need a BackendTLSPolicy for the Service engines");
        }
        "ec-connector" => report.dropped(object, &key, "the filter has no leg for encoders"),
        "decode-chunk-size" => report.dropped(object, &key, "the filter does not cut a decode leg into chunks"),
        "v" | "zap-log-level" | "zap-devel" | "zap-encoder" | "tracing" | "metrics-port" => {
            report.dropped(object, &key, "logs and metrics are Envoy's");
        }
        _ => report.dropped(object, &key, "the filter has no such setting"),
    }
}

/// The engine whose hand-over a connector is, without the sidecar.
fn engine(connector: &str) -> Option<&'static str> {
    match connector {
        "nixl" | "nixlv2" => Some("vllm-nixl"),
        "shared-storage" | "lmcache" | "offloading" => Some("vllm-shared"),
        "sglang" => Some("sglang"),
        "mooncake" => Some("mooncake"),
        _ => None,
    }
}

/// All containers of all workloads, with the key of each.
pub(super) fn containers(manifests: &Manifests) -> impl Iterator<Item = (&Object, String, &Value)> {
    const PODS: &[(&str, &str)] = &[
        ("Deployment", "/spec/template/spec"),
        ("StatefulSet", "/spec/template/spec"),
        ("DaemonSet", "/spec/template/spec"),
        ("Pod", "/spec"),
        ("LeaderWorkerSet", "/spec/leaderWorkerTemplate/leaderTemplate/spec"),
        ("LeaderWorkerSet", "/spec/leaderWorkerTemplate/workerTemplate/spec"),
    ];
    PODS.iter().flat_map(move |(kind, pods)| {
        manifests.of_kind(kind).flat_map(move |object| {
            ["initContainers", "containers"].iter().flat_map(move |list| {
                let containers = items(&object.value, &format!("{pods}/{list}")).iter().enumerate();
                let key = move |i| format!("{}.{list}[{i}]", pods.trim_start_matches('/').replace('/', "."));
                containers.map(move |(i, container)| (object, key(i), container))
            })
        })
    })
}

/// Flags of the command and the arguments: `--name=value`, `--name value`, and `--name`, which means `true`.
pub(super) fn flags(container: &Value) -> Vec<(String, String)> {
    let words: Vec<_> =
        ["/command", "/args"].iter().flat_map(|list| items(container, list)).filter_map(Value::as_str).collect();
    let name = |word: &'_ str| word.strip_prefix("--").or_else(|| word.strip_prefix('-')).map(str::to_owned);
    let mut flags = Vec::new();
    for (i, word) in words.iter().enumerate() {
        let Some(flag) = name(word) else { continue };
        flags.push(match flag.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => {
                let next = words.get(i + 1).filter(|next| !next.starts_with('-'));
                (flag, next.map_or_else(|| "true".to_owned(), |next| (*next).to_owned()))
            }
        });
    }
    flags
}
