//! A container of a pod: its command and its state.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Container, Pod};
use kube::ResourceExt as _;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::process::Child;
use tokio::time::{Instant, timeout};

use super::container::Program;
use super::environment::variables;
use super::shared::Shared;
use super::{probe, volumes};
use crate::program::signal;

/// Failures in a row that take a container's readiness or life, where its probe does not say.
pub(super) const FAILURES: i32 = 3;

/// A container and what became of it.
pub(super) struct PodContainer {
    pub(super) container: Container,
    /// An init container that lives as long as the pod: it starts before the others, ends after them, and always starts again.
    pub(super) is_sidecar: bool,
    pub(super) program: Program,
    pub(super) variables: BTreeMap<String, String>,
    pub(super) log: PathBuf,
    pub(super) child: Option<Child>,
    pub(super) exit: Option<i32>,
    pub(super) restarts: u32,
    pub(super) start_at: Instant,
    pub(super) probe_at: Instant,
    pub(super) failures: i32,
    pub(super) alive_at: Option<Instant>,
    pub(super) dead: i32,
    /// Whether its startup probe has succeeded.
    pub(super) has_started: bool,
    pub(super) is_ready: bool,
}

impl PodContainer {
    /// Ends a container whose liveness probe fails; it is started again as any other that ended. A startup probe counts in
    /// place of it until it succeeds.
    pub(super) async fn end_if_dead(&mut self, address: IpAddr) {
        let startup = self.container.startup_probe.as_ref().filter(|_| !self.has_started);
        let Some(probe) = startup.or(self.container.liveness_probe.as_ref()) else { return };
        let Some(child) = &self.child else {
            (self.alive_at, self.dead, self.has_started) = (None, 0, false);
            return;
        };
        let seconds = |of: Option<i32>, default| Duration::from_secs(of.map_or(default, |n| n.unsigned_abs().into()));
        let pause = seconds(probe.period_seconds, 10);
        let due =
            *self.alive_at.get_or_insert_with(|| Instant::now() + seconds(probe.initial_delay_seconds, 0) + pause);
        if Instant::now() < due {
            return;
        }
        let is_alive = probe::succeeds(probe, &self.container, address).await;
        self.dead = if is_alive { 0 } else { self.dead + 1 };
        self.alive_at = Some(Instant::now() + pause);
        if startup.is_some() && is_alive {
            (self.alive_at, self.has_started) = (None, true);
            return;
        }
        if self.dead >= probe.failure_threshold.unwrap_or(FAILURES) {
            tracing::warn!("{} is not alive", self.container.name);
            signal(child, Signal::KILL);
        }
    }

    /// Its `containerStatuses` entry.
    pub(super) fn status(&self, start_time: &str) -> Value {
        let state = match (&self.child, self.exit) {
            (Some(_), _) => json!({"running": {"startedAt": start_time}}),
            (None, Some(code)) => json!({"terminated": {"exitCode": code}}),
            (None, None) => json!({"waiting": {"reason": "ContainerCreating"}}),
        };
        json!({
            "name": self.container.name, "image": self.container.image, "imageID": self.container.image, "state": state,
            "ready": self.is_ready, "started": self.child.is_some(), "restartCount": self.restarts,
        })
    }
}

/// Whether an init container lives as long as its pod.
pub(super) fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// Volumes and containers, sidecars first, once everything that they name is there.
pub(super) async fn prepare(
    shared: &Shared,
    pod: &Pod,
    ip: &str,
    folder: &std::path::Path,
) -> anyhow::Result<(BTreeMap<String, PathBuf>, Vec<PodContainer>)> {
    let folders = volumes::write(&shared.client, pod, ip, &folder.join("volumes")).await?;
    let mut containers = Vec::new();
    let now = Instant::now();
    let sidecars = pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten());
    for container in sidecars.chain(pod.spec.iter().flat_map(|spec| &spec.containers)) {
        let program = shared.images.program(container.image.as_deref().unwrap_or_default()).await?;
        let log = shared.state.join(format!("{}.{}.log", pod.name_any(), container.name));
        let looking = variables(shared, pod, ip, container);
        let variables = timeout(Duration::from_secs(10), looking).await.context("the API server is slow")??;
        containers.push(PodContainer {
            container: container.clone(),
            is_sidecar: is_sidecar(container),
            program,
            variables,
            log,
            child: None,
            exit: None,
            restarts: 0,
            start_at: now,
            probe_at: now,
            failures: 0,
            alive_at: None,
            dead: 0,
            has_started: false,
            is_ready: false,
        });
    }
    Ok((folders, containers))
}
