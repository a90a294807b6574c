//! The life of one pod.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures::future::join_all;
use k8s_openapi::api::core::v1::{LifecycleHandler, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::process::Child;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use super::container::Start;
use super::pod_container::{FAILURES, PodContainer, is_sidecar, prepare};
use super::shared::{Order, Shared, delete};
use super::{probe, volumes};
use crate::network::{NODE, Sandbox};
use crate::program::signal;

/// Annotation of a pod whose first address is of IPv6, as in a cluster of that family; the other one comes second.
const FAMILY: &str = "pd-cluster/ip-family";
/// Between two looks at a pod's processes.
const TICK: Duration = Duration::from_millis(100);
/// Between two probes, whatever the pod says: tests are impatient.
const PROBE: Duration = Duration::from_millis(500);
/// Before a volume or variable is looked for again.
const RETRY: Duration = Duration::from_millis(500);
/// Between two looks at the secrets and config maps of a pod's volumes.
const REFRESH: Duration = Duration::from_secs(2);
/// Longest pause before a container that ended is started again.
const MAX_BACK_OFF: Duration = Duration::from_secs(10);
/// Grace of pods that do not say.
const GRACE_SECONDS: i64 = 30;

/// Whether a pod has ended for good.
#[must_use]
pub fn is_over(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// Runs a pod from its binding to its end.
pub async fn live(shared: Arc<Shared>, pod: Pod, number: u16, mut orders: watch::Receiver<Order>) {
    let name = pod.name_any();
    let begun = tokio::select! {
        begun = Life::begin(&shared, &pod, number) => begun,
        () = ordered(&mut orders, |order| order != Order::Run) => {
            delete(&shared.client, &pod).await;
            return;
        }
    };
    match begun {
        Ok(mut life) => {
            tracing::info!("{name} starts at {}", life.address());
            life.run(&mut orders).await;
            if !life.is_over {
                life.stop(&mut orders).await;
            } else {
                // The API server knows its end; it stays until somebody deletes it.
                ordered(&mut orders, |order| order != Order::Run).await;
            }
            tracing::info!("{name} has ended");
        }
        Err(error) => tracing::error!("{name}: {error:#}"),
    }
    if *orders.borrow() != Order::Kill {
        delete(&shared.client, &pod).await;
    }
}

struct Life<'a> {
    shared: &'a Shared,
    pod: &'a Pod,
    sandbox: Sandbox,
    folder: PathBuf,
    volumes: BTreeMap<String, PathBuf>,
    containers: Vec<PodContainer>,
    start_time: String,
    /// The status that the API server has.
    reported: Value,
    is_over: bool,
    refresh_at: Instant,
}

impl<'a> Life<'a> {
    async fn begin(shared: &'a Shared, pod: &'a Pod, number: u16) -> anyhow::Result<Self> {
        let sandbox = Sandbox::new(number).await?;
        let ip = addresses(pod, &sandbox)[0].to_string();
        let folder = shared.state.join("pods").join(pod.uid().unwrap_or_default());
        std::fs::create_dir_all(folder.join("etc"))?;
        let namespace = pod.namespace().unwrap_or_default();
        std::fs::write(
            folder.join("etc/resolv.conf"),
            format!(
                "nameserver {NODE}\nsearch {namespace}.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"
            ),
        )?;
        std::fs::write(folder.join("etc/hosts"), format!("127.0.0.1 localhost\n{ip} {}\n", pod.name_any()))?;
        std::fs::write(folder.join("etc/passwd"), "root:x:0:0:root:/tmp:/bin/sh\n")?;
        let spec = pod.spec.as_ref().context("a pod has a spec")?;
        if !spec.init_containers.iter().flatten().all(is_sidecar) {
            bail!("of init containers this node knows those that live on (restartPolicy: Always)");
        }
        let mut last = String::new();
        let (volumes, containers) = loop {
            match prepare(shared, pod, &ip, &folder).await {
                Ok(prepared) => break prepared,
                Err(error) => {
                    let why = format!("{error:#}");
                    if why != last {
                        tracing::warn!("{} waits: {why}", pod.name_any());
                        last = why;
                    }
                    sleep(RETRY).await;
                }
            }
        };
        let start_time = Timestamp::now().to_string();
        let refresh_at = Instant::now() + REFRESH;
        let (reported, is_over) = (Value::Null, false);
        Ok(Self { shared, pod, sandbox, folder, volumes, containers, start_time, reported, is_over, refresh_at })
    }

    fn address(&self) -> IpAddr {
        addresses(self.pod, &self.sandbox)[0]
    }

    /// Until an order comes or all containers have ended for good.
    async fn run(&mut self, orders: &mut watch::Receiver<Order>) {
        loop {
            for index in 0..self.containers.len() {
                self.look(index).await;
            }
            self.report_status().await;
            if self.is_over {
                return;
            }
            if Instant::now() >= self.refresh_at {
                let ip = self.address().to_string();
                let under = self.folder.join("volumes");
                if let Err(error) = volumes::refresh(&self.shared.client, self.pod, &ip, &under).await {
                    tracing::debug!("volumes of {}: {error:#}", self.pod.name_any());
                }
                self.refresh_at = Instant::now() + REFRESH;
            }
            tokio::select! {
                () = ordered(orders, |order| order != Order::Run) => return,
                () = sleep(TICK) => {}
            }
        }
    }

    async fn look(&mut self, index: usize) {
        let address = self.address();
        let waits = self.containers[..index].iter().any(|before| before.is_sidecar && before.child.is_none());
        let restarts = self.policy() == "Always" || self.containers[index].is_sidecar;
        let container = &mut self.containers[index];
        if let Some(child) = &mut container.child
            && let Ok(Some(status)) = child.try_wait()
        {
            tracing::info!("{}: {} ended: {status}", self.pod.name_any(), container.container.name);
            container.child = None;
            container.is_ready = false;
            container.exit = Some(status.code().unwrap_or(137));
            container.start_at = Instant::now() + (RETRY * 2_u32.saturating_pow(container.restarts)).min(MAX_BACK_OFF);
            container.restarts += 1;
        }
        // A container that ran before waits for no sidecar.
        let is_due = if container.exit.is_none() { !waits } else { restarts && Instant::now() >= container.start_at };
        if container.child.is_none() && is_due {
            match self.start(index).and_then(|start| start.spawn()) {
                Ok(child) => self.containers[index].child = Some(child),
                Err(error) => {
                    tracing::error!("{}: {error:#}", self.pod.name_any());
                    self.containers[index].exit = Some(128);
                    self.containers[index].start_at = Instant::now() + MAX_BACK_OFF;
                }
            }
        }
        let container = &mut self.containers[index];
        if container.child.is_some() && Instant::now() >= container.probe_at {
            container.probe_at = Instant::now() + PROBE;
            match container.container.readiness_probe.as_ref() {
                None => container.is_ready = true,
                Some(probe) if probe::succeeds(probe, &container.container, address).await => {
                    (container.is_ready, container.failures) = (true, 0);
                }
                Some(probe) => {
                    container.failures += 1;
                    container.is_ready &= container.failures < probe.failure_threshold.unwrap_or(FAILURES);
                }
            }
        }
        container.end_if_dead(address).await;
    }

    fn start(&self, index: usize) -> anyhow::Result<StartOwned<'_>> {
        let container = &self.containers[index];
        Ok(StartOwned { life: self, container, network: self.sandbox.path()? })
    }

    /// Reports the pod's status to the API server where it has changed.
    async fn report_status(&mut self) {
        let of_pod = || self.containers.iter().filter(|container| !container.is_sidecar);
        let all_ended = self.policy() != "Always"
            && of_pod().all(|container| container.child.is_none() && container.exit.is_some());
        let all_ready = self.containers.iter().all(|container| container.is_ready);
        let phase = match all_ended {
            true if of_pod().all(|container| container.exit == Some(0)) => "Succeeded",
            true => "Failed",
            false => "Running",
        };
        let ready = if all_ready && !all_ended { "True" } else { "False" };
        let [ip, other] = addresses(self.pod, &self.sandbox).map(|address| address.to_string());
        let statuses = |is_sidecar| -> Vec<_> {
            let containers = self.containers.iter().filter(|container| container.is_sidecar == is_sidecar);
            containers.map(|container| container.status(&self.start_time)).collect()
        };
        let (sidecars, others) = (statuses(true), statuses(false));
        let condition = |kind: &str, status: &str| json!({"type": kind, "status": status});
        let status = json!({"status": {
            "phase": phase, "podIP": ip, "podIPs": [{"ip": ip}, {"ip": other}], "hostIP": NODE.to_string(), "startTime": self.start_time,
            "conditions": [
                condition("PodScheduled", "True"), condition("Initialized", "True"),
                condition("ContainersReady", ready), condition("Ready", ready),
            ],
            "initContainerStatuses": sidecars, "containerStatuses": others,
        }});
        if status == self.reported {
            return;
        }
        let pods: Api<Pod> = Api::namespaced(self.shared.client.clone(), &self.pod.namespace().unwrap_or_default());
        match pods.patch_status(&self.pod.name_any(), &PatchParams::default(), &Patch::Merge(&status)).await {
            Ok(_) => {
                self.reported = status;
                self.is_over = all_ended;
            }
            Err(error) => tracing::debug!("status of {}: {error}", self.pod.name_any()),
        }
    }

    /// Hooks, then the signal to end, then the end; all within the grace period.
    async fn stop(&mut self, orders: &mut watch::Receiver<Order>) {
        let spec = self.pod.spec.as_ref();
        let grace = spec.and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(GRACE_SECONDS);
        let end = Instant::now() + Duration::from_secs(u64::try_from(grace).unwrap_or(0));
        tokio::select! {
            () = ordered(orders, |order| order == Order::Kill) => {}
            () = self.end_in_peace() => {}
            () = sleep_until(end) => {}
        }
        for container in &mut self.containers {
            if let Some(child) = &mut container.child {
                signal(child, Signal::KILL);
                let _ = child.wait().await;
            }
        }
        // Its network goes with `self`, its files with the cluster.
    }

    async fn end_in_peace(&mut self) {
        let hooks = (0..self.containers.len()).map(|index| self.hook(index)).collect::<Vec<_>>();
        join_all(hooks).await;
        let (sidecars, containers): (Vec<_>, Vec<_>) =
            self.containers.iter_mut().partition(|container| container.is_sidecar);
        for container in &containers {
            if let Some(child) = &container.child {
                signal(child, Signal::TERM);
            }
        }
        for container in containers {
            if let Some(child) = &mut container.child {
                let _ = child.wait().await;
            }
        }
        // The last that came goes first.
        for container in sidecars.into_iter().rev() {
            if let Some(child) = &mut container.child {
                signal(child, Signal::TERM);
                let _ = child.wait().await;
            }
        }
    }

    async fn hook(&self, index: usize) {
        let container = &self.containers[index];
        let hook = container.container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref());
        let Some(LifecycleHandler { exec, http_get, sleep: pause, .. }) = hook else { return };
        if let Some(pause) = pause {
            sleep(Duration::from_secs(u64::try_from(pause.seconds).unwrap_or(0))).await;
        } else if let Some(get) = http_get {
            // The grace period ends it where it does not end.
            probe::get(get, &container.container, self.address(), Duration::MAX).await;
        } else if let Some(command) = exec.as_ref().and_then(|exec| exec.command.as_ref()) {
            let spawned = self.start(index).and_then(|start| start.as_start().spawn_hook(command));
            match spawned {
                Ok(mut child) => drop(child.wait().await),
                Err(error) => tracing::warn!("hook of {}: {error:#}", self.pod.name_any()),
            }
        }
    }

    fn policy(&self) -> &str {
        self.pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref()).unwrap_or("Always")
    }
}

/// Waits for an order; the end of the node is one, too.
async fn ordered(orders: &mut watch::Receiver<Order>, is_it: impl Fn(Order) -> bool) {
    let _ = orders.wait_for(|order| is_it(*order)).await;
}

/// What [`Start`] borrows.
struct StartOwned<'a> {
    life: &'a Life<'a>,
    container: &'a PodContainer,
    network: String,
}

impl StartOwned<'_> {
    fn as_start(&self) -> Start<'_> {
        Start {
            pod: self.life.pod,
            container: &self.container.container,
            program: &self.container.program,
            variables: &self.container.variables,
            volumes: &self.life.volumes,
            network: &self.network,
            folder: &self.life.folder,
            log: &self.container.log,
        }
    }

    fn spawn(&self) -> anyhow::Result<Child> {
        self.as_start().spawn()
    }
}

/// The pod's addresses, its own first.
fn addresses(pod: &Pod, sandbox: &Sandbox) -> [IpAddr; 2] {
    let (four, six) = (sandbox.address.into(), sandbox.address_six.into());
    if pod.annotations().get(FAMILY).is_some_and(|family| family == "IPv6") { [six, four] } else { [four, six] }
}
