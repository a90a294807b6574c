//! Merges the lists of several sources into one.
//!
//! There is no merged list before each source has sent one: the filters hold a list already, and a partial one would
//! take the other endpoints out of service. When two sources list an endpoint, the first source decides its keys.

use std::collections::BTreeMap;

use pd_core::wire::{Endpoint, MAX_MODELS, State, Stated};

use crate::list::EndpointList;
use crate::publish::updates::{Facts, Update};

/// The last list and the last problem of every source, and the last facts of the engines.
#[derive(Debug, Default)]
pub struct Merge {
    sources: Vec<SourceState>,
    facts: Facts,
    asks_engines: bool,
}

#[derive(Debug)]
struct SourceState {
    list: Option<EndpointList>,
    problem: Option<String>,
}

impl Merge {
    /// Adds a source without a list; returns its index.
    pub fn add(&mut self) -> usize {
        self.sources.push(SourceState { list: None, problem: None });
        self.sources.len() - 1
    }

    /// Says that facts will come: an engine without a fact has not answered its models yet.
    pub fn ask_engines(&mut self) {
        self.asks_engines = true;
    }

    /// Takes an update of one source; returns the merged list and the problems of all sources.
    ///
    /// The merged list is `None` when this update had no list, or when another source has not sent one yet.
    pub fn take(&mut self, source: usize, update: Update) -> Update {
        let mut is_new = false;
        if let Some(part) = self.sources.get_mut(source) {
            is_new = update.list.is_some();
            part.list = update.list.or(part.list.take());
            part.problem = update.problem;
        }
        let problems: Vec<&str> = self.sources.iter().filter_map(|source| source.problem.as_deref()).collect();
        let problem = (!problems.is_empty()).then(|| problems.join("; "));
        match self.list().filter(|_| is_new).transpose() {
            Ok(list) => Update { list, problem },
            Err(error) => Update { list: None, problem: Some(error) },
        }
    }

    /// The merged list; `None` until each source has sent a list.
    ///
    /// # Errors
    /// When filters would refuse the merged list, such as for too many endpoints.
    #[must_use]
    pub fn list(&self) -> Option<Result<EndpointList, String>> {
        let lists: Option<Vec<&EndpointList>> = self.sources.iter().map(|source| source.list.as_ref()).collect();
        let lists = lists.filter(|lists| !lists.is_empty())?;
        if let ([only], true, false) = (lists.as_slice(), self.facts.is_empty(), self.asks_engines) {
            return Some(Ok((*only).clone()));
        }
        let mut endpoints = BTreeMap::new();
        for endpoint in lists.iter().flat_map(|list| list.as_slice()) {
            endpoints.entry(endpoint.id()).or_insert_with(|| self.with_fact(endpoint.clone()));
        }
        let list = EndpointList::new(endpoints.into_values().collect());
        let list = list.and_then(|list| list.with_stated(stated(&lists))).map_err(|error| error.to_string());
        let cards = || self.facts.values().flat_map(|fact| &fact.models);
        Some(list.map(|list| list.with_cards(cards())))
    }

    /// Takes the facts of all engines; returns the merged list as [`Merge::list`] does.
    pub fn take_facts(&mut self, facts: Facts) -> Option<Result<EndpointList, String>> {
        self.facts = facts;
        self.list()
    }

    /// Fills in keys that the sources leave open, and adds the engine's models unless the list of models is closed. An
    /// engine that does not answer is down, whatever the sources say.
    fn with_fact(&self, mut endpoint: Endpoint) -> Endpoint {
        let fact = self.facts.get(&endpoint.address);
        let is_open = !endpoint.models_closed;
        endpoint.models_pending = is_open && self.asks_engines && !fact.is_some_and(|fact| fact.has_answered_models);
        if let Some(fact) = fact {
            for card in fact.models.iter().filter(|_| is_open) {
                if endpoint.models.len() < MAX_MODELS && !endpoint.models.contains(&card.id) {
                    endpoint.models.push(card.id.clone());
                }
            }
            endpoint.cache_tokens = endpoint.cache_tokens.or(fact.cache_tokens);
            endpoint.cache_epoch = fact.cache_epoch;
            endpoint.expired_kv_leases = fact.expired_kv_leases;
            if fact.is_down && endpoint.state == State::Ready {
                endpoint.state = State::Down;
            }
        }
        endpoint
    }
}

