//! Child processes that never outlive a test.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::ensure;

use crate::client;
use crate::wait::PAUSE;

/// Lines of a log that say why its program is not ready.
const LOG_LINES: usize = 40;

/// A shell between this process and its child. It kills the child's process group at a signal, or when the pipe from this
/// process closes. The pipe closes also when this process is killed.
const KEEPER: &str = r#"
trap : HUP INT TERM
out=$1; log=$2; shift 2
setsid "$@" >"$out" 2>"$log" </dev/null &
child=$!
echo "$child"
exec 2>/dev/null
read -r _
kill -s KILL -- "-$child" || kill -s KILL "$child"
wait "$child"
"#;

/// A running program. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    keeper: Child,
    pid: u32,
    program: String,
    out: PathBuf,
    log: PathBuf,
}

impl Process {
    /// Starts a program in the workspace's root; `name` names its two files in `directory`: `name.out`, `name.log`.
    ///
    /// # Panics
    /// When there is no shell or the files cannot be made.
    #[must_use]
    pub fn start(name: &str, directory: &Path, program: &Path, arguments: &[String]) -> Self {
        let out = directory.join(format!("{name}.out"));
        let log = directory.join(format!("{name}.log"));
        for file in [&out, &log] {
            File::create(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        }
        let mut keeper = Command::new("sh")
            .args(["-c", KEEPER, "keeper"])
            .args([&out, &log])
            .arg(program)
            .args(arguments)
            .current_dir(crate::places::root())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("sh: {error}"));
        let mut line = String::new();
        if let Some(stdout) = keeper.stdout.take() {
            let _ = BufReader::new(stdout).read_line(&mut line);
        }
        let pid = line.trim().parse().unwrap_or_else(|_| panic!("{} did not start", program.display()));
        Self { keeper, pid, program: name.to_owned(), out, log }
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What it wrote to standard output so far.
    #[must_use]
    pub fn out(&self) -> String {
        read(&self.out)
    }

    /// What it wrote to standard error so far.
    #[must_use]
    pub fn log(&self) -> String {
        read(&self.log)
    }

    /// Whether it has not ended by itself.
    #[must_use]
    pub fn is_running(&self) -> bool {
        is_running(self.pid)
    }

    /// Memory that it has in RAM, bytes.
    ///
    /// # Panics
    /// When the system does not say.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        resident_bytes(self.pid).expect("VmRSS in /proc")
    }

    /// Sends it a signal by its name: `TERM`.
    ///
    /// # Panics
    /// When it has ended and is forgotten.
    pub fn signal(&self, name: &str) {
        signal(self.pid, name);
    }

    /// Last lines of what it wrote to standard error.
    #[must_use]
    pub fn log_tail(&self, lines: usize) -> String {
        let log = self.log();
        // Envoy begins with a list of everything that it was built with.
        let all: Vec<&str> = log.lines().filter(|line| !line.contains("[info][main]")).collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

/// Waits until a program answers `GET path` with 200, and returns the answer's body.
///
/// # Errors
/// When it ends before, or `limit` is over: with the last lines of its log.
pub async fn ready(process: &Process, address: SocketAddr, path: &str, limit: Duration) -> anyhow::Result<String> {
    let start = Instant::now();
    loop {
        if let Ok(answer) = client::get(address, path).await.and_then(client::Answer::ok) {
            return Ok(answer.text());
        }
        let Process { program, .. } = process;
        ensure!(process.is_running(), "{program} has ended:\n{}", process.log_tail(LOG_LINES));
        ensure!(start.elapsed() < limit, "{program} was not ready after {limit:?}:\n{}", process.log_tail(LOG_LINES));
        tokio::time::sleep(PAUSE).await;
    }
}

/// Sends a process a signal by its name: `TERM`.
///
/// # Panics
/// When there is no such process.
pub fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args(["-s", name, &pid.to_string()]).status();
    assert!(sent.is_ok_and(|status| status.success()), "kill -s {name} {pid}");
}

/// Whether a process runs; one that only waits to be reaped does not.
#[must_use]
pub fn is_running(pid: u32) -> bool {
    let stat = read(Path::new(&format!("/proc/{pid}/stat")));
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

/// Memory that a process has in RAM, bytes; `None` where there is no such process.
#[must_use]
pub fn resident_bytes(pid: u32) -> Option<u64> {
    let status = read(Path::new(&format!("/proc/{pid}/status")));
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kilobytes * 1_024)
}

/// Processes that a process has started and not reaped.
#[must_use]
pub fn children(pid: u32) -> Vec<u32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists: Vec<String> = threads.map(|thread| read(&thread.path().join("children"))).collect();
    lists.iter().flat_map(|list| list.split_whitespace()).filter_map(|child| child.parse().ok()).collect()
}

/// A process and all that it and they have started.
#[must_use]
pub fn tree(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    let mut index = 0;
    while let Some(pid) = all.get(index).copied() {
        index += 1;
        all.extend(children(pid));
    }
    all
}

/// Log files may hold any bytes.
fn read(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}
