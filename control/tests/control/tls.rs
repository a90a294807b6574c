//! TLS, as curl sees it.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use pd_control::Control;
use pd_control::tls::TlsFiles;
use tokio::net::TcpStream;

use crate::support::*;

async fn curl(arguments: Vec<String>) -> Output {
    let run = move || Command::new("curl").args(["-sS", "--max-time", "10"]).args(arguments).output().unwrap();
    tokio::task::spawn_blocking(run).await.unwrap()
}

/// A certificate that vouches for itself, and its key.
fn made(directory: &Path, name: &str) -> TlsFiles {
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
        (&trusting[..], &[][..], "it asks for a token: set PD_CONTROL_TOKEN or --token-file"),
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
    // Somebody who never begins his handshake keeps nobody else from theirs.
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
