//! Namespaces of the cluster: its own network, mounts and processes, gone with the process that has them.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

/// Says that this process is the one inside.
const INSIDE: &str = "PD_CLUSTER_INSIDE";

/// Whether this process is the first one inside.
#[must_use]
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs this program once more, as the first process of new namespaces. When that process ends, the kernel ends all
/// others in them; when this one is killed, that one is.
///
/// Returns only when it cannot.
///
/// # Errors
/// The system's.
pub fn enter() -> anyhow::Result<std::convert::Infallible> {
    let program = std::env::current_exe()?;
    let error = Command::new("unshare")
        .args(["--net", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--propagation", "private"])
        .arg("--")
        .arg(program)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .exec();
    Err(anyhow::anyhow!("unshare: {error}"))
}
