//! Traffic of the last minute, by endpoint, from what the Envoys report.
//!
//! The reports have sums that only grow. Once a second this module takes the difference to the report before, and adds it to
//! the current step of two seconds. Sums that fell are those of new workers, which began at zero.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hashbrown::HashMap;
use pd_core::envoys::report::{Report, Served};
use pd_core::workers::served::{REFUSED_KEY, Sums};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::envoys::hub::SharedHub;

/// Time between two looks at the reports. Envoys report once a second.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Length of a step of the spark line.
const STEP: Duration = Duration::from_secs(2);
/// Steps that are kept: one minute.
pub const STEPS: usize = 30;
/// Steps that rates, shares and latency are of: the last 20 seconds.
const WINDOW: usize = 10;

/// Figures of the last 20 seconds of an endpoint, a pool or an Envoy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Requests a second. Of a prefill endpoint, prefill legs.
    pub rate: f64,
    /// Errors a second: answers with 5xx or 429, and legs without an answer. Of an Envoy, errors that the filter answered
    /// itself.
    pub errors: f64,
    /// Share of the requests that are decode legs of split requests, 0 to 1; none: no requests.
    pub split_share: Option<f64>,
    /// Share of the prompt tokens that the index held where the prompt was computed, 0 to 1; none: no prompts.
    pub hit_share: Option<f64>,
    /// Mean milliseconds to the first byte of the answer; none: no answer began.
    pub first_ms: Option<f64>,
    /// Requests of each step of two seconds in the last minute, oldest first; empty: none at all.
    pub spark: Vec<u64>,
}

/// Sums of the steps of the last minute.
#[derive(Debug, Default)]
pub struct Traffic(Mutex<Steps>);

#[derive(Debug, Default)]
struct Steps {
    /// The sums of the last look, by Envoy and endpoint. An Envoy is there from its first report on.
    last: HashMap<u64, HashMap<u64, Sums>>,
    /// The steps, oldest first, each with its start.
    steps: VecDeque<(Instant, StepSums)>,
}

#[derive(Debug, Default)]
struct StepSums {
    endpoints: HashMap<u64, Sums>,
    /// Requests that each Envoy's filter answered with an error.
    refused: HashMap<u64, Sums>,
}

impl Traffic {
    /// Looks at the reports each second; never returns.
    pub async fn follow(self: Arc<Self>, hub: Arc<SharedHub>) {
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let now = ticks.tick().await;
            let reports = hub.reports();
            self.take(reports.iter().map(|(envoy, _, report)| (*envoy, report)), now);
        }
    }

    /// Takes the reports of all Envoys, each with the Envoy's public name.
    fn take<'a>(&self, reports: impl Iterator<Item = (u64, &'a Report)>, now: Instant) {
        let mut steps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Steps { last, steps } = &mut *steps;
        while steps.back().is_none_or(|(start, _)| now.duration_since(*start) >= STEP) {
            let next = steps.back().map_or(now, |(start, _)| *start + STEP);
            // After a pause longer than all steps, the steps begin anew.
            let is_far = now.duration_since(next) >= STEP * STEPS as u32;
            if is_far {
                steps.clear();
            }
            steps.push_back((if is_far { now } else { next }, StepSums::default()));
            while steps.len() > STEPS {
                steps.pop_front();
            }
        }
        let Some((_, step)) = steps.back_mut() else { return };
        let mut before = std::mem::take(last);
        for (envoy, report) in reports {
            let known = before.remove(&envoy);
            let is_new = known.is_none();
            let mut known = known.unwrap_or_default();
            for Served(key, words) in &report.served {
                let sums = Sums::of_words(*words);
                let was = known.insert(*key, sums);
                // What a new Envoy, or a new name of one, has served is not of this second.
                if is_new {
                    continue;
                }
                let more = since(&sums, &was.unwrap_or_default());
                let of = if *key == REFUSED_KEY {
                    step.refused.entry(envoy).or_default()
                } else {
                    step.endpoints.entry(*key).or_default()
                };
                of.add(&more);
            }
            last.insert(envoy, known);
        }
    }

    /// The figures of an endpoint, by key.
    #[must_use]
    pub fn of_endpoints(&self) -> BTreeMap<u64, Figures> {
        self.figures(|step| &step.endpoints, |key| Some(*key))
    }

    /// The figures of groups of endpoints. `group` names the group of an endpoint, by key; none: it is in no group.
    pub fn of_groups<G: Ord>(&self, group: impl Fn(&u64) -> Option<G>) -> BTreeMap<G, Figures> {
        self.figures(|step| &step.endpoints, group)
    }

    /// The figures of requests that the filter answered itself with an error, by public name of the Envoy.
    #[must_use]
    pub fn of_envoys(&self) -> BTreeMap<u64, Figures> {
        self.figures(|step| &step.refused, |envoy| Some(*envoy))
    }

    fn figures<G: Ord>(
        &self,
        read: impl Fn(&StepSums) -> &HashMap<u64, Sums>,
        group: impl Fn(&u64) -> Option<G>,
    ) -> BTreeMap<G, Figures> {
        let steps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found: BTreeMap<G, (Sums, Vec<u64>)> = BTreeMap::new();
        // The last step is not over yet.
        let whole = steps.steps.len().saturating_sub(1);
        for (index, (_, step)) in steps.steps.iter().take(whole).enumerate() {
            for (key, sums) in read(step) {
                let Some(group) = group(key) else { continue };
                let (sum, spark) = found.entry(group).or_insert_with(|| (Sums::default(), vec![0; whole]));
                if let Some(place) = spark.get_mut(index) {
                    *place += sums.legs;
                }
                if index + WINDOW >= whole {
                    sum.add(sums);
                }
            }
        }
        let seconds = STEP.as_secs_f64() * whole.min(WINDOW) as f64;
        found.into_iter().map(|(group, (sums, spark))| (group, Figures::new(&sums, spark, seconds))).collect()
    }
}

