//! Which waiting request an endpoint with room gets next.

use core::cmp::Reverse;
use core::ops::Bound::{Excluded, Included, Unbounded};
use core::time::Duration;

use super::place::{Group, Place, Rank};
use super::request::{Binding, LOOK, PrefillEndpoint, Request};
use super::{Entry, Queue};
use crate::prefix::hash::rendezvous_weight;
use crate::prefix::index::EndpointIndex;

/// A candidate: whether its account has had its part already, its rank, and its id. The lowest one is bound.
type Candidate = (bool, Rank, u64);

impl Queue {
    /// The request to bind next, and the endpoint for it.
    ///
    /// `endpoints` are the endpoints that may be bound to, ordered by [`index`](PrefillEndpoint::index).
    ///
    /// `None` where
    /// - no request waits,
    /// - no endpoint has room,
    /// - or every request that was looked at prefers an endpoint without room.
    ///
    /// The caller checks that the endpoint still holds the tokens of the binding. If it does not, the caller corrects them
    /// by [`set_held`](Self::set_held) and asks again. Otherwise the caller sends the request and calls
    /// [`bind`](Self::bind).
    #[must_use]
    pub fn next(&self, endpoints: &[PrefillEndpoint], now: Duration) -> Option<Binding> {
        self.next_without(endpoints, now, &|_| false)
    }

    /// As [`next`](Self::next), without the requests whose ids are `passed_over`.
    #[must_use]
    pub fn next_without(
        &self,
        endpoints: &[PrefillEndpoint],
        now: Duration,
        passed_over: &dyn Fn(u64) -> bool,
    ) -> Option<Binding> {
        let least_work = endpoints.iter().min_by(|a, b| a.work().total_cmp(&b.work()));
        let view = View { queue: self, endpoints, least_work, price: self.price(endpoints.len()), passed_over };
        if self.is_empty() || !view.with_room().any(|_| true) {
            return None;
        }
        let priorities = self.seconds.keys();
        priorities.copied().find_map(|priority| {
            let overdue = || view.overdue(priority, now);
            let least = || view.least(priority);
            overdue().or_else(least)
        })
    }
}

/// The queue together with the endpoints that may be bound to.
#[derive(Clone, Copy)]
struct View<'a> {
    queue: &'a Queue,
    endpoints: &'a [PrefillEndpoint],
    least_work: Option<&'a PrefillEndpoint>,
    price: f64,
    passed_over: &'a dyn Fn(u64) -> bool,
}

impl<'a> View<'a> {
    /// Endpoints that have room for some prompt.
    fn with_room(&self) -> impl Iterator<Item = &'a PrefillEndpoint> {
        let room = self.queue.rule.room;
        self.endpoints.iter().filter(move |endpoint| room.may_be_at(endpoint))
    }

    fn endpoint(&self, index: EndpointIndex) -> Option<&'a PrefillEndpoint> {
        self.endpoints.get(self.endpoints.binary_search_by_key(&index, |endpoint| endpoint.index).ok()?)
    }

    /// The endpoint that the request prefers, if that endpoint has room for it; `None` otherwise. It compares the endpoints
    /// with room for some prompt, those that hold some of the prompt, and the one with the least work: it may begin the
    /// prompt sooner than an endpoint with room for it, behind those that it will compute together with it. Any other
    /// endpoint is worse, unless it is faster.
    fn preferred(&self, entry: &Entry) -> Option<Binding> {
        let Request { id, tokens, key, .. } = entry.request;
        let room = self.queue.rule.room;
        let holders = entry.held.iter().filter_map(|held| self.endpoint(held.endpoint));
        let others = holders.chain(self.least_work).filter(|endpoint| !room.may_be_at(endpoint));
        let costs = self.with_room().chain(others).map(|endpoint| {
            let held_tokens = entry.held_tokens(endpoint.index).min(tokens);
            let seconds = endpoint.cost.seconds(tokens, held_tokens);
            let tie = Reverse(rendezvous_weight(key, endpoint.key));
            let binding = Binding { id, endpoint: endpoint.index, held_tokens, seconds };
            (Rank(endpoint.work() + self.price * seconds), tie, room.is_at(endpoint, seconds), binding)
        });
        let (_, _, has_room, binding) = costs.min_by_key(|(cost, tie, _, binding)| (*cost, *tie, binding.endpoint))?;
        has_room.then_some(binding)
    }

    /// The oldest request that has waited longer than [`Rule::longest_wait`](super::Rule::longest_wait) and that can be
    /// bound.
    fn overdue(&self, priority: Reverse<i32>, now: Duration) -> Option<Binding> {
        let since = now.checked_sub(self.queue.rule.longest_wait)?;
        let old = self.queue.arrivals.range((priority, Duration::ZERO, 0)..=(priority, since, u64::MAX));
        let old = old.filter(|(.., id)| !(self.passed_over)(*id)).take(LOOK);
        let mut entries = old.filter_map(|(.., id)| self.queue.entries.get(id));
        entries.find_map(|entry| self.preferred(entry))
    }

    /// The request with the lowest rank that can be bound.
    fn least(&self, priority: Reverse<i32>) -> Option<Binding> {
        let least_got = self.queue.least_got().unwrap_or(0.0);
        let mut best: Option<(Candidate, Binding)> = None;
        let endpoints = self.with_room().map(|endpoint| Some(endpoint.index)).chain([None]);
        for endpoint in endpoints {
            let mut after = Excluded(Place {
                group: Group { endpoint, priority, account: 0 },
                rank: Rank(f64::NEG_INFINITY),
                id: 0,
            });
            // From account to account.
            while let Some(first) = self.queue.places.range((after, Unbounded)).next() {
                let group = first.group;
                if (group.endpoint, group.priority) != (endpoint, priority) {
                    break;
                }
                self.improve(group, first, least_got, &mut best);
                let Some(account) = group.account.checked_add(1) else { break };
                after = Included(Place { group: Group { account, ..group }, rank: Rank(f64::NEG_INFINITY), id: 0 });
            }
        }
        best.map(|(_, binding)| binding)
    }

    /// Replaces `best` where a request of this group is better.
    fn improve(&self, group: Group, first: &Place, least_got: f64, best: &mut Option<(Candidate, Binding)>) {
        let account = self.queue.accounts.get(&group.account).copied().unwrap_or_default();
        let is_over = account.got > least_got + self.queue.rule.fair_seconds;
        for place in self.queue.places.range(first..).take(LOOK) {
            let candidate = (is_over, place.rank, place.id);
            if place.group != group || best.as_ref().is_some_and(|(best, _)| *best <= candidate) {
                return;
            }
            let Some(entry) = self.queue.entries.get(&place.id).filter(|_| !(self.passed_over)(place.id)) else {
                continue;
            };
            // A rank holds for one endpoint only.
            if let Some(binding) = self.preferred(entry)
                && (group.endpoint == Some(binding.endpoint)
                    || (group.endpoint.is_none() && binding.held_tokens == 0.0))
            {
                *best = Some((candidate, binding));
                return;
            }
        }
    }
}
