//! One gateway under test: engines, pd-control, Envoy.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::LazyLock;

use pd_sim::Handle;
use pd_support::admin::{Admin, Metrics};
use pd_support::client::{Client, Http};
use pd_support::config::Config;
use pd_support::file::replace;
use pd_support::process::{self, Process};
use pd_support::wait::{PATIENCE, until, until_true};
use serde_json::Value;
use tokio::runtime::Runtime;

pub use list::{endpoints_file, entries};
use places::Places;
pub use places::WORKERS;

mod list;
pub(crate) mod places;

/// Runs a test. All tests share a runtime, so that a rig can serve several of them.
pub fn run<T>(test: impl Future<Output = T>) -> T {
    static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime"));
    RUNTIME.block_on(test)
}

/// A running gateway.
pub struct Rig {
    /// Prefill engines.
    pub prefill: Vec<Handle>,
    /// Decode engines.
    pub decode: Vec<Handle>,
    /// Envoy's admin interface.
    pub admin: Admin,
    /// Envoy.
    pub envoy: Process,
    /// The configuration that Envoy was started with.
    pub config: Config,
    /// Endpoints of the list that it was started with.
    pub(crate) listed: usize,
    pub(crate) control: Option<Process>,
    pub(crate) places: Places,
}

impl Rig {
    /// Another Envoy with the same configuration, in front of the same engines and asking the same pd-control.
    pub async fn beside(&self) -> Self {
        let places = Places::new();
        let mut config = self.config.clone();
        config.set_admin(places.admin.address());
        config.set_listener(places.listener.address());
        let file = places.file("envoy.json");
        replace(&file, &config.root.to_string()).expect("replaced");
        let envoy = places.start_envoy(&file);
        let admin = Admin { address: places.admin.address() };
        let (prefill, decode, listed) = (Vec::new(), Vec::new(), self.listed);
        let beside = Self { prefill, decode, admin, envoy, config, listed, control: None, places };
        beside.until_ready(Some(listed)).await;
        beside.until_metric("pd_snapshots_total{result=\"applied\"}", |value| value >= WORKERS as f64).await;
        beside
    }

    /// All engines, prefill first.
    pub fn engines(&self) -> impl Iterator<Item = &Handle> {
        self.prefill.iter().chain(&self.decode)
    }

