//! The exchange between Envoys: [`pd_core::exchange::hub`] behind HTTP, and what replicas of `pd-control` pass on to each
//! other.
//!
//! Every replica tells every other what the Envoys told it (and nothing that it heard from another replica), so each has
//! all of it, whichever an Envoy asks. A replica that starts hears it again; one that dies is missed by nobody.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use hashbrown::HashMap;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, StatusCode, header};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use pd_core::exchange::hub::Hub;
use pd_core::exchange::message::{EXCHANGE_PATH, Heard, MAX_MESSAGE_BYTES, Told};
use pd_core::exchange::report::Report;
use tokio::net::lookup_host;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, interval, sleep, sleep_until, timeout};
use tokio_rustls::rustls::pki_types::ServerName;

use crate::access::tls::{self, Trust};
use crate::api::http::Token;
use crate::metrics::Metrics;

/// How long a question waits at most.
const MAX_WAIT: Duration = Duration::from_secs(5);
/// Time that news waits for company before a question is answered.
const COMPANY: Duration = Duration::from_millis(5);
/// How often to look for gateways that are gone.
const PRUNE_EVERY: Duration = Duration::from_millis(500);
/// Time between two messages to another replica.
const RELAY_PAUSE: Duration = Duration::from_millis(25);
/// Time without anything new after which a replica is told that the gateways are there.
const RELAY_HEARTBEAT: Duration = Duration::from_secs(1);
/// How long another replica may take.
const RELAY_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause after it did not answer.
const RELAY_FAILURE_PAUSE: Duration = Duration::from_secs(1);
/// How often the name of the replicas is resolved.
const RESOLVE_EVERY: Duration = Duration::from_secs(5);
/// Replicas that are told.
const MAX_PEERS: usize = 32;

/// The hub, and who waits for it.
#[derive(Debug)]
pub struct Exchange {
    hub: Mutex<Hub>,
    /// Counts what mattered to somebody.
    news: watch::Sender<u64>,
    began: Instant,
}

impl Default for Exchange {
    fn default() -> Self {
        let id = RandomState::new().hash_one(std::process::id());
        Self { hub: Mutex::new(Hub::new(id.max(1))), news: watch::Sender::new(0), began: Instant::now() }
    }
}

impl Exchange {
    fn hub(&self) -> MutexGuard<'_, Hub> {
        self.hub.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Takes what somebody tells and answers when there is something new, or after `wait`. `watching` is the number of
    /// Envoys that follow the list.
    pub async fn answer(
        &self,
        told: &Told,
        wait: Duration,
        watching: u64,
        mut stopping: watch::Receiver<bool>,
    ) -> Heard {
        if self.hub().take(told, self.now()) {
            self.news.send_modify(|count| *count += 1);
        }
        let deadline = Instant::now() + wait.min(MAX_WAIT);
        let mut news = self.news.subscribe();
        while Instant::now() < deadline && !self.hub().has_news(told) {
            tokio::select! {
                _ = news.changed() => {}
                _ = stopping.wait_for(|is_stopping| *is_stopping) => break,
                () = sleep_until(deadline) => break,
            }
            sleep(COMPANY).await;
        }
        self.hub().answer(told, watching)
    }

    /// What the gateways report of themselves: number, time since it was heard of, the report.
    #[must_use]
    pub fn reports(&self) -> Vec<(u64, Duration, Report)> {
        let (hub, now) = (self.hub(), self.now());
        let mut reports: Vec<_> =
            hub.reports(now).map(|(id, age, text)| (id, age, Report::from_json(text).unwrap_or_default())).collect();
        reports.sort_unstable_by_key(|(id, ..)| *id);
        reports
    }

    /// Lets go of gateways that are silent, for good.
    pub async fn prune(self: Arc<Self>, metrics: Arc<Metrics>) {
        let mut ticks = interval(PRUNE_EVERY);
        loop {
            ticks.tick().await;
            let (is_news, count) = {
                let mut hub = self.hub();
                (hub.prune(self.now()), hub.reports(self.now()).count())
            };
            metrics.gateways.set(i64::try_from(count).unwrap_or(i64::MAX));
            if is_news {
                self.news.send_modify(|count| *count += 1);
            }
        }
    }
}

/// Other replicas of `pd-control`.
#[derive(Clone, Debug)]
pub struct Peers {
    /// `host:port` that resolves to all of them, this one included.
    pub name: String,
    /// Token that they ask for.
    pub token: Option<Token>,
    /// Set where they speak TLS.
    pub tls: Option<PeersTls>,
}

/// How replicas that speak TLS are known: they have a certificate for the host of [`Peers::name`].
#[derive(Clone, Debug, Default)]
pub struct PeersTls {
    /// Certificates that vouch for theirs, PEM; read again when a replica cannot be reached. Else the system's.
    pub ca_file: Option<PathBuf>,
}

type PeerClient = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

impl Peers {
    /// Whether they can be asked at all.
    ///
    /// # Errors
    /// A bad name, or certificates that cannot be read; one line.
    pub fn check(&self) -> anyhow::Result<()> {
        self.client().map(drop)
    }

