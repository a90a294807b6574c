//! One gateway under test: engines, pd-control, Envoy.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use pd_sim::{Handle, Role};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use pd_support::admin::{Admin, Metrics};
use pd_support::client::{Client, Http};
use pd_support::config::{Config, eds_file, merge};
use pd_support::file::replace;
use pd_support::places;
use pd_support::port::Port;
use pd_support::process::{self, Process};
use pd_support::wait::{PATIENCE, until, until_true};

/// Workers of every Envoy here: what one knows, the other must learn.
pub const WORKERS: usize = 2;

/// Runs a test. All tests share a runtime, so that a rig can serve several of them.
pub fn run<T>(test: impl Future<Output = T>) -> T {
    static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime"));
    RUNTIME.block_on(test)
}

/// What a rig is made of. The default: two prefill and two decode engines without delays, pd-control with all of them
/// in its file, and the shipped configuration.
pub struct Builder {
    prefill: Vec<pd_sim::Config>,
    decode: Vec<pd_sim::Config>,
    others: Vec<(SocketAddr, Value)>,
    plugin: Value,
    plugin_text: Option<String>,
    is_pushed: bool,
    has_lds: bool,
    control: Vec<String>,
    adapt: Vec<Adapt>,
    adapt_list: Vec<AdaptList>,
}

type Adapt = Box<dyn FnOnce(&mut Config) + Send>;
type AdaptList = Box<dyn FnOnce(&mut [Value]) + Send>;

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
    listed: usize,
    control: Option<Process>,
    places: Places,
}

struct Places {
    listener: Port,
    admin: Port,
    control: Port,
    control_options: Vec<String>,
    directory: TempDir,
}

impl Default for Builder {
    fn default() -> Self {
        let of = |role| vec![pd_sim::Config::of(role); 2];
        Self {
            prefill: of(Role::Prefill),
            decode: of(Role::Decode),
            others: Vec::new(),
            plugin: json!({}),
            plugin_text: None,
            is_pushed: true,
            has_lds: false,
            control: Vec::new(),
            adapt: Vec::new(),
            adapt_list: Vec::new(),
        }
    }
}

impl Builder {
    /// Sets how many engines there are.
    #[must_use]
    pub fn engines(mut self, prefill: usize, decode: usize) -> Self {
        self.prefill = vec![pd_sim::Config::of(Role::Prefill); prefill];
        self.decode = vec![pd_sim::Config::of(Role::Decode); decode];
        self
    }

    /// Adds an engine that somebody else runs.
    #[must_use]
    pub fn other(mut self, address: SocketAddr, role: &str) -> Self {
        self.others.push((address, json!({"address": address.to_string(), "role": role})));
        self
    }

    /// Changes the configuration of every engine.
    #[must_use]
    pub fn every_engine(mut self, change: impl Fn(&mut pd_sim::Config)) -> Self {
        self.prefill.iter_mut().chain(&mut self.decode).for_each(change);
        self
    }

    /// Changes the configuration of the prefill engines; the second argument counts them.
    #[must_use]
    pub fn prefill_engines(mut self, change: impl Fn(&mut pd_sim::Config, usize)) -> Self {
        self.prefill.iter_mut().enumerate().for_each(|(i, config)| change(config, i));
        self
    }

    /// Changes the configuration of the decode engines; the second argument counts them.
    #[must_use]
    pub fn decode_engines(mut self, change: impl Fn(&mut pd_sim::Config, usize)) -> Self {
        self.decode.iter_mut().enumerate().for_each(|(i, config)| change(config, i));
        self
    }

    /// Merges members into the plugin configuration; `null` removes one.
    #[must_use]
    pub fn plugin(mut self, patch: Value) -> Self {
        merge(&mut self.plugin, &patch);
        self
    }

    /// Merges members into the default pool's policy.
    #[must_use]
    pub fn pool(self, patch: Value) -> Self {
        self.plugin(json!({"pools": {"default": patch}}))
    }

    /// Takes this text for the whole plugin configuration. Envoy then counts as ready without endpoints.
    #[must_use]
    pub fn plugin_text(mut self, text: &str) -> Self {
        self.plugin_text = Some(text.to_owned());
        self
    }

    /// Without pd-control: the endpoints stand in the plugin configuration.
    #[must_use]
    pub fn without_control(mut self) -> Self {
        self.is_pushed = false;
        self
    }

    /// Envoy reads its listener from a file that can be replaced: [`Rig::replace_listener`].
    #[must_use]
    pub fn with_listener_file(mut self) -> Self {
        self.has_lds = true;
        self
    }

    /// Starts pd-control with more options.
    #[must_use]
    pub fn control(mut self, options: &[&str]) -> Self {
        self.control.extend(options.iter().map(|option| (*option).to_owned()));
        self
    }

    /// Changes Envoy's configuration.
    #[must_use]
    pub fn envoy(mut self, change: impl FnOnce(&mut Config) + Send + 'static) -> Self {
        self.adapt.push(Box::new(change));
        self
    }

    /// Changes the list of endpoints, prefill engines first.
    #[must_use]
    pub fn list(mut self, change: impl FnOnce(&mut [Value]) + Send + 'static) -> Self {
        self.adapt_list.push(Box::new(change));
        self
    }

