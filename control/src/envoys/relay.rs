//! The relay between replicas of pd-control.
//!
//! Each replica sends the records of its own Envoys to every other replica, so every replica has the records of all
//! Envoys. It does not relay records of another replica. A replica that starts gets all records again. When a replica
//! ends, its Envoys send to another replica.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
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
use pd_core::envoys::message::{EXCHANGE_PATH, ExchangeRequest, ExchangeResponse, MAX_MESSAGE_BYTES};
use tokio::net::lookup_host;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::rustls::pki_types::ServerName;

use crate::access::tls::{self, Trust};
use crate::access::token::Token;
use crate::counters::Counters;
use crate::envoys::hub::SharedHub;

/// Pause between two messages to a replica.
const RELAY_PAUSE: Duration = Duration::from_millis(25);
/// Time without news after which a replica gets a message all the same, so that it keeps the gateways.
const RELAY_HEARTBEAT: Duration = Duration::from_secs(1);
/// Time limit of one message.
const RELAY_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause after a replica did not answer.
const RELAY_FAILURE_PAUSE: Duration = Duration::from_secs(1);
/// How often pd-control resolves the name of the replicas.
const RESOLVE_EVERY: Duration = Duration::from_secs(5);
/// Replicas that get messages; further addresses of the name are ignored.
const MAX_REPLICAS: usize = 32;

/// The other replicas of pd-control.
#[derive(Clone, Debug)]
pub struct Replicas {
    /// `host:port` that resolves to all replicas, this one included.
    pub name: String,
    /// Bearer token that the replicas require.
    pub token: Option<Token>,
    /// Set when the replicas speak TLS.
    pub tls: Option<ReplicasTls>,
}

/// TLS of the replicas. Each one's certificate must be for the host of [`Replicas::name`].
#[derive(Clone, Debug, Default)]
pub struct ReplicasTls {
    /// Trusted certificates, PEM; read again when a replica cannot be reached. None: the system's certificates.
    pub ca_file: Option<PathBuf>,
}

type ReplicaClient = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

impl Replicas {
    /// Checks name and certificates without connecting.
    ///
    /// # Errors
    /// One line when the name has no port or is no host name, or the certificates cannot be read.
    pub fn check(&self) -> anyhow::Result<()> {
        self.client().map(drop)
    }

    fn client(&self) -> anyhow::Result<ReplicaClient> {
        let (host, _) = self.name.rsplit_once(':').with_context(|| format!("--peers {}: no port", self.name))?;
        let connector = match &self.tls {
            None => tls::connector(Trust::Nobody, None),
            Some(ReplicasTls { ca_file }) => {
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

    /// Relays the records of the Envoys. Never returns.
    pub async fn relay(self, hub: Arc<SharedHub>, counters: Arc<Counters>) {
        let mut tasks = JoinSet::new();
        let mut running: BTreeMap<SocketAddr, AbortHandle> = BTreeMap::new();
        let mut was_resolved = true;
        loop {
            match lookup_host(&self.name).await {
                Ok(addresses) => {
                    let addresses: Vec<_> = addresses.take(MAX_REPLICAS).collect();
                    running.retain(|address, task| {
                        let is_here = addresses.contains(address);
                        if !is_here {
                            task.abort();
                        }
                        is_here
                    });
                    for address in addresses {
                        running.entry(address).or_insert_with(|| {
                            let (replicas, hub, counters) = (self.clone(), Arc::clone(&hub), Arc::clone(&counters));
                            tasks.spawn(Replica { address, replicas, hub, counters }.run())
                        });
                    }
                    was_resolved = true;
                }
                Err(error) => {
                    if was_resolved {
                        tracing::warn!("cannot resolve --peers {}: {error}", self.name);
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
struct Replica {
    address: SocketAddr,
    replicas: Replicas,
    hub: Arc<SharedHub>,
    counters: Arc<Counters>,
}

impl Replica {
    /// Sends all news. Returns when the address turns out to be this process itself.
    async fn run(self) {
        let mut have: HashMap<u64, u64> = HashMap::new();
        let mut news = self.hub.subscribe();
        let (mut turns, mut sent_at, mut is_lost) = (Vec::new(), None::<Instant>, false);
        let mut client = None;
        loop {
            let _ = timeout(RELAY_HEARTBEAT, news.changed()).await;
            let messages = self.hub.messages(&have);
            let has_blocks =
                messages.iter().flat_map(|message| &message.records).any(|record| !record.blocks.is_empty());
            let is_new = has_blocks || turns_of(&messages) != turns;
            if messages.is_empty() || (!is_new && sent_at.is_some_and(|at| at.elapsed() < RELAY_HEARTBEAT)) {
                continue;
            }
            match self.send_all(&mut client, &messages).await {
                Ok(None) => return,
                Ok(Some(now_has)) => {
                    self.counters.relayed("ok");
                    have = now_has;
                    (turns, sent_at) = (turns_of(&messages), Some(Instant::now()));
                    if core::mem::take(&mut is_lost) {
                        tracing::info!("replica {} answers again", self.address);
                    }
                    sleep(RELAY_PAUSE).await;
                }
                Err(error) => {
                    self.counters.relayed("failed");
                    if !core::mem::replace(&mut is_lost, true) {
                        tracing::warn!("cannot relay to replica {}: {error:#}", self.address);
                    }
                    (have, turns, client) = (HashMap::new(), Vec::new(), None);
                    sleep(RELAY_FAILURE_PAUSE).await;
                }
            }
        }
    }

    /// Sends messages; returns the newest record of each gateway that the replica then has. `None`: the replica is this
    /// process.
    async fn send_all(
        &self,
        client: &mut Option<ReplicaClient>,
        messages: &[ExchangeRequest],
    ) -> anyhow::Result<Option<HashMap<u64, u64>>> {
        let client = match client {
            Some(client) => client,
            None => client.insert(self.replicas.client()?),
        };
        let mut have = HashMap::new();
        for message in messages {
            let response = self.send(client, message).await?;
            if response.hub == message.from {
                return Ok(None);
            }
            have.extend(response.have);
        }
        Ok(Some(have))
    }

    async fn send(&self, client: &ReplicaClient, message: &ExchangeRequest) -> anyhow::Result<ExchangeResponse> {
        let scheme = if self.replicas.tls.is_some() { "https" } else { "http" };
        let mut request = Request::post(format!("{scheme}://{}{EXCHANGE_PATH}", self.address));
        if let Some(token) = &self.replicas.token {
            request = request.header(header::AUTHORIZATION, token.header());
        }
        let request = request.body(Full::from(message.to_bytes()))?;
        let answer = async {
            let answer = client.request(request).await?;
            if answer.status() != StatusCode::OK {
                bail!("it answers status {}", answer.status().as_u16());
            }
            let body = Limited::new(answer.into_body(), MAX_MESSAGE_BYTES)
                .collect()
                .await
                .map_err(anyhow::Error::from_boxed)?;
            ExchangeResponse::from_bytes(&body.to_bytes()).context("its answer is no message of the exchange")
        };
        timeout(RELAY_TIMEOUT, answer).await.context("no answer in time")?
    }
}

/// Gateway and number of each record in the messages.
fn turns_of(messages: &[ExchangeRequest]) -> Vec<(u64, u64)> {
    let records = messages.iter().flat_map(|message| &message.records);
    let mut turns: Vec<_> = records.map(|record| (record.gateway, record.turn)).collect();
    turns.sort_unstable();
    turns
}
