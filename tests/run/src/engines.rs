//! The engines to route to: simulators of ours, a small vLLM pair, or a person's own.

use std::fmt::Write as _;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use anyhow::{Context, bail};
use pd_core::wire::{Endpoint, Engine, Role};
use tokio::net::TcpStream;

/// Simulators that are started, before any port offset: the same as in `envoy/endpoints.yaml`.
const SIMULATORS: [(u16, Role); 4] =
    [(8100, Role::Prefill), (8101, Role::Prefill), (8200, Role::Decode), (8201, Role::Decode)];
/// vLLM servers that are started, before any port offset, and the port at which NIXL's peers meet each.
const VLLM: [(u16, u16, Role); 2] = [(8100, 5600, Role::Prefill), (8200, 5700, Role::Decode)];
/// How long an engine of somebody's may take to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);

/// Reads an engine's name.
///
/// # Errors
/// When there is no such engine; lists those there are.
pub fn parse_engine(name: &str) -> Result<Engine, String> {
    let engine = serde_json::from_value(name.into());
    engine.map_err(|error: serde_json::Error| error.to_string())
}

/// Whose engines they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Simulators, which have to be started.
    Simulated,
    /// vLLM servers, which have to be started.
    Vllm,
    /// Somebody's own.
    Own,
}

/// What the simulators will be.
///
/// # Errors
/// When the offset leads beyond the last port.
pub fn simulators(port_offset: u16) -> anyhow::Result<Vec<Endpoint>> {
    SIMULATORS.into_iter().map(|(port, role)| Ok(Endpoint::new(local(port, port_offset)?, role))).collect()
}

/// What the vLLM servers will be, and where NIXL's peers meet each.
///
/// # Errors
/// When the offset leads beyond the last port.
pub fn vllm(port_offset: u16) -> anyhow::Result<Vec<(Endpoint, SocketAddr)>> {
    let server = |(port, side, role): (u16, u16, Role)| {
        Ok((Endpoint::new(local(port, port_offset)?, role), local(side, port_offset)?))
    };
    VLLM.into_iter().map(server).collect()
}

fn local(port: u16, port_offset: u16) -> anyhow::Result<SocketAddr> {
    let port = port.checked_add(port_offset).context("--port-offset leads beyond port 65535")?;
    Ok(([127, 0, 0, 1], port).into())
}

/// Somebody's own engines, names resolved; one that is listed in both roles has the role `both`.
///
/// # Errors
/// Names the first that cannot be resolved.
pub fn own(prefill: &[String], decode: &[String], engine: Engine) -> anyhow::Result<Vec<Endpoint>> {
    let mut endpoints: Vec<Endpoint> = Vec::new();
    for (names, role) in [(prefill, Role::Prefill), (decode, Role::Decode)] {
        for name in names {
            let address = resolve(name).with_context(|| format!("{} engine {name}", role_name(role)))?;
            match endpoints.iter_mut().find(|endpoint| endpoint.address == address) {
                Some(endpoint) if endpoint.role == role => bail!("{name} is listed twice"),
                Some(endpoint) => endpoint.role = Role::Both,
                None => endpoints.push(Endpoint { engine: Some(engine), ..Endpoint::new(address, role) }),
            }
        }
    }
    Ok(endpoints)
}

/// Makes sure that every engine accepts connections.
///
/// # Errors
/// Names the first that does not.
pub async fn reach(endpoints: &[Endpoint]) -> anyhow::Result<()> {
    for endpoint in endpoints {
        let reached = tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect(endpoint.address)).await;
        let what = || format!("{} engine {} cannot be reached", role_name(endpoint.role), endpoint.address);
        reached.with_context(what)?.with_context(what)?;
    }
    Ok(())
}

/// The role as people write it.
pub fn role_name(role: Role) -> &'static str {
    match role {
        Role::Prefill => "prefill",
        Role::Decode => "decode",
        Role::Both => "prefill and decode",
    }
}

/// An endpoints file for `pd-control`.
pub fn endpoints_file(endpoints: &[Endpoint]) -> String {
    let mut text =
        "# Written at every start. Edit and save: routing follows. envoy/endpoints.yaml lists all keys.\nendpoints:\n"
            .to_owned();
    for endpoint in endpoints {
        let value = serde_json::to_value(endpoint).unwrap_or_default();
        let mut dash = "- ";
        for (key, value) in value.as_object().into_iter().flatten() {
            let _ = writeln!(text, "  {dash}{key}: {value}");
            dash = "  ";
        }
    }
    text
}

fn resolve(name: &str) -> anyhow::Result<SocketAddr> {
    let (host, port) = name.rsplit_once(':').context("must be host:port")?;
    if host.is_empty() || !port.parse::<u16>().is_ok_and(|port| port > 0) {
        bail!("must be host:port");
    }
    let addresses: Vec<_> = name.to_socket_addrs().context("cannot be resolved")?.collect();
    let first = addresses.iter().find(|address| address.is_ipv4()).or(addresses.first());
    first.copied().context("has no address")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn names_are_resolved_and_a_server_of_both_roles_is_one_endpoint() {
        let endpoints =
            own(&names(&["localhost:81", "[::1]:82"]), &names(&["127.0.0.1:81"]), Engine::VllmShared).unwrap();
        let seen: Vec<_> = endpoints.iter().map(|endpoint| (endpoint.address.to_string(), endpoint.role)).collect();
        assert_eq!(seen, [("127.0.0.1:81".to_owned(), Role::Both), ("[::1]:82".to_owned(), Role::Prefill)]);
    }

    #[test]
    fn what_is_no_host_and_port_is_named() {
        for (name, why) in [("gpu", "host:port"), ("gpu:", "host:port"), (":80", "host:port"), ("[::1]", "host:port")] {
            let error = format!("{:#}", own(&names(&[name]), &[], Engine::VllmNixl).unwrap_err());
            assert!(error.contains(name) && error.contains(why), "{error}");
        }
        assert!(own(&names(&["127.0.0.1:1", "127.0.0.1:1"]), &[], Engine::VllmNixl).is_err());
    }

    #[test]
    fn the_endpoints_file_is_one_that_pd_control_takes() {
        let endpoints = own(&names(&["[::1]:82"]), &names(&["127.0.0.1:81"]), Engine::VllmShared).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("endpoints.yaml");
        std::fs::write(&path, endpoints_file(&endpoints)).unwrap();
        let report = pd_control::cli::check::check(&[path], None);
        assert!(report.faults.is_empty() && report.said[0].contains('2'), "{report:?}");
    }
}
