//! The shipped Envoy configuration, with other addresses and paths in it.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::places;

/// An Envoy configuration of the shape of `envoy/local.yaml`: [`Config::read`] refuses any other, so that what this reads
/// and sets is there.
#[derive(Clone, Debug)]
pub struct Config {
    /// All of it.
    pub root: Value,
}

const ADMIN: &str = "/admin/address";
const LISTENERS: &str = "/static_resources/listeners";
const LISTENER: &str = "/static_resources/listeners/0";
const MANAGER: &str = "/filter_chains/0/filters/0/typed_config";
const CLUSTERS: &str = "/static_resources/clusters";
const CONTROL: &str = "/load_assignment/endpoints/0/lb_endpoints/0/endpoint/address";
const EDS_SOURCE: &str = "/eds_cluster_config/eds_config/path_config_source";
const MODULE: &str = "/vm_config/code/local/filename";
const PLUGIN_CONFIGURATION: &str = "/configuration/value";

impl Config {
    /// Reads a YAML file.
    ///
    /// # Errors
    /// Names the file, and what it lacks.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let file = || path.display().to_string();
        let text = std::fs::read_to_string(path).with_context(file)?;
        let root = serde_saphyr::from_str(&text).map_err(|error| anyhow::anyhow!("{}: {error}", file()))?;
        let config = Self { root };
        config.check().with_context(file)?;
        Ok(config)
    }

    fn check(&self) -> anyhow::Result<()> {
        self.find(LISTENER)
            .and_then(|listener| address(listener.get("address")?))
            .context("it has no first listener")?;
        self.find(ADMIN).and_then(address).context("it has no admin address")?;
        let control = self.named(CLUSTERS, "pd-control").and_then(|cluster| address(self.find(&(cluster + CONTROL))?));
        control.context("it has no pd-control")?;
        let engines = self.named(CLUSTERS, "engines").and_then(|cluster| self.find(&(cluster + EDS_SOURCE)));
        engines.context("cluster engines has no EDS file")?;
        let plugin = self.plugin_place().context("it has no filter")?;
        self.find(&format!("{plugin}{MODULE}")).and_then(Value::as_str).context("it names no module")?;
        let text = self.find(&format!("{plugin}{PLUGIN_CONFIGURATION}")).and_then(Value::as_str);
        let text = text.context("the filter has no plugin configuration")?;
        serde_json::from_str::<Value>(text).context("plugin configuration")?;
        Ok(())
    }

    /// The shipped file, with the module's path made absolute.
    ///
    /// # Panics
    /// When it cannot be read.
    #[must_use]
    pub fn shipped() -> Self {
        let mut config = Self::read(&places::local_yaml()).unwrap_or_else(|error| panic!("{error:#}"));
        config.set_module(&places::wasm());
        config
    }

    /// Where clients connect.
    #[must_use]
    pub fn gateway(&self) -> SocketAddr {
        self.address_at(&format!("{LISTENER}/address"))
    }

    /// Where Envoy's own pages are.
    #[must_use]
    pub fn admin(&self) -> SocketAddr {
        self.address_at(ADMIN)
    }

    /// Where Envoy looks for pd-control.
    #[must_use]
    pub fn control(&self) -> SocketAddr {
        self.address_at(&(self.cluster_place("pd-control") + CONTROL))
    }

    /// The module that the filter runs.
    #[must_use]
    pub fn module(&self) -> &str {
        let place = self.plugin_place().unwrap_or_default() + MODULE;
        self.find(&place).and_then(Value::as_str).unwrap_or_else(|| missing(&place))
    }

    /// Sets where the admin interface listens.
    pub fn set_admin(&mut self, address: SocketAddr) {
        *value_at(&mut self.root, ADMIN) = socket_address(address);
    }

    /// Sets where clients connect.
    pub fn set_listener(&mut self, address: SocketAddr) {
        *value_at(self.listener(), "/address") = socket_address(address);
    }

    /// Sets where pd-control is.
    pub fn set_control(&mut self, address: SocketAddr) {
        *value_at(self.cluster("pd-control"), CONTROL) = socket_address(address);
    }

    /// Sets the file of the engines' hosts; Envoy watches its directory.
    pub fn set_eds(&mut self, file: &Path) {
        let directory = file.parent().map(path_value);
        *value_at(self.cluster("engines"), EDS_SOURCE) =
            json!({"path": path_value(file), "watched_directory": {"path": directory}});
    }

    /// Sets the engines' hosts for good, in place of a file.
    ///
    /// # Panics
    /// When the cluster is no object.
    pub fn set_engines(&mut self, hosts: &[SocketAddr]) {
        let cluster = self.cluster("engines").as_object_mut().expect("an object");
        cluster.remove("eds_cluster_config");
        cluster.insert("type".to_owned(), "STATIC".into());
        cluster.insert("load_assignment".to_owned(), load_assignment("engines", hosts));
    }

    /// Sets the module that the filter runs.
    pub fn set_module(&mut self, path: &Path) {
        *value_at(self.plugin(), MODULE) = path_value(path);
    }

    /// The plugin configuration.
    ///
    /// # Panics
    /// When it is no JSON.
    pub fn plugin_configuration(&mut self) -> Value {
        let value = value_at(self.plugin(), PLUGIN_CONFIGURATION);
        serde_json::from_str(value.as_str().unwrap_or_default()).expect("the plugin configuration is JSON")
    }

    /// Sets the plugin configuration, any text.
    pub fn set_plugin_configuration(&mut self, text: &str) {
        *value_at(self.plugin(), PLUGIN_CONFIGURATION) = text.into();
    }

    /// Takes the listener out, as the text of a file for Envoy's listener discovery.
    #[must_use]
    pub fn listener_file(&mut self) -> String {
        let mut listener = self.listener().clone();
        listener["@type"] = "type.googleapis.com/envoy.config.listener.v3.Listener".into();
        json!({"resources": [listener]}).to_string()
    }

    /// Reads listeners from a file whose directory Envoy watches, in place of its own.
    pub fn set_lds(&mut self, file: &Path) {
        list(&mut self.root, LISTENERS).clear();
        let directory = file.parent().map(path_value);
        self.root["dynamic_resources"]["lds_config"] = json!({
            "path_config_source": {"path": path_value(file), "watched_directory": {"path": directory}},
            "resource_api_version": "V3",
        });
    }

    /// The listener's HTTP connection manager.
    pub fn http(&mut self) -> &mut Value {
        value_at(self.listener(), MANAGER)
    }

    /// The routes. The last one takes all but upgrades.
    pub fn routes(&mut self) -> &mut Vec<Value> {
        list(self.http(), "/route_config/virtual_hosts/0/routes")
    }

    /// The HTTP filters.
    pub fn http_filters(&mut self) -> &mut Vec<Value> {
        list(self.http(), "/http_filters")
    }

    /// Adds a cluster of fixed hosts that are chosen as the engines' are.
    pub fn add_cluster(&mut self, name: &str, hosts: &[SocketAddr]) {
        let policy = self.cluster("engines")["load_balancing_policy"].clone();
        let cluster = json!({
            "name": name,
            "type": "STATIC",
            "connect_timeout": "1s",
            "load_balancing_policy": policy,
            "load_assignment": load_assignment(name, hosts),
        });
        list(&mut self.root, CLUSTERS).push(cluster);
    }

    /// A cluster.
    pub fn cluster(&mut self, name: &str) -> &mut Value {
        let place = self.cluster_place(name);
        value_at(&mut self.root, &place)
    }

    fn listener(&mut self) -> &mut Value {
        value_at(&mut self.root, LISTENER)
    }

    fn plugin(&mut self) -> &mut Value {
        let place = self.plugin_place().unwrap_or_else(|| missing("filter pd"));
        value_at(&mut self.root, &place)
    }

    /// Pointer to the configuration of the filter's plugin.
    fn plugin_place(&self) -> Option<String> {
        Some(self.named(&format!("{LISTENER}{MANAGER}/http_filters"), "pd")? + "/typed_config/config")
    }

    fn cluster_place(&self, name: &str) -> String {
        self.named(CLUSTERS, name).unwrap_or_else(|| missing(&format!("cluster {name}")))
    }

    /// Pointer to the member of a list that has this name.
    fn named(&self, list: &str, name: &str) -> Option<String> {
        let index = self.find(list)?.as_array()?.iter().position(|item| item["name"] == name)?;
        Some(format!("{list}/{index}"))
    }

    fn find(&self, place: &str) -> Option<&Value> {
        self.root.pointer(place)
    }

    fn address_at(&self, place: &str) -> SocketAddr {
        self.find(place).and_then(address).unwrap_or_else(|| missing(place))
    }
}

