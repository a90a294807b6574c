//! The life of one pod.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures::future::join_all;
use k8s_openapi::api::core::v1::{ConfigMap, Container, EnvVar, LifecycleHandler, Pod, Secret};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::process::Child;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::container::{Program, Start, expand};
use super::{NAME, Order, Shared, delete, probe, volumes};
use crate::network::{KUBERNETES, NODE, Sandbox};
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
/// Failures in a row that take a container's readiness or life, where its probe does not say.
const FAILURES: i32 = 3;

/// Whether a pod has ended for good.
#[must_use]
pub fn is_over(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// A field that the downward API knows; empty for others.
#[must_use]
pub fn field(pod: &Pod, ip: &str, path: &str) -> String {
    let quoted = |path: &str| path.split('\'').nth(1).unwrap_or_default().to_owned();
    match path {
        "metadata.name" => pod.name_any(),
        "metadata.namespace" => pod.namespace().unwrap_or_default(),
        "metadata.uid" => pod.uid().unwrap_or_default(),
        "spec.nodeName" => NAME.to_owned(),
        "spec.serviceAccountName" => {
            pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone()).unwrap_or_default()
        }
        "status.podIP" | "status.podIPs" => ip.to_owned(),
        "status.hostIP" | "status.hostIPs" => NODE.to_string(),
        _ if path.starts_with("metadata.labels[") => pod.labels().get(&quoted(path)).cloned().unwrap_or_default(),
        _ if path.starts_with("metadata.annotations[") => {
            pod.annotations().get(&quoted(path)).cloned().unwrap_or_default()
        }
        _ => String::new(),
    }
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
                // Its end was told; it stays until somebody deletes it.
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
    parts: Vec<Part>,
    start_time: String,
    told: Value,
    is_over: bool,
    refresh_at: Instant,
}

/// A container and what became of it.
struct Part {
    container: Container,
    /// An init container that lives as long as the pod: it starts before the others, ends after them, and always starts again.
    is_sidecar: bool,
    program: Program,
    variables: BTreeMap<String, String>,
    log: PathBuf,
    child: Option<Child>,
    exit: Option<i32>,
    restarts: u32,
    start_at: Instant,
    probe_at: Instant,
    failures: i32,
    alive_at: Option<Instant>,
    dead: i32,
    is_ready: bool,
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
        let (volumes, parts) = loop {
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
        let (told, is_over) = (Value::Null, false);
        Ok(Self { shared, pod, sandbox, folder, volumes, parts, start_time, told, is_over, refresh_at })
    }

    fn address(&self) -> IpAddr {
        addresses(self.pod, &self.sandbox)[0]
    }

    /// Until an order comes or all containers have ended for good.
    async fn run(&mut self, orders: &mut watch::Receiver<Order>) {
        loop {
            for index in 0..self.parts.len() {
                self.look(index).await;
            }
            self.tell().await;
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
        let waits = self.parts[..index].iter().any(|before| before.is_sidecar && before.child.is_none());
        let restarts = self.policy() == "Always" || self.parts[index].is_sidecar;
        let part = &mut self.parts[index];
        if let Some(child) = &mut part.child
            && let Ok(Some(status)) = child.try_wait()
        {
            tracing::info!("{}: {} ended: {status}", self.pod.name_any(), part.container.name);
            part.child = None;
            part.is_ready = false;
            part.exit = Some(status.code().unwrap_or(137));
            part.start_at = Instant::now() + (RETRY * 2_u32.saturating_pow(part.restarts)).min(MAX_BACK_OFF);
            part.restarts += 1;
        }
        // A container that ran before waits for no sidecar.
        let is_due = if part.exit.is_none() { !waits } else { restarts && Instant::now() >= part.start_at };
        if part.child.is_none() && is_due {
            match self.start(index).and_then(|start| start.spawn()) {
                Ok(child) => self.parts[index].child = Some(child),
                Err(error) => {
                    tracing::error!("{}: {error:#}", self.pod.name_any());
                    self.parts[index].exit = Some(128);
                    self.parts[index].start_at = Instant::now() + MAX_BACK_OFF;
                }
            }
        }
        let part = &mut self.parts[index];
        if part.child.is_some() && Instant::now() >= part.probe_at {
            part.probe_at = Instant::now() + PROBE;
            match part.container.readiness_probe.as_ref() {
                None => part.is_ready = true,
                Some(probe) if probe::succeeds(probe, &part.container, address).await => {
                    (part.is_ready, part.failures) = (true, 0);
                }
                Some(probe) => {
                    part.failures += 1;
                    part.is_ready &= part.failures < probe.failure_threshold.unwrap_or(FAILURES);
                }
            }
        }
        part.end_if_dead(address).await;
    }

    fn start(&self, index: usize) -> anyhow::Result<StartOwned<'_>> {
        let part = &self.parts[index];
        Ok(StartOwned { life: self, part, network: self.sandbox.path()? })
    }

