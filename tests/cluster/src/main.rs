//! Command line: a cluster for as long as a command runs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use clap::Parser;
use pd_cluster::control_plane::ControlPlane;
use pd_cluster::node::container::Images;
use pd_cluster::node::shared::Shared;
use pd_cluster::pki::Pki;
use pd_cluster::program::run;
use pd_cluster::registry::Registry;
use pd_cluster::services::Services;
use pd_cluster::{dns, namespaces, network, node, services};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

/// Brings up a Kubernetes cluster with Envoy Gateway in namespaces of its own, runs a command in it, and takes it down.
///
/// The command finds KUBECONFIG and a registry that the cluster can reach: PD_CLUSTER_REGISTRY over plain HTTP,
/// PD_CLUSTER_REGISTRY_TLS over TLS.
#[derive(Parser)]
#[command(name = "pd-cluster", version, max_term_width = 120)]
struct Cli {
    /// Folder with etcd, kube-apiserver, kube-controller-manager, helm, envoy-gateway and eg-chart
    #[arg(long, value_name = "DIRECTORY")]
    programs: PathBuf,
    /// Program of an image, by the last part of its name, such as envoy=/usr/bin/envoy (repeatable)
    #[arg(long = "image", value_name = "NAME=FILE", value_parser = image)]
    images: Vec<(String, PathBuf)>,
    /// Where logs and files go; emptied first
    #[arg(long, value_name = "DIRECTORY")]
    state: PathBuf,
    /// What to run
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

fn image(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("NAME=FILE")?;
    let path = Path::new(path).canonicalize().map_err(|error| format!("{path}: {error}"))?;
    Ok((name.to_owned(), path))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if !namespaces::is_inside() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        return match runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(namespaces::enter())) {
            Ok(code) => ExitCode::from(code),
            Err(error) => failed(&error),
        };
    }
    tracing_subscriber::fmt()
        .with_env_filter(
            std::env::var("PD_CLUSTER_LOG").unwrap_or_else(|_| "warn,pd_cluster=info,kube_client=off".to_owned()),
        )
        .with_target(false)
        .with_writer(std::io::stderr)
        .init();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error.into()),
    };
    match runtime.block_on(cluster(cli)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => failed(&error),
    }
}

fn failed(error: &anyhow::Error) -> ExitCode {
    eprintln!("pd-cluster: {error:#}");
    ExitCode::FAILURE
}

async fn cluster(cli: Cli) -> anyhow::Result<u8> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::select! {
        code = up_and_run(cli) => code,
        _ = terminate.recv() => bail!("stopped"),
        _ = interrupt.recv() => bail!("stopped"),
        _ = hangup.recv() => bail!("stopped"),
    }
}

async fn up_and_run(cli: Cli) -> anyhow::Result<u8> {
    let programs = cli.programs.canonicalize().with_context(|| cli.programs.display().to_string())?;
    if cli.state.exists() {
        std::fs::remove_dir_all(&cli.state)?;
    }
    std::fs::create_dir_all(&cli.state)?;
    let state = cli.state.canonicalize()?;
    network::up().await?;
    let pki = Pki::new(state.join("pki"))?;
    let (_control_plane, client) = ControlPlane::start(&programs, &state, &pki).await?;
    let mut images: BTreeMap<String, PathBuf> = cli.images.into_iter().collect();
    images.entry("gateway".to_owned()).or_insert_with(|| programs.join("envoy-gateway"));
    let known = Arc::new(Services::default());
    let registry = Registry::start(&programs, &state, &pki).await?;
    let images = Images::new(images, registry.plain.clone(), state.join("images"));
    let shared = Arc::new(Shared { client: client.clone(), images, state: state.clone() });
    let kubeconfig = pki.path("kubeconfig");
    let command = async {
        install(&programs, &kubeconfig).await?;
        let (program, arguments) = cli.command.split_first().context("a command")?;
        let mut child = Command::new(program)
            .args(arguments)
            .env("KUBECONFIG", &kubeconfig)
            .env("PD_CLUSTER_REGISTRY", &registry.plain)
            .env("PD_CLUSTER_REGISTRY_TLS", &registry.tls)
            .env("PD_CLUSTER_STATE", &state)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| program.clone())?;
        let status = child.wait().await?;
        Ok(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1))
    };
    tokio::select! {
        done = command => done,
        ended = node::run(shared) => ended.and_then(|()| bail!("the node has ended")),
        ended = dns::run(Arc::clone(&known)) => ended.and_then(|()| bail!("DNS has ended")),
        () = services::run(client, known) => bail!("services have ended"),
    }
}

/// Envoy Gateway, by its own chart. Its topology injector is a webhook for zones; there is one node.
async fn install(programs: &Path, kubeconfig: &Path) -> anyhow::Result<()> {
    tracing::info!("installing Envoy Gateway");
    let helm = programs.join("helm");
    let (chart, kubeconfig) = (programs.join("eg-chart").display().to_string(), kubeconfig.display().to_string());
    let arguments = [
        "install",
        "eg",
        &chart,
        "--kubeconfig",
        &kubeconfig,
        "--namespace",
        "envoy-gateway-system",
        "--create-namespace",
        "--set",
        "topologyInjector.enabled=false",
        "--wait",
        "--timeout",
        "3m",
    ];
    run(helm, &arguments).await.map(drop)
}
