//! The command itself: arguments, exit codes, signals.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use pd_support::port::Port;
use pd_support::process;

use crate::support::*;

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pd-control"));
    command.args(arguments).env_clear();
    command
}

pub fn run(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

pub fn write(directory: &Path, name: &str, content: &str) -> String {
    let path = directory.join(name);
    std::fs::write(&path, content).unwrap();
    path.display().to_string()
}

/// Starts it on a free port and reads from its log which one that is.
fn spawn(arguments: &[&str]) -> (Child, HttpClient) {
    spawn_with(arguments, &[])
}

/// The same with environment variables.
pub fn spawn_with(arguments: &[&str], variables: &[(&str, &str)]) -> (Child, HttpClient) {
    let (child, client, _) = spawn_logged(arguments, variables);
    (child, client)
}

/// The same with its log, which ends when it does.
fn spawn_logged(arguments: &[&str], variables: &[(&str, &str)]) -> (Child, HttpClient, JoinHandle<String>) {
    let mut command = command(arguments);
    let mut child = command
        .envs(variables.iter().copied())
        .args(["--listen", "127.0.0.1:0"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut seen = String::new();
    let address = loop {
        let mut line = String::new();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "it ended: {seen}");
        seen += &line;
        if let Some((_, rest)) = line.split_once("listens on http://") {
            let end = rest.find([' ', '"']).unwrap();
            break rest[..end].parse().unwrap();
        }
    };
    // Read on, or the pipe fills up.
    let rest = std::thread::spawn(move || {
        log.read_to_string(&mut seen).unwrap();
        seen
    });
    (child, HttpClient::new(address), rest)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_answers_open_polls_and_ends_it_within_a_second() {
    let directory = tempfile::tempdir().unwrap();
    let file = write(directory.path(), "endpoints.yaml", &four(1.0));
    for signal in ["TERM", "INT"] {
        let (mut child, client) = spawn(&["--endpoints", &file]);
        let mut filter = Filter::default();
        filter.poll(&client, PATIENCE).await.unwrap();
        let poller = client.clone();
        let poll = tokio::spawn(async move { filter.request(&poller, PATIENCE).await.status });
        until_true("the poll waits", || async { client.metric("pd_control_pollers").await == 1.0 }).await;
        let start = Instant::now();
        process::signal(child.id(), signal);
        assert_eq!(poll.await.unwrap(), StatusCode::NOT_MODIFIED);
        assert!(child.wait().unwrap().success());
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    }
}

#[test]
fn what_hinders_the_start_is_one_line_and_exit_code_1() {
    let directory = tempfile::tempdir().unwrap();
    let file = write(directory.path(), "endpoints.yaml", &four(1.0));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for (arguments, error) in [
        (
            vec!["--endpoints", &file, "--listen", &address],
            format!("cannot listen on {address}: Address already in use"),
        ),
        (vec!["--endpoints", "none.yaml", "--listen", "127.0.0.1:0"], "none.yaml: cannot be read: No such file".into()),
        (vec!["--endpoints", &file, "--token-env", "T"], "--token-env T: the variable is not set".into()),
        (vec!["--endpoints", &file, "--log-level", "x=y"], "--log-level x=y: error parsing level filter".into()),
        (vec![], "--endpoints FILE, --endpoint or --kubernetes is needed".into()),
    ] {
        let output = run(&arguments);
        let lines = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {lines}");
        assert!(lines.starts_with(&format!("pd-control: {error}")), "{lines}");
        assert_eq!(lines.lines().count(), 1, "{lines}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_shows_what_a_running_one_knows() {
    let directory = tempfile::tempdir().unwrap();
    let file = write(directory.path(), "endpoints.yaml", &four(1.0));
    let (mut child, client) = spawn(&["--endpoints", &file]);
    let server = format!("http://{}", client.address);
    let shown = |arguments: &[&str]| {
        let output = run(&[arguments, &["--server", &server]].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    let list = shown(&["endpoints"]);
    assert!(
        list.starts_with(&format!("list 1 from {file}, 0 of 0 Envoys have it\nENDPOINT     ROLE  STATE ")),
        "{list}"
    );
    assert_eq!(list.lines().count(), 6, "{list}");
    assert!(shown(&["top", "--once"]).contains("127.0.0.1:3  both  ready  "));
    assert!(shown(&["explain", "127.0.0.1:2"]).starts_with("127.0.0.1:2 is in the list: both, ready\n"));
    let unknown = run(&["explain", "nobody", "--server", &server]);
    assert_eq!(text(&unknown.stderr), "pd-control: nobody: no endpoint and no followed pod has this name\n");

    let put = async |level: &str| client.send("PUT", "/v1/log-level", level.to_owned()).await.unwrap().status();
    assert_eq!(put("debug").await, StatusCode::NO_CONTENT);
    assert_eq!(put("x=y").await, StatusCode::BAD_REQUEST);
    assert_eq!(put(&"x".repeat(2_000)).await, StatusCode::PAYLOAD_TOO_LARGE);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(text(&run(&["endpoints", "--server", &server]).stderr).starts_with("pd-control: cannot reach "));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_json_log_has_an_object_a_line_at_every_level_and_in_failure() {
    let directory = tempfile::tempdir().unwrap();
    let file = write(directory.path(), "endpoints.yaml", &four(1.0));
    let (mut child, client, log) = spawn_logged(&["--endpoints", &file, "--log-format", "json"], &[]);
    let put = client.send("PUT", "/v1/log-level", "trace").await.unwrap();
    assert_eq!(put.status(), StatusCode::NO_CONTENT);
    replace(Path::new(&file), "endpoints: [\"a\\tb\"]").unwrap();
    until_true("it is refused", || async { client.metric("pd_control_refusals_total").await == 1.0 }).await;
    replace(Path::new(&file), &four(2.0)).unwrap();
    until_true("it is good again", || async { client.metric("pd_control_degraded").await == 0.0 }).await;
    process::signal(child.id(), "TERM");
    assert!(child.wait().unwrap().success());
    let lines: Vec<serde_json::Value> =
        log.join().unwrap().lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    assert!(lines.iter().all(|line| line["timestamp"].is_string() && line["message"].is_string()), "{lines:?}");
    let snapshot = lines.iter().find(|line| line["message"] == "snapshot").unwrap();
    assert_eq!((&snapshot["version"], &snapshot["endpoints"], &snapshot["added"]), (&1.into(), &4.into(), &4.into()));
    let refused = lines.iter().find(|line| line["level"] == "WARN" && line["reason"].is_string()).unwrap();
    assert!(refused["reason"].as_str().unwrap().contains("endpoints.yaml:1:"), "{refused}");
    assert!(lines.iter().any(|line| line["level"] == "TRACE" || line["level"] == "DEBUG"), "the level was changed");

    let failed = run(&["--endpoints", "none.yaml", "--log-format", "json"]);
    assert_eq!(failed.status.code(), Some(1));
    let line: serde_json::Value = serde_json::from_str(&text(&failed.stderr)).unwrap();
    assert!(line["message"].as_str().unwrap().starts_with("none.yaml: cannot be read"), "{line}");
}

/// What standard output and error are when nobody reads them any longer.
fn closed_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_leaves_ends_a_command_quietly() {
    let directory = tempfile::tempdir().unwrap();
    let file = write(directory.path(), "endpoints.yaml", &four(1.0));
    let bad = write(directory.path(), "bad.yaml", &four(0.0));
    let (mut child, client) = spawn(&["--endpoints", &file]);
    let server = format!("--server=http://{}", client.address);
    for arguments in [
        vec!["check", &file],
        vec!["endpoints", &server],
        vec!["explain", "127.0.0.1:2", &server],
        vec!["top", "--once", &server],
        vec!["top", &server],
        vec!["--help"],
        vec!["--version"],
    ] {
        let output = command(&arguments).stdout(closed_pipe()).output().unwrap();
        assert_eq!(text(&output.stderr), "", "{arguments:?}");
        assert!(output.status.success(), "{arguments:?}: {}", output.status);
    }
    // rvben/rumdl#184, svix/diom#1285, medialab/xan#759, Backblaze/B2_Command_Line_Tool#1071, simonw/llm-jq#5: the reader is `head`.
    for command in ["top", "top --once", "endpoints"] {
        let line = format!("set -o pipefail; \"$0\" {command} {server} | head -1");
        let output = Command::new("bash").args(["-c", &line, env!("CARGO_BIN_EXE_pd-control")]).output().unwrap();
        assert_eq!((text(&output.stderr), output.status.code()), (String::new(), Some(0)), "{command}");
        assert_eq!(text(&output.stdout).lines().count(), 1, "{command}");
    }
    for (arguments, code) in [
        (vec!["check", &file, &bad], 1),
        (vec!["explain", "nobody", &server], 1),
        (vec!["--endpoints", "none.yaml"], 1),
        (vec!["--no-such"], 2),
    ] {
        let status = command(&arguments).stdout(closed_pipe()).stderr(closed_pipe()).status().unwrap();
        assert_eq!(status.code(), Some(code), "{arguments:?}");
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_nobody_reads_any_longer_disturbs_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let file = write(directory.path(), "endpoints.yaml", &four(1.0));
    let port = Port::reserve();
    let address = port.address();
    let mut child =
        command(&["--endpoints", &file, "--listen", &address.to_string()]).stderr(closed_pipe()).spawn().unwrap();
    let client = HttpClient::new(address);
    until_true("it listens", || async { client.request("GET", "/healthz").await.is_ok() }).await;
    replace(Path::new(&file), "endpoints: 7").unwrap();
    until_true("the refusal is logged", || async { client.metric("pd_control_refusals_total").await == 1.0 }).await;
    replace(Path::new(&file), &four(2.0)).unwrap();
    until_true("it goes on", || async { client.metric("pd_control_snapshot_version").await == 2.0 }).await;
    child.kill().unwrap();
    child.wait().unwrap();
}
