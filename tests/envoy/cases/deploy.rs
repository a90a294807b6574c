//! Envoy as a deployment: envoy/deploy with TLS, configuration from files or from a control plane, hot restarts and drains.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use pd_support::admin::Admin;
use pd_support::body::{CHAT, chat};
use pd_support::certificate::Certificate;
use pd_support::client::{BOTH, Client, Http, Streaming};
use pd_support::file::replace;
use pd_support::places;
use pd_support::port::Port;
use pd_support::process::{self, Process};
use pd_support::wait::{PATIENCE, until, until_true, within};
use pd_tests::rig::{Rig, WORKERS, run};
use pd_tests::tls::TlsTunnel;
use pd_tests::traffic::Traffic;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::*;

/// What the rendered configuration has of pools.
const POOLS: &str = r#""pools": {"default": {"engine": "vllm-nixl", "split": {"mode": "threshold", "uncached_tokens": 256}, "queue": {"no_endpoint_ms": 10000}}}"#;

/// A rendered configuration, and the supervised Envoy that runs it, in front of a rig's engines and beside its pd-control.
struct Deployment {
    directory: TempDir,
    admin: Admin,
    xds: Port,
    supervisor: Process,
    tunnel: TlsTunnel,
    _ports: [Port; 2],
}

impl Deployment {
    /// Renders the configuration, changes the listener's file by `edit` and starts it from `bootstrap`.
    async fn start(rig: &Rig, bootstrap: &str, edit: impl Fn(String) -> String) -> Self {
        Self::start_with(rig, bootstrap, edit, |_, _| None).await.0
    }

    /// As [`start`](Self::start), after what `before` starts: it gets the configuration's folder and the port of a control plane.
    async fn start_with(
        rig: &Rig,
        bootstrap: &str,
        edit: impl Fn(String) -> String,
        before: impl Fn(&Path, SocketAddr) -> Option<Process>,
    ) -> (Self, Option<Process>) {
        let directory = tempfile::tempdir().expect("a directory");
        let [listener, admin, xds] = [Port::reserve(), Port::reserve(), Port::reserve()];
        render(rig, directory.path(), &[&listener, &admin, &xds]);
        let certificate = Certificate::made(&directory.path().join("tls"), "DNS:gateway.internal");
        let lds = directory.path().join("lds/lds.yaml");
        replace(&lds, &edit(std::fs::read_to_string(&lds).expect("a listener"))).expect("replaced");
        let server = before(directory.path(), xds.address());
        let supervisor = supervise(directory.path(), bootstrap, &listener, &admin);
        process::ready(&supervisor, admin.address(), "/ready", PATIENCE * 4).await.expect("Envoy");
        let tunnel = TlsTunnel::start(listener.address(), "gateway.internal", &certificate).await;
        let page = Admin { address: admin.address() };
        let it = Self { directory, admin: page, xds, supervisor, tunnel, _ports: [listener, admin] };
        it.until_metric("pd_snapshots_total{result=\"applied\"}", |value| value >= WORKERS as f64).await;
        (it, server)
    }

    async fn client(&self, http: Http) -> Client {
        Client::connect(self.tunnel.address, http).await
    }

    async fn until_metric(&self, name: &str, condition: impl Fn(f64) -> bool) {
        until(name, async || {
            let value = self.admin.metrics().await.get(name).copied().unwrap_or(0.0);
            condition(value).then_some(())
        })
        .await;
    }

    /// Waits until Envoy of that epoch serves. It loads its module while the one before still has all the traffic.
    async fn until_epoch(&self, epoch: u32) {
        let wanted = format!("\"restart_epoch\": {epoch},");
        within(PATIENCE * 4, Duration::from_millis(50), format_args!("epoch {epoch}"), async || {
            let info = self.admin.get("/server_info").await.unwrap_or_default();
            (info.contains(&wanted) && info.contains("\"state\": \"LIVE\"")).then_some(())
        })
        .await;
    }

    async fn until_said(&self, what: &str) {
        until_true(what, async || self.supervisor.log().contains(what)).await;
    }
}

