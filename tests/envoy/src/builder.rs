//! What a gateway under test is made of.

use std::net::SocketAddr;

use pd_sim::{Handle, Role};
use pd_support::admin::Admin;
use pd_support::config::{Config, eds_file, merge};
use pd_support::file::replace;
use serde_json::{Value, json};

use crate::rig::places::Places;
use crate::rig::{Rig, endpoints_file, entries};

/// What a rig is made of. The default: two prefill and two decode engines without delays, pd-control with all of them
/// in its file, and the shipped configuration.
pub struct Builder {
    prefill: Vec<pd_sim::Config>,
    decode: Vec<pd_sim::Config>,
    others: Vec<(SocketAddr, Value)>,
    plugin: Value,
    plugin_text: Option<String>,
    is_pushed: bool,
    has_lds: bool,
    control: Vec<String>,
    adapt: Vec<Adapt>,
    adapt_list: Vec<AdaptList>,
}

type Adapt = Box<dyn FnOnce(&mut Config) + Send>;
type AdaptList = Box<dyn FnOnce(&mut [Value]) + Send>;

impl Default for Builder {
    fn default() -> Self {
        let of = |role| vec![pd_sim::Config::of(role); 2];
        Self {
            prefill: of(Role::Prefill),
            decode: of(Role::Decode),
            others: Vec::new(),
            plugin: json!({}),
            plugin_text: None,
            is_pushed: true,
            has_lds: false,
            control: Vec::new(),
            adapt: Vec::new(),
            adapt_list: Vec::new(),
        }
    }
}

impl Builder {
    /// Sets how many engines there are.
    #[must_use]
    pub fn engines(mut self, prefill: usize, decode: usize) -> Self {
        self.prefill = vec![pd_sim::Config::of(Role::Prefill); prefill];
        self.decode = vec![pd_sim::Config::of(Role::Decode); decode];
        self
    }

    /// Adds an engine that somebody else runs.
    #[must_use]
    pub fn other(mut self, address: SocketAddr, role: &str) -> Self {
        self.others.push((address, json!({"address": address.to_string(), "role": role})));
        self
    }

    /// Changes the configuration of every engine.
    #[must_use]
    pub fn every_engine(mut self, change: impl Fn(&mut pd_sim::Config)) -> Self {
        self.prefill.iter_mut().chain(&mut self.decode).for_each(change);
        self
    }

    /// Changes the configuration of the prefill engines; the second argument counts them.
    #[must_use]
    pub fn prefill_engines(mut self, change: impl Fn(&mut pd_sim::Config, usize)) -> Self {
        self.prefill.iter_mut().enumerate().for_each(|(i, config)| change(config, i));
        self
    }

    /// Changes the configuration of the decode engines; the second argument counts them.
    #[must_use]
    pub fn decode_engines(mut self, change: impl Fn(&mut pd_sim::Config, usize)) -> Self {
        self.decode.iter_mut().enumerate().for_each(|(i, config)| change(config, i));
        self
    }

    /// Merges members into the plugin configuration; `null` removes one.
    #[must_use]
    pub fn plugin(mut self, patch: Value) -> Self {
        merge(&mut self.plugin, &patch);
        self
    }

    /// Merges members into the default pool's policy.
    #[must_use]
    pub fn pool(self, patch: Value) -> Self {
        self.plugin(json!({"pools": {"default": patch}}))
    }

    /// Takes this text for the whole plugin configuration. Envoy then counts as ready without endpoints.
    #[must_use]
    pub fn plugin_text(mut self, text: &str) -> Self {
        self.plugin_text = Some(text.to_owned());
        self
    }

    /// Without pd-control: the endpoints stand in the plugin configuration.
    #[must_use]
    pub fn without_control(mut self) -> Self {
        self.is_pushed = false;
        self
    }

    /// Envoy reads its listener from a file that can be replaced: [`Rig::replace_listener`].
    #[must_use]
    pub fn with_listener_file(mut self) -> Self {
        self.has_lds = true;
        self
    }

    /// Starts pd-control with more options.
    #[must_use]
    pub fn control(mut self, options: &[&str]) -> Self {
        self.control.extend(options.iter().map(|option| (*option).to_owned()));
        self
    }

    /// Changes Envoy's configuration.
    #[must_use]
    pub fn envoy(mut self, change: impl FnOnce(&mut Config) + Send + 'static) -> Self {
        self.adapt.push(Box::new(change));
        self
    }

    /// Changes the list of endpoints, prefill engines first.
    #[must_use]
    pub fn list(mut self, change: impl FnOnce(&mut [Value]) + Send + 'static) -> Self {
        self.adapt_list.push(Box::new(change));
        self
    }

    /// Starts all of it and waits until every worker knows every endpoint.
    ///
    /// # Panics
    /// When something is missing or does not come up.
    pub async fn start(self) -> Rig {
        let start = |configs: Vec<pd_sim::Config>| async {
            let started = configs.into_iter().map(pd_sim::start);
            futures::future::try_join_all(started).await.unwrap_or_else(|error| panic!("{error}"))
        };
        let (prefill, decode) = (start(self.prefill).await, start(self.decode).await);
        let others = self.others.iter().map(|(_, entry)| entry.clone());
        let mut list: Vec<Value> =
            entries(&prefill, "prefill").chain(entries(&decode, "decode")).chain(others).collect();
        for change in self.adapt_list {
            change(&mut list);
        }
        let places = Places { control_options: self.control, ..Places::new() };
        let others = self.others.iter().map(|(address, _)| *address);
        let hosts: Vec<_> = prefill.iter().chain(&decode).map(Handle::addr).chain(others).collect();
        replace(&places.endpoints(), &endpoints_file(&list)).expect("replaced");
        replace(&places.eds(), &eds_file(&hosts)).expect("replaced");
        let control = if self.is_pushed { Some(places.start_control().await) } else { None };

        let mut config = Config::shipped();
        config.set_admin(places.admin.address());
        config.set_listener(places.listener.address());
        config.set_control(places.control.address());
        config.set_eds(&places.eds());
        let mut plugin = config.plugin_configuration();
        plugin["endpoints"] = list.clone().into();
        if !self.is_pushed {
            merge(&mut plugin, &json!({"control": null}));
        }
        merge(&mut plugin, &self.plugin);
        let text = self.plugin_text.clone().unwrap_or_else(|| plugin.to_string());
        config.set_plugin_configuration(&text);
        for change in self.adapt {
            change(&mut config);
        }
        let running = config.clone();
        if self.has_lds {
            replace(&places.lds(), &config.listener_file()).expect("replaced");
            config.set_lds(&places.lds());
        }
        let file = places.file("envoy.json");
        replace(&file, &config.root.to_string()).expect("replaced");
        let envoy = places.start_envoy(&file);
        let admin = Admin { address: places.admin.address() };
        let rig = Rig { prefill, decode, admin, envoy, config: running, listed: list.len(), control, places };
        rig.until_ready(self.plugin_text.is_none().then_some(list.len())).await;
        rig
    }
}

impl Rig {
    /// See [`Builder`].
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The default one.
    pub async fn start() -> Self {
        Builder::default().start().await
    }
}
