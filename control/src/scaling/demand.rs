//! Demand of each role of each pool: the sum of the work of its ready endpoints.
//!
//! Prefill work, assigned KV tokens and requests in flight come from the Envoys' exchange. KV tokens in use, cache sizes and
//! waiting requests come from the engines' metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use hashbrown::HashMap;
use pd_core::endpoints::elsewhere::Totals;
use pd_core::wire::{Endpoint, Role, State};

use crate::engines::answers::Scraped;
use crate::envoys::hub::Unbound;
use crate::list::role;

/// Pool and role, as the labels of metrics and KEDA's metadata name them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PoolRole {
    /// Name of the pool.
    pub pool: String,
    /// `prefill`, `decode` or `both`.
    pub role: &'static str,
}

/// Demand of one role of one pool.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Demand {
    /// Ready endpoints.
    pub ready: u64,
    /// Seconds of prefill work that wait at the Envoys, wait at ready endpoints or are computed there. `None`: no Envoy
    /// exchanges.
    pub prefill_work_seconds: Option<f64>,
    /// Ready endpoints that have prefill work. Its mean over time is the number of endpoints that the work keeps busy.
    /// `None`: no Envoy exchanges.
    pub prefill_busy: Option<f64>,
    /// KV tokens that Envoys assigned for decoding: prompts and expected output. `None`: no Envoy exchanges.
    pub kv_tokens_assigned: Option<f64>,
    /// Requests that Envoys sent here for decoding and that have not ended. `None`: no Envoy exchanges.
    pub requests_in_flight: Option<f64>,
    /// KV tokens in use, as the engines report. `None`: no engine reports it.
    pub kv_tokens_used: Option<f64>,
    /// KV tokens that all ready endpoints together can hold. An endpoint of unknown size counts as the mean of the others.
    /// `None`: no size is known.
    pub kv_tokens_capacity: Option<f64>,
    /// Requests that wait in the engines. `None`: no engine reports it.
    pub requests_waiting: Option<f64>,
    /// Requests that Envoys keep because no endpoint of the role has room or is ready. `None`: no Envoy exchanges.
    pub requests_unbound: Option<f64>,
    /// Age of the oldest of them in seconds, 0 where there is none. `None`: no Envoy exchanges.
    pub oldest_unbound_seconds: Option<f64>,
}

impl Demand {
    /// Seconds of prefill work per ready endpoint. `None`: no ready endpoint, or no Envoy exchanges.
    #[must_use]
    pub fn prefill_work_seconds_per_endpoint(&self) -> Option<f64> {
        (self.ready > 0).then(|| self.prefill_work_seconds.map(|seconds| seconds / self.ready as f64))?
    }

    /// Share of the ready endpoints that have prefill work. `None`: no ready endpoint, or no Envoy exchanges.
    #[must_use]
    pub fn prefill_busy_ratio(&self) -> Option<f64> {
        (self.ready > 0).then(|| self.prefill_busy.map(|busy| busy / self.ready as f64))?
    }

    /// Share of the KV cache that is assigned or in use, whichever is more. Above 1 where more is assigned than fits.
    /// `None`: neither is known, or the capacity is not.
    #[must_use]
    pub fn kv_load_ratio(&self) -> Option<f64> {
        let capacity = self.kv_tokens_capacity.filter(|tokens| *tokens > 0.0)?;
        let tokens = self.kv_tokens_assigned.into_iter().chain(self.kv_tokens_used).reduce(f64::max)?;
        Some(tokens / capacity)
    }

    /// The same in endpoints: ratio times ready endpoints. Divided by a target per endpoint it is the number of endpoints
    /// that the role needs.
    #[must_use]
    pub fn kv_load(&self) -> Option<f64> {
        self.kv_load_ratio().map(|ratio| ratio * self.ready as f64)
    }

