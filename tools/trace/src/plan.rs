//! The cheapest number of prefill and decode servers for a load and an objective.
//!
//! More servers of a role never make a request slower in the simulator, but for chance, so for each number of prefill
//! servers there is a least number of decode servers, found by bisection. The search goes up in prefill servers until those
//! alone cost as much as the cheapest plan that was found.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use pd_bench::trace::Entry;
use pd_sim::Timing;

/// Numbers of servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Servers {
    /// Prefill servers.
    pub prefill: usize,
    /// Decode servers.
    pub decode: usize,
}

/// Price of a server for an hour, in any currency.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prices {
    /// Of a prefill server.
    pub prefill: f64,
    /// Of a decode server.
    pub decode: f64,
}

impl Prices {
    /// Price of these servers for an hour.
    #[must_use]
    pub fn of(&self, servers: Servers) -> f64 {
        self.prefill * servers.prefill as f64 + self.decode * servers.decode as f64
    }
}

/// What a plan's run showed, against the objective.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// Seconds to the first token, at the objective's share of the requests.
    pub ttft: f64,
    /// Milliseconds per further token, at the objective's share.
    pub tpot_ms: f64,
    /// Share of the time that prefill servers computed, mean over the servers, 0 to 1.
    pub prefill_busy: f64,
    /// Whether the objective is met.
    pub is_met: bool,
}

/// Plans that were tried.
#[derive(Clone, Debug, Default)]
pub struct Plans {
    /// What each showed.
    pub tried: BTreeMap<Servers, Measured>,
    /// The cheapest that meets the objective, of several at one price the one with fewer prefill servers; `None`: none up to
    /// the most servers does.
    pub cheapest: Option<Servers>,
}

/// Bounds below which no plan is tried, by arithmetic: work that arrives in a second, and tokens that stand in KV caches.
#[must_use]
pub fn least(prefill_seconds: f64, kv_tokens: f64, decode_kv_tokens: f64) -> Servers {
    let at_least_one = |servers: f64| servers.ceil().max(1.0) as usize;
    Servers { prefill: at_least_one(prefill_seconds), decode: at_least_one(kv_tokens / decode_kv_tokens.max(1.0)) }
}

/// KV tokens in use at decode servers on average, by Little's law: requests a second, times the seconds that each is
/// there (its output at `tpot_ms` a token), times the tokens that it has then (its prompt and half of its output).
#[must_use]
pub fn kv_tokens(entries: &[Entry], rate: f64, tpot_ms: f64) -> f64 {
    let of = |entry: &Entry| {
        let output = entry.output_tokens.max(1) as f64;
        (entry.input_tokens as f64 + output / 2.0) * output * tpot_ms * 1e-3
    };
    rate * entries.iter().map(of).sum::<f64>() / entries.len().max(1) as f64
}

/// Requests a second of a trace as it was recorded; 0 for a trace without a length.
#[must_use]
pub fn rate(entries: &[Entry]) -> f64 {
    let seconds = entries.last().map_or(0.0, |entry| entry.at_ms * 1e-3);
    if seconds > 0.0 { entries.len() as f64 / seconds } else { 0.0 }
}

/// Seconds of prefill a second if no prompt has anything in a cache: an upper bound of the prefill servers' work.
#[must_use]
pub fn prefill_seconds(entries: &[Entry], rate: f64, timing: &Timing) -> f64 {
    let sum: f64 = entries.iter().map(|entry| timing.prefill(entry.input_tokens, 0).as_secs_f64()).sum();
    rate * sum / entries.len().max(1) as f64
}

