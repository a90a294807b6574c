//! Which Envoys poll the list, and which version each of them has.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Polls that are remembered; more are not shown.
const MAX_POLLING: usize = 4_096;
/// How long a filter is remembered that polls no longer: two of the longest polls.
const FORGET: Duration = Duration::from_secs(120);

/// Who polls, by address: each Envoy is one.
#[derive(Debug, Default)]
pub struct Polls(Mutex<BTreeMap<IpAddr, LastPoll>>);

#[derive(Clone, Copy, Debug)]
struct LastPoll {
    /// Version of our list that it has; 0: none of ours.
    version: u64,
    at: Instant,
}

/// Time without a poll after which an Envoy does not count as one that follows the list: more than a long poll takes.
const WATCHING: Duration = Duration::from_secs(65);

/// One Envoy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PollView {
    /// Where it polls from.
    pub address: IpAddr,
    /// Version of the list that it had when it asked; 0: none of this run.
    pub version: u64,
    /// Since it asked.
    pub seen_ms: u64,
}

impl Polls {
    /// Somebody polls who has this version of our list.
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

    /// Envoys that follow the list.
    #[must_use]
    pub fn watching(&self) -> u64 {
        let filters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        filters.values().filter(|seen| seen.at.elapsed() < WATCHING).count() as u64
    }

    /// Those that have polled of late.
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
