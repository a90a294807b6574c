//! One run of the launcher, on ports and in a directory of its own.

use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use pd_support::port::is_free;
use pd_support::wait::block_until;
use pd_support::{places, process};
use tempfile::TempDir;

/// How long anything may take here; a broken run ends in this time, a good one in a fraction of it.
const LIMIT: Duration = Duration::from_secs(90);
/// Ports of a run, before its offset.
const PORTS: [u16; 7] = [8080, 8100, 8101, 8200, 8201, 9000, 9901];
/// Ports that tests of this process have taken.
static TAKEN: Mutex<Vec<u16>> = Mutex::new(Vec::new());

pub struct Launcher {
    child: Child,
    lines: Receiver<String>,
    seen: String,
    offset: u16,
    directory: TempDir,
}

#[derive(Debug)]
pub struct Ended {
    pub success: bool,
    pub stdout: String,
    pub stderr: String,
}

impl Launcher {
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_at(port_offset(), arguments)
    }

    pub fn start_at(offset: u16, arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_pd-run"));
        command.current_dir(places::root()).arg("--directory").arg(directory.path());
        command.args(["--speed", "0", "--port-offset", &offset.to_string()]);
        if !arguments.contains(&"--envoy") {
            command.arg("--envoy").arg(places::envoy());
        }
        command.args(arguments).env_remove("PD_CONTROL_TOKEN");
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { child, lines, seen: String::new(), offset, directory }
    }

    /// Waits until everything runs; returns the command that is printed for a first try.
    pub fn wait_ready(&mut self) -> String {
        let first = self.wait_line("curl -s http");
        let mut command = first;
        while command.ends_with('\\') {
            command = format!("{}{}", command.trim_end_matches('\\'), self.next_line("rest of the command"));
        }
        self.wait_line("Ctrl-C");
        command
    }

    /// The next line of the output that contains `part`.
    pub fn wait_line(&mut self, part: &str) -> String {
        loop {
            let line = self.next_line(part);
            if line.contains(part) {
                return line;
            }
        }
    }

    fn next_line(&mut self, wanted: &str) -> String {
        let Ok(line) = self.lines.recv_timeout(LIMIT) else {
            let mut stderr = String::new();
            let _ = self.child.kill();
            let _ = self.child.stderr.take().unwrap().read_to_string(&mut stderr);
            panic!("no {wanted:?} in the output (port offset {}):\n{}\n{stderr}", self.offset, self.seen);
        };
        self.seen += &format!("{line}\n");
        line
    }

    /// Runs a command of a document, which names the usual ports, against this run. Returns what it prints.
    pub fn run(&self, command: &str) -> String {
        let ports = PORTS.iter().fold(command.to_owned(), |command, port| {
            command.replace(&format!("127.0.0.1:{port}"), &format!("127.0.0.1:{}", port + self.offset))
        });
        let output = Command::new("bash").args(["-euo", "pipefail", "-c", &ports]).output().unwrap();
        assert!(output.status.success(), "{ports}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn children(&self) -> Vec<u32> {
        process::children(self.child.id())
    }

    pub fn signal(&self, name: &str) {
        process::signal(self.child.id(), name);
    }

    pub fn wait_end(&mut self) -> Ended {
        block_until(LIMIT, "the launcher ends", || self.child.try_wait().unwrap().is_some());
        let mut stderr = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        let rest: Vec<String> = self.lines.try_iter().collect();
        let stdout = format!("{}{}", self.seen, rest.join("\n"));
        Ended { success: self.child.wait().unwrap().success(), stdout, stderr }
    }

    pub fn assert_ports_free(&self) {
        for port in PORTS.map(|port| port + self.offset) {
            assert!(is_free(port), "port {port} is still taken");
        }
    }

    /// Logs and rendered files stay, what is written aside and renamed does not.
    pub fn assert_no_temporary_files(&self) {
        for directory in [self.directory.path().to_owned(), self.directory.path().join("envoy")] {
            for entry in std::fs::read_dir(directory).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                let is_known = ["log", "json", "yaml"].iter().any(|end| name.ends_with(end)) || name == "envoy";
                assert!(is_known && !name.starts_with('.'), "{name}");
            }
        }
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An offset at which every port of a run is free.
pub fn port_offset() -> u16 {
    let mut taken = TAKEN.lock().unwrap();
    let start = u16::try_from(std::process::id() % 1_000).unwrap() * 10;
    let is_ours = |port: u16| !taken.contains(&port) && is_free(port);
    let offset = (0..1_000).map(|i| 2_000 + (start + i * 7) % 18_000);
    let offset = offset.into_iter().find(|offset| PORTS.iter().all(|port| is_ours(port + offset))).unwrap();
    taken.extend(PORTS.map(|port| port + offset));
    offset
}

pub fn wait_listening(port: u16) {
    block_until(LIMIT, "a port is listened on", || {
        TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))).is_ok()
    });
}

pub fn assert_gone(children: &[u32]) {
    for id in children {
        assert!(!process::is_running(*id), "process {id} is still there");
    }
}

pub fn wait(what: &str, is_so: impl FnMut() -> bool) {
    block_until(LIMIT, what, is_so);
}

pub fn wait_gone(children: &[u32]) {
    block_until(LIMIT, "the launcher's children are gone", || !children.iter().any(|id| process::is_running(*id)));
}

/// A program that `make build` puts beside the launcher.
pub fn sibling(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_pd-run")).with_file_name(name);
    assert!(path.exists(), "{} is missing: run `make build`", path.display());
    path
}
