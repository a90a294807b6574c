//! TLS, as curl sees it.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use pd_control::access::tls::TlsFiles;
use pd_control::envoys::relay::{Replicas, ReplicasTls};
use pd_control::{Config, Control};
use pd_core::envoys::message::{ExchangeRequest, Record};
use pd_core::envoys::report::Report;
use tokio::net::TcpStream;

use crate::support::*;

async fn curl(arguments: Vec<String>) -> Output {
    let run = move || Command::new("curl").args(["-sS", "--max-time", "10"]).args(arguments).output().unwrap();
    tokio::task::spawn_blocking(run).await.unwrap()
}

/// A certificate that vouches for itself, and its key.
pub fn made(directory: &Path, name: &str) -> TlsFiles {
    let path = |name: &str| directory.join(name);
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=pd-control"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .args(["-addext", &format!("subjectAltName={name}"), "-keyout"])
        .args([path("key.pem"), "-out".into(), path("cert.pem")])
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(made.success());
    TlsFiles { certificate: path("cert.pem"), key: path("key.pem") }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_shows_one_that_speaks_tls() {
    let rig = Rig::start_with(&four(1.0), |config, directory| {
        config.tls = Some(made(directory, "DNS:pd-control.llm.svc"));
        with_token(config, directory);
    })
    .await;
    let path = |name: &str| rig.directory.path().join(name).display().to_string();
    std::fs::write(path("token"), "secret\n").unwrap();
    let (url, certificate, token) = (format!("https://{}", rig.client.address), path("cert.pem"), path("token"));
    let shown = async |arguments: &[&str], variable: &[(&str, &str)]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pd-control"));
        command.args(["endpoints", "--server", &url]).args(arguments).env_clear().envs(variable.iter().copied());
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
    };
    let trusting = ["--ca-file", &certificate, "--tls-server-name", "pd-control.llm.svc"];
    let variable = [("PD_CONTROL_TOKEN", "secret")];
    assert!(shown(&trusting, &variable).await.unwrap().contains("127.0.0.1:1"));
    assert!(shown(&[&trusting[..], &["--token-file", &token]].concat(), &[]).await.unwrap().contains("127.0.0.1:1"));
    for (arguments, variables, why) in [
        (&trusting[..], &[][..], "pd-control requires a token: set PD_CONTROL_TOKEN or --token-file"),
        (&trusting[..2], &variable[..], "cannot reach"),
        (&trusting[2..], &variable[..], "cannot reach"),
        (&["--ca-file", &token], &variable[..], "--ca-file"),
        (&["--token-file", "none"], &variable[..], "--token-file none: No such file"),
        (&["--tls-server-name", "not a name"], &variable[..], "--tls-server-name not a name: "),
    ] {
        let error = shown(arguments, variables).await.unwrap_err();
        assert!(error.starts_with(&format!("pd-control: {why}")) && error.lines().count() == 1, "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_certificate_only_tls_is_spoken() {
    let rig = Rig::start_with(&four(1.0), |config, directory| config.tls = Some(made(directory, "IP:127.0.0.1"))).await;
    // A client that never begins its handshake does not delay other clients.
    let _silent = TcpStream::connect(rig.client.address).await.unwrap();
    let certificate = rig.directory.path().join("cert.pem").display().to_string();
    let url = |scheme: &str| format!("{scheme}://{}/v1/watch", rig.client.address);
    let trusted = curl(vec!["--cacert".into(), certificate, url("https")]).await;
    let text = String::from_utf8(trusted.stdout).unwrap();
    assert!(text.contains("127.0.0.1:1"), "{text} {}", String::from_utf8_lossy(&trusted.stderr));
    assert!(!curl(vec![url("https")]).await.status.success(), "nobody vouches for it");
    assert!(!curl(vec![url("http")]).await.status.success());

    let mut config = rig.config.clone();
    config.tls = Some(TlsFiles { certificate: rig.file(), key: rig.file() });
    let error = format!("{:#}", Control::start(config).await.unwrap_err());
    assert!(error.starts_with("--tls-cert ") && !error.contains('\n'), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_speak_tls_to_each_other_and_trust_the_given_authorities() {
    let ports = [Port::reserve(), Port::reserve(), Port::reserve()];
    let [first, second, third] = ports.each_ref().map(Port::address);
    let directory = tempfile::tempdir().unwrap();
    let files = made(directory.path(), "IP:127.0.0.1");
    let stranger = tempfile::tempdir().unwrap();
    let other = made(stranger.path(), "IP:127.0.0.1");
    let start = async |own, other: std::net::SocketAddr, ca_file: &Path| {
        Rig::start_with(&four(1.0), |config, _| {
            config.listen = own;
            config.tls = Some(files.clone());
            let tls = Some(ReplicasTls { ca_file: Some(ca_file.to_owned()) });
            config.replicas = Some(Replicas { name: other.to_string(), token: None, tls });
        })
        .await
    };
    let _second = start(second, first, &files.certificate).await;
    let _third = start(third, first, &other.certificate).await;
    let running = start(first, second, &files.certificate).await;
    let trusting = |address: std::net::SocketAddr, path: &str| {
        vec!["--cacert".into(), files.certificate.display().to_string(), format!("https://{address}{path}")]
    };
    let send = async |address, id| {
        // Which Envoy it is, people see by its report: its number is nobody's business.
        let report = Report { epoch: format!("of {id}"), ..Report::default() }.to_json();
        let record = Record { gateway: id, turn: 1, report, ..Record::default() };
        let request = ExchangeRequest { from: id, records: vec![record], ..ExchangeRequest::default() };
        let body = directory.path().join(format!("request{id}"));
        std::fs::write(&body, request.to_bytes()).unwrap();
        let mut arguments = trusting(address, "/v1/exchange");
        arguments.extend(["--fail".into(), "--data-binary".into(), format!("@{}", body.display())]);
        assert!(curl(arguments).await.status.success());
    };
    until_true("the second replica has what the first one received, and nothing of the third", async || {
        // They are silent for good after a few seconds.
        send(first, 1).await;
        send(third, 3).await;
        let text = async |address, path| String::from_utf8(curl(trusting(address, path)).await.stdout).unwrap();
        let is_known = text(second, "/v1/status").await.contains(r#""epoch":"of 1""#);
        let refused = "pd_control_relays_total{result=\"failed\"} ";
        let failed = text(third, "/metrics")
            .await
            .lines()
            .any(|line| line.strip_prefix(refused).is_some_and(|count| count != "0"));
        is_known && failed
    })
    .await;
    let text = String::from_utf8(curl(trusting(first, "/v1/status")).await.stdout).unwrap();
    assert!(!text.contains(r#""epoch":"of 3""#), "{text}");

    // What it could never trust, it says before it serves.
    let tls = Some(ReplicasTls { ca_file: Some(stranger.path().join("none")) });
    let replicas = Some(Replicas { name: "pd-control-peers:1".into(), token: None, tls });
    let port = Port::reserve();
    let refused = Control::start(Config { listen: port.address(), replicas, ..running.config.clone() }).await;
    let error = format!("{:#}", refused.expect_err("no such file"));
    assert!(error.starts_with("--peers-ca-file ") && !error.contains('\n'), "{error}");
}
