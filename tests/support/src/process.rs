//! Child processes that never outlive a test.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A shell stands between: it kills its child, and what that one has started, by the child's process group once the pipe
/// from here closes, also when this process is killed, or at a signal.
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
        Self { keeper, pid, out, log }
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
        // An ended child stays a zombie until its keeper waits for it.
        let stat = read(Path::new(&format!("/proc/{}/stat", self.pid)));
        !stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'))
    }

    /// Memory that it has in RAM, bytes.
    ///
    /// # Panics
    /// When the system does not tell.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        let status = read(Path::new(&format!("/proc/{}/status", self.pid)));
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS in /proc");
        let kilobytes: u64 = line.trim().trim_end_matches("kB").trim().parse().expect("a number of kB");
        kilobytes * 1_024
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

/// Log files may hold any bytes.
fn read(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}
