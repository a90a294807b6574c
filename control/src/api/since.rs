//! Since when each endpoint of the list is `draining` or `down`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pd_core::time::UnixTime;
use pd_core::wire::{Endpoint, State};
use tokio::time::interval;

use crate::publish::registry::Registry;

/// Time between two looks at the list.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Endpoints that are not `ready`, each with its state and the time at which that state began.
#[derive(Debug, Default)]
pub struct Since(Mutex<BTreeMap<u64, (State, UnixTime)>>);

impl Since {
    /// Looks at the list each second; never returns.
    pub async fn follow(self: Arc<Self>, registry: Arc<Registry>) {
        let mut ticks = interval(LOOK_EVERY);
        loop {
            ticks.tick().await;
            self.take(registry.current().endpoints(), today());
        }
    }

    fn take(&self, endpoints: &[Endpoint], now: UnixTime) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::take(&mut *known);
        for endpoint in endpoints.iter().filter(|endpoint| endpoint.state != State::Ready) {
            let key = endpoint.id().key();
            let same = before.get(&key).filter(|(state, _)| *state == endpoint.state);
            known.insert(key, same.copied().unwrap_or((endpoint.state, now)));
        }
    }

    /// When the endpoint with that key came into its state; none: it is `ready`, or pd-control has not looked yet.
    #[must_use]
    pub fn of(&self, key: u64) -> Option<UnixTime> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&key).map(|(_, since)| *since)
    }
}

/// The time of now.
#[must_use]
pub fn today() -> UnixTime {
    SystemTime::now().duration_since(UNIX_EPOCH).map(UnixTime::new).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_keeps_its_time_until_it_changes() {
        let since = Since::default();
        let endpoint =
            |state| Endpoint { state, ..Endpoint::new(([10, 0, 0, 1], 80).into(), pd_core::wire::Role::Decode) };
        let key = endpoint(State::Ready).id().key();
        let at = |second: u64, state| {
            since.take(&[endpoint(state)], UnixTime::from_millis(second * 1_000));
            since.of(key).map(|time| time.as_millis() / 1_000)
        };
        assert_eq!(at(1, State::Ready), None);
        assert_eq!([at(2, State::Draining), at(3, State::Draining)], [Some(2), Some(2)]);
        assert_eq!([at(4, State::Down), at(5, State::Ready), at(6, State::Down)], [Some(4), None, Some(6)]);
    }
}