impl Drop for Deployment {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("--- supervised Envoy\n{}", self.supervisor.log_tail(40));
        }
    }
}

/// The file of the engines' hosts, which pd-control writes.
fn eds(rig: &Rig) -> String {
    let path = "/eds_cluster_config/eds_config/path_config_source/path";
    let mut config = rig.config.clone();
    config.cluster("engines").pointer(path).and_then(Value::as_str).expect("a file").to_owned()
}

fn render(rig: &Rig, directory: &Path, [listener, admin, xds]: &[&Port; 3]) {
    let rendered = Command::new(places::root().join("envoy/deploy/render.sh"))
        .arg(directory)
        .env("PD_CONFIG", directory)
        .env("PD_MODULE", places::wasm())
        .env("PD_EDS", eds(rig))
        .env("PD_LISTEN", listener.address().to_string())
        .env("PD_ADMIN", admin.address().to_string())
        .env("PD_CONTROL", rig.control_address().to_string())
        .env("PD_XDS", xds.address().to_string())
        .status();
    assert!(rendered.is_ok_and(|status| status.success()), "render.sh");
}

fn supervise(directory: &Path, bootstrap: &str, listener: &Port, admin: &Port) -> Process {
    let workers = WORKERS.to_string();
    let arguments = [
        &format!("PD_ADMIN={}", admin.address()),
        &format!("PD_BASE_ID={}", listener.address().port()),
        "PD_LEAVE_SECONDS=5",
        "PD_REQUEST_SECONDS=60",
        "envoy/deploy/supervise.sh",
        &places::envoy().display().to_string(),
        "--config-path",
        &directory.join(bootstrap).display().to_string(),
        "--service-node",
        "deployed",
        "--service-cluster",
        "envoy-pd",
        "--concurrency",
        &workers,
        "--file-flush-interval-msec",
        "10",
    ];
    let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    Process::start("supervise", directory, Path::new("env"), &arguments)
}

/// Starts the control plane that tests/programs.sh has built.
fn serve(program: &Path, rig: &Rig, directory: &Path, address: SocketAddr) -> Process {
    let arguments =
        [format!("--config={}", directory.display()), format!("--eds={}", eds(rig)), format!("--listen={address}")];
    Process::start("xds", directory, program, &arguments)
}

