//! Outside requests: requests at engines that no Envoy of the exchange sent. They are what engines report, less what the
//! Envoys have in flight there.
//!
//! - A report and the newest messages of the Envoys are of different moments, so one comparison says little: a request that
//!   has just begun or ended is in one of them only. In the mean of several comparisons these errors cancel.
//! - Only what an engine has more than the engine of its role that has least makes a difference to a choice.
//! - That excess counts if it is above [`LEAST_REQUESTS`] and [`ERRORS`] times the standard error of its mean. Where nobody
//!   else sends requests, no engine has so much.
//! - An engine that misses [`REPORTS_MISSED`] reports counts as having none.

use core::time::Duration;
use std::collections::BTreeMap;

use hashbrown::HashMap;

use crate::endpoints::elsewhere::{Totals, above_zero};
use crate::time::Monotonic;
use crate::wire::Role;

/// Comparisons that the mean is of, about.
const MEMORY: f64 = 16.0;
/// Comparisons before the mean counts.
const LEAST_REPORTS: f64 = 4.0;
/// Requests at an engine that are no difference: engines and ledgers do not count from and to the same moments.
const LEAST_REQUESTS: f64 = 0.25;
/// Standard errors that are no difference. With 2, one of many engines without outside requests often has more.
const ERRORS: f64 = 3.0;
/// Part of the excess that counts. A mean says nothing of the moment: an engine that others use is often free. With 1, the
/// Envoys' own requests queue at the engines that others do not use (trace simulator, `--other 0.3 --other-servers 4`).
const SHARE: f64 = 0.25;
/// Reports that an engine may miss, in the time between two of them.
const REPORTS_MISSED: u32 = 3;
/// Shortest and longest time for which a report counts.
const LIFE: (Duration, Duration) = (Duration::from_secs(3), Duration::from_secs(60));
/// Most requests, and most KV tokens, that an engine is believed to have.
const MOST_REQUESTS: f64 = 10_000.0;
const MOST_TOKENS: f64 = 1e10;

/// What an engine reports of one moment, over all endpoints at its address. Values that are not finite or below 0 count as 0.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EngineReport {
    /// Requests that wait or are computed.
    pub requests: f64,
    /// Tokens in its KV cache for these; `None`: unknown.
    pub kv_tokens: Option<f64>,
}

/// Outside requests at all engines.
#[derive(Debug, Default)]
pub(super) struct Outside {
    /// By the key of the first endpoint at the engine's address.
    engines: BTreeMap<u64, Engine>,
    /// What counts of them by endpoint, without endpoints at which nothing counts.
    pub(super) loads: HashMap<u64, Totals>,
    /// Mean seconds that a prefill leg of the Envoys has left; 0: none was in flight yet.
    leg_seconds: f64,
}

/// What is known of the engine at one address.
#[derive(Debug, Default)]
struct Engine {
    endpoints: Vec<(u64, Role)>,
    /// When the newest report came, and how long after the one before.
    at: Monotonic,
    gap: Duration,
    /// Comparisons so far, up to [`MEMORY`].
    reports: f64,
    /// Mean and variance of the comparisons, in requests.
    mean: f64,
    variance: f64,
    /// KV tokens of a request, by the newest report.
    tokens_each: f64,
}

impl Outside {
    /// Takes what the engine of these endpoints, all those at its address, reports of now. `sums`: what the Envoys have in
    /// flight. Returns whether [`loads`](Self::loads) changed. Without endpoints nothing changes.
    pub(super) fn take(
        &mut self,
        endpoints: &[(u64, Role)],
        report: EngineReport,
        sums: &HashMap<u64, Totals>,
        now: Monotonic,
    ) -> bool {
        let Some((first, role)) = endpoints.first() else { return false };
        self.leg_seconds = mean_leg_seconds(self.leg_seconds, sums);
        let engine = self.engines.entry(*first).or_default();
        let mut has_changed = false;
        if engine.endpoints != endpoints {
            has_changed = engine.enter(&mut self.loads, 0.0, 0.0);
            *engine = Engine { endpoints: endpoints.to_vec(), at: now, ..Engine::default() };
        }
        engine.take(report, requests_at(sums, endpoints), now);
        let least = self.least(*role);
        let Some(engine) = self.engines.get(first) else { return has_changed };
        engine.enter(&mut self.loads, engine.excess(least), self.leg_seconds) || has_changed
    }

