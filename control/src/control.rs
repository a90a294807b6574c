//! Starts the parts of one pd-control, connects them, and stops them in order.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use axum::Router;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};

use crate::access::rights::Rights;
use crate::access::tls::{Protocol, Tls, TlsFiles};
use crate::access::token::Token;
use crate::api::app::{App, LogLevel};
use crate::api::http;
use crate::api::in_flight::{InFlight, MAX_EXCHANGE_BYTES, MAX_HOST_EXCHANGE_BYTES, MAX_HOST_VIEWS, MAX_VIEWS};
use crate::api::metrics::Metrics;
use crate::api::server::{self, MAX_CONNECTIONS, MAX_SCALER_CONNECTIONS, Serving};
use crate::counters::Counters;
use crate::engines::access::EngineAccess;
use crate::engines::answers::Scrapes;
use crate::engines::scrape::Scraper;
use crate::envoys::hub::SharedHub;
use crate::envoys::relay::Replicas;
use crate::list::EndpointList;
use crate::publish::eds::EdsFile;
use crate::publish::publisher::{ListHealth, Publisher};
use crate::publish::registry::Registry;
use crate::publish::updates::{Message, Updates};
use crate::scaling::history::{DemandSource, History};
use crate::scaling::scaler::Scaler;
use crate::sources::allow::AllowedNetworks;
use crate::sources::file::source::FileSource;
use crate::sources::kubernetes::follow::Limits;
use crate::sources::kubernetes::pods::Pods;
use crate::sources::kubernetes::{KubernetesConfig, KubernetesSource};
use crate::sources::names::{self, NamedEndpoint, NamesSource};

/// How often pd-control compares the endpoints file where the kernel reports no changes, as on network file systems.
pub const DEFAULT_POLL: Duration = Duration::from_secs(2);

/// Configuration of one pd-control.
#[derive(Clone, Debug)]
pub struct Config {
    /// The endpoints file; none: no file source.
    pub endpoints: Option<PathBuf>,
    /// The Kubernetes cluster; none: no Kubernetes source.
    pub kubernetes: Option<Kubernetes>,
    /// Endpoints named on the command line.
    pub named: Vec<NamedEndpoint>,
    /// Allow-list for the addresses of DNS names. Addresses from files and from the command line are not checked.
    pub networks: AllowedNetworks,
    /// Time between two requests to an engine for its metrics; none: pd-control asks no engine.
    pub scrape: Option<Duration>,
    /// How pd-control reaches engines for their metrics.
    pub engines: EngineAccess,
    /// Other replicas, to which pd-control relays the exchange of the Envoys; none: pd-control relays nothing.
    pub replicas: Option<Replicas>,
    /// Certificate and key of the server; none: the server speaks plain HTTP.
    pub tls: Option<TlsFiles>,
    /// Sets the log level for `PUT /v1/log-level`; none: that path answers 404.
    pub log: Option<LogLevel>,
    /// Address to listen on; port 0 picks one.
    pub listen: SocketAddr,
    /// Address of KEDA's external scaler; port 0 picks one. `None`: pd-control serves none.
    pub scaler: Option<SocketAddr>,
    /// The EDS file to write; none: pd-control writes none.
    pub eds: Option<EdsFile>,
    /// Bearer token of filters, which `/v1/…` requires; none: anyone may read.
    pub token: Option<Token>,
    /// Bearer token of operators; none: operators use the filters' token.
    pub operator: Option<Token>,
    /// Bearer token of replicas; none: replicas use the filters' token.
    pub replicas_token: Option<Token>,
    /// How often to compare the file where the kernel reports no changes.
    pub poll: Duration,
}

/// The Kubernetes cluster to follow.
#[derive(Clone, Debug)]
pub struct Kubernetes {
    /// Namespaces, selectors and InferencePools to follow.
    pub config: KubernetesConfig,
    /// How to reach the API server; none: by `KUBECONFIG` or the pod's service account.
    pub cluster: Option<kube::Config>,
    /// Time limits of requests to the API server.
    pub limits: Limits,
}

/// A running `pd-control`.
#[derive(Debug)]
pub struct Control {
    address: SocketAddr,
    scaler: Option<SocketAddr>,
    stop: watch::Sender<bool>,
    servers: Vec<JoinHandle<()>>,
    tasks: JoinSet<()>,
}