    /// Starts all of it and waits until every worker knows every endpoint.
    ///
    /// # Panics
    /// When something is missing or does not come up.
    pub async fn start(self) -> Rig {
        let start = |configs: Vec<pd_sim::Config>| async {
            let started = configs.into_iter().map(pd_sim::start);
            futures::future::try_join_all(started).await.unwrap_or_else(|error| panic!("{error}"))
        };
        let (prefill, decode) = (start(self.prefill).await, start(self.decode).await);
        let others = self.others.iter().map(|(_, entry)| entry.clone());
        let mut list: Vec<Value> =
            entries(&prefill, "prefill").chain(entries(&decode, "decode")).chain(others).collect();
        for change in self.adapt_list {
            change(&mut list);
        }
        let places = Places { control_options: self.control, ..Places::new() };
        let others = self.others.iter().map(|(address, _)| *address);
        let hosts: Vec<_> = prefill.iter().chain(&decode).map(Handle::addr).chain(others).collect();
        replace(&places.endpoints(), &endpoints_file(&list)).expect("replaced");
        replace(&places.eds(), &eds_file(&hosts)).expect("replaced");
        let control = if self.is_pushed { Some(places.start_control().await) } else { None };

        let mut config = Config::shipped();
        config.set_admin(places.admin.address());
        config.set_listener(places.listener.address());
        config.set_control(places.control.address());
        config.set_eds(&places.eds());
        let mut plugin = config.plugin_configuration();
        plugin["endpoints"] = list.clone().into();
        if !self.is_pushed {
            merge(&mut plugin, &json!({"control": null}));
        }
        merge(&mut plugin, &self.plugin);
        let text = self.plugin_text.clone().unwrap_or_else(|| plugin.to_string());
        config.set_plugin_configuration(&text);
        for change in self.adapt {
            change(&mut config);
        }
        let running = config.clone();
        if self.has_lds {
            replace(&places.lds(), &config.listener_file()).expect("replaced");
            config.set_lds(&places.lds());
        }
        let file = places.file("envoy.json");
        replace(&file, &config.root.to_string()).expect("replaced");
        let envoy = places.start_envoy(&file);
        let admin = Admin { address: places.admin.address() };
        let rig = Rig { prefill, decode, admin, envoy, config: running, listed: list.len(), control, places };
        rig.until_ready(self.plugin_text.is_none().then_some(list.len())).await;
        rig
    }
}

impl Rig {
    /// See [`Builder`].
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The default one.
    pub async fn start() -> Self {
        Builder::default().start().await
    }

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

    /// A metric of the filter after all requests so far ended and were counted: what a test needs to say that something
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

    /// Replaces the listener by the one of another configuration; see [`Builder::with_listener_file`].
    pub fn replace_listener(&self, mut config: Config) {
        replace(&self.places.lds(), &config.listener_file()).expect("replaced");
    }

    async fn until_ready(&self, endpoints: Option<usize>) {
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

impl Places {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        // Envoy watches directories: each kind of file has its own.
        for name in ["eds", "lds"] {
            std::fs::create_dir(directory.path().join(name)).expect("a directory");
        }
        Self {
            listener: Port::reserve(),
            admin: Port::reserve(),
            control: Port::reserve(),
            control_options: Vec::new(),
            directory,
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn endpoints(&self) -> PathBuf {
        self.file("endpoints.yaml")
    }

    fn eds(&self) -> PathBuf {
        self.file("eds/eds.json")
    }

    fn lds(&self) -> PathBuf {
        self.file("lds/lds.json")
    }

    async fn start_control(&self) -> Process {
        let own = [
            format!("--endpoints={}", self.endpoints().display()),
            format!("--eds-file={}", self.eds().display()),
            format!("--listen={}", self.control.address()),
        ];
        let arguments = [&own[..], &self.control_options].concat();
        let control = Process::start("pd-control", self.directory.path(), &places::control(), &arguments);
        let ready = process::ready(&control, self.control.address(), "/readyz", PATIENCE).await;
        ready.unwrap_or_else(|error| panic!("{error}"));
        control
    }

    fn start_envoy(&self, config: &Path) -> Process {
        let config = config.display().to_string();
        let workers = WORKERS.to_string();
        let arguments = [
            ["--config-path", &config],
            ["--concurrency", &workers],
            // The access log is read while it is written.
            ["--file-flush-interval-msec", "10"],
        ];
        let arguments = arguments.concat().into_iter().chain(["--disable-hot-restart"]).map(str::to_owned);
        Process::start("envoy", self.directory.path(), &places::envoy(), &arguments.collect::<Vec<_>>())
    }
}

/// The list's entries for some engines.
pub fn entries<'a>(engines: impl IntoIterator<Item = &'a Handle>, role: &str) -> impl Iterator<Item = Value> {
    engines.into_iter().map(move |engine| {
        let mut entry = json!({"address": engine.addr().to_string(), "role": role});
        if role == "prefill" {
            entry["bootstrap_port"] = engine.bootstrap_addr().port().into();
        }
        entry
    })
}

/// Text of pd-control's file.
#[must_use]
pub fn endpoints_file(list: &[Value]) -> String {
    json!({"endpoints": list}).to_string()
}
