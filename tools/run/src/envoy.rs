//! Envoy's configuration, rendered for other ports and other endpoints than those of `envoy/local.yaml`.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context;
use pd_core::wire::Endpoint;
use pd_support::config::Config;

/// The same configuration for other ports, other endpoints and another EDS file.
///
/// # Errors
/// When the offset leads beyond the last port.
pub fn render(config: &Config, port_offset: u16, endpoints: &[Endpoint], eds: &Path) -> anyhow::Result<Config> {
    let shifted = |address: SocketAddr| {
        let port = address.port().checked_add(port_offset).context("--port-offset leads beyond port 65535")?;
        anyhow::Ok(SocketAddr::new(address.ip(), port))
    };
    let mut config = config.clone();
    config.set_admin(shifted(config.admin())?);
    config.set_listener(shifted(config.gateway())?);
    config.set_control(shifted(config.control())?);
    config.set_eds(eds);
    let mut plugin = config.plugin_configuration();
    plugin["endpoints"] = serde_json::to_value(endpoints)?;
    config.set_plugin_configuration(&serde_json::to_string_pretty(&plugin)?);
    Ok(config)
}

#[cfg(test)]
mod tests {
    use pd_core::wire::Role;
    use pd_support::places;

    use super::*;

    fn local() -> Config {
        Config::read(&places::local_yaml()).unwrap()
    }

    fn plugin(config: &mut Config) -> pd_core::config::Config {
        pd_core::config::Config::parse(config.plugin_configuration().to_string().as_bytes()).unwrap()
    }

    #[test]
    fn the_committed_file_names_the_simulators_that_are_started() {
        let mut local = local();
        assert_eq!(plugin(&mut local).endpoints, crate::engines::simulators(0).unwrap());
        let listening = [local.gateway(), local.admin(), local.control()].map(|address| address.to_string());
        assert_eq!(listening, ["127.0.0.1:8080", "127.0.0.1:9901", "127.0.0.1:9000"]);
        assert!(local.module().ends_with(".wasm"));
    }

    #[test]
    fn other_ports_and_endpoints_change_nothing_else() {
        let endpoints = [Endpoint::new("10.0.0.1:80".parse().unwrap(), Role::Both)];
        let mut rendered = render(&local(), 100, &endpoints, Path::new("d/eds.json")).unwrap();
        let listening = [rendered.gateway(), rendered.admin(), rendered.control()].map(|address| address.port());
        assert_eq!(listening, [8180, 10001, 9100]);
        let mut expected = plugin(&mut local());
        expected.endpoints = endpoints.to_vec();
        assert_eq!(plugin(&mut rendered), expected);
        assert!(rendered.root.to_string().contains(r#""path":"d/eds.json""#));
        assert!(render(&local(), 60_000, &endpoints, Path::new("d/eds.json")).is_err());
    }
}
