//! However a cluster ends, nothing of it is left: no process, and so no namespace, interface or mount. Needs root and
//! `PD_CLUSTER_BIN`: `make test-cluster` runs it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pd_support::process;
use pd_support::wait::block_until;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// How long a cluster may take to come, and to go.
const TO_COME: Duration = Duration::from_secs(120);
const TO_GO: Duration = Duration::from_secs(20);

/// Ends a cluster.
type End = fn(&Cluster);

struct Cluster {
    outer: Child,
    /// First process inside.
    inner: Pid,
    /// Namespace of its processes.
    processes: PathBuf,
}

/// A cluster whose Envoy Gateway runs; its processes get their own group, as those of a shell's command do.
fn start(programs: &str, state: &Path) -> Cluster {
    let _ = fs::remove_dir_all(state);
    let up = state.join("up");
    let outer = Command::new(env!("CARGO_BIN_EXE_pd-cluster"))
        .args(["--programs", programs, "--state"])
        .arg(state)
        .args(["--", "sh", "-c", "touch \"$1\"; exec sleep 1000", "sh"])
        .arg(&up)
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()
        .unwrap();
    block_until(TO_COME, "the cluster comes up", || up.exists());
    let [unshare] = process::children(outer.id()).try_into().unwrap();
    let [inner] = children(unshare).try_into().unwrap();
    let processes = fs::read_link(format!("/proc/{inner}/ns/pid")).unwrap();
    assert_ne!(processes, fs::read_link("/proc/self/ns/pid").unwrap());
    Cluster { outer, inner, processes }
}

fn pid(number: u32) -> Pid {
    Pid::from_raw(number.try_into().unwrap()).unwrap()
}

fn children(of: u32) -> Vec<Pid> {
    process::children(of).into_iter().map(pid).collect()
}

/// Processes of a namespace.
fn inside(namespace: &Path) -> Vec<String> {
    let all = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let those = all.filter(|path| fs::read_link(path.join("ns/pid")).is_ok_and(|found| found == namespace));
    those.map(|path| path.display().to_string()).collect()
}

fn interfaces() -> BTreeSet<String> {
    fs::read_dir("/sys/class/net").unwrap().map(|entry| entry.unwrap().file_name().display().to_string()).collect()
}

fn mounts(of: &Path) -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    text.lines().filter(|line| line.contains(&*of.to_string_lossy())).map(str::to_owned).collect()
}

#[test]
fn nothing_is_left_whatever_ends_it() {
    let Ok(programs) = std::env::var("PD_CLUSTER_BIN") else {
        eprintln!("skipped: PD_CLUSTER_BIN names no control plane");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let before = interfaces();
    let ends: [(&str, End); 4] = [
        ("Ctrl-C", |cluster| kill_process_group(pid(cluster.outer.id()), Signal::INT).unwrap()),
        ("SIGTERM", |cluster| kill_process(pid(cluster.outer.id()), Signal::TERM).unwrap()),
        ("kill -9", |cluster| kill_process(pid(cluster.outer.id()), Signal::KILL).unwrap()),
        ("kill -9 inside", |cluster| kill_process(cluster.inner, Signal::KILL).unwrap()),
    ];
    for (what, end) in ends {
        let mut cluster = start(&programs, &state);
        let running = inside(&cluster.processes).len();
        // etcd, API server, controllers, registry, a pod with its sandbox, the command, and the harness.
        assert!(running >= 8, "{running} processes");
        let begun = Instant::now();
        end(&cluster);
        assert!(!cluster.outer.wait().unwrap().success(), "{what}");
        block_until(TO_GO, format_args!("nothing is left after {what}"), || inside(&cluster.processes).is_empty());
        assert_eq!(interfaces(), before, "{what}");
        assert_eq!(mounts(&state), Vec::<String>::new(), "{what}");
        eprintln!("{what}: {running} processes gone after {:?}", begun.elapsed());
    }
}
