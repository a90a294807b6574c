//! Requests of an Envoy that no endpoint has yet, as a part of its report.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::choose::admission::pool_key;
use crate::codec::{Reader, Writer};
use crate::time::Monotonic;
use crate::workers::worker::Worker;

/// Number of parked requests, and the arrival of the oldest one; [`Monotonic::ZERO`] where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parked {
    /// Parked requests.
    pub requests: u64,
    /// Arrival of the oldest of them.
    pub oldest: Monotonic,
}

impl Parked {
    /// The requests of both.
    pub(super) fn with(self, other: Self) -> Self {
        let oldest = match (self.requests, other.requests) {
            (_, 0) => self.oldest,
            (0, _) => other.oldest,
            _ => self.oldest.min(other.oldest),
        };
        Self { requests: self.requests.saturating_add(other.requests), oldest }
    }

    pub(super) fn write(self, out: &mut Writer) {
        out.word(self.requests);
        out.time(self.oldest);
    }

    pub(super) fn read(rest: &mut Reader<'_>) -> Option<Self> {
        Some(Self { requests: rest.word()?, oldest: rest.time()? })
    }
}

/// Requests of a pool that no endpoint has yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PoolWaits {
    /// Name of the pool.
    pub pool: String,
    /// Requests that wait for a prefill endpoint with room.
    pub waiting: u64,
    /// Prefill work of the waiting requests in milliseconds of an endpoint.
    pub work_ms: u64,
    /// Requests that are parked: no endpoint is ready for them. Of the pool `default` only.
    pub parked: u64,
    /// Milliseconds since the arrival of the oldest of all of them.
    pub oldest_ms: u64,
}

impl Worker {
    /// Parked requests of this worker.
    pub(crate) fn parked(&self) -> Parked {
        let parked = &self.turns.parked;
        let oldest = parked.values().map(|request| request.arrival).min().unwrap_or_default();
        Parked { requests: parked.len() as u64, oldest }
    }

    /// Requests of this Envoy that wait or are parked, by pool. `parked` are those of all its workers; they count in the pool
    /// `default`, whose `no_endpoint_ms` holds for them.
    pub(crate) fn waits(&self, parked: Parked, now: Monotonic) -> Vec<PoolWaits> {
        let waiting = &self.state.waiting;
        if waiting.is_empty() && parked.requests == 0 {
            return Vec::new();
        }
        let configured = self.config.iter().flat_map(|config| config.policies().map(|(name, _)| name));
        let names: BTreeSet<_> = configured.chain(self.turns.pools.values().map(String::as_str)).collect();
        let waits = |name: &str| {
            let key = pool_key(name);
            let (requests, _, seconds) = waiting.of_pool(key);
            let parked = if name == "default" { parked } else { Parked::default() };
            let oldest = waiting.oldest(key).into_iter().chain((parked.requests > 0).then_some(parked.oldest)).min()?;
            Some(PoolWaits {
                pool: name.to_owned(),
                waiting: requests as u64,
                work_ms: (seconds * 1e3) as u64,
                parked: parked.requests,
                oldest_ms: u64::try_from(now.saturating_sub(oldest).as_millis()).unwrap_or(u64::MAX),
            })
        };
        names.into_iter().filter_map(waits).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_of_several_workers_counts_and_a_worker_without_parked_requests_has_none() {
        let parked = |requests, millis| Parked { requests, oldest: Monotonic::from_millis(millis) };
        let all = [parked(2, 500), parked(0, 0), parked(1, 300)].into_iter().fold(parked(0, 0), Parked::with);
        assert_eq!(all, parked(3, 300));
        let mut out = Writer::default();
        all.write(&mut out);
        assert_eq!(Parked::read(&mut Reader(&out.0)), Some(all));
        assert_eq!(Parked::read(&mut Reader(&out.0[..8])), None);
    }
}
