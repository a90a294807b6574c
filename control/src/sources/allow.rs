//! Allow-list for addresses that pd-control learns from Kubernetes or DNS. Addresses from files and of the command line
//! are not checked.
//!
//! Without it, anyone who may write a pod's status or a DNS record could direct requests, with the prompts of clients,
//! to the node itself or to a cloud's metadata server.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::LazyLock;

use ipnet::IpNet;

/// Networks without engines. Their addresses are refused unless the operator allows a network inside of them.
const SPECIAL: &[&str] = &[
    // This host.
    "0.0.0.0/8",
    "127.0.0.0/8",
    "::/128",
    "::1/128",
    // Link-local, where clouds have their metadata servers.
    "169.254.0.0/16",
    "fe80::/10",
    // Metadata servers elsewhere: AWS, Google, Azure, Alibaba, Oracle.
    "fd00:ec2::/32",
    "fd20:ce::254/128",
    "168.63.129.16/32",
    "100.100.100.200/32",
    "192.0.0.192/32",
    // Multicast, reserved, broadcast.
    "224.0.0.0/4",
    "240.0.0.0/4",
    "ff00::/8",
];

static SPECIAL_NETWORKS: LazyLock<Vec<IpNet>> =
    LazyLock::new(|| SPECIAL.iter().filter_map(|text| text.parse().ok()).collect());

/// The networks that the operator allows.
#[derive(Clone, Debug, Default)]
pub struct AllowedNetworks(Vec<IpNet>);

impl AllowedNetworks {
    /// Allows these networks; with none, every address outside the special ones.
    #[must_use]
    pub fn new(networks: Vec<IpNet>) -> Self {
        Self(networks)
    }

    /// Checks whether an address may be an endpoint's.
    ///
    /// # Errors
    /// One line that says why the address is refused.
    pub fn check(&self, address: IpAddr) -> Result<(), String> {
        // An IPv4-mapped IPv6 address reaches the same host, and so does the one behind a translator (RFC 6052).
        let (given, address) = (address.to_canonical(), embedded(address).unwrap_or(address.to_canonical()));
        let is_named = |network: &&IpNet| network.contains(&given) || network.contains(&address);
        let named: Vec<_> = self.0.iter().filter(is_named).collect();
        if let Some(special) = SPECIAL_NETWORKS.iter().find(|network| network.contains(&address))
            && !named.iter().any(|network| special.contains(*network))
        {
            return Err(format!("{address} is in {special}, where no engine is"));
        }
        if !self.0.is_empty() && named.is_empty() {
            return Err(format!("{address} is in none of the allowed networks"));
        }
        Ok(())
    }
}

/// The IPv4 address that a translator's IPv6 address stands for.
fn embedded(address: IpAddr) -> Option<IpAddr> {
    let IpAddr::V6(address) = address else { return None };
    let [0x64, 0xff9b, 0, 0, 0, 0, high, low] = address.segments() else { return None };
    Some(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks(texts: &[&str]) -> AllowedNetworks {
        AllowedNetworks::new(texts.iter().map(|text| text.parse().unwrap()).collect())
    }

    fn is_allowed(networks: &AllowedNetworks, address: &str) -> bool {
        networks.check(address.parse().unwrap()).is_ok()
    }

    #[test]
    fn every_special_network_is_one() {
        assert_eq!(SPECIAL_NETWORKS.len(), SPECIAL.len());
    }

    #[test]
    fn this_host_and_metadata_servers_are_refused_unless_named() {
        let any = networks(&[]);
        for special in [
            "127.0.0.1",
            "::1",
            "0.0.0.0",
            "::",
            "169.254.169.254",
            "fe80::1",
            "fd00:ec2::254",
            "168.63.129.16",
            "100.100.100.200",
            "192.0.0.192",
            "224.0.0.1",
            "255.255.255.255",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "fd20:ce::254",
        ] {
            assert!(!is_allowed(&any, special), "{special}");
            assert!(
                !is_allowed(&networks(&["0.0.0.0/0", "::/0"]), special),
                "{special}: a default route names nothing"
            );
        }
        assert!(is_allowed(&any, "10.0.0.1") && is_allowed(&any, "2001:db8::1"));
        let loopback = networks(&["127.0.0.0/24"]);
        assert!(is_allowed(&loopback, "127.0.0.1") && !is_allowed(&loopback, "127.0.1.1"));
    }

    #[test]
    fn with_a_list_the_rest_is_refused() {
        let pods = networks(&["10.244.0.0/16", "fd01::/64"]);
        assert!(is_allowed(&pods, "10.244.3.4") && is_allowed(&pods, "fd01::5"));
        assert!(is_allowed(&networks(&["64:ff9b::/96"]), "64:ff9b::a00:1"));
        assert!(!is_allowed(&pods, "10.245.0.1") && !is_allowed(&pods, "fd02::1"));
        assert_eq!(pods.check("10.1.1.1".parse().unwrap()).unwrap_err(), "10.1.1.1 is in none of the allowed networks");
    }
}