impl Control {
    /// Listens, reads the list, writes the EDS file, then serves. When the address is in use, nothing is written.
    ///
    /// # Errors
    /// One line when the address is in use, the endpoints file is refused or the EDS file cannot be written.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        if let Some(replicas) = &config.replicas {
            replicas.check()?;
        }
        let listeners = Listeners::open(&config).await?;
        let sources = Sources::open(&config).await?;
        let parts = Parts::new(&sources, &config);
        let mut tasks = JoinSet::new();
        parts.publish(sources, &config, &mut tasks)?;
        tasks.spawn(Arc::clone(&parts.hub).prune(Arc::clone(&parts.counters)));
        if let Some(replicas) = config.replicas.clone() {
            tasks.spawn(replicas.relay(Arc::clone(&parts.hub), Arc::clone(&parts.counters)));
        }
        let (stop, stopping) = watch::channel(false);
        let address = listeners.api.socket.local_addr()?;
        let scaler = listeners.scaler.as_ref().map(|listener| listener.socket.local_addr()).transpose()?;
        let scheme = if listeners.api.tls.is_some() { "https" } else { "http" };
        tracing::info!(version = env!("CARGO_PKG_VERSION"), "listens on {scheme}://{address}");
        if let Some(on) = scaler {
            tracing::info!("answers KEDA on {on}");
        }
        let demand = Arc::new(parts.demand());
        let counters = Arc::clone(&parts.counters);
        let app = parts.app(config, &demand, stopping.clone());
        tasks.spawn(Arc::clone(&app.traffic).follow(Arc::clone(&app.hub)));
        tasks.spawn(Arc::clone(&app.since).follow(Arc::clone(&app.registry)));
        let mut servers = vec![listeners.api.serve(Protocol::Http1, http::router(app), &counters, &stopping)];
        if let Some(listener) = listeners.scaler {
            let history = Arc::new(History::default());
            tasks.spawn(Arc::clone(&history).sample(demand));
            let router = Scaler::new(history, stopping.clone()).router();
            servers.push(listener.serve(Protocol::Http2, router, &counters, &stopping));
        }
        Ok(Self { address, scaler, stop, servers, tasks })
    }

    /// The address that pd-control listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The address of KEDA's external scaler. `None`: pd-control serves none.
    #[must_use]
    pub fn scaler_address(&self) -> Option<SocketAddr> {
        self.scaler
    }

    /// Answers the open polls, closes every connection and stops all tasks, within a second.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        for server in self.servers {
            // Fails only when the server panicked, and then there is nothing left to stop.
            let _ = server.await;
        }
        self.tasks.abort_all();
    }
}

/// An address that pd-control listens on, and its certificate.
struct Listener {
    socket: TcpListener,
    tls: Option<Arc<Tls>>,
}

impl Listener {
    /// Serves `router` in a task, until `stopping`.
    fn serve(
        self,
        protocol: Protocol,
        router: Router,
        counters: &Arc<Counters>,
        stopping: &watch::Receiver<bool>,
    ) -> JoinHandle<()> {
        let max_connections = match protocol {
            Protocol::Http1 => MAX_CONNECTIONS,
            Protocol::Http2 => MAX_SCALER_CONNECTIONS,
        };
        let serving = Serving { protocol, tls: self.tls, router, max_connections };
        tokio::spawn(server::serve(self.socket, serving, Arc::clone(counters), stopping.clone()))
    }
}

/// The addresses that pd-control listens on.
struct Listeners {
    api: Listener,
    scaler: Option<Listener>,
}

impl Listeners {
    async fn open(config: &Config) -> anyhow::Result<Self> {
        let tls = |protocol| {
            let files = config.tls.clone();
            files.map(|files| Tls::open(files, protocol).map(Arc::new)).transpose()
        };
        // The certificate is read before the address is taken: a bad one is reported first.
        let (api, keda) = (tls(Protocol::Http1)?, tls(Protocol::Http2)?);
        let Config { listen, scaler, .. } = config;
        let socket = TcpListener::bind(listen).await.with_context(|| format!("cannot listen on {listen}"))?;
        let scaler = match scaler {
            None => None,
            Some(on) => {
                let bound = TcpListener::bind(on).await;
                let socket = bound.with_context(|| format!("--scaler-listen: cannot listen on {on}"))?;
                Some(Listener { socket, tls: keda })
            }
        };
        Ok(Self { api: Listener { socket, tls: api }, scaler })
    }
}

/// Where pd-control learns endpoints from.
struct Sources {
    file: Option<(FileSource, EndpointList)>,
    named: Option<NamesSource>,
    cluster: Option<KubernetesSource>,
    pods: Arc<Pods>,
}

impl Sources {
    async fn open(config: &Config) -> anyhow::Result<Self> {
        let file = config.endpoints.clone().map(|path| FileSource::open(path, config.poll)).transpose()?;
        let named = (!config.named.is_empty()).then(|| NamesSource {
            endpoints: config.named.clone(),
            networks: config.networks.clone(),
            interval: names::DEFAULT_INTERVAL,
        });
        let pods = Arc::new(Pods::default());
        let cluster = match config.kubernetes.clone() {
            None => None,
            Some(kubernetes) => Some(kubernetes.source(&pods).await.context("kubernetes")?),
        };
        Ok(Self { file, named, cluster, pods })
    }

