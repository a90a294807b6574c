//! What endpoints served: sums of one worker since it started, for the report of its Envoy.
//!
//! Sums only grow, so a reader that misses a report learns the same from the next one. Each worker writes its own sums to
//! shared data at its tick, and the leader adds them up.

use hashbrown::HashMap;

use crate::codec::{Reader, Writer};

/// Most endpoints of which a worker keeps sums. Beyond it, a new endpoint has none.
const MAX_ENDPOINTS: usize = 1_024;
/// Reports in a row that name sums which have changed: pd-control may miss one report between two looks.
const REPEATS: u8 = 4;

/// Key of the sums of requests that the filter itself answered with an error: [`Sums::errors`] counts them.
pub const REFUSED_KEY: u64 = 0;

/// Sums of one endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// Legs sent to the endpoint.
    pub legs: u64,
    /// Of these, decode legs of split requests.
    pub split: u64,
    /// Legs that the endpoint answered with 5xx or 429, and legs that it did not answer.
    pub errors: u64,
    /// Legs whose answer began with its first byte; of prefill legs, those answered with 200.
    pub answers: u64,
    /// Of these, milliseconds to the first byte: from the choice of the request's first endpoint, of prefill legs from their
    /// start.
    pub first_ms: u64,
    /// Prompt tokens of the requests whose prompt the endpoint computed.
    pub prompt_tokens: u64,
    /// Of these, tokens that the index held there.
    pub matched_tokens: u64,
}

impl Sums {
    /// Number of [`words`](Self::words).
    pub const WORDS: usize = 7;

    /// The sums, in the order of the fields.
    #[must_use]
    pub const fn words(&self) -> [u64; Self::WORDS] {
        let Self { legs, split, errors, answers, first_ms, prompt_tokens, matched_tokens } = *self;
        [legs, split, errors, answers, first_ms, prompt_tokens, matched_tokens]
    }

    /// The sums with these [`words`](Self::words).
    #[must_use]
    pub const fn of_words(words: [u64; Self::WORDS]) -> Self {
        let [legs, split, errors, answers, first_ms, prompt_tokens, matched_tokens] = words;
        Self { legs, split, errors, answers, first_ms, prompt_tokens, matched_tokens }
    }

    /// Adds an answer whose first byte came after so many milliseconds.
    pub(crate) fn answered(&mut self, first_ms: u64) {
        self.answers = self.answers.saturating_add(1);
        self.first_ms = self.first_ms.saturating_add(first_ms);
    }

    /// Adds others.
    pub fn add(&mut self, other: &Self) {
        let [mut words, others] = [self.words(), other.words()];
        words.iter_mut().zip(others).for_each(|(word, other)| *word = word.saturating_add(other));
        *self = Self::of_words(words);
    }
}

/// Sums of one worker, by [key](crate::endpoints::endpoint_state::EndpointState::key) of the endpoint.
#[derive(Debug, Default)]
pub(crate) struct Served {
    sums: HashMap<u64, Sums>,
    /// Whether there is a sum that is not in shared data yet.
    pub(crate) is_new: bool,
}

impl Served {
    /// Changes the sums of an endpoint.
    pub(crate) fn note(&mut self, key: u64, change: impl FnOnce(&mut Sums)) {
        let is_full = self.sums.len() >= MAX_ENDPOINTS;
        let sums = match self.sums.get_mut(&key) {
            Some(sums) => sums,
            None if is_full => return,
            None => self.sums.entry(key).or_default(),
        };
        change(sums);
        self.is_new = true;
    }

    /// Adds these sums to others, by endpoint.
    pub(crate) fn add_to(&self, all: &mut HashMap<u64, Sums>) {
        self.sums.iter().for_each(|(key, sums)| all.entry(*key).or_default().add(sums));
    }

    /// Drops the sums of endpoints that are gone.
    pub(crate) fn keep(&mut self, is_there: impl Fn(u64) -> bool) {
        self.sums.retain(|key, _| *key == REFUSED_KEY || is_there(*key));
    }

    /// Writes the sums for the leader.
    pub(crate) fn write(&self, out: &mut Writer) {
        self.sums.iter().for_each(|(key, sums)| {
            out.word(*key);
            sums.words().into_iter().for_each(|word| out.word(word));
        });
    }

    /// Reads what another worker wrote, and adds it to `all`. Whatever has another form is left out.
    pub(crate) fn read(rest: &mut Reader<'_>, all: &mut HashMap<u64, Sums>) {
        let mut one = || {
            let key = rest.word()?;
            let mut words = [0; Sums::WORDS];
            for word in &mut words {
                *word = rest.word()?;
            }
            Some((key, Sums::of_words(words)))
        };
        core::iter::from_fn(&mut one).for_each(|(key, sums)| all.entry(key).or_default().add(&sums));
    }
}

/// Which sums the last reports named.
#[derive(Debug, Default)]
pub(crate) struct Reported(HashMap<u64, (Sums, u8)>);

impl Reported {
    /// The sums for the next report, by key: those that have changed within the last [`REPEATS`] reports. `all` are those of all
    /// workers.
    pub(crate) fn next(&mut self, all: &HashMap<u64, Sums>) -> Vec<(u64, Sums)> {
        self.0.retain(|key, _| all.contains_key(key));
        let mut changed = Vec::new();
        for (key, sums) in all {
            let (last, left) = self.0.entry(*key).or_default();
            if last != sums {
                (*last, *left) = (*sums, REPEATS);
            }
            if *left > 0 {
                *left = left.saturating_sub(1);
                changed.push((*key, *sums));
            }
        }
        changed.sort_unstable_by_key(|(key, _)| *key);
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn legs(legs: u64) -> Sums {
        Sums { legs, first_ms: legs, ..Sums::default() }
    }

    #[test]
    fn the_leader_adds_up_what_workers_wrote() {
        let (mut one, mut other) = (Served::default(), Served::default());
        one.note(7, |sums| *sums = legs(2));
        one.note(REFUSED_KEY, |sums| sums.errors = 1);
        other.note(7, |sums| *sums = Sums { matched_tokens: 9, ..legs(3) });
        let mut out = Writer::default();
        other.write(&mut out);
        let mut all = HashMap::new();
        one.add_to(&mut all);
        Served::read(&mut Reader(&out.0), &mut all);
        assert_eq!(all[&7], Sums { matched_tokens: 9, ..legs(5) });
        assert_eq!(all[&REFUSED_KEY].errors, 1);
        // A part of an entry is left out.
        let mut part = HashMap::new();
        Served::read(&mut Reader(&out.0[..out.0.len() - 1]), &mut part);
        assert!(part.is_empty());
    }

    #[test]
    fn the_sums_have_a_bound_and_forget_endpoints_that_are_gone() {
        let mut served = Served::default();
        for key in 0..2 * MAX_ENDPOINTS as u64 {
            served.note(key, |sums| sums.legs += 1);
        }
        assert_eq!(served.sums.len(), MAX_ENDPOINTS);
        served.keep(|key| key == 5);
        assert_eq!(served.sums.len(), 2, "those of refused requests stay");
    }

    #[test]
    fn a_report_names_what_has_changed_some_times() {
        let (mut reported, all) = (Reported::default(), HashMap::from_iter([(1, legs(1)), (2, legs(2))]));
        for _ in 0..REPEATS {
            assert_eq!(reported.next(&all), [(1, legs(1)), (2, legs(2))]);
        }
        assert_eq!(reported.next(&all), []);
        assert_eq!(reported.next(&HashMap::from_iter([(1, legs(1)), (2, legs(3))])), [(2, legs(3))]);
    }
}