/// The YAML of a code block in a document of `docs/`, by its first line, a comment: what a document shows is what tests run.
///
/// # Panics
/// When there is no such block, or it is no YAML.
#[must_use]
pub fn block_of_document(document: &str, first_line: &str) -> Value {
    let path = crate::places::root().join("docs").join(document);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let start = text.find(&format!("```yaml\n{first_line}\n")).unwrap_or_else(|| missing(first_line));
    let block = text[start..].trim_start_matches("```yaml\n").split("```").next().unwrap_or_default();
    serde_saphyr::from_str(block).unwrap_or_else(|error| panic!("{first_line}: {error}"))
}

/// Merges as RFC 7396 says: objects by key, `null` removes, anything else replaces.
pub fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let Some(target) = target.as_object_mut() else { return };
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key.as_str()).or_insert(Value::Null), value);
        }
    }
}

/// The file of Envoy's endpoint discovery for hosts that no pd-control keeps.
#[must_use]
pub fn eds_file(hosts: &[SocketAddr]) -> String {
    let mut assignment = load_assignment("engines", hosts);
    assignment["@type"] = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment".into();
    json!({"resources": [assignment]}).to_string()
}

fn load_assignment(cluster: &str, hosts: &[SocketAddr]) -> Value {
    let hosts = hosts.iter().map(|host| json!({"endpoint": {"address": socket_address(*host)}}));
    json!({"cluster_name": cluster, "endpoints": [{"lb_endpoints": hosts.collect::<Vec<_>>()}]})
}

