//! The engines and the Envoys of a bench.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;

use anyhow::{Context as _, Result};
use pd_bench::client::{self, Outcome, Until};
use pd_bench::engine::{Answers, Engine, LEG_HEADER};
use pd_bench::envoy::{self, Envoy};
use pd_bench::prompt::Template;
use pd_support::config::{Config, merge};
use serde_json::json;

use crate::Args;
use crate::variant::Variant;

/// The engines and the Envoys; what is not needed is not started.
pub struct Rig {
    envoys: BTreeMap<Variant, Rc<Envoy>>,
    /// Number of the next prompt.
    pub mark: Rc<Cell<u64>>,
    _engines: Vec<Engine>,
}

impl Rig {
    /// Starts them.
    pub async fn start(args: &Args, variants: &[Variant]) -> Result<Self> {
        let mut engines = Vec::new();
        for answers in [
            Answers::Prefill,
            Answers::Prefill,
            Answers::Decode,
            Answers::Decode,
            Answers::Asked,
            Answers::Asked,
            Answers::Asked,
            Answers::Asked,
        ] {
            engines.push(Engine::start(answers).await?);
        }
        let addresses: Vec<_> = engines.iter().map(|engine| engine.address).collect();
        let (split, asked) = addresses.split_at(4);
        let mut envoys = BTreeMap::new();
        let mut plain = None;
        for &variant in variants {
            let envoy = match (variant, &plain) {
                (Variant::Plain | Variant::PlainTwice, Some(envoy)) => Rc::clone(envoy),
                (Variant::Plain | Variant::PlainTwice, None) => {
                    let mut config = envoy::local(&args.wasm, asked)?;
                    envoy::make_plain(&mut config, !args.floor_without_retries)?;
                    let envoy = Rc::new(Envoy::start(&args.envoy, &config, &args.out.join("plain"), 1).await?);
                    plain = Some(Rc::clone(&envoy));
                    envoy
                }
                _ => Rc::new(with_filter(args, variant, split).await?),
            };
            envoys.insert(variant, envoy);
        }
        // Marks of one run never meet those of another.
        Ok(Self { envoys, mark: Rc::new(Cell::new(1)), _engines: engines })
    }

    /// The Envoy of a variant.
    pub fn envoy(&self, variant: Variant) -> Result<&Envoy> {
        self.envoys.get(&variant).map(Rc::as_ref).context("no such Envoy")
    }

    /// Sends a variant's requests of one size.
    pub async fn load(
        &self,
        args: &Args,
        variant: Variant,
        size: usize,
        connections: usize,
        until: Until,
    ) -> Result<Outcome> {
        let leg = |leg: &str| Template::chat(size, args.sharing, false, &format!("{LEG_HEADER}: {leg}\r\n"));
        let steps =
            if variant == Variant::PlainTwice { vec![leg("prefill"), leg("decode")] } else { vec![leg("decode")] };
        let outcome = client::run(self.envoy(variant)?.gateway, &steps, connections, until, &self.mark).await;
        outcome.with_context(|| format!("{} at {size} bytes", variant.name()))
    }
}

async fn with_filter(args: &Args, variant: Variant, endpoints: &[SocketAddr]) -> Result<Envoy> {
    let config = filter_config(args, variant, endpoints)?;
    Envoy::start(&args.envoy, &config, &args.out.join(format!("{variant:?}")), 1).await
}

/// Envoys with many workers, with the filter and without, and the engines that they know.
pub async fn idle(args: &Args) -> Result<(Vec<Engine>, Envoy, Envoy)> {
    let mut engines = Vec::new();
    for answers in [Answers::Prefill, Answers::Prefill, Answers::Decode, Answers::Decode] {
        engines.push(Engine::start(answers).await?);
    }
    let addresses: Vec<_> = engines.iter().map(|engine| engine.address).collect();
    let config = filter_config(args, Variant::TwoLegs, &addresses)?;
    let filter = Envoy::start(&args.envoy, &config, &args.out.join("idle"), args.idle_workers).await?;
    let mut config = envoy::local(&args.wasm, &addresses)?;
    envoy::make_plain(&mut config, !args.floor_without_retries)?;
    let plain = Envoy::start(&args.envoy, &config, &args.out.join("idle-plain"), args.idle_workers).await?;
    Ok((engines, filter, plain))
}

fn filter_config(args: &Args, variant: Variant, endpoints: &[SocketAddr]) -> Result<Config> {
    let wasm = args.module(variant).with_context(|| format!("no module is named for `{}`", variant.name()))?;
    let mode = if matches!(variant, Variant::OneLeg | Variant::OneLegBeside) { "never" } else { "always" };
    let mut config = envoy::local(wasm, endpoints)?;
    envoy::edit_filter(&mut config, |filter| {
        let list: Vec<_> = endpoints
            .iter()
            .enumerate()
            .map(|(i, address)| json!({"address": address, "role": if i < 2 { "prefill" } else { "decode" }}))
            .collect();
        filter["endpoints"] = json!(list);
        filter["pools"]["default"]["split"] = json!({"mode": mode});
        if let Some(more) = &args.filter {
            merge(filter, more);
        }
    });
    Ok(config)
}