    /// Tells the API server what is new.
    async fn tell(&mut self) {
        let of_pod = || self.parts.iter().filter(|part| !part.is_sidecar);
        let all_ended = self.policy() != "Always" && of_pod().all(|part| part.child.is_none() && part.exit.is_some());
        let all_ready = self.parts.iter().all(|part| part.is_ready);
        let phase = match all_ended {
            true if of_pod().all(|part| part.exit == Some(0)) => "Succeeded",
            true => "Failed",
            false => "Running",
        };
        let ready = if all_ready && !all_ended { "True" } else { "False" };
        let [ip, other] = addresses(self.pod, &self.sandbox).map(|address| address.to_string());
        let statuses = |is_sidecar| -> Vec<_> {
            let parts = self.parts.iter().filter(|part| part.is_sidecar == is_sidecar);
            parts.map(|part| part.status(&self.start_time)).collect()
        };
        let (sidecars, containers) = (statuses(true), statuses(false));
        let condition = |kind: &str, status: &str| json!({"type": kind, "status": status});
        let status = json!({"status": {
            "phase": phase, "podIP": ip, "podIPs": [{"ip": ip}, {"ip": other}], "hostIP": NODE.to_string(), "startTime": self.start_time,
            "conditions": [
                condition("PodScheduled", "True"), condition("Initialized", "True"),
                condition("ContainersReady", ready), condition("Ready", ready),
            ],
            "initContainerStatuses": sidecars, "containerStatuses": containers,
        }});
        if status == self.told {
            return;
        }
        let pods: Api<Pod> = Api::namespaced(self.shared.client.clone(), &self.pod.namespace().unwrap_or_default());
        match pods.patch_status(&self.pod.name_any(), &PatchParams::default(), &Patch::Merge(&status)).await {
            Ok(_) => {
                self.told = status;
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
        for part in &mut self.parts {
            if let Some(child) = &mut part.child {
                signal(child, Signal::KILL);
                let _ = child.wait().await;
            }
        }
        // Its network goes with `self`, its files with the cluster.
    }

    async fn end_in_peace(&mut self) {
        let hooks = (0..self.parts.len()).map(|index| self.hook(index)).collect::<Vec<_>>();
        join_all(hooks).await;
        let (sidecars, containers): (Vec<_>, Vec<_>) = self.parts.iter_mut().partition(|part| part.is_sidecar);
        for part in &containers {
            if let Some(child) = &part.child {
                signal(child, Signal::TERM);
            }
        }
        for part in containers {
            if let Some(child) = &mut part.child {
                let _ = child.wait().await;
            }
        }
        // The last that came goes first.
        for part in sidecars.into_iter().rev() {
            if let Some(child) = &mut part.child {
                signal(child, Signal::TERM);
                let _ = child.wait().await;
            }
        }
    }

    async fn hook(&self, index: usize) {
        let part = &self.parts[index];
        let hook = part.container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref());
        let Some(LifecycleHandler { exec, http_get, sleep: pause, .. }) = hook else { return };
        if let Some(pause) = pause {
            sleep(Duration::from_secs(u64::try_from(pause.seconds).unwrap_or(0))).await;
        } else if let Some(get) = http_get {
            // The grace period ends it where it does not end.
            probe::get(get, &part.container, self.address(), Duration::MAX).await;
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
    part: &'a Part,
    network: String,
}

impl StartOwned<'_> {
    fn as_start(&self) -> Start<'_> {
        Start {
            pod: self.life.pod,
            container: &self.part.container,
            program: &self.part.program,
            variables: &self.part.variables,
            volumes: &self.life.volumes,
            network: &self.network,
            folder: &self.life.folder,
            log: &self.part.log,
        }
    }

    fn spawn(&self) -> anyhow::Result<Child> {
        self.as_start().spawn()
    }
}

impl Part {
    /// Ends a container whose liveness probe fails; it is started again as any other that ended.
    async fn end_if_dead(&mut self, address: IpAddr) {
        let Some(probe) = &self.container.liveness_probe else { return };
        let Some(child) = &self.child else {
            (self.alive_at, self.dead) = (None, 0);
            return;
        };
        let seconds = |of: Option<i32>, default| Duration::from_secs(of.map_or(default, |n| n.unsigned_abs().into()));
        let pause = seconds(probe.period_seconds, 10);
        let due =
            *self.alive_at.get_or_insert_with(|| Instant::now() + seconds(probe.initial_delay_seconds, 0) + pause);
        if Instant::now() < due {
            return;
        }
        self.dead = if probe::succeeds(probe, &self.container, address).await { 0 } else { self.dead + 1 };
        self.alive_at = Some(Instant::now() + pause);
        if self.dead >= probe.failure_threshold.unwrap_or(FAILURES) {
            tracing::warn!("{} is not alive", self.container.name);
            signal(child, Signal::KILL);
        }
    }

