//! The last answer of every engine, and the facts that the list takes from it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{PoisonError, RwLock};

use pd_core::wire::ModelCard;

use crate::engines::metrics::EngineLoad;
use crate::publish::updates::{Fact, Facts};

/// Failures in a row after which an engine that answered before counts as down.
const FAILURES: u32 = 3;
/// Upper end of the range of `cache_tokens`.
const MAX_CACHE_TOKENS: u64 = 1_000_000_000;

/// The last answer of every engine.
#[derive(Debug, Default)]
pub struct Scrapes(RwLock<BTreeMap<SocketAddr, Scraped>>);

/// Metrics and models; or why there is no answer. `None`: the metrics came, and no answer to the question for models.
pub type Outcome = Result<(EngineLoad, Option<Told>), String>;

/// What an engine answers to the question for its models.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    /// Its models, sorted by name.
    Models(Vec<ModelCard>),
    /// That it tells none: for lack of an API key, or of the path.
    Nothing,
}

/// The last answer of one engine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scraped {
    /// Its metrics, of its last answer.
    pub load: EngineLoad,
    /// Its models, base models and adapters; empty: the engine has not named any.
    pub models: Vec<ModelCard>,
    /// Whether the engine ever answered the question for its models.
    pub has_told: bool,
    /// Whether the engine ever answered.
    pub has_answered: bool,
    /// Failed requests since the last answer.
    pub failures: u32,
    /// Why the last request failed; none: it did not fail.
    pub error: Option<String>,
    /// Requests sent to it.
    pub asked: u32,
}

impl FromIterator<(SocketAddr, Scraped)> for Scrapes {
    fn from_iter<I: IntoIterator<Item = (SocketAddr, Scraped)>>(scraped: I) -> Self {
        Self(RwLock::new(scraped.into_iter().collect()))
    }
}

impl Scrapes {
    /// What every engine said last.
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

    /// Takes an answer; returns the facts of all engines when the answer may have changed them.
    pub fn take(&self, address: SocketAddr, outcome: Outcome) -> Option<Facts> {
        let mut scraped = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let known = scraped.get_mut(&address)?;
        let before = known.basis();
        known.take(outcome);
        (known.basis() != before).then(|| facts(&scraped))
    }
}

impl Scraped {
    fn take(&mut self, outcome: Outcome) {
        self.asked = self.asked.wrapping_add(1);
        match outcome {
            Ok((load, told)) => {
                self.load = load;
                self.has_told |= told.is_some();
                if let Some(Told::Models(models)) = told
                    && !models.is_empty()
                {
                    self.models = models;
                }
                (self.has_answered, self.failures, self.error) = (true, 0, None);
            }
            Err(reason) => {
                self.failures = self.failures.saturating_add(1);
                self.error = Some(reason);
            }
        }
    }

    /// The values that [`facts`] depends on.
    fn basis(&self) -> (Vec<ModelCard>, bool, Option<u64>, bool, bool) {
        (self.models.clone(), self.has_told, self.load.cache_tokens, self.has_answered, self.is_silent())
    }

    /// Whether the engine answered before and has stopped answering.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        self.has_answered && self.failures >= FAILURES
    }
}

/// The facts of all engines. When half of the engines or more stopped answering, none counts as down: the fault is more
/// likely in pd-control's network.
fn facts(scraped: &BTreeMap<SocketAddr, Scraped>) -> Facts {
    let answered = scraped.values().filter(|it| it.has_answered).count();
    let silent = scraped.values().filter(|it| it.is_silent()).count();
    let is_believed = silent * 2 < answered;
    let fact = |scraped: &Scraped| Fact {
        models: scraped.models.clone(),
        has_told: scraped.has_told,
        cache_tokens: scraped.load.cache_tokens.map(|tokens| tokens.min(MAX_CACHE_TOKENS)),
        is_down: is_believed && scraped.is_silent(),
    };
    scraped
        .iter()
        .map(|(address, scraped)| (*address, fact(scraped)))
        .filter(|(_, it)| *it != Fact::default())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scraped(failures: u32) -> Scraped {
        Scraped { has_answered: true, failures, ..Scraped::default() }
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
        for (told, has_told) in [
            (None, false),
            (Some(Told::Models(models.clone())), true),
            (None, true),
            (Some(Told::Nothing), true),
            (Some(Told::Models(vec![])), true),
        ] {
            let expected = if has_told { models.clone() } else { vec![] };
            engine.take(Ok((EngineLoad::default(), told)));
            assert_eq!((&engine.models, engine.has_told), (&expected, has_told));
        }
        engine.take(Err("gone".to_owned()));
        assert_eq!(engine.models, models);
    }

    #[test]
    fn a_cache_beyond_belief_is_cut() {
        let load = EngineLoad { cache_tokens: Some(u64::MAX), ..EngineLoad::default() };
        let map = BTreeMap::from([(([10, 0, 0, 1], 80).into(), Scraped { load, ..Scraped::default() })]);
        assert_eq!(facts(&map).values().next().unwrap().cache_tokens, Some(MAX_CACHE_TOKENS));
    }
}
