//! The last answer of every engine, and the facts that the list takes from it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use pd_core::envoys::outside::EngineReport;
use pd_core::wire::ModelCard;

use crate::engines::metrics::EngineLoad;
use crate::publish::updates::{Fact, Facts};

/// Failures in a row after which an engine that answered before counts as down.
const FAILURES: u32 = 3;
/// How long the status shows that KV caches were fetched too late.
const LATE_FETCH_SHOWN: Duration = Duration::from_secs(600);
/// Upper end of the range of `cache_tokens`.
const MAX_CACHE_TOKENS: u64 = 1_000_000_000;

/// The last answer of every engine.
#[derive(Debug, Default)]
pub struct Scrapes(RwLock<BTreeMap<SocketAddr, Scraped>>);

/// An answer, or the reason why there is none.
pub type Outcome = Result<Answer, String>;

/// Answer of a working engine to one scrape.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// Its metrics; none: the engine refused the question.
    pub load: Option<EngineLoad>,
    /// Its answer to the question for models; none: it gave none.
    pub models: Option<ModelsAnswer>,
    /// Set when the engine wants other credentials: what an operator should do.
    pub refusal: Option<String>,
}

/// Effect of an answer.
#[derive(Debug, Default)]
pub struct Taken {
    /// The facts of all engines, where they may have changed.
    pub facts: Option<Facts>,
    /// Set when the engine began to want other credentials: what an operator should do.
    pub news: Option<String>,
}

/// An engine's answer to the question for its models.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelsAnswer {
    /// Its models, sorted by name.
    Listed(Vec<ModelCard>),
    /// No models: the engine wants other credentials, or has no such path.
    Unlisted,
}

/// The last answer of one engine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scraped {
    /// Its metrics, of its last answer.
    pub load: EngineLoad,
    /// Its models, base models and adapters; empty: the engine has not named any.
    pub models: Vec<ModelCard>,
    /// Whether the engine ever answered the question for its models.
    pub has_answered_models: bool,
    /// Whether the engine ever answered.
    pub has_answered: bool,
    /// Failed requests since the last answer.
    pub failures: u32,
    /// Why the last request failed; none: it did not fail.
    pub error: Option<String>,
    /// When the first of the failed requests failed; none: the last request did not fail.
    pub failing_since: Option<SystemTime>,
    /// Set while the engine wants other credentials: what an operator should do.
    pub refusal: Option<String>,
    /// Requests sent to it.
    pub asked: u32,
    /// Number of times that the engine's cache was cleared without a new start time: its counters fell, or it slept.
    pub clearings: u64,
    /// Last value of its counter of look-ups, or of work; 0 where it shows none yet.
    pub counted: Option<f64>,
    /// Time of the last answer that counts new KV caches fetched after their KV lease.
    pub late_fetch: Option<Instant>,
}

impl FromIterator<(SocketAddr, Scraped)> for Scrapes {
    fn from_iter<I: IntoIterator<Item = (SocketAddr, Scraped)>>(scraped: I) -> Self {
        Self(RwLock::new(scraped.into_iter().collect()))
    }
}

impl Scrapes {
    /// The last answer of every engine.
    #[must_use]
    pub fn view(&self) -> BTreeMap<SocketAddr, Scraped> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps the answers of these engines and drops the others.
    pub fn follow(&self, addresses: &BTreeSet<SocketAddr>) {
        let mut scraped = self.0.write().unwrap_or_else(PoisonError::into_inner);
        scraped.retain(|address, _| addresses.contains(address));
        for address in addresses {
            scraped.entry(*address).or_default();
        }
    }

    /// Time of the engine's last answer that counts new KV caches fetched after their KV lease.
    #[must_use]
    pub fn late_fetch(&self, address: SocketAddr) -> Option<Instant> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&address)?.late_fetch
    }

    /// What the engine's last answer says of its requests; `None` where it says nothing. `ranks`: endpoints at its address.
    #[must_use]
    pub fn report(&self, address: SocketAddr, ranks: usize) -> Option<EngineReport> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&address)?.report(ranks)
    }

    /// Takes an answer.
    pub fn take(&self, address: SocketAddr, outcome: Outcome) -> Taken {
        let mut scraped = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let Some(known) = scraped.get_mut(&address) else { return Taken::default() };
        let (before, refused_before) = (known.basis(), known.refusal.is_some());
        known.take(outcome);
        let news = known.refusal.clone().filter(|_| !refused_before);
        let has_changed = known.basis() != before;
        Taken { facts: has_changed.then(|| facts(&scraped)), news }
    }
}

impl Scraped {
    fn take(&mut self, outcome: Outcome) {
        self.asked = self.asked.wrapping_add(1);
        match outcome {
            Ok(Answer { load, models, refusal }) => {
                if let Some(load) = load {
                    self.take_load(load);
                }
                self.refusal = refusal;
                self.has_answered_models |= models.is_some();
                if let Some(ModelsAnswer::Listed(models)) = models
                    && !models.is_empty()
                {
                    self.models = models;
                }
                (self.has_answered, self.failures, self.error) = (true, 0, None);
                self.failing_since = None;
            }
            Err(reason) => {
                self.failures = self.failures.saturating_add(1);
                self.error = Some(reason);
                self.failing_since.get_or_insert_with(SystemTime::now);
            }
        }
    }

