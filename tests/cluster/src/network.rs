//! The cluster's network: a bridge, and a network namespace with an address of each family for every pod.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Stdio;

use anyhow::Context as _;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use crate::program::run;

/// The node: API server, registry and DNS are here, and pods' routes go through it.
pub const NODE: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 1);
/// Host name of the registry, for TLS.
///
/// Envoy Gateway tries private addresses, and names that end in `.local`, over plain HTTP, too.
pub const REGISTRY: &str = "registry.test";
/// Addresses of pods, of which the first 250 are left out.
const PODS: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 0);
/// The node's other address, and pods' other addresses, of which the first 250 are left out.
const NODE_SIX: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, 1);
const PODS_SIX: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, 0);
/// Addresses of services.
pub const SERVICES: &str = "10.96.0.0/16,fd00:10:96::/112";
/// The API server's service.
pub const KUBERNETES: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);

/// Makes the bridge.
///
/// # Errors
/// What `ip` says.
pub async fn up() -> anyhow::Result<()> {
    ip("link set lo up").await?;
    ip("link add br0 type bridge").await?;
    ip(&format!("addr add {NODE}/16 dev br0")).await?;
    ip(&format!("addr add {NODE_SIX}/64 dev br0 nodad")).await?;
    ip("link set br0 up").await
}

/// Gives the node one more address.
///
/// # Errors
/// What `ip` says.
pub async fn add_address(address: Ipv4Addr) -> anyhow::Result<()> {
    ip(&format!("addr add {address}/32 dev lo")).await
}

async fn ip(line: &str) -> anyhow::Result<()> {
    run("ip", &line.split(' ').collect::<Vec<_>>()).await.map(drop)
}

/// A pod's network namespace. Dropping it ends the process that holds it.
#[derive(Debug)]
pub struct Sandbox {
    /// The pod's IPv4 address.
    pub address: Ipv4Addr,
    /// The pod's IPv6 address.
    pub address_six: Ipv6Addr,
    holder: Child,
}

impl Sandbox {
    /// Makes the `number`-th namespace and connects it.
    ///
    /// # Errors
    /// What the system says.
    pub async fn new(number: u16) -> anyhow::Result<Self> {
        let address = Ipv4Addr::from(u32::from(PODS) + 250 + u32::from(number));
        let address_six = Ipv6Addr::from(u128::from(PODS_SIX) + 250 + u128::from(number));
        let mut holder = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo up; exec sleep infinity"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        // The namespace is there once the shell in it speaks.
        let mut line = String::new();
        BufReader::new(holder.stdout.take().context("stdout")?).read_line(&mut line).await?;
        let sandbox = Self { address, address_six, holder };
        let pid = sandbox.pid()?;
        ip(&format!("link add pod{number} type veth peer name eth0 netns {pid}")).await?;
        ip(&format!("link set pod{number} master br0 up")).await?;
        let inside = format!(
            "ip link set lo up; ip addr add {address}/16 dev eth0; ip addr add {address_six}/64 dev eth0 nodad; \
             ip link set eth0 up; ip route add default via {NODE}; ip -6 route add default via {NODE_SIX}"
        );
        run("nsenter", &[&format!("--net={}", sandbox.path()?), "sh", "-ec", &inside]).await?;
        Ok(sandbox)
    }

    /// The namespace, for `nsenter`.
    ///
    /// # Errors
    /// When it is gone.
    pub fn path(&self) -> anyhow::Result<String> {
        Ok(format!("/proc/{}/ns/net", self.pid()?))
    }

    fn pid(&self) -> anyhow::Result<u32> {
        self.holder.id().context("the pod's network namespace is gone")
    }
}
