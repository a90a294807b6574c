//! The queue of requests that wait in the gateway for a prefill endpoint with room, and the order in which it binds them.
//!
//! An endpoint has *room*
//! - for any prompt while the work that it has left takes less than [`Room::lead`],
//! - and, while what it computes now takes less than that, for prompts that it will compute together with those that were
//!   bound to it and that it has not begun: engines compute prompts of [`Room::batch_tokens`] in one step, and the fixed
//!   time of a prompt counts once for all of them.
//!
//! A request is bound to no endpoint before one has room. So the request goes to the endpoint that serves it best at its
//! turn, and a short request never stands behind a long one that came first.
//!
//! # Which endpoint a request prefers
//! The one with the lowest `R + w·S`:
//! - `R`: seconds of the work that the endpoint has left,
//! - `S`: seconds of the endpoint for the prompt, given the tokens that it holds,
//! - `w = 2 + n`, where `n` is the number of waiting requests per endpoint.
//!
//! The terms of `w`:
//! - 1 for the request itself,
//! - 1 because a prompt that is computed anew displaces as much from the endpoint's cache, and another request has to
//!   compute that again,
//! - 1 for each of the `n` requests that the endpoint could have computed instead: each of them waits a second longer.
//!
//! A request that prefers an endpoint without room keeps waiting for it, and other requests overtake. The request gives
//! the endpoint up when another one has room and waiting costs more than computing anew: when
//! `R > w·(S elsewhere − S there)`.
//!
//! # Which request an endpoint gets
//! Of the requests that prefer an endpoint with room, in this order:
//! 1. the highest priority,
//! 2. a request that has waited longer than [`Rule::longest_wait`], the oldest first,
//! 3. a request of a fairness id that has got at most [`Rule::fair_seconds`] more than the fairness id with the least,
//! 4. the lowest `S·exp(−waited/patience)`: the shortest, where waiting makes a request shorter.
//!
//! # Starvation
//! - By the fourth rule, only requests that come within `patience·ln(S/s)` after a request can overtake it. `S` are the
//!   seconds of the request and `s` those of the request that overtakes.
//! - By the second rule, no request of the same priority overtakes a request that has waited for `longest_wait`.
//! - Priorities are strict: a request waits while one of a higher priority waits, until its
//!   [deadline](Request::deadline) at most.
//!
//! # Cost
//! Time does not change the order of two requests, because it passes for both. So requests stand in ordered sets: one for
//! each endpoint that holds a prefix of them, and one for all. With `n` requests:
//! - [`Queue::push`], [`Queue::remove`] and [`Queue::set_held`] take `O(log n)`.
//! - [`Queue::next`] takes `O(log n)` for each endpoint with room, priority and account, and looks at [`LOOK`] requests
//!   of each at most.
//! - A request takes [`REQUEST_BYTES`] at most, beside its body.
//!
//! The order is the same at every worker that pushed, removed and updated the same requests: ties go by id.

use core::cmp::Reverse;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

use hashbrown::HashMap;

use crate::config::Cost;
use crate::prefix::index::EndpointIndex;

use place::{Group, Place, Rank};
pub use request::{Binding, Full, Held, LOOK, MOST_HELD, PrefillEndpoint, REQUEST_BYTES, Request, Room, Rule};

mod next;
mod place;
mod request;

/// Accounts of a queue. Fairness ids whose hashes are equal modulo this number share one account (McKenney 1990).
const ACCOUNTS: u64 = 256;
/// The least that a request's seconds count for in the order, so that their logarithm is a number.
const LEAST_SECONDS: f64 = 1e-6;

#[derive(Clone, Debug)]
struct Entry {
    request: Request,
    /// What endpoints hold of the prompt, the longest first.
    held: Vec<Held>,
}

impl Entry {
    fn held_tokens(&self, endpoint: EndpointIndex) -> f64 {
        self.held.iter().find(|held| held.endpoint == endpoint).map_or(0.0, |held| held.tokens)
    }

    /// Seconds at the endpoint that holds most of the prompt.
    fn least_seconds(&self, cost: &Cost) -> f64 {
        cost.seconds(self.request.tokens, self.held.first().map_or(0.0, |held| held.tokens))
    }

    fn account(&self) -> u8 {
        (self.request.fairness % ACCOUNTS) as u8
    }

