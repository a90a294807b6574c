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

fn run(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn write(directory: &Path, name: &str, content: &str) -> String {
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
    assert!(shown(&["top", "--once"]).contains("127.0.0.1:3  both  ready  -"));
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

#[test]
fn check_knows_other_configurations_by_their_keys() {
    let directory = tempfile::tempdir().unwrap();
    let kubernetes = write(directory.path(), "k.yaml", "namespaces: [a]\nselectors: []\n");
    let plugin = write(directory.path(), "p.json", r#"{"revision": "1", "endpoints": []}"#);
    let output = run(&["check", &kubernetes, &plugin]);
    let expected = format!(
        "{kubernetes}: ok, Kubernetes configuration with 0 selectors and 0 InferencePools\n\
         {plugin}: ok, plugin configuration with 0 endpoints\n"
    );
    assert_eq!(text(&output.stdout), expected, "{}", text(&output.stderr));
    let wrong = write(directory.path(), "w.json", r#"{"revision": "1", "pool": {}}"#);
    assert!(text(&run(&["check", &wrong]).stderr).contains("w.json:1:19: pool: unknown field `pool`"), "it is named");
    let wrong = write(directory.path(), "w.yaml", "namespaces: [a]\nselector: []\n");
    assert!(text(&run(&["check", &wrong]).stderr).contains("w.yaml:2:1: unknown field `selector`"));
}

#[test]
fn check_says_whether_a_file_would_be_taken() {
    let directory = tempfile::tempdir().unwrap();
    let good = write(directory.path(), "good.yaml", &four(1.0));
    let bad = write(directory.path(), "bad.yaml", &four(0.0));
    let output = run(&["check", &good]);
    assert!(output.status.success());
    assert_eq!(text(&output.stdout), format!("{good}: ok, 4 endpoints (4 both)\n"));
    let output = run(&["check", &good, &bad]);
    assert_eq!(output.status.code(), Some(1));
    let error = format!("pd-control: {bad}:2:46: endpoints[0].weight: must be between 0.01 and 100\n");
    assert_eq!(text(&output.stderr), error);
}

#[test]
fn check_names_every_fault_of_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let faults = |name: &str, content: &str| {
        let path = write(directory.path(), name, content);
        let output = run(&["check", &path]);
        assert_eq!(output.status.code(), Some(1), "{}", text(&output.stdout));
        text(&output.stderr).replace(&format!("pd-control: {path}"), "").lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let expect = |found: Vec<String>, expected: &[&str]| {
        assert_eq!(found.len(), expected.len(), "{found:#?}");
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.starts_with(expected), "{found} is not {expected}");
        }
    };
    let list = "endpoints:\n\
                - {address: 10.0.0.1:80, role: boss, weight: 1000, weigth: 1}\n\
                - {address: 10.0.0.2:80, role: both, models: [a, 1.5], rank: -1}\n\
                - {address: gpu:80, role: both, bootstrap_port: 0}\n\
                - 7\n\
                - {role: both}\n\
                - {address: 10.0.0.2:80, role: both}\n\
                extra: 1\n";
    expect(
        faults("list.yaml", list),
        &[
            ":2:32: endpoints[0].role: unknown variant `boss`",
            ":2:46: endpoints[0].weight: must be between 0.01 and 100",
            ":2:52: endpoints[0].weigth: unknown key",
            ":3:50: endpoints[1].models[1]: invalid type",
            ":3:62: endpoints[1].rank: invalid value",
            ":4:13: endpoints[2].address: \"gpu:80\" is not ip:port",
            ":4:49: endpoints[2].bootstrap_port: must not be 0",
            ":5:3: endpoints[3]: must be a mapping",
            ":6:3: endpoints[4]: missing field `address`",
            ":7:13: endpoints[5].address: 10.0.0.2:80 is endpoints[1] in line 3 already",
            ":8:1: extra: unknown key",
        ],
    );
    let kubernetes = "namespaces: [a, a]\n\
                      label: true\n\
                      selectors:\n\
                      - {match: {matchLabels: {app: x}}, role: boss, weight: 1000}\n\
                      - {match: {matchLabels: {app: y}}, rol: both}\n\
                      - {match: {}}\n";
    expect(
        faults("k.yaml", kubernetes),
        &[
            ":1:13: namespaces: a is listed twice",
            ":2:1: unknown field `label`",
            ":4:42: selectors[0].role: \"boss\" is no role",
            ":4:56: selectors[0].weight: must be between",
            ":5:36: unknown field `rol`",
            ":6:11: selectors[2].match: selects every pod",
        ],
    );
    let plugin = r#"{"max_body_bytes": 6, "pool": {}, "pools": {"a.b": {"splt": 1, "split": {"uncached_tokens": "x"}}},
        "session_headers": ["X"], "endpoints": [{"address": "10.0.0.1:80", "role": "boss"}]}"#;
    expect(
        faults("p.json", plugin),
        &[
            ":1:20: max_body_bytes: must be between",
            ":1:23: pool: unknown field `pool`",
            ":1:53: pools.a.b.splt: unknown field `splt`",
            ":1:93: pools.a.b.split.uncached_tokens: invalid type",
            ":2:29: session_headers[0]: must be a header name",
            ":2:49: endpoints[0]: unknown variant `boss`",
        ],
    );
}

#[test]
fn check_bounds_the_faults_that_it_names() {
    let directory = tempfile::tempdir().unwrap();
    let line = "- {address: 10.0.0.1:80, role: boss}\n";
    let path = write(directory.path(), "many.yaml", &format!("endpoints:\n{}", line.repeat(1_000)));
    let output = run(&["check", &path]);
    let lines = text(&output.stderr);
    assert_eq!(lines.lines().count(), 101, "{lines}");
    assert!(lines.ends_with(&format!("pd-control: {path}: there are more faults than these 100\n")), "{lines}");
}

#[test]
fn check_warns_of_lists_that_cannot_serve() {
    let directory = tempfile::tempdir().unwrap();
    let warnings = |content: &str| {
        let path = write(directory.path(), "e.yaml", content);
        let output = run(&["check", &path]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stderr).replace(&format!("pd-control: warning: {path}: "), "").trim_end().to_owned()
    };
    let list = |endpoints: &[&str]| {
        let line = |(n, rest): (usize, &&str)| format!("- {{address: 10.0.0.{n}:80, {rest}}}\n");
        warnings(&format!(
            "endpoints:\n{}",
            endpoints.iter().enumerate().map(|(n, it)| line((n + 1, it))).collect::<String>()
        ))
    };
    assert_eq!(warnings("endpoints: []"), "the list has no endpoint: every request gets 503");
    assert_eq!(list(&["role: prefill", "role: decode"]), "");
    assert_eq!(
        list(&["role: prefill", "role: prefill"]),
        "pool \"default\" has prefill endpoints only: nothing generates, every request gets 503"
    );
    assert_eq!(list(&["role: decode, engine: vllm-nixl"]), "", "vLLM computes a prompt at a decode endpoint, too");
    assert_eq!(
        list(&["role: decode, engine: sglang"]),
        "pool \"default\" has decode endpoints only, and sglang's serve no request without a prefill endpoint"
    );
    assert_eq!(
        list(&["role: prefill, pool: a", "role: decode, pool: b, engine: sglang"]),
        "pool \"a\" has prefill endpoints only: nothing generates, every request gets 503\n\
         pool \"b\" has decode endpoints only, and sglang's serve no request without a prefill endpoint"
    );
    assert_eq!(
        list(&["role: prefill, group: a", "role: decode, group: b"]),
        "pool \"default\": group \"a\" has no decode endpoint, so prefill endpoint 10.0.0.1:80 is never used\n\
         pool \"default\": group \"b\" has no prefill endpoint, so decode endpoint 10.0.0.2:80 takes no prompt over"
    );
    assert_eq!(
        list(&["role: prefill, group: a", "role: decode, group: a", "role: decode"]),
        "pool \"default\": every prefill endpoint has a group, so decode endpoint 10.0.0.3:80, which has none, takes no \
         prompt over"
    );
    assert_eq!(
        list(&[
            "role: prefill, revision: a",
            "role: decode, revision: a",
            "role: decode, revision: b",
            "role: prefill"
        ]),
        "pool \"default\": revision \"b\" has no prefill endpoint, so decode endpoint 10.0.0.3:80 takes no prompt over\n\
         pool \"default\": the rest without a revision has no decode endpoint, so prefill endpoint 10.0.0.4:80 is never used"
    );
    assert_eq!(
        list(&["role: prefill", "role: both"]),
        "pool \"default\": there is no decode endpoint, so prefill endpoint 10.0.0.1:80 is never used"
    );
    assert_eq!(
        list(&["role: decode, engine: sglang", "role: both"]),
        "pool \"default\": there is no prefill endpoint, so decode endpoint 10.0.0.1:80 is never used"
    );
    assert_eq!(list(&["role: prefill", "role: decode, group: b"]), "", "one without a group pairs with any");
    assert_eq!(
        list(&["role: prefill, engine: vllm-nixl", "role: decode, engine: sglang"]),
        "pool \"default\": prefill endpoint 10.0.0.1:80 speaks vllm-nixl, which no decode endpoint speaks: nothing takes its prompts over\n\
         pool \"default\": decode endpoint 10.0.0.2:80 speaks sglang, which no prefill endpoint speaks: it takes no \
             prompt over"
    );
    assert_eq!(
        list(&["role: prefill, models: [m]", "role: decode, models: [o]"]),
        "pool \"default\": model \"m\" has prefill endpoints only: nothing generates, its requests get 503"
    );
    assert_eq!(list(&["role: prefill, models: [m]", "role: both, models: [o]", "role: decode"]), "");
    assert_eq!(
        list(&["role: both, state: draining", "role: both, state: down"]),
        "no endpoint is ready: every request gets 503"
    );
    let plugin = write(
        directory.path(),
        "p.json",
        r#"{"endpoints": [{"address": "10.0.0.1:80", "role": "decode"}],
        "pools": {"default": {"engine": "sglang"}}}"#,
    );
    let output = run(&["check", &plugin]);
    assert!(text(&output.stderr).contains("decode endpoints only, and sglang's serve"), "{}", text(&output.stderr));
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
