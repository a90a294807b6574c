//! Programs that are run, to their end or for long.

use std::ffi::OsStr;
use std::fs::File;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, bail};
use tokio::process::{Child, Command};

/// Runs a program to its end and returns what it printed.
///
/// # Errors
/// What it said, when it fails.
pub async fn run<A: AsRef<OsStr>>(program: impl AsRef<OsStr>, arguments: &[A]) -> anyhow::Result<String> {
    let program = program.as_ref();
    let name = || {
        let arguments: Vec<_> = arguments.iter().map(|argument| argument.as_ref().to_string_lossy()).collect();
        format!("{} {}", program.to_string_lossy(), arguments.join(" "))
    };
    let done = Command::new(program).args(arguments).stdin(Stdio::null()).output().await.with_context(name)?;
    if !done.status.success() {
        bail!("{}: {}", name(), String::from_utf8_lossy(&done.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// A command whose output goes to a file, in a process group of its own, killed when dropped.
///
/// # Errors
/// When the file cannot be made.
pub fn logged(program: impl AsRef<OsStr>, log: &Path) -> anyhow::Result<Command> {
    let file = File::options().create(true).append(true).open(log).with_context(|| log.display().to_string())?;
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).process_group(0).kill_on_drop(true);
    Ok(command)
}

/// Last lines of a file.
#[must_use]
pub fn tail(log: &Path, lines: usize) -> String {
    let text = String::from_utf8_lossy(&std::fs::read(log).unwrap_or_default()).into_owned();
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Sends a signal to a child's process group, if it runs.
pub fn signal(child: &Child, signal: rustix::process::Signal) {
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid {
        // It may have ended at this moment.
        let _ = rustix::process::kill_process_group(pid, signal);
    }
}