/// A stream of so many tokens, of a request that is split.
async fn stream(deployment: &Deployment, http: Http, tokens: u32) -> (Client, Streaming, String) {
    let body = chat(&[&new_prompt()], &format!(r#","max_tokens":{tokens},"ignore_eos":true,"stream":true"#));
    let mut client = deployment.client(http).await;
    let mut stream = client.open(client.json(CHAT, body.clone(), &[])).await;
    assert!(stream.event().await.expect("a stream").is_some());
    (client, stream, body)
}

/// Reads a stream to its end.
async fn read((_client, mut stream, _): (Client, Streaming, String)) -> u32 {
    let mut events = 1;
    while stream.event().await.expect("the stream goes on").is_some() {
        events += 1;
    }
    events
}

/// A gateway whose prefill endpoint takes one request at a time, for two seconds, and whose streams last eight.
async fn slow() -> Rig {
    Rig::builder()
        .engines(1, 2)
        .prefill_engines(|config, _| (config.speed, config.a_ms, config.b_us, config.c_ns) = (1.0, 2_000.0, 0.0, 0.0))
        .decode_engines(|config, _| (config.speed, config.tpot_ms) = (1.0, 20.0))
        .start()
        .await
}

/// The listener's file with a queue.
fn queued(lds: String) -> String {
    let pools = json!({"default": {
        "engine": "vllm-nixl", "split": {"mode": "always"}, "fit": false, "cost": {"a_ms": 10_000.0}, "queue": {"enabled": true, "no_endpoint_ms": 10_000},
    }});
    edited(&lds, POOLS, &format!(r#""pools": {pools}"#))
}

#[track_caller]
fn edited(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "{from} in {text}");
    text.replace(from, to)
}

/// Two requests of which the second waits in the gateway until the first one's prefill leg is over.
async fn until_one_waits(deployment: &Deployment) -> Vec<tokio::task::JoinHandle<()>> {
    let mut asked = Vec::new();
    for http in BOTH {
        let mut client = deployment.client(http).await;
        asked.push(tokio::spawn(async move { ask(&mut client, &long_chat()).await }));
    }
    deployment.until_metric("pd_waiting_requests{pool=\"default\"}", |value| value >= 1.0).await;
    asked
}

#[test]
fn files_with_tls_serve_and_a_change_of_the_listener_ends_no_stream() {
    run(async {
        let rig = Rig::builder().decode_engines(|config, _| (config.speed, config.tpot_ms) = (1.0, 10.0)).start().await;
        let deployment = Deployment::start(&rig, "envoy.yaml", |lds| lds).await;
        for http in BOTH {
            ask(&mut deployment.client(http).await, &long_chat()).await;
        }
        let streams = [stream(&deployment, Http::One, 200).await, stream(&deployment, Http::Two, 200).await];
        let lds = deployment.directory.path().join("lds/lds.yaml");
        let text = std::fs::read_to_string(&lds).unwrap();
        replace(&lds, &edited(&text, r#""uncached_tokens": 256"#, r#""uncached_tokens": 100000"#)).unwrap();
        deployment.until_metric("envoy_listener_manager_listener_in_place_updated", |value| value >= 1.0).await;
        let mut client = deployment.client(Http::One).await;
        until_true("the new configuration is in force", async || {
            let before = sum(&rig.prefill, |stats| stats.requests);
            ask(&mut client, &long_chat()).await;
            sum(&rig.prefill, |stats| stats.requests) == before
        })
        .await;
        for stream in streams {
            assert!(read(stream).await >= 200);
        }
    });
}

#[test]
fn a_hot_restart_loses_neither_streams_nor_requests_that_wait() {
    run(async {
        let rig = slow().await;
        let deployment = Deployment::start(&rig, "envoy.yaml", queued).await;
        let streams = [stream(&deployment, Http::One, 400).await, stream(&deployment, Http::Two, 400).await];
        let asked = until_one_waits(&deployment).await;
        deployment.supervisor.signal("HUP");
        deployment.until_epoch(1).await;
        for asked in asked {
            asked.await.expect("answered");
        }
        for stream in streams {
            assert!(read(stream).await >= 400);
        }
        ask(&mut deployment.client(Http::One).await, &long_chat()).await;
        deployment.supervisor.signal("HUP");
        deployment.until_said("the last restart is not over").await;
    });
}

#[test]
fn no_request_of_many_is_lost_by_a_hot_restart() {
    run(async {
        let rig = Rig::start().await;
        let deployment = Deployment::start(&rig, "envoy.yaml", |lds| lds).await;
        let traffic = Traffic::start(deployment.tunnel.address, 6);
        traffic.more(200).await;
        deployment.supervisor.signal("HUP");
        deployment.until_epoch(1).await;
        traffic.more(200).await;
        println!("{} requests, none lost", traffic.stop().await);
    });
}

/// envoyproxy/envoy#33216, #1537: a new process that does not start must not cost the one that runs.
#[test]
fn a_restart_with_a_broken_bootstrap_leaves_the_running_envoy_alone() {
    run(async {
        let rig = Rig::start().await;
        let deployment = Deployment::start(&rig, "envoy.yaml", |lds| lds).await;
        let bootstrap = deployment.directory.path().join("envoy.yaml");
        let text = std::fs::read_to_string(&bootstrap).unwrap();
        replace(&bootstrap, &edited(&text, "dynamic_resources", "dynamic_sources")).unwrap();
        deployment.supervisor.signal("HUP");
        deployment.until_said("the configuration is refused").await;
        deployment.until_epoch(0).await;
        replace(&bootstrap, &text).unwrap();
        deployment.supervisor.signal("HUP");
        deployment.until_epoch(1).await;
        ask(&mut deployment.client(Http::Two).await, &long_chat()).await;
    });
}

#[test]
fn the_end_waits_for_streams_and_requests_that_wait() {
    run(async {
        let rig = slow().await;
        let deployment = Deployment::start(&rig, "envoy.yaml", queued).await;
        let streams = [stream(&deployment, Http::One, 400).await, stream(&deployment, Http::Two, 400).await];
        let asked = until_one_waits(&deployment).await;
        deployment.supervisor.signal("TERM");
        deployment.until_said("drains").await;
        // Load balancers may not know yet.
        ask(&mut deployment.client(Http::One).await, &long_chat()).await;
        for asked in asked {
            asked.await.expect("answered");
        }
        for stream in streams {
            assert!(read(stream).await >= 400);
        }
        until_true("all has ended", async || !deployment.supervisor.is_running()).await;
        assert!(deployment.supervisor.log().contains("has ended"));
    });
}

#[test]
fn a_control_plane_serves_listener_routes_clusters_and_hosts() {
    let Some(program) = places::program("xds", "Envoy with a control plane") else { return };
    run(async {
        let rig = Rig::start().await;
        let serving = |directory: &Path, address| Some(serve(&program, &rig, directory, address));
        let (deployment, server) = Deployment::start_with(&rig, "envoy-xds.yaml", |lds| lds, serving).await;
        for http in BOTH {
            ask(&mut deployment.client(http).await, &long_chat()).await;
        }
        assert_eq!(sum(&rig.prefill, |stats| stats.prefill_legs), 2);
        // A route of its own, which leaves the listener alone.
        let lds = deployment.directory.path().join("lds/lds.yaml");
        let text = std::fs::read_to_string(&lds).unwrap();
        let first = "            routes:\n";
        // Without the filter, which answers 404 on paths of no API.
        let answer = r#"            - {match: {path: /here}, direct_response: {status: 204}, typed_per_filter_config: {pd: {"@type": type.googleapis.com/envoy.config.route.v3.FilterConfig, disabled: true}}}
"#;
        replace(&lds, &edited(&text, first, &format!("{first}{answer}"))).unwrap();
        let mut client = deployment.client(Http::One).await;
        until_true("the route is served", async || {
            let answer = client.send(client.request("GET", "/here")).await;
            answer.status == 204
        })
        .await;
        let name = "envoy_listener_manager_listener_modified";
        assert!(
            deployment.admin.metrics().await.get(name).is_none_or(|value| *value == 0.0),
            "the listener is the same"
        );
        // A broken file, and no control plane at all: what was served stays.
        replace(&lds, "resources: [{").unwrap();
        until_true("it is refused", async || server.as_ref().unwrap().log().contains("not served")).await;
        drop(server);
        ask(&mut client, &long_chat()).await;
        // It comes back with other hosts.
        replace(&lds, &text).unwrap();
        let _server = serve(&program, &rig, deployment.directory.path(), deployment.xds.address());
        until_true("the route is gone", async || client.send(client.request("GET", "/here")).await.status != 204).await;
        ask(&mut client, &long_chat()).await;
    });
}

/// The units, with programs that this machine has in place of theirs.
#[test]
fn systemd_accepts_the_units() {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        println!("NOT TESTED: there is no systemd-analyze");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let units = ["envoy-pd.service", "pd-control.service"].map(|name| {
        let text = std::fs::read_to_string(places::root().join("envoy/deploy").join(name)).unwrap();
        let file = directory.path().join(name);
        let local = text.lines().map(|line| match line.split_once('=') {
            Some((key @ ("ExecStart" | "ExecReload"), _)) => format!("{key}=/bin/true\n"),
            _ => format!("{line}\n"),
        });
        std::fs::write(&file, local.collect::<String>()).unwrap();
        file
    });
    let output = Command::new("systemd-analyze").arg("verify").arg("--man=no").args(&units).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let ours: Vec<_> = said.lines().filter(|line| line.contains("envoy-pd") || line.contains("pd-control")).collect();
    assert!(output.status.success() && ours.is_empty(), "{said}");
}
