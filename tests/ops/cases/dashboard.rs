//! The Grafana dashboard: well formed, and each of its queries answered by a real Prometheus that scrapes a real gateway.

use std::collections::BTreeSet;
use std::path::Path;

use pd_sim::Handle;
use pd_support::admin::Admin;
use pd_support::body::{CHAT, chat, words};
use pd_support::client::Http;
use pd_support::places;
use pd_support::port::Port;
use pd_support::process::Process;
use pd_support::wait::until;
use pd_tests::rig::{Rig, run};
use pd_tests::traffic::Traffic;
use serde_json::{Value, json};

use crate::files::{array, monitoring, str_of, text};
use crate::names::{known, unknown};

pub fn dashboard() -> Value {
    serde_json::from_str(&text(&monitoring("dashboard.json"))).unwrap()
}

fn panels(dashboard: &Value) -> Vec<&Value> {
    array(&dashboard["panels"]).iter().filter(|panel| panel["type"] != "row").collect()
}

/// What Grafana needs of a dashboard: its own schema marks nearly everything as optional, and then shows nothing.
#[test]
fn the_dashboard_is_well_formed() {
    let dashboard = dashboard();
    for key in ["uid", "title", "description", "timezone", "refresh"] {
        assert!(!str_of(&dashboard[key]).is_empty(), "{key}");
    }
    assert!(dashboard["schemaVersion"].as_u64().is_some_and(|version| (36..=42).contains(&version)));
    let variables: BTreeSet<_> = array(&dashboard["templating"]["list"]).iter().map(|it| str_of(&it["name"])).collect();
    assert_eq!(variables, BTreeSet::from(["datasource", "pool"]));
    let (mut ids, mut titles, mut cells) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for panel in array(&dashboard["panels"]) {
        let title = str_of(&panel["title"]);
        assert!(ids.insert(panel["id"].as_u64().unwrap()) && titles.insert(title), "{title} is there twice");
        let [x, y, w, h] = ["x", "y", "w", "h"].map(|key| panel["gridPos"][key].as_u64().unwrap());
        assert!(w > 0 && h > 0 && x + w <= 24, "{title} is out of the grid");
        for cell in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
            assert!(cells.insert(cell), "{title} lies over another panel");
        }
        if panel["type"] == "row" {
            continue;
        }
        assert!(["timeseries", "stat"].contains(&str_of(&panel["type"])), "{title}");
        assert!(str_of(&panel["description"]).ends_with('.'), "{title}");
        assert!(!str_of(&panel["fieldConfig"]["defaults"]["unit"]).is_empty(), "{title}");
        let mut references = BTreeSet::new();
        for target in array(&panel["targets"]) {
            assert_eq!(target["datasource"], json!({"type": "prometheus", "uid": "${datasource}"}), "{title}");
            assert!(references.insert(str_of(&target["refId"])), "{title}");
            assert!(!str_of(&target["legendFormat"]).is_empty(), "{title}");
        }
        assert!(!references.is_empty(), "{title}");
    }
}

#[test]
fn every_metric_of_the_dashboard_exists() {
    let known = known();
    for panel in panels(&dashboard()) {
        for target in array(&panel["targets"]) {
            assert_eq!(unknown(str_of(&target["expr"]), &known), Vec::<String>::new(), "{}", panel["title"]);
        }
    }
}

/// What Grafana puts in place of its variables.
pub fn query(expression: &str) -> String {
    expression.replace("$__rate_interval", "30s").replace("$pool", ".*")
}

pub fn scrapes(rig: &Rig) -> String {
    let job = |name: &str, path: &str, role: Option<&str>, addresses: Vec<String>| {
        let labels = role.map_or(json!({}), |role| json!({"role": role}));
        json!({"job_name": name, "metrics_path": path, "static_configs": [{"targets": addresses, "labels": labels}]})
    };
    let of = |engines: &[Handle]| engines.iter().map(|engine| engine.addr().to_string()).collect();
    let jobs = [
        job("envoy", "/stats/prometheus", None, vec![rig.admin.address.to_string()]),
        job("pd-control", "/metrics", None, vec![rig.control_address().to_string()]),
        job("prefill", "/metrics", Some("prefill"), of(&rig.prefill)),
        job("decode", "/metrics", Some("decode"), of(&rig.decode)),
    ];
    json!({"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": jobs}).to_string()
}

pub fn start_prometheus(program: &Path, directory: &Path, port: &Port, config: &str) -> Process {
    let file = directory.join("prometheus.yml");
    std::fs::write(&file, config).unwrap();
    let arguments = [
        format!("--config.file={}", file.display()),
        format!("--storage.tsdb.path={}", directory.join("data").display()),
        format!("--web.listen-address={}", port.address()),
    ];
    Process::start("prometheus", directory, program, &arguments)
}

/// Values of an instant query; none that are no numbers.
async fn values(prometheus: Admin, expression: &str) -> Vec<f64> {
    let escaped: String = query(expression).bytes().map(|byte| format!("%{byte:02x}")).collect();
    let Some(text) = prometheus.get(&format!("/api/v1/query?query={escaped}")).await else { return Vec::new() };
    let answer: Value = serde_json::from_str(&text).unwrap();
    let values = array(&answer["data"]["result"]).iter().filter_map(|series| series["value"][1].as_str()?.parse().ok());
    values.filter(|value: &f64| value.is_finite()).collect()
}

#[test]
fn every_query_of_the_dashboard_has_an_answer_in_a_real_prometheus() {
    let Some(program) = places::program("prometheus", "the dashboard's queries") else { return };
    run(async {
        let rig = Rig::builder()
            .every_engine(|engine| engine.speed = 0.05)
            .pool(json!({"max_requests": 1_000, "queue": {"enabled": true, "lead_ms": 1}}))
            .control(&["--scrape-interval=0.5"])
            .start()
            .await;
        let (directory, port) = (tempfile::tempdir().unwrap(), Port::reserve());
        let _prometheus = start_prometheus(&program, directory.path(), &port, &scrapes(&rig));
        let prometheus = Admin { address: port.address() };
        let traffic = Traffic::start(rig.address(), 6);
        let mut client = rig.client(Http::One).await;
        let dashboard = dashboard();
        for panel in panels(&dashboard) {
            for target in array(&panel["targets"]) {
                let (title, expression) = (str_of(&panel["title"]), str_of(&target["expr"]));
                until(format_args!("{title}: {expression}"), async || {
                    // Something of each kind of request, all the time.
                    client.post(CHAT, "{}").await;
                    client.get("/v1/models").await;
                    client.post(CHAT, chat(&[&words("again", 8_000)], r#","max_tokens":4"#)).await;
                    let found = values(prometheus, expression).await;
                    (!found.is_empty()).then_some(())
                })
                .await;
            }
        }
        // Not only series: what there was shows.
        for (expression, least) in [
            ("sum(pd_requests_total{decision=\"split\"})", 10.0),
            (
                "sum(rate(vllm:prompt_tokens_by_source_total{role=\"decode\",source=\"external_kv_transfer\"}[$__rate_interval]))",
                1.0,
            ),
            ("sum(pd_control_role_kv_tokens_capacity{role=\"decode\"})", 1_000.0),
            ("sum(pd_moved_tokens_total)", 1.0),
        ] {
            until(expression, async || values(prometheus, expression).await.into_iter().find(|value| *value >= least))
                .await;
        }
        traffic.stop().await;
    });
}