    /// Adds requests of the pool that have no endpoint yet. Those that wait do so for a prefill endpoint; those that are parked
    /// may need an endpoint of any role.
    fn add_unbound(&mut self, role: &str, unbound: Unbound) {
        let waiting = if role == "decode" { 0.0 } else { unbound.waiting };
        let requests = waiting + unbound.parked;
        self.requests_unbound = Some(requests);
        self.oldest_unbound_seconds = Some(if requests > 0.0 { unbound.oldest_seconds } else { 0.0 });
        if role != "decode" && self.ready > 0 {
            add(&mut self.prefill_work_seconds, unbound.work_seconds);
        }
    }

    /// Whether there is anything to do.
    #[must_use]
    pub fn is_active(&self) -> bool {
        let all = [
            self.prefill_work_seconds,
            self.requests_in_flight,
            self.kv_tokens_assigned,
            self.requests_waiting,
            self.requests_unbound,
        ];
        all.into_iter().flatten().any(|value| value > 0.0)
    }
}

/// Demand of every pool and role in the list. A draining endpoint does not count, because it only ends its running requests,
/// and neither does one that is down. `loads` is the load of all Envoys by endpoint key; `None` if no Envoy exchanges.
/// `unbound` are the requests that the Envoys keep, by pool.
#[must_use]
pub fn demand(
    endpoints: &[Endpoint],
    loads: Option<&HashMap<u64, Totals>>,
    scrapes: &BTreeMap<SocketAddr, Scraped>,
    unbound: &BTreeMap<String, Unbound>,
) -> BTreeMap<PoolRole, Demand> {
    let mut sums: BTreeMap<PoolRole, Sums> = BTreeMap::new();
    for endpoint in endpoints {
        let key = PoolRole { pool: endpoint.pool.clone(), role: role(endpoint.role) };
        let sums = sums.entry(key).or_default();
        if endpoint.state == State::Ready {
            sums.add(endpoint, loads, scrapes);
        }
    }
    let demand = |(key, sums): (PoolRole, Sums)| {
        let mut demand = sums.demand();
        if loads.is_some() {
            demand.add_unbound(key.role, unbound.get(&key.pool).copied().unwrap_or_default());
        }
        (key, demand)
    };
    sums.into_iter().map(demand).collect()
}

/// The role of that name.
#[must_use]
pub fn role_named(name: &str) -> Option<&'static str> {
    [Role::Prefill, Role::Decode, Role::Both].map(role).into_iter().find(|known| *known == name)
}

#[derive(Default)]
struct Sums {
    demand: Demand,
    /// Endpoints of known size.
    sized: u64,
    /// Addresses whose waiting requests are counted: ranks of one address report together.
    counted: BTreeSet<SocketAddr>,
}

impl Sums {
    fn add(
        &mut self,
        endpoint: &Endpoint,
        loads: Option<&HashMap<u64, Totals>>,
        scrapes: &BTreeMap<SocketAddr, Scraped>,
    ) {
        self.demand.ready += 1;
        if let Some(loads) = loads {
            let totals = loads.get(&endpoint.id().key()).copied().unwrap_or_default();
            let work = above_zero(totals.work);
            add(&mut self.demand.prefill_work_seconds, work * 1e-6);
            add(&mut self.demand.prefill_busy, f64::from(u8::from(work > 0.0)));
            add(&mut self.demand.kv_tokens_assigned, above_zero(totals.tokens));
            add(&mut self.demand.requests_in_flight, above_zero(totals.requests));
        }
        let scraped = scrapes.get(&endpoint.address).filter(|scraped| scraped.has_answered);
        let load = scraped.map(|scraped| scraped.load).unwrap_or_default();
        // The engine's own figure first: the list's may count a CPU tier, too.
        let size = load.cache_tokens.or(endpoint.cache_tokens).map(|tokens| tokens as f64);
        if let Some(size) = size {
            self.sized += 1;
            add(&mut self.demand.kv_tokens_capacity, size);
            if let Some(usage) = load.kv_usage {
                add(&mut self.demand.kv_tokens_used, usage * size);
            }
        }
        if let Some(waiting) = load.waiting
            && self.counted.insert(endpoint.address)
        {
            add(&mut self.demand.requests_waiting, waiting);
        }
    }

