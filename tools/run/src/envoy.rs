//! Envoy's configuration: `envoy/local.yaml` as it stands, or rendered for other ports and other endpoints.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::Context;
use pd_core::wire::Endpoint;
use serde_json::{Value, json};

const ADMIN: &str = "/admin/address/socket_address";
const GATEWAY: &str = "/static_resources/listeners/0/address/socket_address";
const HTTP_FILTERS: &str = "/static_resources/listeners/0/filter_chains/0/filters/0/typed_config/http_filters";
const CLUSTERS: &str = "/static_resources/clusters";
const CONTROL: &str = "/load_assignment/endpoints/0/lb_endpoints/0/endpoint/address/socket_address";

/// A whole Envoy configuration.
#[derive(Clone, Debug)]
pub struct EnvoyConfig(Value);

impl EnvoyConfig {
    /// Reads a YAML file.
    ///
    /// # Errors
    /// Names the file.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let file = || path.display().to_string();
        let text = std::fs::read_to_string(path).with_context(file)?;
        serde_saphyr::from_str(&text).map(Self).map_err(|error| anyhow::anyhow!("{}: {error}", file()))
    }

    /// Where clients connect.
    ///
    /// # Errors
    /// When the file says no such thing.
    pub fn gateway(&self) -> anyhow::Result<SocketAddr> {
        self.0.pointer(GATEWAY).and_then(address).context("Envoy's configuration has no first listener")
    }

    /// Where Envoy's own pages are.
    ///
    /// # Errors
    /// When the file says no such thing.
    pub fn admin(&self) -> anyhow::Result<SocketAddr> {
        self.0.pointer(ADMIN).and_then(address).context("Envoy's configuration has no admin address")
    }

    /// Where Envoy looks for `pd-control`.
    ///
    /// # Errors
    /// When the file says no such thing.
    pub fn control(&self) -> anyhow::Result<SocketAddr> {
        let cluster = named(self.0.pointer(CLUSTERS), "pd-control");
        cluster
            .and_then(|cluster| address(cluster.pointer(CONTROL)?))
            .context("Envoy's configuration has no pd-control")
    }

    /// The module that the filter runs.
    pub fn module(&self) -> Option<&str> {
        let filter = named(self.0.pointer(HTTP_FILTERS), "pd")?;
        filter.pointer("/typed_config/config/vm_config/code/local/filename")?.as_str()
    }

    /// The same for other ports, other endpoints and another EDS file.
    ///
    /// # Errors
    /// When the file lacks one of the places to change, or the offset leads beyond the last port.
    pub fn render(&self, port_offset: u16, endpoints: &[Endpoint], eds: &Path) -> anyhow::Result<Self> {
        let mut config = self.0.clone();
        for place in [ADMIN, GATEWAY] {
            shift(config.pointer_mut(place), port_offset).context(place)?;
        }
        let clusters = config.pointer_mut(CLUSTERS);
        let control = named_mut(clusters, "pd-control").and_then(|cluster| cluster.pointer_mut(CONTROL));
        shift(control, port_offset).context("cluster pd-control")?;
        let source = named_mut(config.pointer_mut(CLUSTERS), "engines")
            .and_then(|cluster| cluster.pointer_mut("/eds_cluster_config/eds_config/path_config_source"))
            .context("cluster engines has no EDS file")?;
        let directory = eds.parent().context("the EDS file has no directory")?;
        *source = json!({"path": eds, "watched_directory": {"path": directory}});
        let text = named_mut(config.pointer_mut(HTTP_FILTERS), "pd")
            .and_then(|filter| filter.pointer_mut("/typed_config/config/configuration/value"))
            .context("the filter has no plugin configuration")?;
        let mut plugin: Value =
            serde_json::from_str(text.as_str().unwrap_or_default()).context("plugin configuration")?;
        plugin["endpoints"] = serde_json::to_value(endpoints)?;
        *text = Value::String(serde_json::to_string_pretty(&plugin)?);
        Ok(Self(config))
    }

    /// As JSON, which Envoy reads too.
    pub fn to_json(&self) -> String {
        format!("{:#}\n", self.0)
    }
}

fn address(socket: &Value) -> Option<SocketAddr> {
    let ip: IpAddr = socket.get("address")?.as_str()?.parse().ok()?;
    Some((ip, u16::try_from(socket.get("port_value")?.as_u64()?).ok()?).into())
}

fn shift(socket: Option<&mut Value>, port_offset: u16) -> anyhow::Result<()> {
    let socket = socket.context("is not there")?;
    let port = address(socket).context("is no address")?.port();
    socket["port_value"] = port.checked_add(port_offset).context("--port-offset leads beyond port 65535")?.into();
    Ok(())
}

fn is_named(value: &Value, name: &str) -> bool {
    value.get("name").and_then(Value::as_str) == Some(name)
}

fn named<'a>(list: Option<&'a Value>, name: &str) -> Option<&'a Value> {
    list?.as_array()?.iter().find(|value| is_named(value, name))
}

fn named_mut<'a>(list: Option<&'a mut Value>, name: &str) -> Option<&'a mut Value> {
    list?.as_array_mut()?.iter_mut().find(|value| is_named(value, name))
}

#[cfg(test)]
mod tests {
    use pd_core::config::Config;
    use pd_core::wire::Role;

    use super::*;

    fn local() -> EnvoyConfig {
        EnvoyConfig::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../envoy/local.yaml")).unwrap()
    }

    fn plugin(config: &EnvoyConfig) -> Config {
        let filter = named(config.0.pointer(HTTP_FILTERS), "pd").unwrap();
        let text = filter.pointer("/typed_config/config/configuration/value").unwrap().as_str().unwrap();
        Config::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn the_committed_file_names_the_simulators_that_are_started() {
        let local = local();
        assert_eq!(plugin(&local).endpoints, crate::engines::simulators(0).unwrap());
        let listening = [local.gateway(), local.admin(), local.control()].map(|address| address.unwrap().to_string());
        assert_eq!(listening, ["127.0.0.1:8080", "127.0.0.1:9901", "127.0.0.1:9000"]);
        assert!(local.module().unwrap().ends_with(".wasm"));
    }

    #[test]
    fn other_ports_and_endpoints_change_nothing_else() {
        let endpoints = [Endpoint::new("10.0.0.1:80".parse().unwrap(), Role::Both)];
        let rendered = local().render(100, &endpoints, Path::new("d/eds.json")).unwrap();
        let listening = [rendered.gateway(), rendered.admin(), rendered.control()].map(|at| at.unwrap().port());
        assert_eq!(listening, [8180, 10001, 9100]);
        let mut expected = plugin(&local());
        expected.endpoints = endpoints.to_vec();
        assert_eq!(plugin(&rendered), expected);
        assert!(rendered.to_json().contains(r#""path": "d/eds.json""#));
        assert!(local().render(60_000, &endpoints, Path::new("d/eds.json")).is_err());
    }
}
