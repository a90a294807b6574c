//! The gateways of the comparison and the engines behind them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use pd_bench::envoy::{self, Envoy};
use pd_sim::{Engine, Handle, Role};
use pd_support::port::Port;
use pd_support::process::Process;
use serde_json::json;

use crate::Args;
use crate::check;

/// How long a router may take to find its engines.
const START_LIMIT: Duration = Duration::from_secs(60);
/// Lines of a router's log that say why it did not start.
const LOG_LINES: usize = 20;
/// Requests at once that the routers may take: more than any cell sends.
const MAX_REQUESTS: &str = "4096";

/// What clients talk to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Gateway {
    /// No gateway: the client asks a decode server
    Direct,
    /// Envoy without the filter, in front of decode servers
    Plain,
    /// Envoy with the filter, requests served whole
    OneLeg,
    /// Envoy with the filter, requests split over vLLM's servers
    TwoLegs,
    /// The same with the queue on
    Queue,
    /// Envoy with the filter, requests split over SGLang's servers
    TwoLegsSglang,
    /// vllm-router alone, splitting over vLLM's servers
    VllmRouter,
    /// vllm-router behind plain Envoy
    EnvoyVllmRouter,
    /// sglang-router alone, splitting over SGLang's servers
    SglangRouter,
    /// sglang-router behind plain Envoy
    EnvoySglangRouter,
    /// smg alone, splitting over SGLang's servers
    Smg,
    /// smg behind plain Envoy
    EnvoySmg,
}

impl Gateway {
    /// All of them, in the order in which a round measures them.
    pub const ALL: [Self; 12] = [
        Self::Direct,
        Self::Plain,
        Self::OneLeg,
        Self::TwoLegs,
        Self::Queue,
        Self::TwoLegsSglang,
        Self::VllmRouter,
        Self::EnvoyVllmRouter,
        Self::SglangRouter,
        Self::EnvoySglangRouter,
        Self::Smg,
        Self::EnvoySmg,
    ];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Plain => "plain Envoy",
            Self::OneLeg => "filter, one leg",
            Self::TwoLegs => "filter, two legs",
            Self::Queue => "filter, two legs, queue",
            Self::TwoLegsSglang => "filter, two legs, SGLang",
            Self::VllmRouter => "vllm-router",
            Self::EnvoyVllmRouter => "Envoy, vllm-router",
            Self::SglangRouter => "sglang-router",
            Self::EnvoySglangRouter => "Envoy, sglang-router",
            Self::Smg => "smg",
            Self::EnvoySmg => "Envoy, smg",
        }
    }

    /// The router that it contains, if it is another project's.
    pub fn router(self) -> Option<Router> {
        match self {
            Self::VllmRouter | Self::EnvoyVllmRouter => Some(Router::Vllm),
            Self::SglangRouter | Self::EnvoySglangRouter => Some(Router::Sglang),
            Self::Smg | Self::EnvoySmg => Some(Router::Smg),
            _ => None,
        }
    }

    fn has_envoy(self) -> bool {
        !matches!(self, Self::Direct | Self::VllmRouter | Self::SglangRouter | Self::Smg)
    }

    /// Whether it runs two legs.
    pub fn splits(self) -> bool {
        !matches!(self, Self::Direct | Self::Plain | Self::OneLeg)
    }

    /// The engine behind it.
    pub fn engine(self) -> Engine {
        let is_sglang = self == Self::TwoLegsSglang || matches!(self.router(), Some(Router::Sglang | Router::Smg));
        if is_sglang { Engine::Sglang } else { Engine::VllmNixl }
    }
}

/// A router of another project, from PyPI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Router {
    Vllm,
    Sglang,
    Smg,
}