    fn demand(mut self) -> Demand {
        if let Some(capacity) = &mut self.demand.kv_tokens_capacity {
            *capacity *= self.demand.ready as f64 / self.sized as f64;
        }
        self.demand
    }
}

fn add(sum: &mut Option<f64>, value: f64) {
    *sum = Some(sum.unwrap_or(0.0) + value);
}

/// Sums of the exchange are differences that may be below zero for a moment.
fn above_zero(sum: u64) -> f64 {
    sum.cast_signed().max(0) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engines::metrics::EngineLoad;

    const NONE: BTreeMap<String, Unbound> = BTreeMap::new();

    fn endpoint(n: u8, role: Role) -> Endpoint {
        Endpoint::new(([10, 0, 0, n], 80).into(), role)
    }

    fn key(endpoint: &Endpoint) -> u64 {
        endpoint.id().key()
    }

    fn scraped(load: EngineLoad) -> Scraped {
        Scraped { load, has_answered: true, ..Scraped::default() }
    }

    fn of<'a>(all: &'a BTreeMap<PoolRole, Demand>, role: &'static str) -> &'a Demand {
        &all[&PoolRole { pool: "default".into(), role }]
    }

    #[test]
    fn roles_have_what_their_ready_endpoints_have() {
        let draining = Endpoint { state: State::Draining, ..endpoint(3, Role::Prefill) };
        let list = [endpoint(1, Role::Prefill), endpoint(2, Role::Prefill), draining, endpoint(4, Role::Decode)];
        let totals = |work, tokens, requests| Totals { work, tokens, requests, legs: 0 };
        let loads = HashMap::from([
            (key(&list[0]), totals(1_500_000, 0, 0)),
            (key(&list[1]), totals(500_000, 0, 0)),
            (key(&list[2]), totals(9_000_000, 0, 0)),
            (key(&list[3]), totals(0, 300, 2)),
            (7, totals(1, 1, 1)),
        ]);
        let load =
            EngineLoad { kv_usage: Some(0.25), cache_tokens: Some(1_000), waiting: Some(3.0), ..EngineLoad::default() };
        let scrapes = BTreeMap::from([(list[3].address, scraped(load))]);
        let all = demand(&list, Some(&loads), &scrapes, &NONE);
        assert_eq!(all.len(), 2);
        let prefill = of(&all, "prefill");
        assert_eq!((prefill.ready, prefill.prefill_work_seconds), (2, Some(2.0)));
        assert_eq!(prefill.prefill_work_seconds_per_endpoint(), Some(1.0));
        assert_eq!((prefill.prefill_busy, prefill.prefill_busy_ratio()), (Some(2.0), Some(1.0)));
        assert_eq!(of(&all, "decode").prefill_busy, Some(0.0));
        assert_eq!((prefill.kv_tokens_capacity, prefill.requests_waiting, prefill.kv_load()), (None, None, None));
        let decode = of(&all, "decode");
        assert_eq!((decode.kv_tokens_assigned, decode.kv_tokens_used), (Some(300.0), Some(250.0)));
        assert_eq!((decode.requests_in_flight, decode.requests_waiting), (Some(2.0), Some(3.0)));
        assert_eq!(decode.kv_load_ratio(), Some(0.3));
    }

    #[test]
    fn a_role_whose_endpoints_all_left_stays_with_none_ready() {
        let down = Endpoint { state: State::Down, ..endpoint(1, Role::Decode) };
        let all = demand(&[down], Some(&HashMap::new()), &BTreeMap::new(), &NONE);
        let none = Demand { requests_unbound: Some(0.0), oldest_unbound_seconds: Some(0.0), ..Demand::default() };
        assert_eq!(*of(&all, "decode"), none);
        assert_eq!(of(&all, "decode").prefill_work_seconds_per_endpoint(), None);
    }

    #[test]
    fn without_an_exchange_nothing_is_known_of_what_is_in_flight() {
        let all = demand(&[endpoint(1, Role::Prefill)], None, &BTreeMap::new(), &NONE);
        assert_eq!(of(&all, "prefill").prefill_work_seconds, None);
        assert!(!of(&all, "prefill").is_active());
        let none = demand(&[endpoint(1, Role::Prefill)], Some(&HashMap::new()), &BTreeMap::new(), &NONE);
        assert_eq!(of(&none, "prefill").prefill_work_seconds, Some(0.0));
    }

    #[test]
    fn sums_below_zero_count_as_none() {
        let list = [endpoint(1, Role::Prefill)];
        let below = Totals::default().minus(Totals { work: 5, tokens: 5, requests: 5, legs: 5 });
        let all = demand(&list, Some(&HashMap::from([(key(&list[0]), below)])), &BTreeMap::new(), &NONE);
        assert_eq!(of(&all, "prefill").prefill_work_seconds, Some(0.0));
        assert!(!of(&all, "prefill").is_active());
    }

    #[test]
    fn requests_that_envoys_keep_are_work_of_the_role_that_they_need() {
        let list = [endpoint(1, Role::Prefill), endpoint(2, Role::Decode)];
        let of_pool = |waiting, parked| Unbound { waiting, work_seconds: waiting * 2.0, parked, oldest_seconds: 9.0 };
        let demand = |unbound| {
            let all = BTreeMap::from([("default".to_owned(), unbound), ("other".to_owned(), of_pool(7.0, 7.0))]);
            demand(&list, Some(&HashMap::new()), &BTreeMap::new(), &all)
        };
        let read = |demand: &Demand| {
            (demand.prefill_work_seconds, demand.requests_unbound, demand.oldest_unbound_seconds, demand.is_active())
        };
        let waiting = demand(of_pool(3.0, 0.0));
        assert_eq!(read(of(&waiting, "prefill")), (Some(6.0), Some(3.0), Some(9.0), true));
        assert_eq!(read(of(&waiting, "decode")), (Some(0.0), Some(0.0), Some(0.0), false));
        let parked = demand(of_pool(0.0, 2.0));
        assert_eq!(read(of(&parked, "prefill")), (Some(0.0), Some(2.0), Some(9.0), true));
        assert_eq!(read(of(&parked, "decode")), (Some(0.0), Some(2.0), Some(9.0), true));
    }

    #[test]
    fn an_endpoint_of_unknown_size_counts_as_the_mean() {
        let list = [endpoint(1, Role::Decode), endpoint(2, Role::Decode)];
        let load = EngineLoad { cache_tokens: Some(1_000), ..EngineLoad::default() };
        let scrapes = BTreeMap::from([(list[0].address, scraped(load))]);
        assert_eq!(of(&demand(&list, None, &scrapes, &NONE), "decode").kv_tokens_capacity, Some(2_000.0));
    }

    #[test]
    fn ranks_behind_one_address_report_their_waiting_requests_once() {
        let rank = |rank| Endpoint { rank: Some(rank), ..endpoint(1, Role::Decode) };
        let load =
            EngineLoad { waiting: Some(4.0), kv_usage: Some(0.5), cache_tokens: Some(100), ..EngineLoad::default() };
        let scrapes = BTreeMap::from([(rank(0).address, scraped(load))]);
        let all = demand(&[rank(0), rank(1)], None, &scrapes, &NONE);
        let decode = of(&all, "decode");
        assert_eq!(
            (decode.requests_waiting, decode.kv_tokens_capacity, decode.kv_tokens_used),
            (Some(4.0), Some(200.0), Some(100.0))
        );
    }
}
