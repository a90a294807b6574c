//! Probes and hooks over HTTP and TCP.

use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, HTTPGetAction, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use pd_support::client;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Whether a probe succeeds. Those that would run a program in the container do.
pub async fn succeeds(probe: &Probe, container: &Container, address: IpAddr) -> bool {
    let limit = Duration::from_secs(probe.timeout_seconds.and_then(|seconds| seconds.try_into().ok()).unwrap_or(1));
    if let Some(get) = &probe.http_get {
        self::get(get, container, address, limit).await
    } else if let Some(tcp) = &probe.tcp_socket {
        let Some(port) = port(&tcp.port, container) else { return false };
        accepts(address, port, limit).await
    } else {
        true
    }
}

/// Whether `GET` is answered with success in time. Over TLS a connection is enough.
pub async fn get(get: &HTTPGetAction, container: &Container, address: IpAddr, limit: Duration) -> bool {
    let Some(port) = port(&get.port, container) else { return false };
    if get.scheme.as_deref() == Some("HTTPS") {
        return accepts(address, port, limit).await;
    }
    let path = get.path.as_deref().unwrap_or("/");
    let answer = timeout(limit, client::get((address, port).into(), path)).await;
    answer.is_ok_and(|answer| answer.is_ok_and(|answer| (200..400).contains(&answer.status)))
}

async fn accepts(address: IpAddr, port: u16, limit: Duration) -> bool {
    timeout(limit, TcpStream::connect((address, port))).await.is_ok_and(|connected| connected.is_ok())
}

fn port(port: &IntOrString, container: &Container) -> Option<u16> {
    match port {
        IntOrString::Int(number) => (*number).try_into().ok(),
        IntOrString::String(name) => {
            let mut ports = container.ports.iter().flatten();
            let named = ports.find(|port| port.name.as_ref() == Some(name)).map(|port| port.container_port);
            named.or_else(|| name.parse().ok())?.try_into().ok()
        }
    }
}
