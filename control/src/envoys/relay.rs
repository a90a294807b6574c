//! What replicas of `pd-control` pass on to each other.
//!
//! Every replica tells every other what the Envoys told it (and nothing that it heard from another replica), so each has
//! all of it, whichever an Envoy asks. A replica that starts hears it again; one that dies is missed by nobody.

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
    pub async fn relay(self, hub: Arc<SharedHub>, counters: Arc<Counters>) {
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
                            let (peers, hub, counters) = (self.clone(), Arc::clone(&hub), Arc::clone(&counters));
                            tasks.spawn(Peer { address, peers, hub, counters }.run())
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
    hub: Arc<SharedHub>,
    counters: Arc<Counters>,
}

impl Peer {
    /// Tells it everything new; ends when it turns out to be this process itself.
    async fn run(self) {
        let mut have: HashMap<u64, u64> = HashMap::new();
        let mut news = self.hub.subscribe();
        let (mut turns, mut told_at, mut is_lost) = (Vec::new(), None::<Instant>, false);
        let mut client = None;
        loop {
            let _ = timeout(RELAY_HEARTBEAT, news.changed()).await;
            let messages = self.hub.messages(&have);
            let has_blocks =
                messages.iter().flat_map(|message| &message.records).any(|record| !record.blocks.is_empty());
            let is_new = has_blocks || turns_of(&messages) != turns;
            if messages.is_empty() || (!is_new && told_at.is_some_and(|at| at.elapsed() < RELAY_HEARTBEAT)) {
                continue;
            }
            match self.tell_all(&mut client, &messages).await {
                Ok(None) => return,
                Ok(Some(now_has)) => {
                    self.counters.relayed("ok");
                    have = now_has;
                    (turns, told_at) = (turns_of(&messages), Some(Instant::now()));
                    if core::mem::take(&mut is_lost) {
                        tracing::info!("replica {} is back", self.address);
                    }
                    sleep(RELAY_PAUSE).await;
                }
                Err(error) => {
                    self.counters.relayed("failed");
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
        messages: &[ExchangeRequest],
    ) -> anyhow::Result<Option<HashMap<u64, u64>>> {
        let client = match client {
            Some(client) => client,
            None => client.insert(self.peers.client()?),
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

    async fn send(&self, client: &PeerClient, message: &ExchangeRequest) -> anyhow::Result<ExchangeResponse> {
        let scheme = if self.peers.tls.is_some() { "https" } else { "http" };
        let mut request = Request::post(format!("{scheme}://{}{EXCHANGE_PATH}", self.address));
        if let Some(token) = &self.peers.token {
            request = request.header(header::AUTHORIZATION, token.header());
        }
        let request = request.body(Full::from(message.to_bytes()))?;
        let answer = async {
            let answer = client.request(request).await?;
            if answer.status() != StatusCode::OK {
                bail!("status {}", answer.status().as_u16());
            }
            let body = Limited::new(answer.into_body(), MAX_MESSAGE_BYTES)
                .collect()
                .await
                .map_err(anyhow::Error::from_boxed)?;
            ExchangeResponse::from_bytes(&body.to_bytes()).context("its answer is none")
        };
        timeout(RELAY_TIMEOUT, answer).await.context("no answer in time")?
    }
}

/// Which record of each gateway the messages have.
fn turns_of(messages: &[ExchangeRequest]) -> Vec<(u64, u64)> {
    let records = messages.iter().flat_map(|message| &message.records);
    let mut turns: Vec<_> = records.map(|record| (record.gateway, record.turn)).collect();
    turns.sort_unstable();
    turns
}
