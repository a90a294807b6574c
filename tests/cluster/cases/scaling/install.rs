//! Autoscalers by their own manifests, and our components for them.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use http::Request;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use kube::Api;
use serde_json::Value;

use crate::cluster::{Cluster, OURS, kubectl, until};

/// Group of the metrics of which an APIService has one server: KEDA's or prometheus-adapter.
const METRICS: &str = "/apis/external.metrics.k8s.io/v1beta1";

/// Longer than all pauses and windows of the shortened manifests: an autoscaler that wants a change has made it by then.
pub const SETTLED: Duration = Duration::from_secs(30);

/// Folder that `build-keda.sh` made.
fn programs() -> PathBuf {
    std::env::var_os("PD_KEDA_BIN").expect("PD_KEDA_BIN: run `make test-cluster`").into()
}

/// Applies text.
async fn apply(text: &str) {
    let file = tempfile::NamedTempFile::new().expect("a file");
    fs::write(file.path(), text).expect("written");
    kubectl(&["apply", "--server-side", "--force-conflicts", "-f", &file.path().display().to_string()])
        .await
        .expect("applied");
}

/// Installs KEDA without its webhooks.
pub async fn keda(cluster: &Cluster) {
    let config = programs().join("config/minimal").display().to_string();
    until("KEDA's manifests are taken", async || {
        kubectl(&["apply", "--server-side", "--force-conflicts", "-k", &config]).await.ok()
    })
    .await;
    for name in ["keda-operator", "keda-metrics-apiserver"] {
        cluster.settled("keda", name).await;
    }
    metrics_are_served(cluster).await;
}

/// Waits until the API server has external metrics of somebody.
async fn metrics_are_served(cluster: &Cluster) {
    until("external metrics are served", async || {
        let request = Request::get(METRICS).body(Vec::new()).ok()?;
        cluster.client.request::<Value>(request).await.ok()
    })
    .await;
}

/// Waits until the autoscalers of both roles have the metrics of the external scaler. KEDA has made them with others where the
/// scaler did not answer at first (kedacore/keda#7729), and our manifests start it at the same time.
pub async fn has_external_metrics(cluster: &Cluster) {
    let api: Api<HorizontalPodAutoscaler> = Api::namespaced(cluster.client.clone(), OURS);
    for (role, count) in [("prefill", 2), ("decode", 1)] {
        until(format!("KEDA has the metrics of {role}"), async || {
            let metrics = api.get(&format!("keda-hpa-{role}")).await.ok()?.spec?.metrics?;
            let are_external = metrics.iter().all(|metric| metric.external.is_some());
            (are_external && metrics.len() == count).then_some(())
        })
        .await;
    }
}

/// A Prometheus that scrapes pd-control every second.
pub async fn prometheus(cluster: &Cluster) {
    apply(PROMETHEUS).await;
    cluster.settled("monitoring", "prometheus").await;
}

/// prometheus-adapter with our rules.
pub async fn adapter(cluster: &Cluster) {
    let text = fs::read_to_string(cluster.manifests().join("autoscaling/hpa/adapter-rules.yml")).expect("the rules");
    let (_, rules) = text.split_once("rules:\n  external:\n").expect("the rules");
    let rules = rules.replace("[1m]", "[5s]");
    // Text of a config map.
    let rules: String =
        rules.lines().map(|line| format!("      {}\n", line.strip_prefix("  ").unwrap_or(line))).collect();
    apply(&ADAPTER.replace("RULES\n", &rules)).await;
    cluster.settled("monitoring", "prometheus-adapter").await;
    metrics_are_served(cluster).await;
}

/// Applies `sim` with one of the components for autoscaling, with seconds in place of minutes, and one server of each role.
pub async fn ready(cluster: &mut Cluster, component: &str) {
    for kind in ["scaledobjects.keda.sh", "horizontalpodautoscalers"] {
        // A cluster that never had KEDA does not know the kind.
        let _ = kubectl(&["delete", kind, "--namespace", OURS, "--all"]).await;
    }
    let overlay = cluster.manifests().join("overlays/test");
    fs::create_dir_all(&overlay).expect("a folder");
    let text = format!(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [../sim]\n\
         components: [../../autoscaling/{component}]\n"
    );
    fs::write(overlay.join("kustomization.yaml"), text).expect("written");
    let engines = "overlays/sim/engines.yaml";
    cluster.edit(
        engines,
        "--role, prefill, --model, sim, --speed, '0.1'",
        "--role, prefill, --model, sim, --speed, '1'",
    );
    let decode = "--role, decode, --model, sim, --speed, '1', --cache-tokens, '40000', --tpot-batch-us, '0'";
    cluster.edit(engines, "--role, decode, --model, sim, --speed, '0.1'", decode);
    // Servers of another model are in the same pool, and would count.
    replace_all(cluster, engines, "  replicas: 1", "  replicas: 0");
    replace_all(cluster, engines, "  replicas: 2", "  replicas: 1");
    let file = match component {
        "keda" | "keda-prometheus" => format!("autoscaling/{component}/scaledobjects.yaml"),
        other => format!("autoscaling/{other}/hpa.yaml"),
    };
    replace_all(cluster, &file, "stabilizationWindowSeconds: 300", "stabilizationWindowSeconds: 15");
    replace_all(cluster, &file, "periodSeconds: 60", "periodSeconds: 5");
    match component {
        "keda" => {
            replace_all(cluster, &file, "pollingInterval: 15", "pollingInterval: 1");
            for role in ["prefill", "decode"] {
                cluster.edit(
                    &file,
                    &format!("      role: {role}\n"),
                    &format!("      role: {role}\n      windowSeconds: '5'\n"),
                );
            }
        }
        "keda-prometheus" => {
            replace_all(cluster, &file, "pollingInterval: 15", "pollingInterval: 1");
            replace_all(cluster, &file, "[1m]", "[5s]");
        }
        _ => {}
    }
    for name in ["maxReplicaCount: 8", "maxReplicas: 8"] {
        let path = cluster.manifests().join(&file);
        let text = fs::read_to_string(&path).expect("manifests");
        fs::write(&path, text.replace(name, &name.replace('8', "4"))).expect("written");
    }
    cluster.up().await;
    crate::cluster::served(cluster.address).await;
}

