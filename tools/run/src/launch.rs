//! The whole run: check, start, wait until ready, say so, and stop.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use pd_core::wire::Endpoint;
use pd_support::config::Config;
use pd_support::places;
use tokio::process::Command;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::Args;
use crate::banner::Banner;
use crate::engines::{self, Origin, role_name};
use crate::envoy::render;
use crate::ports;
use crate::probe;
use crate::process::{Output, Processes};

/// How long a part may take until it is ready. Envoy compiles the module at its start, which a slow machine feels.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// The same for a vLLM server, which takes its time.
const VLLM_READY_LIMIT: Duration = Duration::from_secs(420);
/// Becomes a vLLM server.
const VLLM_SERVE: &str = "tests/vllm/serve.sh";
/// Milliseconds until Envoy writes access log lines out; its default of 10,000 hides what was just asked.
const LOG_FLUSH_MS: &str = "100";
/// Model of the simulators.
const SIMULATED_MODEL: &str = "sim";

/// What will run.
struct Plan {
    /// Everything that a run leaves is in here.
    directory: PathBuf,
    engines: Vec<Endpoint>,
    origin: Origin,
    /// Where NIXL's peers meet each of the engines, where these are vLLM servers.
    meetings: Vec<SocketAddr>,
    speed: f64,
    endpoints_file: PathBuf,
    eds_file: PathBuf,
    envoy: PathBuf,
    envoy_config: PathBuf,
    gateway: SocketAddr,
    admin: SocketAddr,
    control: SocketAddr,
}

/// Does all of it; returns when a signal or the end of a child ended the run.
///
/// # Errors
/// The one line to print.
pub async fn run(args: Args) -> anyhow::Result<()> {
    // Before anything starts, so that no signal is missed.
    let mut stop = StopSignals::new()?;
    let mut processes = Processes::default();
    let outcome = tokio::select! {
        outcome = serve(args, &mut processes) => outcome,
        () = stop.next() => Ok(()),
    };
    if outcome.is_ok() {
        println!("\nstopping");
    }
    tokio::select! {
        () = processes.stop() => {}
        () = stop.next() => {}
    }
    processes.kill().await;
    outcome
}

async fn serve(args: Args, processes: &mut Processes) -> anyhow::Result<()> {
    let began = Instant::now();
    let plan = Plan::new(&args)?;
    let version = envoy_version(&plan.envoy).await?;
    ports::check(&plan.listening())?;
    if plan.origin == Origin::Own {
        engines::reach(&plan.engines).await?;
    }
    plan.start_engines(processes).await?;
    plan.start_control(processes).await?;
    plan.start_envoy(processes, &version).await?;
    println!("ready after {:.1} s", began.elapsed().as_secs_f64());

    let model = plan.model(args.model).await;
    let Plan { gateway, admin, control, .. } = plan;
    let (endpoints, logs) = (&plan.endpoints_file, &plan.directory);
    println!("{}", Banner { gateway, admin, control, endpoints, logs, model: &model }.text());
    Err(processes.one_ended().await)
}

