//! CPU time and memory of a process, from `/proc`.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// What a process has had of the machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// CPU time, user and system.
    pub cpu: Duration,
    /// Time in which its threads could have run and others did.
    pub waited: Duration,
}

impl Usage {
    /// What has been added since.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        let (cpu, waited) = (self.cpu.saturating_sub(before.cpu), self.waited.saturating_sub(before.waited));
        Self { cpu, waited }
    }

    /// Adds what another time brought.
    pub fn add(&mut self, other: Self) {
        self.cpu += other.cpu;
        self.waited += other.waited;
    }
}

/// What the live threads of a process have had.
///
/// # Errors
/// When there is no such process.
pub fn usage(pid: u32) -> Result<Usage> {
    let tasks = format!("/proc/{pid}/task");
    let mut usage = Usage::default();
    for task in fs::read_dir(&tasks).with_context(|| tasks.clone())? {
        // A thread that ends meanwhile takes its time with it; Envoy's live as long as Envoy.
        let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        let mut fields = text.split_ascii_whitespace().map(|field| Duration::from_nanos(field.parse().unwrap_or(0)));
        usage.cpu += fields.next().unwrap_or_default();
        usage.waited += fields.next().unwrap_or_default();
    }
    Ok(usage)
}

/// Resident memory of a process, kB.
///
/// # Errors
/// When there is no such process.
pub fn resident_kb(pid: u32) -> Result<u64> {
    Ok(pd_support::process::resident_bytes(pid).with_context(|| format!("no process {pid}"))? / 1_024)
}

/// One line about the machine and how busy it is.
#[must_use]
pub fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let model = info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown CPU");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let load = read("/proc/loadavg");
    let load = load.split_ascii_whitespace().next().unwrap_or("?");
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{}, {cores} cores, Linux {}, load {load}", model.trim_start_matches([' ', '\t', ':']), kernel.trim())
}