    /// Drops engines that no longer report. Returns whether [`loads`](Self::loads) changed.
    pub(super) fn prune(&mut self, now: Monotonic) -> bool {
        let mut has_changed = false;
        let loads = &mut self.loads;
        self.engines.retain(|_, engine| {
            let life = engine.gap.saturating_mul(REPORTS_MISSED).clamp(LIFE.0, LIFE.1);
            let is_reporting = now.saturating_sub(engine.at) <= life;
            has_changed |= !is_reporting && engine.enter(loads, 0.0, 0.0);
            is_reporting
        });
        has_changed
    }

    /// Outside requests at the engine of this role that has the fewest; 0 or more.
    fn least(&self, role: Role) -> f64 {
        let is_known = |engine: &&Engine| {
            engine.reports >= LEAST_REPORTS && engine.endpoints.first().is_some_and(|(_, of)| *of == role)
        };
        self.engines.values().filter(is_known).map(|engine| engine.mean).fold(f64::INFINITY, f64::min).max(0.0)
    }
}

/// Requests that Envoys have at endpoints, by key. A request that one endpoint serves whole is a prefill leg and a decode leg
/// there.
fn requests_at(sums: &HashMap<u64, Totals>, endpoints: &[(u64, Role)]) -> f64 {
    let of = |totals: &Totals| above_zero(totals.requests).max(above_zero(totals.legs)) as f64;
    endpoints.iter().filter_map(|(key, _)| sums.get(key)).map(of).sum()
}

/// Mean seconds that a leg of the Envoys has left, by those in flight now and, for the larger part, by the mean before.
fn mean_leg_seconds(before: f64, sums: &HashMap<u64, Totals>) -> f64 {
    let (legs, micros) = sums.values().fold((0.0, 0.0), |(legs, micros), totals| {
        (legs + above_zero(totals.legs) as f64, micros + above_zero(totals.work) as f64)
    });
    if legs == 0.0 {
        return before;
    }
    let seconds = micros * 1e-6 / legs;
    if before > 0.0 { before + (seconds - before) / (8.0 * MEMORY) } else { seconds }
}

fn within(value: f64, most: f64) -> f64 {
    if value.is_finite() { value.clamp(0.0, most) } else { 0.0 }
}

impl Engine {
    /// Compares a report with the number of requests that the Envoys have at the engine.
    fn take(&mut self, report: EngineReport, ours: f64, now: Monotonic) {
        self.gap = now.saturating_sub(self.at);
        self.at = now;
        let requests = within(report.requests, MOST_REQUESTS);
        self.tokens_each = within(report.kv_tokens.unwrap_or(0.0), MOST_TOKENS) / requests.max(1.0);
        self.reports = (self.reports + 1.0).min(MEMORY);
        let (share, off) = (self.reports.recip(), requests - ours - self.mean);
        self.mean += share * off;
        self.variance = (1.0 - share) * (self.variance + share * off * off);
    }

    /// What counts of the outside requests beyond the `least` number.
    fn excess(&self, least: f64) -> f64 {
        let error = (self.variance / self.reports.max(1.0)).sqrt();
        let excess = self.mean - least;
        let counts = self.reports >= LEAST_REPORTS && excess >= LEAST_REQUESTS.max(ERRORS * error);
        if counts { SHARE * excess } else { 0.0 }
    }

