//! Child processes that end with the launcher, whatever ends it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use futures::FutureExt;
use futures::future::select_all;
use tokio::process::{Child, Command};

/// How long a process may take to end after it was asked to.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Where a process's standard output goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// To its log.
    Log,
    /// To the terminal.
    Terminal,
}

/// The processes that run, in the order in which they were started.
#[derive(Debug, Default)]
pub struct Processes {
    running: Vec<Process>,
}

#[derive(Debug)]
struct Process {
    name: String,
    log: PathBuf,
    group: libc::pid_t,
    child: Child,
}

impl Processes {
    /// Starts one. It gets no input and its own process group, so that Ctrl-C at the terminal reaches the launcher alone.
    ///
    /// # Errors
    /// When it cannot be started or its log cannot be written.
    pub fn start(&mut self, name: &str, mut command: Command, log: &Path, output: Output) -> anyhow::Result<()> {
        let file = File::create(log).with_context(|| log.display().to_string())?;
        let stdout = match output {
            Output::Log => Stdio::from(file.try_clone()?),
            Output::Terminal => Stdio::inherit(),
        };
        command.stdin(Stdio::null()).stdout(stdout).stderr(file).process_group(0).kill_on_drop(true);
        let launcher = std::process::id();
        // SAFETY: between fork and exec only prctl and getppid are called, which are safe there, and nothing allocates.
        unsafe { command.pre_exec(move || die_with(launcher)) };
        let program = command.as_std().get_program().to_owned();
        let child = command.spawn().with_context(|| format!("{name}: cannot start {}", program.display()))?;
        let group = child.id().and_then(|id| libc::pid_t::try_from(id).ok()).context("no process id")?;
        self.running.push(Process { name: name.to_owned(), log: log.to_owned(), group, child });
        Ok(())
    }

    /// Waits until one of them ends, which none should, and says so in a line. Never returns while there are none.
    pub async fn one_ended(&mut self) -> anyhow::Error {
        if self.running.is_empty() {
            std::future::pending::<()>().await;
        }
        let ends = self.running.iter_mut().map(|process| process.child.wait().boxed());
        let (ended, index, _) = select_all(ends).await;
        let Process { name, log, .. } = self.running.remove(index);
        let how = ended.map_or_else(|error| error.to_string(), describe);
        let last = last_line(&log).map(|line| format!(": {line}")).unwrap_or_default();
        anyhow::anyhow!("{name} ended ({how}){last} (log: {})", log.display())
    }

    /// Ends all of them, the last one first: gently, and by force what does not end in time.
    pub async fn stop(&mut self) {
        while let Some(process) = self.running.last_mut() {
            signal_group(process.group, libc::SIGTERM);
            if tokio::time::timeout(STOP_LIMIT, process.child.wait()).await.is_err() {
                eprintln!("pd-run: {} does not end, so it is killed", process.name);
                self.kill_last().await;
            } else {
                self.running.pop();
            }
        }
    }

    /// Ends all of them at once.
    pub async fn kill(&mut self) {
        while !self.running.is_empty() {
            self.kill_last().await;
        }
    }

    async fn kill_last(&mut self) {
        if let Some(mut process) = self.running.pop() {
            signal_group(process.group, libc::SIGKILL);
            let _ = process.child.wait().await;
        }
    }
}

/// Has the kernel kill this process when the launcher is gone.
fn die_with(launcher: u32) -> io::Result<()> {
    // SAFETY: no pointers.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: no arguments.
    let parent = unsafe { libc::getppid() };
    // It was gone before the kernel knew.
    if u32::try_from(parent).ok() == Some(launcher) { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
}

/// Signals a child's process group: a wrapper script's children belong to it. The child is not reaped yet, so the number
/// still is its own.
fn signal_group(group: libc::pid_t, signal: libc::c_int) {
    // SAFETY: no pointers. A group that is gone is an error that says what we want.
    unsafe { libc::kill(-group, signal) };
}

fn describe(status: ExitStatus) -> String {
    status.to_string()
}

/// Last line of a log that is not empty.
fn last_line(log: &Path) -> Option<String> {
    let text = std::fs::read(log).ok()?;
    let text = String::from_utf8_lossy(&text);
    text.lines().rfind(|line| !line.trim().is_empty()).map(|line| line.chars().take(300).collect())
}
