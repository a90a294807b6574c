//! What the components `usage` and `tracing` need: Envoy Gateway's configuration, a Redis and a collector.

use std::fs;
use std::path::PathBuf;

use pd_support::config::block_of_document;
use serde_json::json;
use tokio::process::Command;

use crate::cluster::{Cluster, GATEWAY, kubectl};

/// Tokens of a tenant and model in the shortened limit.
pub const LIMIT: u64 = 6_000;

/// Applies `sim` with both components. Servers keep the requests that they got.
pub async fn ready() -> Cluster {
    apply(REDIS).await;
    apply(COLLECTOR).await;
    let mut cluster = Cluster::new("test").await;
    cluster.settled("redis-system", "redis").await;
    cluster.settled("monitoring", "collector").await;
    configure_envoy_gateway().await;
    cluster.settled(GATEWAY, "envoy-gateway").await;
    cluster.settled(GATEWAY, "envoy-ratelimit").await;
    let overlay = cluster.manifests().join("overlays/test");
    fs::create_dir_all(&overlay).expect("a folder");
    let text = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [../sim]\n\
                components: [../../usage, ../../tracing]\n";
    fs::write(overlay.join("kustomization.yaml"), text).expect("written");
    cluster.edit("usage/kustomization.yaml", "requests: 1000000", &format!("requests: {LIMIT}"));
    let engines = cluster.manifests().join("overlays/sim/engines.yaml");
    let text = fs::read_to_string(&engines).expect("engines");
    fs::write(&engines, text.replace("--speed, '0.1'", "--speed, '1', --record, '16'")).expect("written");
    cluster.up().await;
    crate::cluster::served(cluster.address).await;
    cluster
}

/// What `docs/observability.md` tells users to set.
async fn configure_envoy_gateway() {
    let block =
        block_of_document("observability.md", "# In Envoy Gateway's configuration, config.envoyGateway of its chart:");
    let values = tempfile::NamedTempFile::new().expect("a file");
    fs::write(values.path(), json!({"config": {"envoyGateway": block}}).to_string()).expect("written");
    let chart = PathBuf::from(std::env::var_os("PD_CLUSTER_BIN").expect("PD_CLUSTER_BIN")).join("eg-chart");
    let mut helm = Command::new("helm");
    helm.args(["upgrade", "eg", "--namespace", GATEWAY, "--reuse-values", "--wait", "--timeout", "3m", "-f"]);
    let done = helm.arg(values.path()).arg(chart).output().await.expect("helm");
    assert!(done.status.success(), "helm: {}", String::from_utf8_lossy(&done.stderr));
    // Envoy Gateway watches the file, but starts the rate limit service only at its start.
    kubectl(&["rollout", "restart", "deployment/envoy-gateway", "--namespace", GATEWAY]).await.expect("restarted");
}

async fn apply(text: &str) {
    let file = tempfile::NamedTempFile::new().expect("a file");
    fs::write(file.path(), text).expect("written");
    kubectl(&["apply", "-f", &file.path().display().to_string()]).await.expect("applied");
}

const REDIS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: redis-system}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: redis, namespace: redis-system}
spec:
  replicas: 1
  selector: {matchLabels: {app: redis}}
  template:
    metadata: {labels: {app: redis}}
    spec:
      containers:
      - name: redis
        image: redis:7
        args: [--bind, '*', --protected-mode, 'no', --save, '', --dir, /tmp]
        ports: [{containerPort: 6379}]
        readinessProbe: {tcpSocket: {port: 6379}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: redis, namespace: redis-system}
spec:
  selector: {app: redis}
  ports: [{port: 6379, targetPort: 6379}]
";

const COLLECTOR: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: monitoring}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: collector, namespace: monitoring}
data:
  config.yaml: |
    receivers: {otlp: {protocols: {grpc: {endpoint: '0.0.0.0:4317'}}}}
    exporters: {debug: {verbosity: detailed}}
    service:
      telemetry: {metrics: {level: none}}
      pipelines: {traces: {receivers: [otlp], exporters: [debug]}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: collector, namespace: monitoring}
spec:
  replicas: 1
  selector: {matchLabels: {app: collector}}
  template:
    metadata: {labels: {app: collector}}
    spec:
      containers:
      - name: collector
        image: otel/opentelemetry-collector
        args: ['--config=file:/etc/collector/config.yaml']
        ports: [{containerPort: 4317}]
        readinessProbe: {tcpSocket: {port: 4317}, periodSeconds: 1}
        volumeMounts: [{name: config, mountPath: /etc/collector}]
      volumes: [{name: config, configMap: {name: collector}}]
---
apiVersion: v1
kind: Service
metadata: {name: collector, namespace: monitoring}
spec:
  selector: {app: collector}
  ports: [{port: 4317, targetPort: 4317}]
";
