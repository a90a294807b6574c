//! Namespaces of the cluster: its own network, mounts and processes, gone with the process that has them.

use anyhow::Context as _;
use pd_support::process::children;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

/// Says that this process is the one inside.
const INSIDE: &str = "PD_CLUSTER_INSIDE";

/// Whether this process is the first one inside.
#[must_use]
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs this program once more, as the first process of new namespaces, and returns its exit code. When that process ends,
/// the kernel ends all others in them, and networks and mounts go with the last. What would end this process is passed on
/// to that one; where this one is killed, so is that one. So nothing is left that a later start would have to remove.
///
/// To be called on the thread that lives as long as the process does.
///
/// # Errors
/// The system's.
pub async fn enter() -> anyhow::Result<u8> {
    let program = std::env::current_exe()?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut child = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child=KILL"])
        .args(["--mount-proc", "--propagation", "private", "--"])
        .arg(program)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .spawn()
        .context("setpriv")?;
    let unshare = child.id().unwrap_or_default();
    loop {
        tokio::select! {
            status = child.wait() => return Ok(u8::try_from(status?.code().unwrap_or(1)).unwrap_or(1)),
            _ = terminate.recv() => pass_on(unshare),
            _ = interrupt.recv() => pass_on(unshare),
            _ = hangup.recv() => pass_on(unshare),
        }
    }
}

/// `unshare` itself does not listen while its child runs.
fn pass_on(unshare: u32) {
    for pid in children(unshare).into_iter().filter_map(|pid| Pid::from_raw(pid.try_into().ok()?)) {
        // It may have ended at this moment.
        let _ = kill_process(pid, Signal::TERM);
    }
}