    fn report(&self, ranks: usize) -> Option<EngineReport> {
        let EngineLoad { waiting, running, kv_usage, cache_tokens, .. } = self.load;
        // The use is that of the fullest rank, the requests are those of all.
        let kv_tokens = kv_usage.zip(cache_tokens).map(|(usage, tokens)| usage * tokens as f64 * ranks as f64);
        Some(EngineReport { requests: waiting? + running?, kv_tokens })
    }

    fn take_load(&mut self, load: EngineLoad) {
        let before = core::mem::replace(&mut self.load, load);
        // Engines do not show some counters before their first request. An engine with a start time names its cache by it.
        let counted = load.counted().or(self.counted.map(|_| 0.0)).filter(|_| load.is_known());
        let fell = load.process_start.is_none() && has_risen(counted, self.counted);
        self.counted = counted.or(self.counted);
        let slept = load.is_asleep && !before.is_asleep;
        self.clearings += u64::from(fell || slept);
        if has_risen(before.late_fetches, load.late_fetches) {
            self.late_fetch = Some(Instant::now());
        }
    }

    /// The values that [`facts`] depends on.
    fn basis(&self) -> (Fact, bool) {
        (self.fact(true), self.has_answered)
    }

    /// What the engine's answers add to the list. `is_believed`: whether the engine counts as down when it does not answer.
    fn fact(&self, is_believed: bool) -> Fact {
        Fact {
            models: self.models.clone(),
            has_answered_models: self.has_answered_models,
            cache_tokens: self.load.cache_tokens.map(|tokens| tokens.min(MAX_CACHE_TOKENS)),
            is_down: is_believed && self.is_silent(),
            cache_epoch: self.cache_epoch(),
            expired_kv_leases: self.load.expired_kv_leases.map(|leases| leases as u64),
        }
    }

    /// Cache epoch of the engine: the time at which its process started, in milliseconds, plus the number of times that its
    /// cache was cleared. `None` before the first answer, and for an engine whose metrics show neither.
    fn cache_epoch(&self) -> Option<u64> {
        let start = self.load.process_start.map(|seconds| (seconds.max(0.0) * 1e3) as u64);
        let start = start.or_else(|| self.counted.map(|_| 0))?;
        Some(start.saturating_add(self.clearings))
    }

    /// Text about KV caches that were fetched too late, for some minutes after the last one; `None` otherwise.
    #[must_use]
    pub fn late_fetches(&self) -> Option<String> {
        let latest = self.late_fetch.filter(|latest| latest.elapsed() < LATE_FETCH_SHOWN)?;
        let minutes = latest.elapsed().as_secs() / 60;
        let all = self.load.late_fetches.unwrap_or(0.0);
        Some(format!(
            "decode servers fetched KV caches from it after their KV lease, {all} since it started, the last one {minutes} min \
             ago: the answers were refused, or had wrong text. Raise kv_lease_duration and pools.NAME.kv_lease_ms, or find \
             the decode server that stands still"
        ))
    }

    /// Whether the engine answered before and has stopped answering.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        self.has_answered && self.failures >= FAILURES
    }
}

/// Whether a counter rose between two answers.
fn has_risen(before: Option<f64>, now: Option<f64>) -> bool {
    before.zip(now).is_some_and(|(before, now)| now > before)
}

