//! State that the handlers of the API share.

use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::watch;

use crate::access::rights::Rights;
use crate::api::in_flight::InFlight;
use crate::api::metrics::Metrics;
use crate::api::since::Since;
use crate::api::traffic::Traffic;
use crate::counters::Counters;
use crate::engines::answers::Scrapes;
use crate::envoys::hub::SharedHub;
use crate::envoys::polls::Polls;
use crate::publish::publisher::ListHealth;
use crate::publish::registry::Registry;
use crate::sources::kubernetes::pods::Pods;

/// State that the handlers share.
#[derive(Clone, Debug)]
pub struct App {
    /// The list in force.
    pub registry: Arc<Registry>,
    /// Counters of all parts.
    pub counters: Arc<Counters>,
    /// The metrics of `/metrics`.
    pub metrics: Arc<Metrics>,
    /// Whether the newest list is in force.
    pub health: Arc<ListHealth>,
    /// The class of each pod.
    pub pods: Arc<Pods>,
    /// The last answer of every engine.
    pub scrapes: Arc<Scrapes>,
    /// The last poll of every Envoy.
    pub polls: Arc<Polls>,
    /// The hub of the exchange between Envoys.
    pub hub: Arc<SharedHub>,
    /// Traffic of the last minute.
    pub traffic: Arc<Traffic>,
    /// Since when endpoints are not ready.
    pub since: Arc<Since>,
    /// Bytes of messages of the exchange that pd-control reads, answers or writes now.
    pub exchanges: Arc<InFlight>,
    /// Answers to people and scrapers that pd-control makes or writes now.
    pub views: Arc<InFlight>,
    /// Sets the log level; none: the log is not pd-control's own.
    pub log: Option<LogLevel>,
    /// Which clients may send which requests.
    pub rights: Rights,
    /// Becomes true when pd-control stops and has to answer open polls.
    pub stopping: watch::Receiver<bool>,
}

/// Sets the log level while pd-control runs.
#[derive(Clone)]
pub struct LogLevel(Arc<SetLevel>);

type SetLevel = dyn Fn(&str) -> Result<(), String> + Send + Sync;

/// Address of the client of a connection.
#[derive(Clone, Copy, Debug)]
pub struct ClientAddress(pub IpAddr);

impl LogLevel {
    /// `set` is called with the new level, or with a filter such as `info,pd_control=debug`.
    #[must_use]
    pub fn new(set: impl Fn(&str) -> Result<(), String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(set))
    }

    /// Sets the level or the filter.
    ///
    /// # Errors
    /// One line when it is no level and no filter.
    pub fn set(&self, level: &str) -> Result<(), String> {
        (self.0)(level)
    }
}

impl std::fmt::Debug for LogLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LogLevel(…)")
    }
}