impl Router {
    /// Name of its package and of its program.
    fn package(self) -> &'static str {
        match self {
            Self::Vllm => "vllm-router",
            Self::Sglang => "sglang-router",
            Self::Smg => "smg",
        }
    }

    /// Its command line: each as its own guide has it for prefill and decode servers.
    fn arguments(self, port: u16, metrics: u16, pods: &Pods) -> Vec<String> {
        let mut arguments: Vec<String> = match self {
            Self::Vllm => ["--vllm-pd-disaggregation", "--kv-connector", "nixl", "--log-level", "warning"].as_slice(),
            Self::Sglang | Self::Smg => ["launch", "--pd-disaggregation", "--log-level", "warn"].as_slice(),
        }
        .iter()
        .map(|argument| (*argument).to_owned())
        .collect();
        let mut add = |name: &str, values: &[String]| {
            arguments.push(name.to_owned());
            arguments.extend_from_slice(values);
        };
        add("--port", &[port.to_string()]);
        add("--prometheus-port", &[metrics.to_string()]);
        add("--max-concurrent-requests", &[MAX_REQUESTS.to_owned()]);
        for pod in &pods.prefill {
            let bootstrap = (self != Self::Vllm).then(|| pod.bootstrap_addr().port().to_string());
            add("--prefill", &[Some(pod.url()), bootstrap].into_iter().flatten().collect::<Vec<_>>());
        }
        for pod in &pods.decode {
            add("--decode", &[pod.url()]);
        }
        arguments
    }
}

/// Engine simulators of one kind that answer at once.
pub struct Pods {
    pub prefill: Vec<Handle>,
    pub decode: Vec<Handle>,
}

impl Pods {
    async fn start(engine: Engine) -> Result<Self> {
        let (mut prefill, mut decode) = (Vec::new(), Vec::new());
        for (role, pods) in [(Role::Prefill, &mut prefill), (Role::Decode, &mut decode)] {
            for _ in 0..2 {
                // Routers parse the KV parameters and write them again.
                let config = pd_sim::Config {
                    engine,
                    models: vec!["m".to_owned()],
                    record: 4,
                    rebuilt_params: true,
                    max_num_seqs: 1_024,
                    ..pd_sim::Config::of(role)
                };
                pods.push(pd_sim::start(config).await?);
            }
        }
        Ok(Self { prefill, decode })
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Handle> {
        self.prefill.iter().chain(&self.decode)
    }
}

struct Running {
    address: SocketAddr,
    pids: Vec<u32>,
}

/// Everything that runs.
pub struct Rig {
    running: BTreeMap<Gateway, Running>,
    vllm: Pods,
    sglang: Pods,
    _envoys: Vec<Envoy>,
    _routers: Vec<(Process, [Port; 2])>,
}

impl Rig {
    /// Starts the gateways, and waits until each of them answers.
    pub async fn start(args: &Args, gateways: &[Gateway]) -> Result<Self> {
        let (vllm, sglang) = (Pods::start(Engine::VllmNixl).await?, Pods::start(Engine::Sglang).await?);
        let mut rig = Self { running: BTreeMap::new(), vllm, sglang, _envoys: Vec::new(), _routers: Vec::new() };
        let mut routers: BTreeMap<Router, Running> = BTreeMap::new();
        for &gateway in gateways {
            if let Some(router) = gateway.router()
                && !routers.contains_key(&router)
            {
                routers.insert(router, rig.start_router(args, router)?);
            }
            let router = gateway.router().and_then(|router| routers.get(&router));
            let mut pids = router.map(|router| router.pids.clone()).unwrap_or_default();
            let mut address = router.map_or(rig.vllm.decode[0].addr(), |router| router.address);
            if gateway.has_envoy() {
                let envoy = rig.start_envoy(args, gateway, router.map(|router| router.address)).await?;
                (address, _) = (envoy.gateway, pids.push(envoy.pid()));
                rig._envoys.push(envoy);
            }
            rig.running.insert(gateway, Running { address, pids });
            rig.until_it_answers(gateway).await?;
        }
        Ok(rig)
    }