impl Plan {
    fn new(args: &Args) -> anyhow::Result<Self> {
        let local = Path::new("envoy/local.yaml");
        ensure!(local.exists(), "envoy/local.yaml is not here: run it from the repository's root");
        ensure!(args.speed.is_finite() && args.speed >= 0.0, "--speed must be 0 or more");
        let template = Config::read(local)?;
        let module = template.module();
        ensure!(Path::new(module).exists(), "{module} is not built: run `make build`");

        let (origin, engines, meetings) = if args.vllm {
            ensure!(Path::new(VLLM_SERVE).exists(), "{VLLM_SERVE} is not here: run it from the repository's root");
            let (engines, meetings) = engines::vllm(args.port_offset)?.into_iter().unzip();
            (Origin::Vllm, engines, meetings)
        } else if args.prefill.is_empty() {
            (Origin::Simulated, engines::simulators(args.port_offset)?, Vec::new())
        } else {
            (Origin::Own, engines::own(&args.prefill, &args.decode, args.engine)?, Vec::new())
        };
        std::fs::create_dir_all(&args.directory).with_context(|| args.directory.display().to_string())?;
        let (config, envoy_config, endpoints_file, eds_file) = if origin == Origin::Simulated && args.port_offset == 0 {
            (template, local.to_owned(), "envoy/endpoints.yaml".into(), "envoy/eds.json".into())
        } else {
            // A directory of its own: Envoy watches it for a new EDS file.
            let directory = args.directory.join("envoy");
            std::fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
            let [config_file, endpoints_file, eds_file] =
                ["local.json", "endpoints.yaml", "eds.json"].map(|name| directory.join(name));
            let config = render(&template, args.port_offset, &engines, &eds_file)?;
            // Envoy reads JSON too.
            std::fs::write(&config_file, format!("{:#}\n", config.root))?;
            std::fs::write(&endpoints_file, engines::endpoints_file(&engines))?;
            (config, config_file, endpoints_file, eds_file)
        };
        Ok(Self {
            directory: args.directory.clone(),
            engines,
            origin,
            meetings,
            speed: args.speed,
            endpoints_file,
            eds_file,
            envoy: args.envoy.clone().map_or_else(fetched_envoy, Ok)?,
            envoy_config,
            gateway: config.gateway(),
            admin: config.admin(),
            control: config.control(),
        })
    }

    /// Every address that will be listened on, and what for.
    fn listening(&self) -> Vec<(SocketAddr, String)> {
        let mut wanted = vec![
            (self.gateway, "Envoy's gateway".to_owned()),
            (self.admin, "Envoy's admin pages".to_owned()),
            (self.control, "pd-control".to_owned()),
        ];
        if self.origin != Origin::Own {
            wanted.extend(self.engines.iter().map(|engine| (engine.address, format!("a {}", self.kind(engine)))));
        }
        wanted.extend(self.meetings.iter().map(|address| (*address, "NIXL".to_owned())));
        wanted
    }

    async fn start_engines(&self, processes: &mut Processes) -> anyhow::Result<()> {
        let limit = match self.origin {
            Origin::Own => {
                for engine in &self.engines {
                    println!("engine      {} at {}", role_name(engine.role), engine.address);
                }
                return Ok(());
            }
            Origin::Simulated => READY_LIMIT,
            Origin::Vllm => VLLM_READY_LIMIT,
        };
        for (i, engine) in self.engines.iter().enumerate() {
            let (kind, address) = (self.kind(engine), engine.address);
            println!("starting    {kind} on {address}");
            let command = match self.meetings.get(i) {
                Some(meeting) => vllm_server(engine, *meeting),
                None => self.simulator(engine)?,
            };
            let log = self.log(&format!("{}-{}", role_name(engine.role), address.port()));
            processes.start(&format!("the {kind} on {address}"), command, &log, Output::Log)?;
        }
        if self.origin == Origin::Vllm {
            println!("waiting     vLLM takes a minute or two; its model is tiny and random, and so is what it says");
        }
        for engine in &self.engines {
            ready(processes, probe::wait(engine.address, "/health", limit, |_| true)).await?;
        }
        Ok(())
    }

    /// What an engine that is started is called.
    fn kind(&self, engine: &Endpoint) -> String {
        let what = if self.origin == Origin::Vllm { "vLLM server" } else { "simulator" };
        format!("{} {what}", role_name(engine.role))
    }

    fn simulator(&self, engine: &Endpoint) -> anyhow::Result<Command> {
        let mut command = Command::new(sibling("pd-sim")?);
        command.args(["--role", role_name(engine.role), "--listen", &engine.address.to_string()]);
        command.args(["--model", SIMULATED_MODEL, "--speed", &self.speed.to_string()]);
        Ok(command)
    }

    async fn start_control(&self, processes: &mut Processes) -> anyhow::Result<()> {
        println!("starting    pd-control on {} with {}", self.control, self.endpoints_file.display());
        let mut command = Command::new(sibling("pd-control")?);
        command.arg("--listen").arg(self.control.to_string());
        command.arg("--endpoints").arg(&self.endpoints_file).arg("--eds-file").arg(&self.eds_file);
        processes.start("pd-control", command, &self.log("pd-control"), Output::Log)?;
        ready(processes, probe::wait(self.control, "/readyz", READY_LIMIT, |_| true)).await
    }

