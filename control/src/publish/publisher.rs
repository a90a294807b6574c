//! Puts lists into force: first Envoy's hosts, then the filters' list.
//!
//! A host that Envoy does not know is skipped by `override_host`, so a new host is in the EDS file before any filter
//! hears of it, and a host that left stays there until every filter has heard of that.

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

/// How long a host that left the list stays in the EDS file: filters act within 50 ms, and one that just reconnects
/// needs a moment more.
pub const EDS_LINGER: Duration = Duration::from_secs(1);
/// How long until an EDS file that could not be written is tried again.
const EDS_RETRY: Duration = Duration::from_secs(2);

/// Whether the newest list is the one in force; shared with whoever reports it.
#[derive(Debug)]
pub struct ListHealth {
    source: String,
    degraded: Mutex<Option<String>>,
}

/// The one writer of registry and EDS file.
#[derive(Debug)]
pub struct Publisher {
    registry: Arc<Registry>,
    counters: Arc<Counters>,
    health: Arc<ListHealth>,
    eds: Option<Eds>,
    merge: Merge,
    has_started: bool,
}

/// The EDS file and what is to become of it.
#[derive(Debug)]
struct Eds {
    file: EdsFile,
    written: Hosts,
    wanted: Hosts,
    due: Option<Instant>,
}

impl ListHealth {
    /// Lists come from `source`, and all is well.
    #[must_use]
    pub fn new(source: String) -> Self {
        Self { source, degraded: Mutex::default() }
    }

    /// Where lists come from, as the operator named it.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Why the newest list is not in force, if it is not.
    #[must_use]
    pub fn degraded(&self) -> Option<String> {
        self.degraded.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says whether it was another reason before.
    fn set(&self, reason: Option<&str>) -> bool {
        let mut degraded = self.degraded.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = degraded.as_deref() != reason;
        *degraded = reason.map(str::to_owned);
        is_new
    }
}

impl Publisher {
    /// A publisher to `registry`, and to an EDS file where there is one.
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

    /// Adds a source, with its list where it has one at the start; returns its place. The first one that is added says
    /// what an endpoint is that several list.
    pub fn add(&mut self, list: Option<EndpointList>) -> usize {
        let source = self.merge.add();
        if let Some(list) = list {
            self.merge.take(source, Ok(list).into());
        }
        source
    }

    /// Publishes the list of the start, if all sources have one. Hosts that an earlier run left in the EDS file are gone
    /// afterwards.
    ///
    /// # Errors
    /// When the EDS file cannot be written: later that is only logged and tried again, at the start it is a mistake.
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

    /// Publishes every list that arrives, until the sources are gone.
    pub async fn run(mut self, mut updates: mpsc::Receiver<Message>) {
        loop {
            let due = self.eds.as_ref().and_then(|eds| eds.due);
            tokio::select! {
                update = updates.recv() => match update {
                    Some(Message::Update(source, update)) => self.take(source, update),
                    Some(Message::Facts(facts)) => match self.merge.take_facts(facts) {
                        Some(Ok(list)) => self.publish(list),
                        // Facts are checked where they are made.
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
            None if is_new => tracing::info!(source = self.health.source(), "good again"),
            None => {}
            Some(reason) if is_refused && self.has_started => {
                self.counters.refusals.inc();
                let version = self.registry.current().version();
                tracing::warn!(version, reason, "refused, an older snapshot stays in force");
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
            tracing::warn!(source, "no endpoint is listed: the filters keep the last list, new ones refuse requests");
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
            tracing::error!("cannot write {path} ({error}), trying again in {EDS_RETRY:?}");
            self.due = Some(Instant::now() + EDS_RETRY);
        }
    }
}
