//! Publishes lists: first the hosts to the EDS file, then the list to the filters.
//!
//! Envoy's `override_host` skips a host that Envoy does not know. So pd-control writes a new host into the EDS file
//! before it publishes the endpoint, and keeps a removed host there until every filter has the new list.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::counters::Counters;
use crate::list::{EndpointList, summary};
use crate::publish::eds::{self, EdsFile, Hosts};
use crate::publish::merge::Merge;
use crate::publish::registry::{Change, Registry};
use crate::publish::updates::{Message, Update};

/// How long a removed host stays in the EDS file. Filters act within 50 ms; one that reconnects takes longer.
pub const EDS_LINGER: Duration = Duration::from_secs(1);
/// Pause before pd-control tries again to write the EDS file.
const EDS_RETRY: Duration = Duration::from_secs(2);

/// Whether the newest list is in force; the API and the metrics report it.
#[derive(Debug)]
pub struct ListHealth {
    source: String,
    degraded: Mutex<Option<String>>,
}

/// The only writer of the registry and of the EDS file.
#[derive(Debug)]
pub struct Publisher {
    registry: Arc<Registry>,
    counters: Arc<Counters>,
    health: Arc<ListHealth>,
    eds: Option<Eds>,
    merge: Merge,
    has_started: bool,
}

/// The EDS file, its present hosts and the wanted ones.
#[derive(Debug)]
struct Eds {
    file: EdsFile,
    written: Hosts,
    wanted: Hosts,
    due: Option<Instant>,
}

impl ListHealth {
    /// `source` names the sources for people; nothing is degraded.
    #[must_use]
    pub fn new(source: String) -> Self {
        Self { source, degraded: Mutex::default() }
    }

    /// Names of the sources, as the operator wrote them.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Why the newest list is not in force; `None` when it is.
    #[must_use]
    pub fn degraded(&self) -> Option<String> {
        self.degraded.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets the reason; returns whether it changed.
    fn set(&self, reason: Option<&str>) -> bool {
        let mut degraded = self.degraded.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = degraded.as_deref() != reason;
        *degraded = reason.map(str::to_owned);
        is_new
    }
}

impl Publisher {
    /// A publisher to `registry` and, where there is one, to an EDS file.
    #[must_use]
    pub fn new(
        registry: Arc<Registry>,
        counters: Arc<Counters>,
        health: Arc<ListHealth>,
        eds: Option<EdsFile>,
    ) -> Self {
        let eds = eds.map(|file| Eds { file, written: Hosts::new(), wanted: Hosts::new(), due: None });
        Self { registry, counters, health, eds, merge: Merge::default(), has_started: false }
    }

    /// Adds a source, with its list if it has one at the start; returns its index.
    ///
    /// When several sources list an endpoint, the one that was added first decides its keys.
    pub fn add(&mut self, list: Option<EndpointList>) -> usize {
        let source = self.merge.add();
        if let Some(list) = list {
            self.merge.take(source, Ok(list).into());
        }
        source
    }

    /// Says that the facts of engines will come.
    pub fn ask_engines(&mut self) {
        self.merge.ask_engines();
    }

    /// Publishes the first list if all sources have one. This removes hosts that an earlier run left in the EDS file.
    ///
    /// # Errors
    /// When the EDS file cannot be written. Later, pd-control logs that and tries again; at the start it is a mistake
    /// of the configuration.
    pub fn start(&mut self) -> anyhow::Result<()> {
        let Some(list) = self.merge.list().transpose().map_err(anyhow::Error::msg)? else { return Ok(()) };
        self.has_started = true;
        if let Some(eds) = &mut self.eds {
            eds.wanted = eds::hosts(list.as_slice());
            eds.write(eds.wanted.clone(), &self.counters)
                .with_context(|| format!("cannot write {}", eds.file.path().display()))?;
        }
        self.put_into_force(list);
        Ok(())
    }

    /// Publishes every list that arrives, until all sources have ended.
    pub async fn run(mut self, mut updates: mpsc::Receiver<Message>) {
        loop {
            let due = self.eds.as_ref().and_then(|eds| eds.due);
            tokio::select! {
                update = updates.recv() => match update {
                    Some(Message::Update(source, update)) => self.take(source, update),
                    Some(Message::Facts(facts)) => match self.merge.take_facts(facts) {
                        Some(Ok(list)) => self.publish(list),
                        // `engines` has checked the facts.
                        Some(Err(error)) => tracing::error!("{error}"),
                        None => {}
                    },
                    None => return,
                },
                () = async { tokio::time::sleep_until(due.unwrap_or_else(Instant::now)).await }, if due.is_some() => {
                    if let Some(eds) = &mut self.eds {
                        eds.due = None;
                        eds.try_write(eds.wanted.clone(), &self.counters);
                    }
                }
            }
        }
    }

    fn publish(&mut self, list: EndpointList) {
        if let Some(eds) = &mut self.eds {
            eds.wanted = eds::hosts(list.as_slice());
            let lingering = eds.written.union(&eds.wanted).copied().collect();
            eds.try_write(lingering, &self.counters);
            if eds.due.is_none() && eds.written != eds.wanted {
                eds.due = Some(Instant::now() + EDS_LINGER);
            }
        }
        self.has_started = true;
        self.put_into_force(list);
    }

    fn take(&mut self, source: usize, update: Update) {
        let is_refused = update.list.is_none();
        let Update { list, problem } = self.merge.take(source, update);
        if let Some(list) = list {
            self.publish(list);
        }
        self.counters.degraded.set(i64::from(problem.is_some()));
        let is_new = self.health.set(problem.as_deref());
        match problem {
            None if is_new => tracing::info!(source = self.health.source(), "the newest list is in force again"),
            None => {}
            Some(reason) if is_refused && self.has_started => {
                self.counters.refusals.inc();
                let version = self.registry.current().version();
                tracing::warn!(version, reason, "refused the new list, an older snapshot stays in force");
            }
            Some(reason) if is_new => tracing::warn!(reason, "degraded"),
            Some(_) => {}
        }
    }

    fn put_into_force(&self, list: EndpointList) {
        let Some(change) = self.registry.publish(list, SystemTime::now()) else { return };
        let published = self.registry.current();
        let (version, source) = (published.version(), self.health.source());
        let Change { total, added, changed, removed } = change;
        tracing::info!(version, endpoints = total, added, removed, changed, source, "snapshot");
        tracing::debug!(version, "{}", summary(published.endpoints()));
        if change.total == 0 {
            tracing::warn!(
                source,
                "the list is empty: filters keep their last list, a filter without one refuses requests"
            );
        }
    }
}

impl Eds {
    fn write(&mut self, hosts: Hosts, counters: &Counters) -> std::io::Result<()> {
        let outcome = self.file.write(&hosts);
        match &outcome {
            Ok(true) => {
                counters.eds_writes.inc();
                tracing::debug!("{}: {} hosts", self.file.path().display(), hosts.len());
            }
            Ok(false) => {}
            Err(_) => {
                counters.eds_errors.inc();
            }
        }
        outcome.map(|_| self.written = hosts)
    }

    fn try_write(&mut self, hosts: Hosts, counters: &Counters) {
        if let Err(error) = self.write(hosts, counters) {
            let path = self.file.path().display();
            tracing::error!("cannot write the EDS file {path}, trying again in {EDS_RETRY:?}: {error}");
            self.due = Some(Instant::now() + EDS_RETRY);
        }
    }
}