    /// Where clients connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.places.listener.address()
    }

    /// A connection to whichever worker takes it.
    pub async fn client(&self, http: Http) -> Client {
        Client::connect(self.address(), http).await
    }

    /// A connection to each worker. Nobody else may connect meanwhile.
    pub async fn client_of_each_worker(&self, http: Http) -> Vec<Client> {
        let mut clients: Vec<Option<Client>> = (0..WORKERS).map(|_| None).collect();
        let mut before = self.admin.connections_by_worker(self.address()).await;
        while clients.iter().any(Option::is_none) {
            let client = self.client(http).await;
            let after = until("a worker takes the connection", async || {
                let after = self.admin.connections_by_worker(self.address()).await;
                (after != before).then_some(after)
            });
            let after = after.await;
            let worker = (0..WORKERS).find(|i| after.get(*i) > before.get(*i)).expect("a worker");
            clients[worker] = Some(client);
            before = after;
        }
        clients.into_iter().flatten().collect()
    }

    /// Envoy's metrics.
    pub async fn metrics(&self) -> Metrics {
        self.admin.metrics().await
    }

    /// A metric of Envoy, 0 where there is none.
    pub async fn metric(&self, name: &str) -> f64 {
        self.metrics().await.get(name).copied().unwrap_or(0.0)
    }

    /// Waits until a metric meets a condition, and returns it. The filter's come up at its next tick.
    pub async fn until_metric(&self, name: &str, condition: impl Fn(f64) -> bool) -> f64 {
        until(name, async || Some(self.metric(name).await).filter(|value| condition(*value))).await
    }

    /// A metric of the filter after all requests so far ended and were counted. Only then can a test assert that something
    /// did not happen.
    pub async fn final_metric(&self, name: &str) -> f64 {
        until_true("all requests are counted", async || {
            let metrics = self.metrics().await;
            let sum = |name: &str| -> f64 {
                let is_it = |series: &str| series.starts_with(name) && !series.contains("\"admin\"");
                metrics.iter().filter(|(series, _)| is_it(series)).map(|(_, value)| value).sum()
            };
            let log = self.access_log();
            let decided = log.iter().filter(|entry| !entry["decision"].is_null()).count();
            sum("envoy_http_downstream_rq_active") == 0.0
                && log.len() as f64 >= sum("envoy_http_downstream_rq_completed")
                && sum("pd_requests_total") >= decided as f64
        })
        .await;
        self.metric(name).await
    }

    /// Waits until nothing is in flight, by the filter's gauges and by the engines' own.
    pub async fn until_idle(&self) {
        until_true("nothing is in flight", async || {
            let metrics = self.metrics().await;
            let gauges = ["pd_prefill_in_flight", "pd_decode_in_flight", "pd_decode_tokens_in_flight"];
            gauges.iter().all(|gauge| metrics.get(*gauge).is_none_or(|value| *value == 0.0))
        })
        .await;
    }

    /// The access log's entries so far.
    ///
    /// # Panics
    /// When an entry is no JSON.
    #[must_use]
    pub fn access_log(&self) -> Vec<Value> {
        let out = self.envoy.out();
        // The last line may be half written.
        let lines = out.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        lines.map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"))).collect()
    }

    /// Waits for the access log's entry of a request, by its path and query.
    pub async fn access_log_of(&self, path: &str) -> Value {
        until(format_args!("the access log has {path}"), async || {
            self.access_log().into_iter().find(|entry| entry["path"] == path)
        })
        .await
    }

    /// Makes an engine refuse connections; when this returns, it does, and Envoy has none left to it.
    pub async fn refuse(&self, engine: &Handle) {
        engine.set_refuse(true);
        let gone = format!("engines::{}::cx_active::0", engine.addr());
        until_true(format_args!("{} refuses", engine.addr()), async || {
            let connected = tokio::net::TcpStream::connect(engine.addr()).await.is_ok();
            let clusters = self.admin.get("/clusters").await.unwrap_or_default();
            !connected && clusters.lines().any(|line| line == gone)
        })
        .await;
    }

    /// Makes an engine accept connections again; when this returns, it does.
    pub async fn accept(&self, engine: &Handle) {
        engine.set_refuse(false);
        until_true(format_args!("{} accepts", engine.addr()), async || {
            tokio::net::TcpStream::connect(engine.addr()).await.is_ok()
        })
        .await;
    }

    /// Connections to an engine that failed, as Envoy counts them.
    pub async fn failed_connects(&self, engine: &Handle) -> u64 {
        let clusters = self.admin.get("/clusters").await.expect("Envoy's admin answers");
        let name = format!("engines::{}::cx_connect_fail::", engine.addr());
        let count = clusters.lines().find_map(|line| line.strip_prefix(&name)?.parse().ok());
        count.expect("Envoy counts what fails")
    }

    /// The file from which pd-control reads the endpoints.
    #[must_use]
    pub fn endpoints_path(&self) -> PathBuf {
        self.places.endpoints()
    }

    /// Puts another list into pd-control's file and waits until every worker goes by it.
    pub async fn relist(&self, list: &[Value]) {
        let applied = "pd_snapshots_total{result=\"applied\"}";
        let before = self.metric(applied).await;
        replace(&self.endpoints_path(), &endpoints_file(list)).expect("replaced");
        self.until_metric(applied, |value| value >= before + WORKERS as f64).await;
        self.until_hosts(list).await;
    }

    /// Waits until Envoy's cluster has these hosts.
    pub async fn until_hosts(&self, list: &[Value]) {
        let mut wanted: Vec<&str> = list.iter().filter_map(|entry| entry["address"].as_str()).collect();
        wanted.sort_unstable();
        until_true(format_args!("hosts {wanted:?}"), async || {
            let mut hosts = self.admin.hosts("engines").await;
            hosts.sort_unstable();
            hosts == wanted
        })
        .await;
    }

    /// `GET` from pd-control.
    pub async fn ask_control(&self, path: &str) -> Option<String> {
        Admin { address: self.places.control.address() }.get(path).await
    }

    /// Where Envoy looks for pd-control.
    #[must_use]
    pub fn control_address(&self) -> SocketAddr {
        self.places.control.address()
    }

    /// What pd-control has logged.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn control_log(&self) -> String {
        self.control.as_ref().expect("a pd-control").log()
    }

    /// Kills pd-control.
    pub fn kill_control(&mut self) {
        self.control = None;
    }

    /// Sends pd-control a signal by its name.
    ///
    /// # Panics
    /// When it does not run.
    pub fn signal_control(&self, signal: &str) {
        self.control.as_ref().expect("a pd-control").signal(signal);
    }

    /// Starts pd-control again, where it was.
    pub async fn start_control(&mut self) {
        self.control = Some(self.places.start_control().await);
    }

    /// Replaces the listener by the one of another configuration; see [`Builder::with_listener_file`](crate::builder::Builder::with_listener_file).
    pub fn replace_listener(&self, mut config: Config) {
        replace(&self.places.lds(), &config.listener_file()).expect("replaced");
    }

    /// Waits until Envoy is ready and has so many endpoints, where that is known.
    pub(crate) async fn until_ready(&self, endpoints: Option<usize>) {
        let ready = process::ready(&self.envoy, self.admin.address, "/ready", PATIENCE).await;
        ready.unwrap_or_else(|error| panic!("{error}"));
        if let Some(endpoints) = endpoints {
            self.until_metric("pd_endpoints", |value| value == endpoints as f64).await;
        }
        if self.control.is_some() && endpoints.is_some() {
            self.until_metric("pd_snapshots_total{result=\"applied\"}", |value| value >= WORKERS as f64).await;
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("--- Envoy on {}, admin {}", self.address(), self.admin.address);
            println!("{}", self.envoy.log_tail(40));
            let out = self.envoy.out();
            let lines: Vec<_> = out.lines().collect();
            println!("--- access log\n{}", lines[lines.len().saturating_sub(10)..].join("\n"));
            if let Some(control) = &self.control {
                println!("--- pd-control\n{}", control.log_tail(10));
            }
        }
    }
}