    fn status(&self, start_time: &str) -> Value {
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

/// The pod's addresses, its own first.
fn addresses(pod: &Pod, sandbox: &Sandbox) -> [IpAddr; 2] {
    let (four, six) = (sandbox.address.into(), sandbox.address_six.into());
    if pod.annotations().get(FAMILY).is_some_and(|family| family == "IPv6") { [six, four] } else { [four, six] }
}

fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// Volumes and containers, sidecars first, once everything that they name is there.
async fn prepare(
    shared: &Shared,
    pod: &Pod,
    ip: &str,
    folder: &std::path::Path,
) -> anyhow::Result<(BTreeMap<String, PathBuf>, Vec<Part>)> {
    let folders = volumes::write(&shared.client, pod, ip, &folder.join("volumes")).await?;
    let mut parts = Vec::new();
    let now = Instant::now();
    let sidecars = pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten());
    for container in sidecars.chain(pod.spec.iter().flat_map(|spec| &spec.containers)) {
        let program = shared.images.program(container.image.as_deref().unwrap_or_default()).await?;
        let log = shared.state.join(format!("{}.{}.log", pod.name_any(), container.name));
        let looking = variables(shared, pod, ip, container);
        let variables = timeout(Duration::from_secs(10), looking).await.context("the API server is slow")??;
        parts.push(Part {
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
            is_ready: false,
        });
    }
    Ok((folders, parts))
}

async fn variables(
    shared: &Shared,
    pod: &Pod,
    ip: &str,
    container: &Container,
) -> anyhow::Result<BTreeMap<String, String>> {
    let mut variables: BTreeMap<String, String> = [
        ("KUBERNETES_SERVICE_HOST".to_owned(), KUBERNETES.to_string()),
        ("KUBERNETES_SERVICE_PORT".to_owned(), "443".to_owned()),
        ("HOSTNAME".to_owned(), pod.name_any()),
    ]
    .into();
    for variable in container.env.iter().flatten() {
        if let Some(value) = value(shared, pod, ip, variable, &variables).await? {
            variables.insert(variable.name.clone(), value);
        }
    }
    Ok(variables)
}

async fn value(
    shared: &Shared,
    pod: &Pod,
    ip: &str,
    variable: &EnvVar,
    known: &BTreeMap<String, String>,
) -> anyhow::Result<Option<String>> {
    let namespace = pod.namespace().unwrap_or_default();
    let Some(from) = &variable.value_from else {
        return Ok(Some(expand(variable.value.as_deref().unwrap_or_default(), known)));
    };
    if let Some(of) = &from.field_ref {
        return Ok(Some(field(pod, ip, &of.field_path)));
    }
    let (found, optional, what) = if let Some(of) = &from.secret_key_ref {
        let secrets: Api<Secret> = Api::namespaced(shared.client.clone(), &namespace);
        let data = secrets.get_opt(&of.name).await?.and_then(|secret| secret.data?.remove(&of.key));
        let text = data.map(|bytes| String::from_utf8(bytes.0)).transpose()?;
        (text, of.optional, format!("key {} of secret {}", of.key, of.name))
    } else if let Some(of) = &from.config_map_key_ref {
        let maps: Api<ConfigMap> = Api::namespaced(shared.client.clone(), &namespace);
        let text = maps.get_opt(&of.name).await?.and_then(|map| map.data?.remove(&of.key));
        (text, of.optional, format!("key {} of config map {}", of.key, of.name))
    } else {
        // Resources of the container: there are no limits here.
        return Ok(None);
    };
    if found.is_none() && optional != Some(true) {
        bail!("there is no {what} for {}", variable.name);
    }
    Ok(found)
}
