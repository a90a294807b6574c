//! Bounds the amount in flight at a time, for all clients together and for each host.
//!
//! A host at its bound leaves the rest to the other hosts.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hashbrown::HashMap;

/// Most bytes of messages of the exchange in flight. Together with what the hub keeps they fit into the container's memory
/// limit that the manifests set.
pub const MAX_EXCHANGE_BYTES: usize = 48 << 20;
/// Of these, most bytes of one host: the largest message while it is read, and the largest answer.
pub const MAX_HOST_EXCHANGE_BYTES: usize = 17 << 20;
/// Most answers in flight for people and scrapers, each of the size of the list.
pub const MAX_VIEWS: usize = 16;
/// Of these, most answers for one host.
pub const MAX_HOST_VIEWS: usize = 8;

/// What is in flight, in bytes or in requests.
#[derive(Debug)]
pub struct InFlight {
    most: usize,
    most_of_a_host: usize,
    held: Mutex<Amounts>,
}

#[derive(Debug, Default)]
struct Amounts {
    all: usize,
    hosts: HashMap<IpAddr, usize>,
}

/// A share of the bound, held until it is dropped.
#[derive(Debug)]
pub struct Held {
    of: Arc<InFlight>,
    host: IpAddr,
    amount: usize,
}

impl InFlight {
    /// At most `most` for all hosts, and `most_of_a_host` for each.
    #[must_use]
    pub fn new(most: usize, most_of_a_host: usize) -> Self {
        Self { most, most_of_a_host, held: Mutex::default() }
    }

    /// Holds an amount for a host; `None` where that is too much.
    #[must_use]
    pub fn hold(self: &Arc<Self>, host: IpAddr, amount: usize) -> Option<Held> {
        let mut held = Held { of: Arc::clone(self), host, amount: 0 };
        held.resize(amount).then_some(held)
    }

    fn amounts(&self) -> MutexGuard<'_, Amounts> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    /// Holds another amount in place of the present one. `false` where that is too much: the present one stays.
    #[must_use]
    pub fn resize(&mut self, amount: usize) -> bool {
        let mut held = self.of.amounts();
        let host = held.hosts.get(&self.host).copied().unwrap_or(0);
        let with = |sum: usize| sum.saturating_sub(self.amount).saturating_add(amount);
        let (all, of_host) = (with(held.all), with(host));
        if amount > self.amount && (all > self.of.most || of_host > self.of.most_of_a_host) {
            return false;
        }
        held.all = all;
        match of_host {
            0 => held.hosts.remove(&self.host),
            _ => held.hosts.insert(self.host, of_host),
        };
        self.amount = amount;
        true
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Less is never too much.
        let _ = self.resize(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_takes_all_it_may_leaves_the_rest_to_others() {
        let in_flight = Arc::new(InFlight::new(10, 6));
        let [greedy, other] = [1, 2].map(|n| IpAddr::from([10, 0, 0, n]));
        let mut first = in_flight.hold(greedy, 4).unwrap();
        assert!(in_flight.hold(greedy, 3).is_none() && !first.resize(7));
        let second = in_flight.hold(greedy, 2).unwrap();
        assert!(in_flight.hold(greedy, 1).is_none());
        let _other = in_flight.hold(other, 4).unwrap();
        assert!(in_flight.hold(other, 1).is_none(), "all together have the most");
        assert!(first.resize(1) && in_flight.hold(other, 1).is_some());
        drop((first, second));
        assert_eq!(in_flight.amounts().hosts.len(), 1, "hosts without anything take no memory");
        assert!(in_flight.hold(greedy, 6).is_some());
    }
}
