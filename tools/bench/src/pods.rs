//! What engine simulators say they did.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use pd_sim::Stats;

use pd_support::client::{Answer, get};

/// One engine and its counters.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its address.
    pub address: SocketAddr,
    /// What it has counted since its start, or during a run.
    pub stats: Stats,
}

/// Asks engines for their counters.
///
/// # Errors
/// When one does not answer, or is no simulator.
pub async fn ask(addresses: &[SocketAddr]) -> Result<Vec<Pod>> {
    let mut pods = Vec::with_capacity(addresses.len());
    for &address in addresses {
        let answer = get(address, "/stats").await.and_then(Answer::ok).with_context(|| format!("engine {address}"))?;
        let stats =
            serde_json::from_slice(&answer.body).with_context(|| format!("engine {address} is no simulator"))?;
        pods.push(Pod { address, stats });
    }
    Ok(pods)
}

/// What was counted between two questions.
#[must_use]
pub fn since(before: &[Pod], after: Vec<Pod>) -> Vec<Pod> {
    let mut pods = after;
    for (pod, before) in pods.iter_mut().zip(before) {
        let (now, then) = (&mut pod.stats, &before.stats);
        for (now, then) in [
            (&mut now.requests, then.requests),
            (&mut now.prefill_legs, then.prefill_legs),
            (&mut now.decode_legs, then.decode_legs),
            (&mut now.local_prefills, then.local_prefills),
            (&mut now.prompt_tokens, then.prompt_tokens),
            (&mut now.cached_tokens, then.cached_tokens),
            (&mut now.computed_tokens, then.computed_tokens),
            (&mut now.external_tokens, then.external_tokens),
            (&mut now.generated_tokens, then.generated_tokens),
            (&mut now.wrong_text, then.wrong_text),
            (&mut now.leases_expired, then.leases_expired),
        ] {
            *now = now.saturating_sub(then);
        }
    }
    pods
}

/// Counters of several pods together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pool {
    /// Pods.
    pub pods: u64,
    /// Requests of all, legs counted apart.
    pub requests: u64,
    /// Requests of the busiest pod.
    pub most: u64,
    /// Prefill legs.
    pub prefill_legs: u64,
    /// Prompts whose KV came from another pod.
    pub decode_legs: u64,
    /// Prompts computed by a pod for itself.
    pub local_prefills: u64,
    /// Prompt tokens.
    pub prompt_tokens: u64,
    /// Of these, found in the own cache.
    pub cached_tokens: u64,
    /// Of these, fetched from another pod.
    pub external_tokens: u64,
    /// Of these, computed.
    pub computed_tokens: u64,
    /// Answers made from the wrong KV.
    pub wrong_text: u64,
    /// Prefill legs whose KV nobody fetched.
    pub leases_expired: u64,
}

impl Pool {
    /// Adds up.
    #[must_use]
    pub fn of<'a>(pods: impl Iterator<Item = &'a Pod>) -> Self {
        let mut sum = Self::default();
        for Pod { stats, .. } in pods {
            let requests = stats.requests;
            sum.pods += 1;
            sum.requests += requests;
            sum.most = sum.most.max(requests);
            sum.prefill_legs += stats.prefill_legs;
            sum.decode_legs += stats.decode_legs;
            sum.local_prefills += stats.local_prefills;
            sum.prompt_tokens += stats.prompt_tokens;
            sum.cached_tokens += stats.cached_tokens;
            sum.external_tokens += stats.external_tokens;
            sum.computed_tokens += stats.computed_tokens;
            sum.wrong_text += stats.wrong_text;
            sum.leases_expired += stats.leases_expired;
        }
        sum
    }

    /// Share of prompt tokens that were not computed here.
    #[must_use]
    pub fn hit_rate(&self) -> f64 {
        (self.cached_tokens + self.external_tokens) as f64 / self.prompt_tokens as f64
    }

    /// Requests of the busiest pod over the mean.
    #[must_use]
    pub fn imbalance(&self) -> f64 {
        self.most as f64 * self.pods as f64 / self.requests as f64
    }
}
