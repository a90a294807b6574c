//! The shipped Envoy configuration, with other addresses and paths in it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::places;

/// An Envoy configuration: `envoy/local.yaml` at first.
#[derive(Clone, Debug)]
pub struct Config {
    /// All of it.
    pub root: Value,
}

impl Config {
    /// The shipped file, with the module's path made absolute.
    ///
    /// # Panics
    /// When it cannot be read.
    #[must_use]
    pub fn shipped() -> Self {
        let path = places::local_yaml();
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let root = serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut config = Self { root };
        *at(config.plugin(), "/vm_config/code/local/filename") = path_value(&places::wasm());
        config
    }

    /// Sets where the admin interface listens.
    pub fn set_admin(&mut self, address: SocketAddr) {
        *at(&mut self.root, "/admin/address") = socket_address(address);
    }

    /// Sets where clients connect.
    pub fn set_listener(&mut self, address: SocketAddr) {
        *at(self.listener(), "/address") = socket_address(address);
    }

    /// Sets where pd-control is.
    pub fn set_control(&mut self, address: SocketAddr) {
        let cluster = self.cluster("pd-control");
        *at(cluster, "/load_assignment/endpoints/0/lb_endpoints/0/endpoint/address") = socket_address(address);
    }

    /// Sets the file of the engines' hosts; Envoy watches its directory.
    pub fn set_eds(&mut self, file: &Path) {
        let directory = file.parent().map(path_value);
        *at(self.cluster("engines"), "/eds_cluster_config/eds_config/path_config_source") =
            json!({"path": path_value(file), "watched_directory": {"path": directory}});
    }

    /// The plugin configuration.
    ///
    /// # Panics
    /// When it is no JSON.
    pub fn plugin_configuration(&mut self) -> Value {
        let value = at(self.plugin(), "/configuration/value");
        serde_json::from_str(value.as_str().unwrap_or_default()).expect("the plugin configuration is JSON")
    }

    /// Sets the plugin configuration, any text.
    pub fn set_plugin_configuration(&mut self, text: &str) {
        *at(self.plugin(), "/configuration/value") = text.into();
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
        at(&mut self.root, "/static_resources/listeners").as_array_mut().expect("a list").clear();
        let directory = file.parent().map(path_value);
        self.root["dynamic_resources"]["lds_config"] = json!({
            "path_config_source": {"path": path_value(file), "watched_directory": {"path": directory}},
            "resource_api_version": "V3",
        });
    }

    /// The listener's HTTP connection manager.
    pub fn http(&mut self) -> &mut Value {
        at(self.listener(), "/filter_chains/0/filters/0/typed_config")
    }

    fn listener(&mut self) -> &mut Value {
        at(&mut self.root, "/static_resources/listeners/0")
    }

    fn plugin(&mut self) -> &mut Value {
        at(named(at(self.http(), "/http_filters"), "pd"), "/typed_config/config")
    }

    /// Adds a cluster of fixed hosts that are chosen as the engines' are.
    ///
    /// # Panics
    /// When the list of clusters is no list.
    pub fn add_cluster(&mut self, name: &str, hosts: &[SocketAddr]) {
        let policy = self.cluster("engines")["load_balancing_policy"].clone();
        let hosts = hosts.iter().map(|host| json!({"endpoint": {"address": socket_address(*host)}}));
        let cluster = json!({
            "name": name,
            "type": "STATIC",
            "connect_timeout": "1s",
            "load_balancing_policy": policy,
            "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": hosts.collect::<Vec<_>>()}]},
        });
        at(&mut self.root, "/static_resources/clusters").as_array_mut().expect("a list").push(cluster);
    }

    /// A cluster.
    pub fn cluster(&mut self, name: &str) -> &mut Value {
        named(at(&mut self.root, "/static_resources/clusters"), name)
    }
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
pub fn eds_file(hosts: impl IntoIterator<Item = SocketAddr>) -> String {
    let hosts = hosts.into_iter().map(|host| json!({"endpoint": {"address": socket_address(host)}}));
    json!({
        "resources": [{
            "@type": "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            "cluster_name": "engines",
            "endpoints": [{"lb_endpoints": hosts.collect::<Vec<_>>()}],
        }],
    })
    .to_string()
}

/// Writes a file aside and renames it, as whoever is watched must.
///
/// # Panics
/// When the directory cannot be written.
pub fn replace_file(path: &Path, text: &str) {
    let aside = PathBuf::from(format!("{}.aside", path.display()));
    let replaced = std::fs::write(&aside, text).and_then(|()| std::fs::rename(&aside, path));
    replaced.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

fn socket_address(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

fn path_value(path: &Path) -> Value {
    path.to_string_lossy().into()
}

fn at<'a>(value: &'a mut Value, pointer: &str) -> &'a mut Value {
    value.pointer_mut(pointer).unwrap_or_else(|| panic!("envoy/local.yaml has no {pointer}"))
}

fn named<'a>(list: &'a mut Value, name: &str) -> &'a mut Value {
    let mut items = list.as_array_mut().into_iter().flatten();
    items.find(|item| item["name"] == name).unwrap_or_else(|| panic!("envoy/local.yaml has no {name}"))
}
