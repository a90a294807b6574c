//! The EDS file, from which a plain Envoy reads the hosts of its cluster.
//!
//! The file has every address of the list, whatever the endpoint's state: draining endpoints have to finish their
//! requests, and the filter decides which host gets a request. Data-parallel ranks behind one address are one host.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use pd_core::wire::Endpoint;
use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64;

const CLUSTER_LOAD_ASSIGNMENT: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";

/// Addresses of a cluster's hosts.
pub type Hosts = BTreeSet<SocketAddr>;

/// The EDS file of one Envoy cluster.
#[derive(Clone, Debug)]
pub struct EdsFile {
    path: PathBuf,
    cluster: String,
}

#[derive(Serialize)]
struct DiscoveryResponse<'a> {
    version_info: String,
    resources: [Assignment<'a>; 1],
}

#[derive(Serialize)]
struct Assignment<'a> {
    #[serde(rename = "@type")]
    type_url: &'static str,
    cluster_name: &'a str,
    endpoints: [Locality; 1],
}

#[derive(Serialize)]
struct Locality {
    lb_endpoints: Vec<LbEndpoint>,
}

#[derive(Serialize)]
struct LbEndpoint {
    endpoint: EndpointAddress,
}

#[derive(Serialize)]
struct EndpointAddress {
    address: Address,
}

#[derive(Serialize)]
struct Address {
    socket_address: SocketAddress,
}

#[derive(Serialize)]
struct SocketAddress {
    address: IpAddr,
    port_value: u16,
}

impl EdsFile {
    /// The file at `path` for the Envoy cluster named `cluster`; nothing is read or written yet.
    #[must_use]
    pub fn new(path: PathBuf, cluster: String) -> Self {
        Self { path, cluster }
    }

    /// Path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the file unless it holds `hosts` already; returns whether it was written.
    ///
    /// The text goes into a file beside it, which is then renamed: Envoy watches for the rename and must never read
    /// half a file.
    ///
    /// # Errors
    /// When the directory cannot be written. The old file then stays as it was.
    pub fn write(&self, hosts: &Hosts) -> io::Result<bool> {
        let content = render(&self.cluster, hosts);
        if std::fs::read(&self.path).is_ok_and(|present| present == content.as_bytes()) {
            return Ok(false);
        }
        let name = self.path.file_name().ok_or(io::ErrorKind::InvalidFilename)?.to_string_lossy();
        let aside = self.path.with_file_name(format!(".{name}.new"));
        let outcome = std::fs::write(&aside, content).and_then(|()| std::fs::rename(&aside, &self.path));
        if outcome.is_err() {
            // It may not exist. The first error is the one to report.
            let _ = std::fs::remove_file(&aside);
        }
        outcome.map(|()| true)
    }
}

/// The addresses of a list, each once.
#[must_use]
pub fn hosts(endpoints: &[Endpoint]) -> Hosts {
    endpoints.iter().map(|endpoint| endpoint.address).collect()
}

/// The file's text.
///
/// Its `version_info` is a hash of the hosts: the text depends on cluster and hosts alone, so a restart writes no new
/// file.
#[must_use]
pub fn render(cluster: &str, hosts: &Hosts) -> String {
    let names: Vec<String> = hosts.iter().map(ToString::to_string).collect();
    let lb_endpoints = hosts.iter().map(|host| {
        let socket_address = SocketAddress { address: host.ip(), port_value: host.port() };
        LbEndpoint { endpoint: EndpointAddress { address: Address { socket_address } } }
    });
    let response = DiscoveryResponse {
        version_info: format!("{:016x}", xxh3_64(names.join("\n").as_bytes())),
        resources: [Assignment {
            type_url: CLUSTER_LOAD_ASSIGNMENT,
            cluster_name: cluster,
            endpoints: [Locality { lb_endpoints: lb_endpoints.collect() }],
        }],
    };
    // serde_json cannot fail on strings and integers.
    serde_json::to_string_pretty(&response).unwrap_or_default() + "\n"
}

#[cfg(test)]
mod tests {
    use pd_core::wire::{Role, State};
    use serde_json::{Value, json};

    use super::*;

    fn hosts_of(addresses: &[&str]) -> Hosts {
        addresses.iter().map(|address| address.parse().unwrap()).collect()
    }

    #[test]
    fn hosts_are_sorted_and_in_the_shape_that_envoy_reads() {
        let text = render("engines", &hosts_of(&["127.0.0.1:8200", "[::1]:80", "127.0.0.1:8100"]));
        let host = |address: &str, port: u16| json!({"endpoint": {"address": {"socket_address": {"address": address, "port_value": port}}}});
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            value["resources"],
            json!([{
                "@type": "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
                "cluster_name": "engines",
                "endpoints": [{"lb_endpoints": [host("127.0.0.1", 8100), host("127.0.0.1", 8200), host("::1", 80)]}],
            }])
        );
    }

    #[test]
    fn the_version_changes_with_the_hosts_alone() {
        let version = |text: &str| serde_json::from_str::<Value>(text).unwrap()["version_info"].clone();
        let (one, two) = (hosts_of(&["10.0.0.1:80"]), hosts_of(&["10.0.0.1:80", "10.0.0.2:80"]));
        assert_eq!(version(&render("a", &one)), version(&render("b", &one)));
        assert_ne!(version(&render("a", &one)), version(&render("a", &two)));
    }

    #[test]
    fn ranks_collapse_and_every_state_is_a_host() {
        let endpoint = Endpoint::new("10.0.0.1:80".parse().unwrap(), Role::Decode);
        let down = Endpoint { address: "10.0.0.2:80".parse().unwrap(), state: State::Down, ..endpoint.clone() };
        let ranks = [0, 1].map(|rank| Endpoint { rank: Some(rank), ..endpoint.clone() });
        let [first, second] = ranks;
        assert_eq!(hosts(&[first, second, down]), hosts_of(&["10.0.0.1:80", "10.0.0.2:80"]));
    }

    #[test]
    fn a_file_that_holds_the_hosts_already_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let file = EdsFile::new(directory.path().join("eds.json"), "engines".into());
        let hosts = hosts_of(&["10.0.0.1:80"]);
        assert!(file.write(&hosts).unwrap());
        assert!(!file.write(&hosts).unwrap());
        assert!(file.write(&Hosts::new()).unwrap());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn a_directory_that_is_not_there_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let file = EdsFile::new(directory.path().join("none/eds.json"), "engines".into());
        assert!(file.write(&Hosts::new()).is_err());
    }
}