/// Changes a file of the manifests, wherever it holds `from`.
pub fn replace_all(cluster: &Cluster, file: &str, from: &str, to: &str) {
    let path = cluster.manifests().join(file);
    let text = fs::read_to_string(&path).expect(file);
    assert!(text.contains(from), "{from} in {file}");
    fs::write(path, text.replace(from, to)).expect(file);
}

/// By the name of Prometheus' operator for its Service.
const PROMETHEUS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: monitoring}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: prometheus, namespace: monitoring}
data:
  prometheus.yml: |
    global: {scrape_interval: 1s}
    scrape_configs:
    - job_name: pd-control
      static_configs:
      - targets: [pd-control.llm.svc:9000]
        labels: {namespace: llm}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: prometheus, namespace: monitoring}
spec:
  replicas: 1
  selector: {matchLabels: {app: prometheus}}
  template:
    metadata: {labels: {app: prometheus}}
    spec:
      containers:
      - name: prometheus
        image: prom/prometheus
        args: [--config.file=/etc/prometheus/prometheus.yml, --storage.tsdb.path=/tmp/data, '--web.listen-address=0.0.0.0:9090']
        ports: [{containerPort: 9090}]
        readinessProbe: {httpGet: {path: /-/ready, port: 9090}}
        volumeMounts: [{name: config, mountPath: /etc/prometheus}]
      volumes: [{name: config, configMap: {name: prometheus}}]
---
apiVersion: v1
kind: Service
metadata: {name: prometheus-operated, namespace: monitoring}
spec:
  selector: {app: prometheus}
  ports: [{port: 9090, targetPort: 9090}]
";

/// prometheus-adapter as its chart installs it, for external metrics alone.
const ADAPTER: &str = "
apiVersion: v1
kind: ServiceAccount
metadata: {name: prometheus-adapter, namespace: monitoring}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: prometheus-adapter-delegator}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: 'system:auth-delegator'}
subjects: [{kind: ServiceAccount, name: prometheus-adapter, namespace: monitoring}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: prometheus-adapter-view}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view}
subjects: [{kind: ServiceAccount, name: prometheus-adapter, namespace: monitoring}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: prometheus-adapter, namespace: kube-system}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: extension-apiserver-authentication-reader}
subjects: [{kind: ServiceAccount, name: prometheus-adapter, namespace: monitoring}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: adapter-config, namespace: monitoring}
data:
  config.yaml: |
    externalRules:
RULES
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: prometheus-adapter, namespace: monitoring}
spec:
  replicas: 1
  selector: {matchLabels: {app: prometheus-adapter}}
  template:
    metadata: {labels: {app: prometheus-adapter}}
    spec:
      serviceAccountName: prometheus-adapter
      containers:
      - name: prometheus-adapter
        image: registry.k8s.io/prometheus-adapter/prometheus-adapter
        args:
        - --cert-dir=/tmp/cert
        - --config=/etc/adapter/config.yaml
        - --metrics-relist-interval=5s
        - --prometheus-url=http://prometheus-operated.monitoring.svc:9090/
        - --secure-port=6443
        ports: [{name: https, containerPort: 6443}]
        readinessProbe: {httpGet: {path: /readyz, port: https, scheme: HTTPS}}
        volumeMounts: [{name: config, mountPath: /etc/adapter}]
      volumes: [{name: config, configMap: {name: adapter-config}}]
---
apiVersion: v1
kind: Service
metadata: {name: prometheus-adapter, namespace: monitoring}
spec:
  selector: {app: prometheus-adapter}
  ports: [{port: 443, targetPort: https}]
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1beta1.external.metrics.k8s.io}
spec:
  group: external.metrics.k8s.io
  groupPriorityMinimum: 100
  insecureSkipTLSVerify: true
  caBundle: null
  service: {name: prometheus-adapter, namespace: monitoring, port: 443}
  version: v1beta1
  versionPriority: 100
";