    /// Enters how many outside requests the engine has. Returns whether that is something else than before.
    fn enter(&self, loads: &mut HashMap<u64, Totals>, requests: f64, leg_seconds: f64) -> bool {
        // Ranks of one address report together.
        let each = requests / self.endpoints.len().max(1) as f64;
        let mut has_changed = false;
        for (key, role) in &self.endpoints {
            let prefill =
                Totals { work: (each * leg_seconds * 1e6) as u64, legs: each.round() as u64, ..Totals::default() };
            let decode =
                Totals { tokens: (each * self.tokens_each) as u64, requests: each.round() as u64, ..Totals::default() };
            let totals = if *role == Role::Prefill { prefill } else { decode };
            let before = match totals == Totals::default() {
                true => loads.remove(key),
                false => loads.insert(*key, totals),
            };
            has_changed |= before.unwrap_or_default() != totals;
        }
        has_changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// What the Envoys have: a leg of half a second at each of the endpoints 1 to 4.
    fn sums() -> HashMap<u64, Totals> {
        (1..5).map(|key| (key, Totals { work: 500_000, legs: 1, ..Totals::default() })).collect()
    }

    struct Run {
        outside: Outside,
        now: Monotonic,
    }

    impl Run {
        fn new() -> Self {
            Self { outside: Outside::default(), now: Monotonic::from_secs(1) }
        }

        /// So many rounds of reports, one of each endpoint from 1 on: requests by round and endpoint.
        fn reports(&mut self, rounds: usize, requests: impl Fn(usize, u64) -> f64) {
            for round in 0..rounds {
                self.now = self.now.saturating_add(SECOND);
                for key in 1..5 {
                    let report = EngineReport { requests: requests(round, key), kv_tokens: None };
                    self.outside.take(&[(key, Role::Prefill)], report, &sums(), self.now);
                }
            }
        }
    }

    #[test]
    fn requests_of_the_envoys_are_none() {
        let mut run = Run::new();
        run.reports(40, |_, _| 1.0);
        assert_eq!(run.outside.loads, HashMap::new());
    }

    #[test]
    fn moments_that_differ_are_none() {
        // Requests that have just ended or begun, in one of them only.
        let mut run = Run::new();
        for turn in 0..100 {
            run.reports(2, |_, key| if key % 2 == turn % 2 { 0.0 } else { 2.0 });
            assert_eq!(run.outside.loads, HashMap::new());
        }
    }

    #[test]
    fn requests_that_one_engine_has_beside_them_count_there_from_the_fourth_report() {
        let mut run = Run::new();
        run.reports(3, |_, key| if key == 2 { 9.0 } else { 1.0 });
        assert_eq!(run.outside.loads, HashMap::new());
        run.reports(3, |_, key| if key == 2 { 9.0 } else { 1.0 });
        let expected = Totals { work: 1_000_000, legs: 2, ..Totals::default() };
        assert_eq!(run.outside.loads, HashMap::from([(2, expected)]), "a quarter of eight, half a second each");
        run.reports(100, |_, _| 1.0);
        assert_eq!(run.outside.loads, HashMap::new());
    }

    #[test]
    fn as_many_at_all_engines_make_no_difference() {
        let mut run = Run::new();
        run.reports(20, |_, _| 9.0);
        assert_eq!(run.outside.loads, HashMap::new());
    }

    #[test]
    fn fewer_than_the_envoys_count_is_no_advantage() {
        let mut run = Run::new();
        run.reports(20, |_, key| if key == 1 { 0.0 } else { 1.0 });
        assert_eq!(run.outside.loads, HashMap::new());
    }

    #[test]
    fn an_engine_that_no_longer_reports_has_none() {
        let mut run = Run::new();
        run.reports(6, |_, key| if key == 2 { 9.0 } else { 1.0 });
        assert!(!run.outside.prune(run.now.saturating_add(3 * SECOND)));
        assert_eq!(run.outside.loads.len(), 1);
        assert!(run.outside.prune(run.now.saturating_add(4 * SECOND)));
        assert_eq!(run.outside.loads, HashMap::new());
        assert!(run.outside.engines.is_empty());
    }

    #[test]
    fn decode_endpoints_of_one_address_share_requests_and_tokens() {
        let mut outside = Outside::default();
        let both = [(1, Role::Decode), (2, Role::Decode)];
        for second in 1..10 {
            let report = EngineReport { requests: 16.0, kv_tokens: Some(16_000.0) };
            let now = Monotonic::from_secs(second);
            outside.take(&both, report, &HashMap::new(), now);
            outside.take(&[(3, Role::Decode)], EngineReport::default(), &HashMap::new(), now);
        }
        let each = Totals { tokens: 2_000, requests: 2, ..Totals::default() };
        assert_eq!(outside.loads, HashMap::from([(1, each), (2, each)]));
        // An endpoint that leaves takes its share along, and the engine is compared anew.
        outside.take(&both[..1], EngineReport::default(), &HashMap::new(), Monotonic::from_secs(10));
        assert_eq!(outside.loads, HashMap::new());
        assert!(!outside.take(&[], EngineReport::default(), &HashMap::new(), Monotonic::from_secs(11)));
    }

    #[test]
    fn what_no_engine_can_have_is_cut() {
        for requests in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -5.0, 1e300] {
            let mut outside = Outside::default();
            for second in 1..10 {
                let report = EngineReport { requests, kv_tokens: Some(requests) };
                let now = Monotonic::from_secs(second);
                outside.take(&[(1, Role::Decode)], report, &HashMap::new(), now);
                outside.take(&[(2, Role::Decode)], EngineReport::default(), &HashMap::new(), now);
            }
            let most = Totals { tokens: 2_500_000_000, requests: 2_500, ..Totals::default() };
            let expected = if requests == 1e300 { HashMap::from([(1, most)]) } else { HashMap::new() };
            assert_eq!(outside.loads, expected, "{requests}");
        }
    }
}