/// Finds the cheapest plan from `from` to `most` servers of each role. `measure` runs one.
///
/// # Errors
/// That of `measure`; a price of 0 or less.
pub fn cheapest(
    from: Servers,
    most: Servers,
    prices: Prices,
    mut measure: impl FnMut(Servers) -> Result<Measured>,
) -> Result<Plans> {
    ensure!(prices.prefill > 0.0 && prices.decode > 0.0, "a server's price must be above 0");
    let mut plans = Plans::default();
    let mut most_decode = most.decode;
    for prefill in from.prefill..=most.prefill {
        let best = plans.cheapest.map_or(f64::INFINITY, |servers| prices.of(servers));
        // Not even with the fewest decode servers would it be cheaper.
        if prices.of(Servers { prefill, decode: from.decode }) >= best {
            break;
        }
        let mut is_met = |decode: usize| -> Result<bool> {
            let servers = Servers { prefill, decode };
            let measured = match plans.tried.get(&servers) {
                Some(measured) => *measured,
                None => measure(servers)?,
            };
            plans.tried.insert(servers, measured);
            Ok(measured.is_met)
        };
        // With more prefill servers than before, no more decode servers are needed than before.
        if most_decode < from.decode || !is_met(most_decode)? {
            continue;
        }
        let (mut low, mut high) = (from.decode, most_decode);
        while low < high {
            let middle = low.midpoint(high);
            if is_met(middle)? { high = middle } else { low = middle + 1 }
        }
        most_decode = high;
        let servers = Servers { prefill, decode: high };
        if prices.of(servers) < best {
            plans.cheapest = Some(servers);
        }
    }
    Ok(plans)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FROM: Servers = Servers { prefill: 1, decode: 1 };
    const MOST: Servers = Servers { prefill: 20, decode: 20 };

    /// Meets the objective from 4 prefill servers on, and with `12 − prefill` decode servers, 3 at least.
    fn measure(Servers { prefill, decode }: Servers) -> Result<Measured> {
        let is_met = prefill >= 4 && decode >= 12_usize.saturating_sub(prefill).max(3);
        Ok(Measured { ttft: 0.0, tpot_ms: 0.0, prefill_busy: 0.0, is_met })
    }

    fn by_trying_all(prices: Prices) -> f64 {
        let all = (1..=20).flat_map(|prefill| (1..=20).map(move |decode| Servers { prefill, decode }));
        all.filter(|it| measure(*it).unwrap().is_met).map(|it| prices.of(it)).fold(f64::INFINITY, f64::min)
    }

    #[test]
    fn no_plan_is_cheaper_whatever_the_prices() {
        for (prefill, decode) in [(1.0, 1.0), (3.0, 1.0), (1.0, 3.0), (0.1, 9.0)] {
            let prices = Prices { prefill, decode };
            let plans = cheapest(FROM, MOST, prices, measure).unwrap();
            assert_eq!(plans.cheapest.map(|it| prices.of(it)), Some(by_trying_all(prices)), "{prices:?}");
            assert!(plans.tried.len() < 60, "{} of 400 plans were tried", plans.tried.len());
        }
    }

    #[test]
    fn an_objective_that_no_plan_meets_has_none() {
        let most = Servers { prefill: 3, decode: 20 };
        assert_eq!(cheapest(FROM, most, Prices { prefill: 1.0, decode: 1.0 }, measure).unwrap().cheapest, None);
        assert!(cheapest(FROM, MOST, Prices { prefill: 0.0, decode: 1.0 }, measure).is_err());
    }

    #[test]
    fn bounds_are_littles_law() {
        let entry =
            |at_ms, input_tokens, output_tokens| Entry { at_ms, input_tokens, output_tokens, blocks: Vec::new() };
        let entries = [entry(0.0, 900, 200), entry(2_000.0, 900, 200)];
        assert_eq!(rate(&entries), 1.0);
        // Each is there for 2 s with 1,000 tokens.
        assert!((kv_tokens(&entries, 3.0, 10.0) - 6_000.0).abs() < 1e-6);
        assert_eq!(least(3.2, 6_000.0, 2_500.0), Servers { prefill: 4, decode: 3 });
        assert_eq!(least(0.0, 0.0, 0.0), FROM);
        assert_eq!(rate(&[]), 0.0);
    }
}