    /// Where a gateway listens.
    pub fn address(&self, gateway: Gateway) -> Result<SocketAddr> {
        Ok(self.running.get(&gateway).context("the gateway does not run")?.address)
    }

    /// Processes between the client and the engines.
    pub fn pids(&self, gateway: Gateway) -> &[u32] {
        self.running.get(&gateway).map_or(&[], |running| &running.pids)
    }

    /// The engines behind a gateway.
    pub fn pods(&self, gateway: Gateway) -> &Pods {
        if gateway.engine() == Engine::Sglang { &self.sglang } else { &self.vllm }
    }

    fn start_router(&mut self, args: &Args, router: Router) -> Result<Running> {
        let directory = args.out.join(router.package());
        std::fs::create_dir_all(&directory)?;
        let program = args.peers.join(router.package()).join("bin").join(router.package());
        anyhow::ensure!(program.exists(), "{} is missing: run tools/bench/peers/install.sh", program.display());
        let ports = [Port::reserve(), Port::reserve()];
        let [address, metrics] = ports.each_ref().map(Port::address);
        let pods = if router == Router::Vllm { &self.vllm } else { &self.sglang };
        let arguments = router.arguments(address.port(), metrics.port(), pods);
        let process = Process::start(router.package(), &directory, &program, &arguments);
        let pids = vec![process.pid()];
        self._routers.push((process, ports));
        Ok(Running { address, pids })
    }

    async fn start_envoy(&self, args: &Args, gateway: Gateway, upstream: Option<SocketAddr>) -> Result<Envoy> {
        let pods = self.pods(gateway);
        let engines: Vec<SocketAddr> = match upstream {
            Some(router) => vec![router],
            None if gateway == Gateway::Plain => pods.decode.iter().map(Handle::addr).collect(),
            None => pods.all().map(Handle::addr).collect(),
        };
        let mut config = envoy::local(&args.wasm, &engines)?;
        if gateway == Gateway::Plain || upstream.is_some() {
            envoy::make_plain(&mut config, true)?;
        } else {
            envoy::edit_filter(&mut config, |filter| edit(filter, gateway, pods));
        }
        Envoy::start(&args.envoy, &config, &args.out.join(format!("{gateway:?}")), 1).await
    }

    async fn until_it_answers(&self, gateway: Gateway) -> Result<()> {
        let begun = Instant::now();
        loop {
            match check::one(self, gateway, 200, false).await {
                Ok(_) => return Ok(()),
                Err(error) if begun.elapsed() > START_LIMIT => {
                    let logs = self._routers.iter().map(|(process, _)| process.log_tail(LOG_LINES) + &process.out());
                    bail!("{} does not answer: {error:#}\n{}", gateway.name(), logs.collect::<String>());
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    }
}

fn edit(filter: &mut serde_json::Value, gateway: Gateway, pods: &Pods) {
    let endpoint = |pod: &Handle, role: Role| {
        let mut endpoint = json!({"address": pod.addr(), "role": role.name()});
        if gateway == Gateway::TwoLegsSglang {
            endpoint["bootstrap_port"] = json!(pod.bootstrap_addr().port());
        }
        endpoint
    };
    let prefill = pods.prefill.iter().map(|pod| endpoint(pod, Role::Prefill));
    let decode = pods.decode.iter().map(|pod| endpoint(pod, Role::Decode));
    filter["endpoints"] = prefill.chain(decode).collect();
    let pool = &mut filter["pools"]["default"];
    pool["split"] = json!({"mode": if gateway == Gateway::OneLeg { "never" } else { "always" }});
    if gateway == Gateway::TwoLegsSglang {
        pool["engine"] = json!("sglang");
    }
    if gateway == Gateway::Queue {
        pool["queue"] = json!({"enabled": true});
    }
}

/// The module that is measured exists.
pub fn existing(path: &Path) -> Result<u64> {
    Ok(std::fs::metadata(path).with_context(|| path.display().to_string())?.len())
}