    fn client(&self) -> anyhow::Result<PeerClient> {
        let (host, _) = self.name.rsplit_once(':').with_context(|| format!("--peers {}: no port", self.name))?;
        let connector = match &self.tls {
            None => tls::connector(Trust::Nobody, None),
            Some(PeersTls { ca_file }) => {
                let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned());
                let name = name.with_context(|| format!("--peers {}", self.name))?;
                let trust = match ca_file {
                    Some(path) => Trust::File { option: "--peers-ca-file", path },
                    None => Trust::System,
                };
                tls::connector(trust, Some(name))
            }
        };
        let mut builder = Client::builder(TokioExecutor::new());
        let builder = builder.pool_timer(TokioTimer::new()).pool_idle_timeout(Duration::from_secs(30));
        Ok(builder.build(connector?))
    }

    /// Passes on what the Envoys tell, for good.
    pub async fn relay(self, exchange: Arc<Exchange>, metrics: Arc<Metrics>) {
        let mut tasks = JoinSet::new();
        let mut running: BTreeMap<SocketAddr, AbortHandle> = BTreeMap::new();
        let mut was_resolved = true;
        loop {
            match lookup_host(&self.name).await {
                Ok(addresses) => {
                    let addresses: Vec<_> = addresses.take(MAX_PEERS).collect();
                    running.retain(|address, task| {
                        let is_here = addresses.contains(address);
                        if !is_here {
                            task.abort();
                        }
                        is_here
                    });
                    for address in addresses {
                        running.entry(address).or_insert_with(|| {
                            let (peers, exchange, metrics) =
                                (self.clone(), Arc::clone(&exchange), Arc::clone(&metrics));
                            tasks.spawn(Peer { address, peers, exchange, metrics }.run())
                        });
                    }
                    was_resolved = true;
                }
                Err(error) => {
                    if was_resolved {
                        tracing::warn!("--peers {}: {error}", self.name);
                    }
                    was_resolved = false;
                }
            }
            sleep(RESOLVE_EVERY).await;
            while tasks.try_join_next().is_some() {}
        }
    }
}

/// One other replica.
struct Peer {
    address: SocketAddr,
    peers: Peers,
    exchange: Arc<Exchange>,
    metrics: Arc<Metrics>,
}

impl Peer {
    /// Tells it everything new; ends when it turns out to be this process itself.
    async fn run(self) {
        let mut have: HashMap<u64, u64> = HashMap::new();
        let mut news = self.exchange.news.subscribe();
        let (mut turns, mut told_at, mut is_lost) = (Vec::new(), None::<Instant>, false);
        let mut client = None;
        loop {
            let _ = timeout(RELAY_HEARTBEAT, news.changed()).await;
            let messages = self.exchange.hub().relay(&have, self.exchange.now());
            let has_blocks = messages.iter().flat_map(|told| &told.records).any(|record| !record.blocks.is_empty());
            let is_new = has_blocks || turns_of(&messages) != turns;
            if messages.is_empty() || (!is_new && told_at.is_some_and(|at| at.elapsed() < RELAY_HEARTBEAT)) {
                continue;
            }
            match self.tell_all(&mut client, &messages).await {
                Ok(None) => return,
                Ok(Some(now_has)) => {
                    self.metrics.relayed("ok");
                    have = now_has;
                    (turns, told_at) = (turns_of(&messages), Some(Instant::now()));
                    if core::mem::take(&mut is_lost) {
                        tracing::info!("replica {} is back", self.address);
                    }
                    sleep(RELAY_PAUSE).await;
                }
                Err(error) => {
                    self.metrics.relayed("failed");
                    if !core::mem::replace(&mut is_lost, true) {
                        tracing::warn!("replica {}: {error:#}", self.address);
                    }
                    (have, turns, client) = (HashMap::new(), Vec::new(), None);
                    sleep(RELAY_FAILURE_PAUSE).await;
                }
            }
        }
    }

    /// What the replica has of each gateway then; `None`: it is this process itself.
    async fn tell_all(
        &self,
        client: &mut Option<PeerClient>,
        messages: &[Told],
    ) -> anyhow::Result<Option<HashMap<u64, u64>>> {
        let client = match client {
            Some(client) => client,
            None => client.insert(self.peers.client()?),
        };
        let mut have = HashMap::new();
        for told in messages {
            let heard = self.tell(client, told).await?;
            if heard.hub == told.from {
                return Ok(None);
            }
            have.extend(heard.have);
        }
        Ok(Some(have))
    }

    async fn tell(&self, client: &PeerClient, told: &Told) -> anyhow::Result<Heard> {
        let scheme = if self.peers.tls.is_some() { "https" } else { "http" };
        let mut request = Request::post(format!("{scheme}://{}{EXCHANGE_PATH}", self.address));
        if let Some(token) = &self.peers.token {
            request = request.header(header::AUTHORIZATION, token.header());
        }
        let request = request.body(Full::from(told.to_bytes()))?;
        let answer = async {
            let answer = client.request(request).await?;
            if answer.status() != StatusCode::OK {
                bail!("status {}", answer.status().as_u16());
            }
            let body = Limited::new(answer.into_body(), MAX_MESSAGE_BYTES)
                .collect()
                .await
                .map_err(anyhow::Error::from_boxed)?;
            Heard::from_bytes(&body.to_bytes()).context("its answer is none")
        };
        timeout(RELAY_TIMEOUT, answer).await.context("no answer in time")?
    }
}

/// Which record of each gateway the messages have.
fn turns_of(messages: &[Told]) -> Vec<(u64, u64)> {
    let records = messages.iter().flat_map(|told| &told.records);
    let mut turns: Vec<_> = records.map(|record| (record.gateway, record.turn)).collect();
    turns.sort_unstable();
    turns
}