/// What the objects of all sources state. Where two state the same name, the first source counts.
fn stated(lists: &[&EndpointList]) -> Stated {
    let mut all = Stated::default();
    for stated in lists.iter().rev().map(|list| list.stated()) {
        all.objectives.extend(stated.objectives.clone());
        all.aliases.extend(stated.aliases.clone());
        if !stated.others.is_empty() {
            all.others.clone_from(&stated.others);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use pd_core::wire::{ModelCard, Role};

    use super::*;
    use crate::publish::updates::Fact;

    fn list(endpoints: &[(u8, f64)]) -> Update {
        let endpoint = |(n, weight): &(u8, f64)| Endpoint {
            weight: *weight,
            ..Endpoint::new(([10, 0, 0, *n], 80).into(), Role::Both)
        };
        Ok(EndpointList::new(endpoints.iter().map(endpoint).collect()).unwrap()).into()
    }

    fn weights(update: &Update) -> Option<Vec<f64>> {
        let list = update.list.as_ref()?;
        Some(list.as_slice().iter().map(|endpoint| endpoint.weight).collect())
    }

    fn problem(text: &str) -> Update {
        Err(text.to_owned()).into()
    }

    #[test]
    fn nothing_is_said_before_all_have_listed() {
        let mut merge = Merge::default();
        let (first, second) = (merge.add(), merge.add());
        assert_eq!(weights(&merge.take(first, list(&[(1, 1.0)]))), None);
        assert_eq!(weights(&merge.take(second, list(&[]))), Some(vec![1.0]));
    }

    #[test]
    fn the_first_source_says_what_an_endpoint_is() {
        let mut merge = Merge::default();
        let (first, second) = (merge.add(), merge.add());
        merge.take(second, list(&[(1, 9.0), (2, 3.0)]));
        assert_eq!(weights(&merge.take(first, list(&[(1, 2.0)]))), Some(vec![2.0, 3.0]));
        assert_eq!(weights(&merge.take(first, list(&[]))), Some(vec![9.0, 3.0]));
    }

    #[test]
    fn the_first_source_says_what_a_name_stands_for() {
        let mut merge = Merge::default();
        let (first, second) = (merge.add(), merge.add());
        let states = |objectives: &[(&str, i64)]| {
            let objectives = objectives.iter().map(|(name, priority)| ((*name).to_owned(), *priority)).collect();
            let list = EndpointList::new(vec![]).unwrap().with_stated(Stated { objectives, ..Stated::default() });
            Update::from(Ok(list.unwrap()))
        };
        merge.take(second, states(&[("a", 1), ("b", 2)]));
        let merged = merge.take(first, states(&[("a", 3)])).list.unwrap();
        assert_eq!(merged.stated().objectives, [("a".to_owned(), 3), ("b".to_owned(), 2)].into());
    }

    #[test]
    fn a_problem_of_one_keeps_its_list_and_stays_said_while_others_change() {
        let mut merge = Merge::default();
        let (first, second) = (merge.add(), merge.add());
        merge.take(first, list(&[(1, 1.0)]));
        merge.take(second, list(&[(2, 2.0)]));
        let update = merge.take(first, problem("broken"));
        assert_eq!((update.list, update.problem.as_deref()), (None, Some("broken")));
        let update = merge.take(second, list(&[(2, 4.0)]));
        assert_eq!((weights(&update), update.problem.as_deref()), (Some(vec![1.0, 4.0]), Some("broken")));
        assert_eq!(merge.take(second, problem("gone")).problem.as_deref(), Some("broken; gone"));
        assert_eq!(merge.take(first, list(&[])).problem.as_deref(), Some("gone"));
    }

    #[test]
    fn facts_fill_what_is_not_said_and_silence_is_down() {
        let mut merge = Merge::default();
        let source = merge.add();
        merge.take(source, list(&[(1, 1.0), (2, 1.0)]));
        let models = vec![ModelCard { max_model_len: Some(8), ..ModelCard::new("m") }];
        let fact = Fact {
            models,
            has_answered_models: true,
            cache_tokens: Some(9),
            is_down: true,
            cache_epoch: Some(7),
            expired_kv_leases: Some(2),
        };
        let merged = merge.take_facts(Facts::from([(([10, 0, 0, 1], 80).into(), fact)])).unwrap().unwrap();
        let [first, second] = merged.as_slice() else { panic!() };
        assert_eq!(
            (first.models.as_slice(), first.cache_tokens, first.state),
            (["m".to_owned()].as_slice(), Some(9), State::Down)
        );
        assert_eq!((first.cache_epoch, first.expired_kv_leases), (Some(7), Some(2)));
        assert_eq!(*second, Endpoint::new(([10, 0, 0, 2], 80).into(), Role::Both));
        let said = Endpoint {
            models: vec!["x".into()],
            models_closed: true,
            cache_tokens: Some(1),
            state: State::Draining,
            ..first.clone()
        };
        merge.take(source, Ok(EndpointList::new(vec![said.clone()]).unwrap()).into());
        let list = merge.list().unwrap().unwrap();
        assert_eq!((list.as_slice(), list.cards().len()), ([said.clone()].as_slice(), 0));
        let open = Endpoint { models_closed: false, ..said };
        merge.take(source, Ok(EndpointList::new(vec![open]).unwrap()).into());
        let list = merge.list().unwrap().unwrap();
        assert_eq!(list.as_slice()[0].models, ["x", "m"], "an adapter that was loaded at run time");
        assert_eq!(list.cards()["m"].max_model_len, Some(8));
    }

    #[test]
    fn an_engine_that_was_not_asked_yet_has_yet_to_tell_its_models() {
        let mut merge = Merge::default();
        let source = merge.add();
        merge.ask_engines();
        let pending = |list: EndpointList| list.as_slice().iter().map(|it| it.models_pending).collect::<Vec<_>>();
        let update = merge.take(source, list(&[(1, 1.0), (2, 1.0)]));
        assert_eq!(pending(update.list.unwrap()), [true, true]);
        let fact = Fact { has_answered_models: true, ..Fact::default() };
        let merged = merge.take_facts(Facts::from([(([10, 0, 0, 1], 80).into(), fact)]));
        assert_eq!(pending(merged.unwrap().unwrap()), [false, true]);
    }
}
