//! Envoy and engines, started here or running already.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use pd_bench::envoy::{self, Envoy};
use pd_bench::pods::{self, Pod};
use pd_sim::{Handle, Role};
use pd_support::client::{Answer, get};
use serde_json::json;

use crate::{Args, SplitMode};

/// How long counters may take to reach what was seen: the filter passes its counts to Envoy a few times a second.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

/// What requests go through. What was started here ends with it.
pub struct Setup {
    /// Base URL of the gateway.
    pub gateway: String,
    engines: Vec<SocketAddr>,
    admin: Option<SocketAddr>,
    _envoy: Option<Envoy>,
    _simulators: Vec<Handle>,
}

/// Counters at one moment, or between two.
#[derive(Clone, Debug, Default)]
pub struct Counted {
    /// Of each engine.
    pub pods: Vec<Pod>,
    /// The filter's, by name and tag.
    pub filter: BTreeMap<String, u64>,
}

impl Setup {
    /// Starts what is not there.
    pub async fn start(args: &Args) -> Result<Self> {
        if let Some(gateway) = &args.gateway {
            let engines = args.engines.clone();
            let gateway = gateway.clone();
            return Ok(Self { gateway, engines, admin: args.admin, _envoy: None, _simulators: Vec::new() });
        }
        let mut simulators = Vec::new();
        let mut endpoints = Vec::new();
        for (role, count) in [(Role::Prefill, args.prefill), (Role::Decode, args.decode)] {
            for _ in 0..count {
                let config = pd_sim::Config {
                    speed: args.speed,
                    cache_tokens: args.cache_tokens,
                    models: vec![args.model.clone()],
                    record: 0,
                    ..pd_sim::Config::of(role)
                };
                let simulator = pd_sim::start(config).await?;
                endpoints.push(json!({"address": simulator.addr(), "role": role.name()}));
                simulators.push(simulator);
            }
        }
        let engines: Vec<_> = simulators.iter().map(Handle::addr).collect();
        let mut config = envoy::local(&args.wasm, &engines)?;
        envoy::edit_filter(&mut config, |filter| {
            filter["endpoints"] = json!(endpoints);
            let pool = &mut filter["pools"]["default"];
            pool["cache_tokens"] = json!(args.cache_tokens);
            if args.speed > 0.0 {
                // The filter reckons with the time that the simulators take.
                let pd_sim::Config { a_ms, b_us, c_ns, .. } = pd_sim::Config::default();
                let [a_ms, b_us, c_ns] = [a_ms, b_us, c_ns].map(|cost| cost * args.speed);
                pool["cost"] = json!({"a_ms": a_ms, "b_us": b_us, "c_ns": c_ns});
            }
            if let Some(split) = args.split {
                pool["split"]["mode"] = json!(match split {
                    SplitMode::Threshold => "threshold",
                    SplitMode::Always => "always",
                    SplitMode::Never => "never",
                });
            }
        });
        let envoy = Envoy::start(&args.envoy, &config, &args.out.join("envoy"), args.workers).await?;
        let (gateway, admin) = (format!("http://{}", envoy.gateway), Some(envoy.admin));
        Ok(Self { gateway, engines, admin, _envoy: Some(envoy), _simulators: simulators })
    }

    /// Counters now.
    pub async fn ask(&self) -> Result<Counted> {
        let pods = pods::ask(&self.engines).await?;
        let mut filter = BTreeMap::new();
        if let Some(admin) = self.admin {
            let answer =
                get(admin, "/stats?filter=pd_").await.and_then(Answer::ok).context("Envoy's admin interface")?;
            for line in answer.text().lines() {
                let Some((name, value)) = line.split_once(": ") else { continue };
                let name = name.rsplit('.').next().unwrap_or(name);
                if let Ok(value) = value.trim().parse() {
                    filter.insert(name.to_owned(), value);
                }
            }
        }
        Ok(Counted { pods, filter })
    }

    /// Counters since `before`, once the filter has counted so many requests.
    pub async fn ask_when_counted(&self, requests: u64, before: &Counted) -> Result<Counted> {
        let begun = Instant::now();
        loop {
            let mut after = self.ask().await?;
            for (name, value) in &mut after.filter {
                *value = value.saturating_sub(before.filter.get(name).copied().unwrap_or(0));
            }
            let counted: u64 = after.decisions().map(|(_, count)| count).sum();
            if self.admin.is_none() || counted >= requests || begun.elapsed() > SETTLE_LIMIT {
                after.pods = pods::since(&before.pods, after.pods);
                return Ok(after);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

impl Counted {
    /// The filter's decisions and how often each was taken.
    pub fn decisions(&self) -> impl Iterator<Item = (&str, u64)> {
        self.filter.iter().filter_map(|(name, count)| Some((name.strip_prefix("pd_requests_total;decision=")?, *count)))
    }

    /// One of the filter's counters.
    pub fn filter(&self, name: &str) -> u64 {
        self.filter.get(name).copied().unwrap_or(0)
    }
}
