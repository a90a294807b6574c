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

use crate::access::tls::{Tls, TlsFiles};
use crate::access::token::Token;
use crate::api::app::{App, LogLevel};
use crate::api::http;
use crate::api::metrics::Metrics;
use crate::api::server::{self, MAX_CONNECTIONS};
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
    stop: watch::Sender<bool>,
    server: JoinHandle<()>,
    tasks: JoinSet<()>,
}

impl Control {
    /// Listens, reads the list, writes the EDS file, then serves. When the address is in use, nothing is written.
    ///
    /// # Errors
    /// One line when the address is in use, the endpoints file is refused or the EDS file cannot be written.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        let Config { endpoints, kubernetes, named, networks, scrape, peers, tls, log, listen, eds, token, poll } =
            config;
        let tls = tls.map(Tls::open).transpose()?;
        peers.iter().try_for_each(Peers::check)?;
        let listener = TcpListener::bind(listen).await.with_context(|| format!("cannot listen on {listen}"))?;
        let address = listener.local_addr()?;
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
        let metrics = Metrics::new(&counters, Arc::clone(&registry), Arc::clone(&pods), asked);
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
        let has_tls = tls.is_some();
        let server = tokio::spawn(server::serve(
            listener,
            tls.map(Arc::new),
            http::router(app),
            counters,
            stopping,
            MAX_CONNECTIONS,
        ));
        let scheme = if has_tls { "https" } else { "http" };
        tracing::info!(version = env!("CARGO_PKG_VERSION"), "listens on {scheme}://{address}");
        Ok(Self { address, stop, server, tasks })
    }

    /// The address that pd-control listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers the open polls, closes every connection and stops all tasks, within a second.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        // Fails only when the server panicked, and then there is nothing left to stop.
        let _ = self.server.await;
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
