//! An Envoy in front of any number of endpoints, which two engines stand for.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

use anyhow::Result;
use pd_bench::engine::{Answers, Engine};
use pd_bench::envoy::{self, Envoy};
use pd_support::config::{Config, merge};
use serde_json::{Value, json};

use crate::Args;

/// What stands between the client and the engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Envoy without the filter.
    Plain,
    /// Envoy with the filter, which serves requests whole.
    OneLeg,
    /// Envoy with the filter, which splits requests.
    TwoLegs,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::OneLeg => "one leg",
            Self::TwoLegs => "two legs",
        }
    }
}

/// The engines: each of the two has as many endpoints as there are addresses in 127.0.0.0/8.
pub struct Engines {
    prefill: Engine,
    decode: Engine,
}

impl Engines {
    pub async fn start() -> Result<Self> {
        let [prefill, decode] = [Answers::Prefill, Answers::Decode].map(|answers| Engine::start_at("0.0.0.0", answers));
        Ok(Self { prefill: prefill.await?, decode: decode.await? })
    }

    /// `count` endpoints of the list, one half of each role, and their addresses.
    pub fn endpoints(&self, count: usize) -> (Vec<Value>, Vec<SocketAddr>) {
        let address = |index: usize| {
            let engine = if index.is_multiple_of(2) { &self.prefill } else { &self.decode };
            let [_, a, b, c] = (index as u32 + 2).to_be_bytes();
            SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, a, b, c)), engine.address.port())
        };
        let addresses: Vec<_> = (0..count).map(address).collect();
        let role = |index: usize| if index.is_multiple_of(2) { "prefill" } else { "decode" };
        let list = addresses.iter().enumerate().map(|(i, address)| json!({"address": address, "role": role(i)}));
        (list.collect(), addresses)
    }
}

/// How an Envoy differs from the usual one.
#[derive(Clone)]
pub struct Options {
    pub kind: Kind,
    pub endpoints: usize,
    pub workers: u32,
    /// Merged into the filter's configuration.
    pub filter: Value,
    /// Where pd-control is, if the filter asks it.
    pub control: Option<SocketAddr>,
}

impl Options {
    /// Four endpoints, one worker.
    pub fn of(kind: Kind) -> Self {
        Self { kind, endpoints: 4, workers: 1, filter: json!({}), control: None }
    }
}

/// The configuration of an Envoy for these engines.
pub fn config(args: &Args, engines: &Engines, options: &Options) -> Result<Config> {
    let (list, addresses) = engines.endpoints(options.endpoints);
    let mut config = envoy::local(&args.wasm, &addresses)?;
    if options.kind == Kind::Plain {
        let decode: Vec<_> = addresses.into_iter().skip(1).step_by(2).collect();
        config.set_engines(&decode);
        envoy::make_plain(&mut config, true)?;
        return Ok(config);
    }
    let mut plugin = config.plugin_configuration();
    match options.control {
        Some(control) => config.set_control(control),
        None => merge(&mut plugin, &json!({"control": null})),
    }
    plugin["endpoints"] = list.into();
    plugin["max_body_bytes"] = json!(64 << 20);
    plugin["pools"]["default"]["split"] =
        json!({"mode": if options.kind == Kind::OneLeg { "never" } else { "always" }});
    merge(&mut plugin, &options.filter);
    config.set_plugin_configuration(&plugin.to_string());
    for filter in config.http_filters() {
        if let Some(limit) = filter.pointer_mut("/typed_config/max_request_bytes") {
            *limit = json!(64 << 20);
        }
    }
    Ok(config)
}

/// Starts an Envoy for these engines; its files go to a folder of this name.
pub async fn start(args: &Args, engines: &Engines, name: &str, options: &Options) -> Result<Envoy> {
    let directory: &Path = &args.out.join(format!("{name}-{:?}", options.kind));
    Envoy::start(&args.envoy, &config(args, engines, options)?, directory, options.workers).await
}
