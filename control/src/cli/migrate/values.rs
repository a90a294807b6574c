//! The values of the chart, as they are put together.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context;
use serde_json::{Map, Value, json};

/// The values.
#[derive(Debug, Default)]
pub(super) struct Values {
    /// Labels of all engine pods.
    pub(super) selector: BTreeMap<String, String>,
    /// Port of the engines.
    pub(super) port: Option<u16>,
    /// Further ports of the same pods.
    pub(super) more_ports: Vec<u16>,
    /// Hosts of the route.
    pub(super) hostnames: Vec<String>,
    /// `objectives` of the plugin configuration: names and priorities.
    pub(super) objectives: BTreeMap<String, i64>,
    /// `models` of the plugin configuration: targets and weights of each alias.
    pub(super) models: BTreeMap<String, Vec<(String, u64)>>,
    /// `session_headers` of the plugin configuration; empty: the default.
    pub(super) session_headers: Vec<String>,
    /// `path_prefixes` of the plugin configuration.
    pub(super) path_prefixes: Vec<String>,
    /// Keys of the pool `default`.
    pub(super) pool: Map<String, Value>,
    /// `inference_pools` of pd-control: namespace, name and API group.
    pub(super) inference_pools: Vec<(String, String, String)>,
    /// `inference_objects` of pd-control: API groups.
    pub(super) inference_objects: BTreeSet<String>,
}

impl Values {
    /// As YAML for `helm install -f`.
    pub(super) fn to_yaml(&self) -> anyhow::Result<String> {
        let mut engines = Map::new();
        if !self.selector.is_empty() {
            engines.insert("selector".to_owned(), self.selector_value());
        }
        if let Some(port) = self.port {
            engines.insert("port".to_owned(), port.into());
        }
        if !self.more_ports.is_empty() {
            engines.insert("morePorts".to_owned(), json!(self.more_ports));
        }
        let mut values = json!({
            "simulators": {"enabled": false},
            "engines": engines,
            "filter": {"config": self.config()},
        });
        if !self.hostnames.is_empty() {
            values["gateway"] = json!({"hostnames": self.hostnames});
        }
        if !self.inference_pools.is_empty() {
            let pool = |(namespace, name, group): &(String, String, String)| {
                let mut pool = json!({"name": name, "group": group});
                if !namespace.is_empty() {
                    pool["namespace"] = json!(namespace);
                }
                pool
            };
            let pools: Vec<_> = self.inference_pools.iter().map(pool).collect();
            values["kubernetesConfig"]["inference_pools"] = json!(pools);
        }
        if !self.inference_objects.is_empty() {
            values["kubernetesConfig"]["inference_objects"] = json!(self.inference_objects);
        }
        if values["engines"] == json!({}) {
            values.as_object_mut().map(|values| values.remove("engines"));
        }
        serde_saphyr::to_string(&values).context("cannot write the values")
    }

    /// The chart's selector is merged with its default, whose label is taken out by `null`.
    fn selector_value(&self) -> Value {
        const DEFAULT: &str = "app.kubernetes.io/component";
        let mut selector: Map<_, _> =
            self.selector.iter().map(|(name, value)| (name.clone(), Value::from(value.as_str()))).collect();
        selector.entry(DEFAULT).or_insert(Value::Null);
        Value::Object(selector)
    }

    /// The plugin configuration.
    fn config(&self) -> Value {
        let mut config = Map::new();
        if !self.objectives.is_empty() {
            let objectives = self.objectives.iter();
            let objectives = objectives.map(|(name, priority)| json!({"name": name, "priority": priority}));
            config.insert("objectives".to_owned(), objectives.collect());
        }
        if !self.models.is_empty() {
            let target = |(model, weight): &(String, u64)| json!({"model": model, "weight": weight});
            let models = self.models.iter().map(|(alias, targets)| {
                (alias.clone(), json!({"targets": targets.iter().map(target).collect::<Vec<_>>()}))
            });
            config.insert("models".to_owned(), Value::Object(models.collect()));
        }
        if !self.session_headers.is_empty() {
            config.insert("session_headers".to_owned(), json!(self.session_headers));
        }
        if !self.path_prefixes.is_empty() {
            config.insert("path_prefixes".to_owned(), json!(self.path_prefixes));
        }
        config.insert("pools".to_owned(), json!({"default": self.pool}));
        Value::Object(config)
    }
}