impl Figures {
    fn new(sums: &Sums, spark: Vec<u64>, seconds: f64) -> Self {
        let of = |part: u64, all: u64| (all > 0).then(|| part as f64 / all as f64);
        Self {
            rate: sums.legs as f64 / seconds,
            errors: sums.errors as f64 / seconds,
            split_share: of(sums.split, sums.legs),
            hit_share: of(sums.matched_tokens, sums.prompt_tokens),
            first_ms: of(sums.first_ms, sums.answers),
            spark: if spark.iter().all(|legs| *legs == 0) { Vec::new() } else { spark },
        }
    }
}

/// What came to the sums. Sums that fell are of workers that began at zero.
fn since(now: &Sums, before: &Sums) -> Sums {
    let (mut words, before) = (now.words(), before.words());
    if words.iter().zip(before).all(|(now, before)| *now >= before) {
        words.iter_mut().zip(before).for_each(|(now, before)| *now -= before);
    }
    Sums::of_words(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(served: &[(u64, Sums)]) -> Report {
        let served = served.iter().map(|(key, sums)| Served(*key, sums.words())).collect();
        Report { served, ..Report::default() }
    }

    fn sums(legs: u64) -> Sums {
        let (answers, first_ms) = (legs, legs * 50);
        Sums {
            legs,
            split: legs / 2,
            answers,
            first_ms,
            prompt_tokens: legs * 100,
            matched_tokens: legs * 25,
            errors: 0,
        }
    }

    /// Reports of one Envoy, one a second.
    fn followed(seconds: u64, legs_at: impl Fn(u64) -> u64) -> Traffic {
        let (traffic, start) = (Traffic::default(), Instant::now());
        for second in 0..seconds {
            let report = report(&[(7, sums(legs_at(second)))]);
            traffic.take([(1, &report)].into_iter(), start + Duration::from_secs(second));
        }
        traffic
    }

    #[test]
    fn rates_and_shares_are_those_of_the_last_seconds() {
        let figures = followed(61, |second| 1_000 + 10 * second).of_endpoints().remove(&7).unwrap();
        assert!((figures.rate - 10.0).abs() < 1e-9, "{figures:?}");
        assert_eq!((figures.split_share, figures.hit_share, figures.first_ms), (Some(0.5), Some(0.25), Some(50.0)));
        assert_eq!(figures.spark.len(), STEPS - 1);
        assert_eq!(figures.spark.last(), Some(&20));
        assert!(
            figures.spark.iter().all(|legs| *legs <= 20),
            "what it served before is not of this minute: {figures:?}"
        );
    }

    #[test]
    fn an_endpoint_at_rest_has_no_rate_and_a_spark_line_of_what_it_did() {
        let figures = followed(61, |second| 10 * second.min(30)).of_endpoints().remove(&7).unwrap();
        assert_eq!((figures.rate, figures.first_ms), (0.0, None));
        assert_eq!((figures.spark[5], figures.spark.last()), (20, Some(&0)));
    }

    #[test]
    fn sums_that_begin_anew_count_from_zero() {
        let figures = followed(12, |second| if second < 6 { 500 + second } else { 3 * (second - 5) }).of_endpoints();
        let legs: u64 = figures[&7].spark.iter().sum();
        // 1 a second to second 5, then 3 a second; the last step is not over.
        assert_eq!(legs, 5 + 3 * 4);
    }

    #[test]
    fn an_endpoint_that_first_appears_in_a_known_envoys_report_counts_from_zero() {
        let (traffic, start) = (Traffic::default(), Instant::now());
        let (none, some) = (report(&[]), report(&[(7, sums(4)), (REFUSED_KEY, Sums { errors: 6, ..Sums::default() })]));
        for (second, it) in [&none, &some, &some].into_iter().enumerate() {
            traffic.take([(1, it)].into_iter(), start + Duration::from_secs(second as u64));
        }
        assert_eq!(traffic.of_endpoints()[&7].spark, [4]);
        assert!((traffic.of_envoys()[&1].errors - 3.0).abs() < 1e-9);
        let pools = traffic.of_groups(|key| (*key == 7).then_some("pool"));
        assert!((pools["pool"].rate - 2.0).abs() < 1e-9);
    }

    #[test]
    fn a_pause_of_any_length_ends() {
        let traffic = followed(3, |second| second);
        let (later, report) = (Instant::now() + Duration::from_secs(100_000), report(&[]));
        traffic.take([(1, &report)].into_iter(), later);
        assert!(traffic.of_endpoints().values().all(|figures| figures.rate == 0.0));
    }
}