    async fn start_envoy(&self, processes: &mut Processes, version: &str) -> anyhow::Result<()> {
        println!("starting    Envoy {version} on {} with {}", self.gateway, self.envoy_config.display());
        let mut command = Command::new(&self.envoy);
        // Hot restart would keep shared memory and a socket for a successor that never comes.
        command.arg("--disable-hot-restart").args(["--file-flush-interval-msec", LOG_FLUSH_MS]);
        command.arg("-c").arg(&self.envoy_config);
        processes.start("Envoy", command, &self.log("envoy"), Output::Terminal)?;
        ready(processes, probe::wait(self.admin, "/ready", READY_LIMIT, |_| true)).await?;
        let has_list = |stats: &str| stats.lines().any(|line| line.contains("=changed: ") && !line.ends_with(": 0"));
        let polled = probe::wait(self.admin, "/stats?filter=pd_polls_total", READY_LIMIT, has_list);
        let without_list = || format!("the filter has no list from pd-control (log: {})", self.log("envoy").display());
        ready(processes, polled).await.with_context(without_list)
    }

    fn log(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.log"))
    }

    /// Model for the curl line.
    async fn model(&self, named: Option<String>) -> String {
        if let Some(model) = named {
            return model;
        }
        if self.origin == Origin::Simulated {
            return SIMULATED_MODEL.to_owned();
        }
        let asked = match self.engines.last() {
            Some(engine) => probe::get(engine.address, "/v1/models").await.ok(),
            None => None,
        };
        let models = asked.map(|answer| answer.json());
        let first = models.as_ref().and_then(|models| models.pointer("/data/0/id")?.as_str());
        first.unwrap_or("MODEL").to_owned()
    }
}

fn vllm_server(engine: &Endpoint, meeting: SocketAddr) -> Command {
    let mut command = Command::new(VLLM_SERVE);
    command.args([role_name(engine.role), &engine.address.port().to_string(), "pull", &meeting.port().to_string()]);
    // Without the prefill server's cache it computes the prompt itself, as the simulators do.
    command.env("KV_LOAD_FAILURE", "recompute");
    command
}

/// Waits for a part, unless one ends meanwhile.
async fn ready(processes: &mut Processes, wait: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::select! {
        outcome = wait => outcome,
        error = processes.one_ended() => Err(error),
    }
}

/// The signals that end a run.
struct StopSignals([Signal; 3]);

impl StopSignals {
    fn new() -> anyhow::Result<Self> {
        let [interrupt, terminate, hangup] =
            [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
        Ok(Self([interrupt?, terminate?, hangup?]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// Envoy's version, as `1.40.0`.
async fn envoy_version(envoy: &Path) -> anyhow::Result<String> {
    let mut command = Command::new(envoy);
    let asked = command.arg("--version").stdin(Stdio::null()).kill_on_drop(true).output().await;
    let output = asked.with_context(|| format!("cannot start Envoy as {}", envoy.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    // `envoy  version: <commit>/1.40.0/Clean/RELEASE/BoringSSL`
    let version = text.split("version:").nth(1).and_then(|rest| rest.split('/').nth(1));
    match version {
        Some(version) if output.status.success() => Ok(version.to_owned()),
        _ => bail!("{} is no Envoy: `--version` says {:?}", envoy.display(), text.trim()),
    }
}

/// The Envoy that `envoy/fetch.sh` installs.
fn fetched_envoy() -> anyhow::Result<PathBuf> {
    let path = places::installed_envoy(Path::new(""), None);
    ensure!(path.exists(), "{} is not there: run `make envoy`", path.display());
    Ok(path)
}

/// A program of ours, which is built into the same directory.
fn sibling(name: &str) -> anyhow::Result<OsString> {
    let path = std::env::current_exe()?.with_file_name(name);
    ensure!(path.exists(), "{} is not built: run `make build`", path.display());
    Ok(path.into_os_string())
}
