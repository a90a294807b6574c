//! Starts the parts of one pd-control, connects them, and stops them in order.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};

use crate::access::tls::{Protocol, Tls, TlsFiles};
use crate::access::token::Token;
use crate::api::app::{App, LogLevel};
use crate::api::http;
use crate::api::metrics::Metrics;
use crate::api::server::{self, MAX_CONNECTIONS, MAX_SCALER_CONNECTIONS, Serving};
use crate::counters::Counters;
use crate::engines::answers::Scrapes;
use crate::engines::scrape::Scraper;
use crate::envoys::hub::SharedHub;
use crate::envoys::relay::Peers;
use crate::list::EndpointList;
use crate::publish::eds::EdsFile;
use crate::publish::publisher::{ListHealth, Publisher};
use crate::publish::registry::Registry;
use crate::publish::updates::Updates;
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
    /// Allow-list for the addresses of DNS names. Addresses from files and of the command line are not checked.
    pub networks: AllowedNetworks,
    /// Time between two requests to an engine for its metrics; none: pd-control asks no engine.
    pub scrape: Option<Duration>,
    /// Other replicas, to which pd-control relays the exchange of the Envoys; none: pd-control relays nothing.
    pub peers: Option<Peers>,
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
    /// Bearer token that `/v1/…` requires; none: anyone may ask.
    pub token: Option<Token>,
    /// How often to compare the file where the kernel reports no changes.
    pub poll: Duration,
}

/// The Kubernetes cluster to follow.
#[derive(Clone, Debug)]
pub struct Kubernetes {
    /// Namespaces, selectors and InferencePools to follow.
    pub config: KubernetesConfig,
    /// How to reach the API server; none: as `KUBECONFIG` or the pod's service account says.
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
        let Config {
            endpoints,
            kubernetes,
            named,
            networks,
            scrape,
            peers,
            tls,
            log,
            listen,
            scaler,
            eds,
            token,
            poll,
        } = config;
        let open = |files: &TlsFiles, protocol| Tls::open(files.clone(), protocol).map(Arc::new);
        let scaler_tls = tls.as_ref().map(|files| open(files, Protocol::Http2)).transpose()?;
        let tls = tls.as_ref().map(|files| open(files, Protocol::Http1)).transpose()?;
        peers.iter().try_for_each(Peers::check)?;
        let listener = TcpListener::bind(listen).await.with_context(|| format!("cannot listen on {listen}"))?;
        let address = listener.local_addr()?;
        let scaler = match scaler {
            None => None,
            Some(on) => {
                Some(TcpListener::bind(on).await.with_context(|| format!("--scaler-listen: cannot listen on {on}"))?)
            }
        };
        let file = endpoints.map(|path| FileSource::open(path, poll)).transpose()?;
        let named = (!named.is_empty()).then_some(NamesSource {
            endpoints: named,
            networks,
            interval: names::DEFAULT_INTERVAL,
        });
        let pods = Arc::new(Pods::default());
        let cluster = match kubernetes {
            None => None,
            Some(kubernetes) => Some(kubernetes.source(&pods).await.context("kubernetes")?),
        };
        let names = file.iter().map(|(source, _)| source.name());
        let names = names.chain(named.iter().map(NamesSource::name)).chain(cluster.iter().map(KubernetesSource::name));
        let health = Arc::new(ListHealth::new(names.collect::<Vec<_>>().join(", ")));

        let scrapes = Arc::new(Scrapes::default());
        let registry = Arc::new(Registry::new(&new_epoch(), SystemTime::now()));
        let counters = Arc::new(Counters::default());
        let mut publisher = Publisher::new(Arc::clone(&registry), Arc::clone(&counters), Arc::clone(&health), eds);
        let (sender, updates) = mpsc::channel(1);
        let mut tasks = JoinSet::new();
        if let Some((source, list)) = file {
            let place = publisher.add(Some(list));
            tasks.spawn(source.run(Updates::new(place, sender.clone())));
        }
        if let Some(source) = named {
            let fixed = source.fixed().map(EndpointList::new).transpose().context("--endpoint")?;
            let place = publisher.add(fixed);
            tasks.spawn(source.run(Updates::new(place, sender.clone())));
        }
        if let Some(interval) = scrape {
            let (registry, counters) = (Arc::clone(&registry), Arc::clone(&counters));
            let scraper = Scraper::new(registry, counters, Arc::clone(&scrapes), interval);
            tasks.spawn(scraper.run(Updates::new(usize::MAX, sender.clone())));
        }
        if let Some(source) = cluster {
            let place = publisher.add(None);
            tasks.spawn(source.run(Updates::new(place, sender.clone())));
        }
        let hub = Arc::new(SharedHub::default());
        tasks.spawn(Arc::clone(&hub).prune(Arc::clone(&counters)));
        if let Some(peers) = peers {
            tasks.spawn(peers.relay(Arc::clone(&hub), Arc::clone(&counters)));
        }
        publisher.start()?;
        tasks.spawn(publisher.run(updates));
        let (stop, stopping) = watch::channel(false);
        let asked = scrape.map(|_| Arc::clone(&scrapes));
        let demand =
            DemandSource { registry: Arc::clone(&registry), hub: Arc::clone(&hub), scrapes: Arc::clone(&scrapes) };
        let demand = Arc::new(demand);
        let metrics = Metrics::new(&counters, Arc::clone(&registry), Arc::clone(&pods), asked);
        let metrics = metrics.with_demand(Arc::clone(&demand));
        let app = App {
            registry,
            counters: Arc::clone(&counters),
            metrics: Arc::new(metrics),
            health,
            pods,
            scrapes,
            polls: Arc::default(),
            hub,
            log,
            token,
            stopping: stopping.clone(),
        };
        let scheme = if tls.is_some() { "https" } else { "http" };
        tracing::info!(version = env!("CARGO_PKG_VERSION"), "listens on {scheme}://{address}");
        let api =
            Serving { protocol: Protocol::Http1, tls, router: http::router(app), max_connections: MAX_CONNECTIONS };
        let mut servers = vec![tokio::spawn(server::serve(listener, api, Arc::clone(&counters), stopping.clone()))];
        let mut scaler_address = None;
        if let Some(listener) = scaler {
            let history = Arc::new(History::default());
            tasks.spawn(Arc::clone(&history).sample(demand));
            let on = listener.local_addr()?;
            tracing::info!("answers KEDA on {on}");
            scaler_address = Some(on);
            let serving = Serving {
                protocol: Protocol::Http2,
                tls: scaler_tls,
                router: Scaler::new(history, stopping.clone()).router(),
                max_connections: MAX_SCALER_CONNECTIONS,
            };
            servers.push(tokio::spawn(server::serve(listener, serving, counters, stopping)));
        }
        Ok(Self { address, scaler: scaler_address, stop, servers, tasks })
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
