//! Starts the parts, accepts connections within bounds, and stops in order.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};

use crate::access::tls::{Tls, TlsFiles};
use crate::api::http::{self, App, LogLevel, Peer, Token};
use crate::engines::scrape::{Scraper, Scrapes};
use crate::envoys::exchange::{Exchange, Peers};
use crate::list::EndpointList;
use crate::metrics::Metrics;
use crate::publish::eds::EdsFile;
use crate::publish::publisher::{Publisher, Status};
use crate::publish::registry::Registry;
use crate::publish::updates::Updates;
use crate::sources::allow::AllowedNetworks;
use crate::sources::file::watch::FileSource;
use crate::sources::kubernetes::follow::Limits;
use crate::sources::kubernetes::pods::Pods;
use crate::sources::kubernetes::{KubernetesConfig, KubernetesSource};
use crate::sources::names::{self, NamedEndpoint, NamesSource};

/// Connections open at a time; each filter holds one, probes and people a few.
const MAX_CONNECTIONS: usize = 4_096;
/// How long a connection may take over the head of its next request, idle time included. Longer than any pause between
/// a filter's polls, so that only forgotten connections are closed.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long TLS may take to stand.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a request head; a poll needs a few hundred.
const MAX_HEAD_BYTES: usize = 16 << 10;
/// How long answers may take after the signal to stop.
const STOP_TIMEOUT: Duration = Duration::from_millis(800);
/// Pause after a failed accept, such as for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How often the endpoints file is looked at where the kernel reports no changes.
pub const DEFAULT_POLL: Duration = Duration::from_secs(2);

/// Everything that one `pd-control` is told at its start.
#[derive(Clone, Debug)]
pub struct Config {
    /// The endpoints file, if any.
    pub endpoints: Option<PathBuf>,
    /// The cluster, if any.
    pub kubernetes: Option<Kubernetes>,
    /// Endpoints named on the command line.
    pub named: Vec<NamedEndpoint>,
    /// Networks that addresses may be in which DNS tells.
    pub networks: AllowedNetworks,
    /// How often to ask each engine for its metrics; none: never.
    pub scrape: Option<Duration>,
    /// Other replicas, which are told what the Envoys exchange; none: there are none.
    pub peers: Option<Peers>,
    /// Certificate and key; none: no TLS.
    pub tls: Option<TlsFiles>,
    /// What changes the level of the log, if anything.
    pub log: Option<LogLevel>,
    /// Address to listen on; port 0 picks one.
    pub listen: SocketAddr,
    /// The EDS file to keep, if any.
    pub eds: Option<EdsFile>,
    /// Token that filters have to show, if any.
    pub token: Option<Token>,
    /// How often to look at the file where the kernel reports no changes.
    pub poll: Duration,
}

/// The cluster to follow.
#[derive(Clone, Debug)]
pub struct Kubernetes {
    /// What to follow there.
    pub config: KubernetesConfig,
    /// How to reach it; none: as `KUBECONFIG` or the pod's own service account says.
    pub cluster: Option<kube::Config>,
    /// How long requests to it may take.
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
    /// Starts listening, loads the list, writes the EDS file, then serves. Nothing is written when the address is taken.
    ///
    /// # Errors
    /// One line when the address is taken, the endpoints file is bad or the EDS file cannot be written.
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
        let status = Arc::new(Status::new(names.collect::<Vec<_>>().join(", ")));

        let scrapes = Arc::new(Scrapes::default());
        let registry = Arc::new(Registry::new(&new_epoch(), SystemTime::now()));
        let metrics = Arc::new(Metrics::with_engines(
            Arc::clone(&registry),
            Arc::clone(&pods),
            scrape.map(|_| Arc::clone(&scrapes)),
        ));
        let mut publisher = Publisher::new(Arc::clone(&registry), Arc::clone(&metrics), Arc::clone(&status), eds);
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
            let (registry, metrics) = (Arc::clone(&registry), Arc::clone(&metrics));
            let scraper = Scraper::new(registry, metrics, Arc::clone(&scrapes), interval);
            tasks.spawn(scraper.run(Updates::new(usize::MAX, sender.clone())));
        }
        if let Some(source) = cluster {
            let place = publisher.add(None);
            tasks.spawn(source.run(Updates::new(place, sender.clone())));
        }
        let exchange = Arc::new(Exchange::default());
        tasks.spawn(Arc::clone(&exchange).prune(Arc::clone(&metrics)));
        if let Some(peers) = peers {
            tasks.spawn(peers.relay(Arc::clone(&exchange), Arc::clone(&metrics)));
        }
        publisher.start()?;
        tasks.spawn(publisher.run(updates));
        let (stop, stopping) = watch::channel(false);
        let app = App {
            registry,
            metrics: Arc::clone(&metrics),
            status,
            pods,
            scrapes,
            filters: Arc::default(),
            exchange,
            log,
            token,
            stopping: stopping.clone(),
        };
        let has_tls = tls.is_some();
        let server =
            tokio::spawn(serve(listener, tls.map(Arc::new), http::router(app), metrics, stopping, MAX_CONNECTIONS));
        let scheme = if has_tls { "https" } else { "http" };
        tracing::info!(version = env!("CARGO_PKG_VERSION"), "listens on {scheme}://{address}");
        Ok(Self { address, stop, server, tasks })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers the open polls, closes every connection and ends, within a second.
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