fn socket_address(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

fn address(value: &Value) -> Option<SocketAddr> {
    let socket = value.get("socket_address")?;
    let ip: IpAddr = socket.get("address")?.as_str()?.parse().ok()?;
    Some((ip, u16::try_from(socket.get("port_value")?.as_u64()?).ok()?).into())
}

fn path_value(path: &Path) -> Value {
    path.to_string_lossy().into()
}

fn value_at<'a>(value: &'a mut Value, place: &str) -> &'a mut Value {
    value.pointer_mut(place).unwrap_or_else(|| missing(place))
}

fn list<'a>(value: &'a mut Value, place: &str) -> &'a mut Vec<Value> {
    value_at(value, place).as_array_mut().unwrap_or_else(|| missing(place))
}

fn missing(place: &str) -> ! {
    panic!("Envoy's configuration has no {place}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_lacks_something_is_refused() {
        let whole = Config::read(&places::local_yaml()).unwrap();
        for (place, why) in [
            ("/admin", "it has no admin address"),
            ("/static_resources/listeners", "it has no first listener"),
            ("/static_resources/clusters", "it has no pd-control"),
            ("/static_resources/clusters/0/eds_cluster_config", "cluster engines has no EDS file"),
            ("/static_resources/listeners/0/filter_chains/0/filters/0/typed_config/http_filters", "it has no filter"),
        ] {
            let mut config = whole.clone();
            *value_at(&mut config.root, place) = Value::Null;
            assert_eq!(config.check().unwrap_err().to_string(), why, "{place}");
        }
        let mut config = whole.clone();
        config.set_plugin_configuration("no JSON");
        assert_eq!(config.check().unwrap_err().to_string(), "plugin configuration");
    }

    #[test]
    fn what_is_set_is_read() {
        let mut config = Config::read(&places::local_yaml()).unwrap();
        let addresses = [1, 2, 3].map(|port| SocketAddr::from(([10, 0, 0, 1], port)));
        config.set_listener(addresses[0]);
        config.set_admin(addresses[1]);
        config.set_control(addresses[2]);
        config.set_module(Path::new("/m.wasm"));
        assert_eq!([config.gateway(), config.admin(), config.control()], addresses);
        assert_eq!(config.module(), "/m.wasm");
        config.check().unwrap();
    }

    #[test]
    fn objects_merge_null_removes_and_the_rest_is_replaced() {
        let mut config = json!({"a": {"b": 1, "c": [1, 2]}, "d": 2, "g": 3});
        merge(&mut config, &json!({"a": {"c": [3], "e": {"f": 4}}, "g": null}));
        assert_eq!(config, json!({"a": {"b": 1, "c": [3], "e": {"f": 4}}, "d": 2}));
    }
}