/// The facts of all engines. When half of the engines or more stopped answering, none counts as down: the fault is more
/// likely in pd-control's network.
fn facts(scraped: &BTreeMap<SocketAddr, Scraped>) -> Facts {
    let answered = scraped.values().filter(|it| it.has_answered).count();
    let silent = scraped.values().filter(|it| it.is_silent()).count();
    let is_believed = silent * 2 < answered;
    scraped
        .iter()
        .map(|(address, scraped)| (*address, scraped.fact(is_believed)))
        .filter(|(_, it)| *it != Fact::default())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scraped(failures: u32) -> Scraped {
        Scraped { has_answered: true, failures, ..Scraped::default() }
    }

    fn known(load: EngineLoad) -> Outcome {
        Ok(Answer { load: Some(load), ..Answer::default() })
    }

    fn all(failures: &[u32]) -> BTreeMap<SocketAddr, Scraped> {
        (1_u8..).zip(failures).map(|(n, failures)| (([10, 0, 0, n], 80).into(), scraped(*failures))).collect()
    }

    fn dead(failures: &[u32]) -> usize {
        facts(&all(failures)).values().filter(|fact| fact.is_down).count()
    }

    #[test]
    fn the_few_that_fall_silent_are_down_and_the_many_are_not_believed() {
        assert_eq!(dead(&[0, 0, 2]), 0);
        assert_eq!(dead(&[0, 0, 3]), 1);
        assert_eq!(dead(&[0, 3]), 0, "half of them");
        assert_eq!(dead(&[3, 3, 3]), 0);
        let mut never = all(&[0, 0, 9]);
        for scraped in never.values_mut() {
            scraped.has_answered = scraped.failures == 0;
        }
        assert!(facts(&never).is_empty(), "who never answered may be out of reach from here only");
    }

    #[test]
    fn models_stay_while_an_engine_does_not_tell_them() {
        let mut engine = Scraped::default();
        let models = vec![ModelCard::new("m")];
        for (answered, has_answered_models) in [
            (None, false),
            (Some(ModelsAnswer::Listed(models.clone())), true),
            (None, true),
            (Some(ModelsAnswer::Unlisted), true),
            (Some(ModelsAnswer::Listed(vec![])), true),
        ] {
            let expected = if has_answered_models { models.clone() } else { vec![] };
            engine.take(Ok(Answer { load: Some(EngineLoad::default()), models: answered, refusal: None }));
            assert_eq!((&engine.models, engine.has_answered_models), (&expected, has_answered_models));
        }
        engine.take(Err("gone".to_owned()));
        assert_eq!(engine.models, models);
    }

    /// vllm-project/aibrix#2287: an engine that slept was taken for one that held everything.
    #[test]
    fn another_cache_has_another_name() {
        let load = |start, queries, is_asleep| EngineLoad {
            process_start: start,
            prefix_queries: Some(queries),
            is_asleep,
            ..EngineLoad::default()
        };
        let epochs = |loads: &[EngineLoad]| -> Vec<u64> {
            let mut engine = Scraped::default();
            assert_eq!(engine.cache_epoch(), None);
            let mut take = |load: &EngineLoad| {
                engine.take(known(*load));
                engine.take(Err("gone".to_owned()));
                engine.cache_epoch().unwrap()
            };
            loads.iter().map(&mut take).collect()
        };
        // The metrics have the start of the process.
        let answers = [load(Some(5.0), 9.0, false), load(Some(5.0), 9.0, false), load(Some(7.5), 1.0, false)];
        assert_eq!(epochs(&answers), [5_000, 5_000, 7_500]);
        // It does not: its counters fall.
        let fell = [load(None, 9.0, false), load(None, 12.0, false), load(None, 3.0, false), load(None, 4.0, false)];
        assert_eq!(epochs(&fell), [0, 0, 1, 1]);
        // SGLang and TensorRT-LLM tell no start, and show no counter before their first request.
        let work = |work| EngineLoad { work, running: Some(0.0), ..EngineLoad::default() };
        let restarted = [work(Some(9.0)), work(None), work(Some(12.0)), work(Some(3.0)), work(Some(4.0))];
        assert_eq!(epochs(&restarted), [0, 1, 1, 2, 2]);
        // A page without any metric of the engine tells nothing.
        assert_eq!(epochs(&[work(Some(9.0)), EngineLoad::default(), work(Some(9.0))]), [0, 0, 0]);
        // It sleeps, and wakes up without a cache.
        let slept = [load(Some(5.0), 9.0, false), load(Some(5.0), 9.0, true), load(Some(5.0), 9.0, false)];
        assert_eq!(epochs(&slept), [5_000, 5_001, 5_001]);
    }

    #[test]
    fn fetches_after_a_lease_are_shown_for_some_minutes() {
        let mut engine = Scraped::default();
        for (count, is_shown) in [(3.0, false), (3.0, false), (4.0, true), (4.0, true)] {
            let load = EngineLoad { late_fetches: Some(count), ..EngineLoad::default() };
            engine.take(known(load));
            assert_eq!(
                engine.late_fetches().is_some(),
                is_shown,
                "{count}: those before pd-control are none of its news"
            );
        }
    }

    #[test]
    fn an_engine_that_wants_a_key_works_and_is_news_once() {
        let address: SocketAddr = ([10, 0, 0, 1], 80).into();
        let scrapes: Scrapes = [(address, Scraped::default())].into_iter().collect();
        let load = EngineLoad { cache_tokens: Some(7), ..EngineLoad::default() };
        let refused = || Ok(Answer { refusal: Some("why".to_owned()), ..Answer::default() });
        let known = || Ok(Answer { load: Some(load), ..Answer::default() });
        let steps = [
            (refused(), true),
            (refused(), false),
            (Err("gone".to_owned()), false),
            (refused(), false),
            (known(), false),
            (refused(), true),
        ];
        for (outcome, is_news) in steps {
            assert_eq!(scrapes.take(address, outcome).news.is_some(), is_news);
        }
        let scraped = &scrapes.view()[&address];
        assert!(scraped.has_answered && scraped.failures == 0 && scraped.load == load, "{scraped:?}");
    }

    #[test]
    fn a_cache_beyond_belief_is_cut() {
        let load = EngineLoad { cache_tokens: Some(u64::MAX), ..EngineLoad::default() };
        let map = BTreeMap::from([(([10, 0, 0, 1], 80).into(), Scraped { load, ..Scraped::default() })]);
        assert_eq!(facts(&map).values().next().unwrap().cache_tokens, Some(MAX_CACHE_TOKENS));
    }
}
