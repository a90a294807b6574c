//! TLS, as curl sees it.

use std::process::{Command, Output, Stdio};

use pd_control::Control;
use pd_control::tls::TlsFiles;
use tokio::net::TcpStream;

use crate::support::*;

async fn curl(arguments: Vec<String>) -> Output {
    let run = move || Command::new("curl").args(["-sS", "--max-time", "10"]).args(arguments).output().unwrap();
    tokio::task::spawn_blocking(run).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_certificate_only_tls_is_spoken() {
    let rig = Rig::start_with(&four(1.0), |config, directory| {
        let path = |name: &str| directory.join(name);
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=pd-control"])
            .args(["-addext", "subjectAltName=IP:127.0.0.1", "-keyout"])
            .args([path("key.pem"), "-out".into(), path("cert.pem")])
            .stderr(Stdio::null())
            .status()
            .unwrap();
        assert!(made.success());
        config.tls = Some(TlsFiles { certificate: path("cert.pem"), key: path("key.pem") });
    })
    .await;
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
