//! Runs the command of the command line.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow, bail};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, reload};

use crate::api::app::LogLevel;
use crate::cli::arguments::{Cli, Command, LogFormat, ServeArgs};
use crate::cli::check::check;
use crate::cli::migrate::migrate;
use crate::cli::output::{Closed, print, print_error};
use crate::cli::{terminal, top};
use crate::control::{Config, Control};

/// Runs the command; returns when it is done or a signal ends it.
///
/// When the reader closes standard output, the command ends without an error.
///
/// # Errors
/// The error to print, one line for each fault.
pub fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match run_command(cli) {
        Err(error) if error.is::<Closed>() => Ok(ExitCode::SUCCESS),
        ended => ended,
    }
}

fn run_command(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Some(Command::Check { files, applied }) => check_all(&files, applied.as_deref())?,
        Some(Command::Migrate { files }) => {
            let migration = migrate(&files)?;
            let printed = print(&migration.values);
            migration.report.carried.iter().for_each(|line| print_error(&format!("carried over: {line}")));
            migration.report.dropped.iter().for_each(|line| print_error(&format!("NOT carried over: {line}")));
            printed?;
        }
        Some(Command::Endpoints { server }) => {
            print(&terminal::endpoints(&wait_for(server.status())?))?;
        }
        Some(Command::Explain { server, name }) => {
            let text = terminal::explain(&wait_for(server.status())?, &name);
            print(&text.with_context(|| format!("{name}: no endpoint and no followed pod has this name"))?)?;
        }
        Some(Command::Top { server, shown, once }) => wait_for(top::follow_top(&server, once, &shown))?,
        None => {
            let log = start_log(&cli.serve.log_level, cli.serve.log_format)?;
            let is_json = cli.serve.log_format == LogFormat::Json;
            return match serve(cli.serve, log) {
                // With --log-format json, the error is an object, too.
                Err(error) if is_json => {
                    tracing::error!("{error:#}");
                    Ok(ExitCode::FAILURE)
                }
                ended => ended.map(|()| ExitCode::SUCCESS),
            };
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn wait_for<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

fn check_all(files: &[PathBuf], applied: Option<&Path>) -> anyhow::Result<()> {
    let report = check(files, applied);
    let said: String = report.said.iter().map(|line| format!("{line}\n")).collect();
    let printed = print(&said);
    report.warnings.iter().for_each(|line| print_error(&format!("warning: {line}")));
    // Also with standard output closed, a fault decides the exit code.
    if report.faults.is_empty() { printed } else { bail!("{}", report.faults.join("\npd-control: ")) }
}

fn serve(args: ServeArgs, log: LogLevel) -> anyhow::Result<()> {
    let config = Config { log: Some(log), ..args.config(|name| std::env::var(name).ok())? };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        // First of all, so that no signal is missed.
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let control = Control::start(config).await?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
        control.stop().await;
        Ok(())
    })
}

fn start_log(level: &str, format: LogFormat) -> anyhow::Result<LogLevel> {
    let filter: EnvFilter = level.parse().map_err(|error| anyhow!("--log-level {level}: {error}"))?;
    let (filter, handle) = reload::Layer::new(filter);
    let lines = tracing_subscriber::fmt::layer()
        .with_target(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr);
    let lines = match format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(lines).init();
    Ok(LogLevel::new(move |level| {
        let filter: EnvFilter = level.parse().map_err(|error| format!("{level}: {error}"))?;
        handle.reload(filter).map_err(|error| error.to_string())
    }))
}