    /// The request's places under this rule.
    fn places(&self, rule: &Rule) -> impl Iterator<Item = Place> {
        let Request { id, arrival, tokens, priority, .. } = self.request;
        let account = self.account();
        let came = arrival.as_secs_f64() / rule.patience;
        let endpoints = self.held.iter().map(|held| (Some(held.endpoint), held.tokens));
        endpoints.chain([(None, 0.0)]).map(move |(endpoint, held)| {
            let seconds = rule.cost.seconds(tokens, held).max(LEAST_SECONDS);
            Place {
                group: Group { endpoint, priority: Reverse(priority), account },
                rank: Rank(seconds.ln() + came),
                id,
            }
        })
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Account {
    waiting: usize,
    /// Seconds of work that its requests got. The accounts of a queue are compared by these.
    got: f64,
}

/// Waiting requests of one pool.
#[derive(Debug)]
pub struct Queue {
    rule: Rule,
    entries: HashMap<u64, Entry>,
    places: BTreeSet<Place>,
    arrivals: BTreeSet<(Reverse<i32>, Duration, u64)>,
    deadlines: BTreeSet<(Duration, u64)>,
    keys: BTreeSet<(u64, u64)>,
    accounts: BTreeMap<u8, Account>,
    /// Number and seconds of the waiting requests, by priority.
    seconds: BTreeMap<Reverse<i32>, (usize, f64)>,
    bytes: usize,
}

impl Queue {
    /// An empty queue.
    #[must_use]
    pub fn new(rule: Rule) -> Self {
        Self {
            rule,
            entries: HashMap::new(),
            places: BTreeSet::new(),
            arrivals: BTreeSet::new(),
            deadlines: BTreeSet::new(),
            keys: BTreeSet::new(),
            accounts: BTreeMap::new(),
            seconds: BTreeMap::new(),
            bytes: 0,
        }
    }

    /// The rule in force.
    #[must_use]
    pub fn rule(&self) -> &Rule {
        &self.rule
    }

    /// Requests that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Upper bound of the bytes that the waiting requests take, with their bodies.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Seconds of work of the waiting requests that have this priority or a higher one; 0 where none waits. Divided by
    /// the number of endpoints, it is about the longest wait of a new request with this priority.
    #[must_use]
    pub fn seconds(&self, priority: i32) -> f64 {
        self.seconds.range(..=Reverse(priority)).map(|(_, (_, seconds))| seconds).sum()
    }

    /// The request, while it waits.
    #[must_use]
    pub fn get(&self, id: u64) -> Option<&Request> {
        self.entries.get(&id).map(|entry| &entry.request)
    }

    /// What endpoints hold of a request, the longest first, at most [`MOST_HELD`]. Empty for unknown ids.
    #[must_use]
    pub fn held(&self, id: u64) -> &[Held] {
        self.entries.get(&id).map_or(&[], |entry| &entry.held)
    }

    /// Ids of the requests with this [key](Request::key), the lowest first. An endpoint that got one of them may hold a
    /// prefix of the others.
    pub fn sharing(&self, key: u64) -> impl Iterator<Item = u64> {
        self.keys.range((key, 0)..=(key, u64::MAX)).map(|(_, id)| *id)
    }

    /// Adds a request. The [longest](MOST_HELD) entries of `held` count.
    ///
    /// # Errors
    /// [`Full`] where the queue takes no more, or has the id. The queue is then unchanged.
    pub fn push(&mut self, request: Request, held: &[Held]) -> Result<(), Full> {
        let bytes = self.bytes.saturating_add(request.bytes).saturating_add(REQUEST_BYTES);
        if self.entries.contains_key(&request.id) {
            return Err(Full::Taken);
        }
        if self.entries.len() >= self.rule.most_requests {
            return Err(Full::Requests);
        }
        if bytes > self.rule.most_bytes {
            return Err(Full::Bytes);
        }
        self.bytes = bytes;
        let Request { id, arrival, key, priority, deadline, .. } = request;
        let entry = Entry { request, held: longest(held) };
        self.arrivals.insert((Reverse(priority), arrival, id));
        self.deadlines.extend(deadline.map(|deadline| (deadline, id)));
        self.keys.insert((key, id));
        self.open_account(entry.account());
        self.add_places(&entry);
        self.entries.insert(id, entry);
        Ok(())
    }

    /// Replaces what endpoints hold of a request. An unknown id changes nothing.
    pub fn set_held(&mut self, id: u64, held: &[Held]) {
        let Some(mut entry) = self.entries.remove(&id) else { return };
        let held = longest(held);
        if entry.held != held {
            self.remove_places(&entry);
            entry.held = held;
            self.add_places(&entry);
        }
        self.entries.insert(id, entry);
    }

    /// Removes a request that no endpoint gets: its client has left, its deadline is over, or it is refused. `None` for an
    /// unknown id.
    pub fn remove(&mut self, id: u64) -> Option<Request> {
        let entry = self.entries.remove(&id)?;
        self.remove_places(&entry);
        let Request { arrival, key, priority, deadline, bytes, .. } = entry.request;
        self.arrivals.remove(&(Reverse(priority), arrival, id));
        deadline.map(|deadline| self.deadlines.remove(&(deadline, id)));
        self.keys.remove(&(key, id));
        self.bytes = self.bytes.saturating_sub(bytes).saturating_sub(REQUEST_BYTES);
        if let Some(account) = self.accounts.get_mut(&entry.account()) {
            account.waiting = account.waiting.saturating_sub(1);
        }
        if self.entries.is_empty() {
            // A request that comes to an empty queue has no claim from before.
            self.accounts.clear();
            self.seconds.clear();
        }
        Some(entry.request)
    }

    /// Removes a request that an endpoint gets, and adds `seconds` to the account of its fairness id. Negative seconds
    /// count as 0. `None` for an unknown id.
    pub fn bind(&mut self, id: u64, seconds: f64) -> Option<Request> {
        let account = self.entries.get(&id).map(Entry::account)?;
        if let Some(account) = self.accounts.get_mut(&account) {
            account.got += seconds.max(0.0);
        }
        self.remove(id)
    }

    /// Arrival of the oldest request; `None` where none waits.
    #[must_use]
    pub fn oldest(&self) -> Option<Duration> {
        let priorities = self.seconds.keys();
        let oldest = priorities.filter_map(|priority| self.arrivals.range((*priority, Duration::ZERO, 0)..).next());
        oldest.map(|(_, arrival, _)| *arrival).min()
    }

    /// The oldest request of the highest priority, if it has waited longer than [`Rule::longest_wait`]; `None` otherwise.
    #[must_use]
    pub fn overdue(&self, now: Duration) -> Option<u64> {
        let since = now.checked_sub(self.rule.longest_wait)?;
        self.arrivals.first().filter(|(_, arrival, _)| *arrival <= since).map(|(.., id)| *id)
    }

    /// The request with the earliest deadline, where that deadline is over; `None` otherwise.
    #[must_use]
    pub fn expired(&self, now: Duration) -> Option<u64> {
        self.deadlines.first().filter(|(deadline, _)| *deadline <= now).map(|(_, id)| *id)
    }

    /// The earliest deadline; `None` where no request has one.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// `w`, the price of a second of work, with so many endpoints: 2 or more. 0 endpoints count as 1.
    #[must_use]
    pub fn price(&self, endpoints: usize) -> f64 {
        2.0 + self.len() as f64 / endpoints.max(1) as f64
    }

    fn add_places(&mut self, entry: &Entry) {
        self.places.extend(entry.places(&self.rule));
        let (count, seconds) = self.seconds.entry(Reverse(entry.request.priority)).or_default();
        *count = count.saturating_add(1);
        *seconds += entry.least_seconds(&self.rule.cost);
    }

    fn remove_places(&mut self, entry: &Entry) {
        for place in entry.places(&self.rule) {
            self.places.remove(&place);
        }
        let priority = Reverse(entry.request.priority);
        if let Some((count, seconds)) = self.seconds.get_mut(&priority) {
            *count = count.saturating_sub(1);
            *seconds = (*seconds - entry.least_seconds(&self.rule.cost)).max(0.0);
            if *count == 0 {
                self.seconds.remove(&priority);
            }
        }
    }

    /// Counts one more waiting request. An account without any begins with the seconds of the account that has the least,
    /// so no fairness id saves up while it sends nothing.
    fn open_account(&mut self, account: u8) {
        let least = self.least_got();
        let account = self.accounts.entry(account).or_default();
        if account.waiting == 0 {
            account.got = account.got.max(least.unwrap_or(0.0));
        }
        account.waiting = account.waiting.saturating_add(1);
    }

    fn least_got(&self) -> Option<f64> {
        self.accounts.values().filter(|account| account.waiting > 0).map(|account| account.got).reduce(f64::min)
    }
}

/// The longest entries, at most [`MOST_HELD`] and one for each endpoint.
fn longest(held: &[Held]) -> Vec<Held> {
    let mut held: Vec<Held> = held.iter().copied().filter(|held| held.tokens > 0.0).collect();
    held.sort_by(|a, b| b.tokens.total_cmp(&a.tokens).then(a.endpoint.cmp(&b.endpoint)));
    let mut longest: Vec<Held> = Vec::with_capacity(MOST_HELD);
    for next in held {
        if longest.len() < MOST_HELD && longest.iter().all(|of| of.endpoint != next.endpoint) {
            longest.push(next);
        }
    }
    longest
}

#[cfg(test)]
mod tests;