    /// The sources' names, for the status page.
    fn names(&self) -> String {
        let names = self.file.iter().map(|(source, _)| source.name());
        let names = names.chain(self.named.iter().map(NamesSource::name));
        names.chain(self.cluster.iter().map(KubernetesSource::name)).collect::<Vec<_>>().join(", ")
    }

    /// Follows each source in a task. Where two sources list an endpoint, the first of them counts: file, names, cluster.
    fn follow(
        self,
        publisher: &mut Publisher,
        sender: &mpsc::Sender<Message>,
        tasks: &mut JoinSet<()>,
    ) -> anyhow::Result<()> {
        if let Some((source, list)) = self.file {
            let place = publisher.add(Some(list));
            tasks.spawn(source.run(Updates::new(place, sender.clone())));
        }
        if let Some(source) = self.named {
            let fixed = source.fixed().map(EndpointList::new).transpose().context("--endpoint")?;
            let place = publisher.add(fixed);
            tasks.spawn(source.run(Updates::new(place, sender.clone())));
        }
        if let Some(source) = self.cluster {
            let place = publisher.add(None);
            tasks.spawn(source.run(Updates::new(place, sender.clone())));
        }
        Ok(())
    }
}

/// What the tasks and the server share.
struct Parts {
    registry: Arc<Registry>,
    counters: Arc<Counters>,
    health: Arc<ListHealth>,
    hub: Arc<SharedHub>,
    scrapes: Arc<Scrapes>,
    pods: Arc<Pods>,
}

impl Parts {
    fn new(sources: &Sources, config: &Config) -> Self {
        Self {
            registry: Arc::new(Registry::new(&new_epoch(), SystemTime::now())),
            counters: Arc::default(),
            health: Arc::new(ListHealth::new(sources.names())),
            hub: Arc::new(SharedHub::new(config.replicas_token.as_ref().or(config.token.as_ref()))),
            scrapes: Arc::default(),
            pods: Arc::clone(&sources.pods),
        }
    }

    /// Publishes the list of the sources, and follows the sources and the engines.
    fn publish(&self, sources: Sources, config: &Config, tasks: &mut JoinSet<()>) -> anyhow::Result<()> {
        let Self { registry, counters, health, hub, scrapes, .. } = self;
        let mut publisher =
            Publisher::new(Arc::clone(registry), Arc::clone(counters), Arc::clone(health), config.eds.clone());
        let (sender, updates) = mpsc::channel(1);
        sources.follow(&mut publisher, &sender, tasks)?;
        if let Some(interval) = config.scrape {
            publisher.ask_engines();
            let how = (interval, &config.engines);
            let to = (Arc::clone(scrapes), Arc::clone(hub));
            let scraper = Scraper::new(Arc::clone(registry), Arc::clone(counters), to, how)?;
            tasks.spawn(scraper.run(Updates::new(usize::MAX, sender)));
        }
        publisher.start()?;
        tasks.spawn(publisher.run(updates));
        Ok(())
    }

    fn demand(&self) -> DemandSource {
        let Self { registry, hub, scrapes, .. } = self;
        DemandSource { registry: Arc::clone(registry), hub: Arc::clone(hub), scrapes: Arc::clone(scrapes) }
    }

    fn app(self, config: Config, demand: &Arc<DemandSource>, stopping: watch::Receiver<bool>) -> App {
        let Self { registry, counters, health, hub, scrapes, pods } = self;
        let asked = config.scrape.map(|_| Arc::clone(&scrapes));
        let metrics = Metrics::new(&counters, Arc::clone(&registry), Arc::clone(&pods), asked);
        App {
            registry,
            counters,
            metrics: Arc::new(metrics.with_demand(Arc::clone(demand))),
            health,
            pods,
            scrapes,
            polls: Arc::default(),
            hub,
            traffic: Arc::default(),
            since: Arc::default(),
            log: config.log,
            exchanges: Arc::new(InFlight::new(MAX_EXCHANGE_BYTES, MAX_HOST_EXCHANGE_BYTES)),
            views: Arc::new(InFlight::new(MAX_VIEWS, MAX_HOST_VIEWS)),
            rights: Rights { filter: config.token, operator: config.operator, replicas: config.replicas_token },
            stopping,
        }
    }
}

impl Kubernetes {
    async fn source(self, pods: &Arc<Pods>) -> anyhow::Result<KubernetesSource> {
        let cluster = match self.cluster {
            Some(cluster) => cluster,
            None => kube::Config::infer().await?,
        };
        KubernetesSource::new(cluster, self.config, self.limits, Arc::clone(pods))
    }
}

/// Names one run: the millisecond of its start, so that names sort by time, and a random number.
fn new_epoch() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let random = RandomState::new().build_hasher().finish();
    format!("{:011x}-{:08x}", now.as_millis(), random & 0xffff_ffff)
}
