//! The engines to route to: simulators of ours, a small vLLM pair, or a person's own.

use std::fmt::Write as _;
use std::net::{Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
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
/// Names the first that is not `host:port`, is listed twice in a role, or cannot be resolved, and says what is wanted.
pub fn own(prefill: &[String], decode: &[String], engine: Engine) -> anyhow::Result<Vec<Endpoint>> {
    let mut endpoints: Vec<(&str, Endpoint)> = Vec::new();
    for (names, role) in [(prefill, Role::Prefill), (decode, Role::Decode)] {
        for name in names {
            let what = format!("{} engine {name:?}", role_name(role));
            let address = resolve(name.trim()).with_context(|| what.clone())?;
            match endpoints.iter_mut().find(|(_, endpoint)| endpoint.address == address) {
                Some((first, endpoint)) if endpoint.role == role => match *first == name.trim() {
                    true => bail!("{what} is listed twice"),
                    false => bail!("{what} is listed twice: {first:?} is the same address"),
                },
                Some((_, endpoint)) => endpoint.role = Role::Both,
                None => {
                    let endpoint = Endpoint { engine: Some(engine), ..Endpoint::new(address, role) };
                    endpoints.push((name.trim(), endpoint));
                }
            }
        }
    }
    Ok(endpoints.into_iter().map(|(_, endpoint)| endpoint).collect())
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
    check_host_and_port(name)?;
    let addresses: Vec<_> = name.to_socket_addrs().context("cannot be resolved")?.collect();
    let first = addresses.iter().find(|address| address.is_ipv4()).or(addresses.first());
    first.copied().context("has no address")
}

/// Checks `host:port`. The error says which part is missing or too much, and the right form.
fn check_host_and_port(name: &str) -> anyhow::Result<()> {
    ensure!(!name.is_empty(), "an entry is empty: separate host:port by one comma");
    let (scheme, rest) = name.split_once("://").map_or(("", name), |(scheme, rest)| (scheme, rest));
    let (authority, path) = rest.split_at_checked(rest.find('/').unwrap_or(rest.len())).unwrap_or((rest, ""));
    let surplus = [if scheme.is_empty() { String::new() } else { format!("{scheme}://") }, path.to_owned()];
    let surplus: Vec<_> = surplus.into_iter().filter(|part| !part.is_empty()).collect();
    if !surplus.is_empty() {
        let wanted = match authority.trim_end_matches(':') {
            _ if check_host_and_port(authority).is_ok() => authority.to_owned(),
            host if is_host(host) => format!("{host}:PORT"),
            _ => "HOST:PORT".to_owned(),
        };
        bail!("must be host:port without {}: write {wanted}", surplus.join(" and "));
    }
    if name.parse::<Ipv6Addr>().is_ok() {
        // Its last group may be meant as the port.
        let split = name.rsplit_once(':').filter(|(host, port)| {
            host.parse::<Ipv6Addr>().is_ok() && port.len() > 1 && port.bytes().all(|byte| byte.is_ascii_digit())
        });
        let or = split.map_or(String::new(), |(host, port)| format!(" or [{host}]:{port}"));
        bail!("must have its IPv6 address in brackets: write [{name}]:PORT{or}");
    }
    ensure!(!is_bracketed(name), "has no port: write {name}:PORT");
    let Some((host, port)) = name.rsplit_once(':').filter(|(_, port)| !port.is_empty()) else {
        bail!("has no port: write {}:PORT", name.trim_end_matches(':'));
    };
    ensure!(!host.is_empty(), "has no host: write HOST:{port}");
    let is_v6 = host.contains([':', '[', ']']);
    ensure!(!is_v6 || is_bracketed(host), "must have its IPv6 address in brackets, as [::1]:8000");
    ensure!(is_v6 || host.bytes().all(is_of_name), "is no host name and no address");
    match port.parse::<u16>() {
        Ok(0) => bail!("port 0 cannot be connected to: write a port from 1 to 65535"),
        Ok(_) => Ok(()),
        Err(_) => bail!("{port:?} is no port: write a number from 1 to 65535"),
    }
}

fn is_bracketed(host: &str) -> bool {
    let inner = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    inner.is_some_and(|inner| inner.parse::<Ipv6Addr>().is_ok())
}

/// Whether a text is a name or an address, without a port.
fn is_host(text: &str) -> bool {
    !text.is_empty() && (is_bracketed(text) || text.bytes().all(is_of_name))
}

fn is_of_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_')
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
    fn what_is_no_host_and_port_is_said_with_what_is_wanted() {
        for (name, why) in [
            ("", "an entry is empty: separate host:port by one comma"),
            ("gpu", "has no port: write gpu:PORT"),
            ("gpu:", "has no port: write gpu:PORT"),
            ("10.0.0.1", "has no port: write 10.0.0.1:PORT"),
            (":80", "has no host: write HOST:80"),
            ("gpu:0", "port 0 cannot be connected to: write a port from 1 to 65535"),
            ("gpu:http", "\"http\" is no port: write a number from 1 to 65535"),
            ("gpu:70000", "\"70000\" is no port: write a number from 1 to 65535"),
            ("http://gpu:8000", "must be host:port without http://: write gpu:8000"),
            ("https://gpu:8000/v1", "must be host:port without https:// and /v1: write gpu:8000"),
            ("gpu:8000/v1", "must be host:port without /v1: write gpu:8000"),
            ("gpu:8000/", "must be host:port without /: write gpu:8000"),
            ("http://gpu", "must be host:port without http://: write gpu:PORT"),
            ("http://", "must be host:port without http://: write HOST:PORT"),
            // sgl-project/sglang#8644: SGLang's router takes URLs, and a bootstrap port behind them.
            ("http://127.0.0.1:30001", "must be host:port without http://: write 127.0.0.1:30001"),
            ("http://127.0.0.1:30001 8998", "must be host:port without http://: write HOST:PORT"),
            ("127.0.0.1:30001 8998", "\"30001 8998\" is no port: write a number from 1 to 65535"),
            // llm-d/llm-d-router#233: a prefill server was named by a URL where host:port was meant.
            ("http://[::1]:80/", "must be host:port without http:// and /: write [::1]:80"),
            ("http://gpu:", "must be host:port without http://: write gpu:PORT"),
            ("http://gpu:80:90", "must be host:port without http://: write HOST:PORT"),
            // THUDM/AgentTuning#31: the colon is missing.
            ("127.0.0.123332", "has no port: write 127.0.0.123332:PORT"),
            // vavallee/bindery#2110: the error was about a scheme.
            ("audiobookshelf.invalid:13378", "cannot be resolved"),
            ("::1", "must have its IPv6 address in brackets: write [::1]:PORT"),
            ("fd00::1:8000", "must have its IPv6 address in brackets: write [fd00::1:8000]:PORT or [fd00::1]:8000"),
            ("[::1]", "has no port: write [::1]:PORT"),
            ("[::1:80", "must have its IPv6 address in brackets, as [::1]:8000"),
            ("[gpu]:80", "must have its IPv6 address in brackets, as [::1]:8000"),
            ("no such:80", "is no host name and no address"),
            ("no.such.invalid:80", "cannot be resolved"),
        ] {
            let error = format!("{:#}", own(&names(&[name]), &[], Engine::VllmNixl).unwrap_err());
            assert!(error.starts_with(&format!("prefill engine {name:?}: {why}")), "{error}");
        }
    }

    #[test]
    fn an_engine_that_is_listed_twice_is_named_as_it_was_written() {
        let error = |list: &[&str]| format!("{:#}", own(&names(list), &[], Engine::VllmNixl).unwrap_err());
        assert_eq!(error(&["127.0.0.1:1", "127.0.0.1:1"]), "prefill engine \"127.0.0.1:1\" is listed twice");
        assert_eq!(
            error(&["127.0.0.1:1", "localhost:1"]),
            "prefill engine \"localhost:1\" is listed twice: \"127.0.0.1:1\" is the same address"
        );
        let spaced = own(&names(&["127.0.0.1:1", " 127.0.0.1:2"]), &[], Engine::VllmNixl).unwrap();
        assert_eq!(spaced.len(), 2, "a space after the comma is no part of a name");
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
