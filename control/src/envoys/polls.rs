//! Which Envoys poll the list, and which version each of them has.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Addresses that are kept. Polls of further addresses are answered, but not counted.
const MAX_POLLING: usize = 4_096;
/// Time after its last poll until an address is dropped: two of the longest polls.
const FORGET: Duration = Duration::from_secs(120);

/// The last poll of each Envoy, by address.
#[derive(Debug, Default)]
pub struct Polls(Mutex<BTreeMap<IpAddr, LastPoll>>);

#[derive(Clone, Copy, Debug)]
struct LastPoll {
    /// Version of the list that the Envoy has; 0: none of this run.
    version: u64,
    at: Instant,
}

/// Time after its last poll in which an Envoy counts as following the list. Longer than the longest poll.
const WATCHING: Duration = Duration::from_secs(65);

/// The last poll of one Envoy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PollView {
    /// Address that it polls from.
    pub address: IpAddr,
    /// Version of the list that it had at its last poll; 0: none of this run.
    pub version: u64,
    /// Milliseconds since its last poll.
    pub seen_ms: u64,
}

impl Polls {
    /// Notes a poll by an Envoy that has this version of the list.
    pub fn seen(&self, address: IpAddr, version: u64) {
        let mut filters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if filters.len() >= MAX_POLLING && !filters.contains_key(&address) {
            filters.retain(|_, seen| seen.at.elapsed() < FORGET);
            if filters.len() >= MAX_POLLING {
                return;
            }
        }
        filters.insert(address.to_canonical(), LastPoll { version, at: Instant::now() });
    }

    /// Number of Envoys that follow the list.
    #[must_use]
    pub fn watching(&self) -> u64 {
        let filters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        filters.values().filter(|seen| seen.at.elapsed() < WATCHING).count() as u64
    }

    /// The last polls, sorted by address.
    #[must_use]
    pub fn view(&self) -> Vec<PollView> {
        let mut filters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        filters.retain(|_, seen| seen.at.elapsed() < FORGET);
        let view = |(address, seen): (&IpAddr, &LastPoll)| PollView {
            address: *address,
            version: seen.version,
            seen_ms: u64::try_from(seen.at.elapsed().as_millis()).unwrap_or(u64::MAX),
        };
        filters.iter().map(view).collect()
    }
}
