//! Ports that have to be free before anything starts.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};

use anyhow::bail;

/// Makes sure that every address can be listened on.
///
/// # Errors
/// One line that names every port that is taken, and what it was for.
pub fn check(wanted: &[(SocketAddr, String)]) -> anyhow::Result<()> {
    let mut taken = Vec::new();
    for (address, purpose) in wanted {
        match TcpListener::bind(address) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                taken.push(format!("port {} (for {purpose})", address.port()));
            }
            Err(error) => bail!("cannot listen on {address} (for {purpose}): {error}"),
        }
    }
    if taken.is_empty() {
        return Ok(());
    }
    let verb = if taken.len() == 1 { "is" } else { "are" };
    bail!("{} {verb} in use; free what holds them, or move all ports: make run PORT_OFFSET=1000", taken.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_port_is_named_with_its_purpose() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let error = check(&[(address, "the gateway".to_owned())]).unwrap_err().to_string();
        assert!(error.starts_with(&format!("port {} (for the gateway) is in use", address.port())), "{error}");
    }

    #[test]
    fn an_address_of_another_machine_is_an_error_of_its_own() {
        let error = check(&[("192.0.2.1:80".parse().unwrap(), "x".to_owned())]).unwrap_err().to_string();
        assert!(error.starts_with("cannot listen on 192.0.2.1:80 (for x)"), "{error}");
    }
}
