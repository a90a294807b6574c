//! What the handlers of the API read.

use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::watch;

use crate::access::token::Token;
use crate::api::metrics::Metrics;
use crate::counters::Counters;
use crate::engines::answers::Scrapes;
use crate::envoys::hub::SharedHub;
use crate::envoys::polls::Polls;
use crate::publish::publisher::ListHealth;
use crate::publish::registry::Registry;
use crate::sources::kubernetes::pods::Pods;

/// What the handlers read.
#[derive(Clone, Debug)]
pub struct App {
    /// The list in force.
    pub registry: Arc<Registry>,
    /// What is counted.
    pub counters: Arc<Counters>,
    /// What `/metrics` says.
    pub metrics: Arc<Metrics>,
    /// Whether the newest list is in force.
    pub health: Arc<ListHealth>,
    /// What became of each pod.
    pub pods: Arc<Pods>,
    /// What every engine said last.
    pub scrapes: Arc<Scrapes>,
    /// Who polls.
    pub polls: Arc<Polls>,
    /// What the Envoys tell each other.
    pub hub: Arc<SharedHub>,
    /// What is logged.
    pub log: Option<LogLevel>,
    /// Bearer token that `/v1/…` asks for, if any.
    pub token: Option<Token>,
    /// Becomes true when open polls have to be answered.
    pub stopping: watch::Receiver<bool>,
}

/// Changes what is logged.
#[derive(Clone)]
pub struct LogLevel(Arc<SetLevel>);

type SetLevel = dyn Fn(&str) -> Result<(), String> + Send + Sync;

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug)]
pub struct ClientAddress(pub IpAddr);

impl LogLevel {
    /// What is called with a new level or filter.
    #[must_use]
    pub fn new(set: impl Fn(&str) -> Result<(), String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(set))
    }

    /// Logs this level, or what this filter names, from now on.
    ///
    /// # Errors
    /// What is wrong with it, in one line.
    pub fn set(&self, level: &str) -> Result<(), String> {
        (self.0)(level)
    }
}

impl std::fmt::Debug for LogLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LogLevel(…)")
    }
}