/// Names one run, for people in the order of time: the millisecond of its start and something random.
fn new_epoch() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let random = RandomState::new().build_hasher().finish();
    format!("{:011x}-{:08x}", now.as_millis(), random & 0xffff_ffff)
}

async fn serve(
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    router: Router,
    metrics: Arc<Metrics>,
    mut stopping: watch::Receiver<bool>,
    max_connections: usize,
) {
    let slots = Arc::new(Semaphore::new(max_connections));
    let graceful = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopping.wait_for(|is_stopping| *is_stopping) => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            metrics.connections_refused.inc();
            continue;
        };
        let (watcher, router, tls) =
            (graceful.watcher(), router.clone().layer(Extension(Peer(peer.ip()))), tls.clone());
        let open = metrics.connections.clone();
        open.inc();
        tokio::spawn(async move {
            // Answers are single writes; waiting to fill a segment would only delay them.
            let _ = stream.set_nodelay(true);
            let outcome = match tls {
                None => watcher.watch(connection(stream, router)).await,
                Some(tls) => match timeout(HANDSHAKE_TIMEOUT, tls.acceptor().accept(stream)).await {
                    Ok(Ok(stream)) => watcher.watch(connection(stream, router)).await,
                    Ok(Err(error)) => {
                        tracing::debug!("TLS: {error}");
                        Ok(())
                    }
                    Err(_) => Ok(()),
                },
            };
            if let Err(error) = outcome {
                tracing::debug!("connection: {error}");
            }
            drop(slot);
            open.dec();
        });
    }
    drop(listener);
    if timeout(STOP_TIMEOUT, graceful.shutdown()).await.is_err() {
        tracing::warn!("some connections did not end in {STOP_TIMEOUT:?}");
    }
}

type Connection<S> = http1::Connection<TokioIo<S>, TowerToHyperService<Router>>;

fn connection<S: AsyncRead + AsyncWrite + Unpin>(stream: S, router: Router) -> Connection<S> {
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    /// Whether a connection is served; it stays open.
    async fn ask(stream: &mut TcpStream) -> bool {
        let mut answer = Vec::new();
        if stream.write_all(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n").await.is_err() {
            return false;
        }
        // Of a 404 there is a head only.
        while !answer.ends_with(b"\r\n\r\n") {
            if !matches!(stream.read_buf(&mut answer).await, Ok(1..)) {
                return false;
            }
        }
        answer.starts_with(b"HTTP/1.1 404")
    }

    #[tokio::test]
    async fn connections_beyond_the_bound_are_closed_and_counted_until_one_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let registry = Arc::new(Registry::new("e", SystemTime::UNIX_EPOCH));
        let metrics = Arc::new(Metrics::new(registry));
        let (stop, stopping) = watch::channel(false);
        let server = tokio::spawn(serve(listener, None, Router::new(), Arc::clone(&metrics), stopping, 2));
        let (mut first, mut second) =
            (TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap());
        assert!(ask(&mut first).await && ask(&mut second).await);
        assert!(!ask(&mut TcpStream::connect(address).await.unwrap()).await);
        assert_eq!((metrics.connections.get(), metrics.connections_refused.get()), (2, 1));
        assert!(ask(&mut second).await, "the others are not disturbed");
        drop(first);
        let is_free = async {
            while metrics.connections.get() > 1 {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(Duration::from_secs(10), is_free).await.unwrap();
        assert!(ask(&mut TcpStream::connect(address).await.unwrap()).await);
        stop.send_replace(true);
        server.await.unwrap();
    }
}
