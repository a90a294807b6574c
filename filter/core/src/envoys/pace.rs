//! Pace of the host's ticks: the exchange and waiting requests need more ticks than the rest of the worker.

use core::time::Duration;

use crate::envoys::client;
use crate::time::Monotonic;
use crate::workers::push;

/// How much earlier than asked for the host's tick may come.
const SLACK: Duration = Duration::from_millis(20);

/// When the host ticks, and when the whole of the worker's work was done last.
#[derive(Debug, Default)]
pub struct Pace {
    period: Duration,
    last_whole: Monotonic,
}

impl Pace {
    /// Whether the whole of a worker's work is due at this tick. If not, only the exchange and waiting requests are. Call it
    /// once a tick.
    pub fn is_whole(&mut self, now: Monotonic) -> bool {
        let since = now.saturating_sub(self.last_whole).saturating_add(SLACK);
        let is_whole = self.period >= push::TICK || since >= push::TICK;
        if is_whole {
            self.last_whole = now;
        }
        is_whole
    }

    /// The new time between two ticks; `None` where it has not changed.
    ///
    /// - `is_exchanging` is [`ExchangeClient::is_busy`](client::ExchangeClient::is_busy).
    /// - `look` is [`Worker::next_look`](crate::workers::worker::Worker::next_look).
    pub fn new_period(&mut self, is_exchanging: bool, look: Option<Duration>) -> Option<Duration> {
        let period = if is_exchanging { client::TICK } else { push::TICK };
        // The host counts milliseconds.
        let look = look.map(|look| Duration::from_millis(u64::try_from(look.as_millis()).unwrap_or(u64::MAX)));
        let period = look.map_or(period, |look| period.min(look.saturating_add(Duration::from_millis(1))));
        let has_changed = self.period != period;
        self.period = period;
        has_changed.then_some(period)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Monotonic {
        Monotonic::from_millis(ms)
    }

    #[test]
    fn a_worker_that_exchanges_does_the_rest_as_often_as_one_that_does_not() {
        let mut pace = Pace::default();
        pace.new_period(false, None);
        assert!(pace.is_whole(ms(1_000)) && pace.is_whole(ms(1_050)), "every tick, where it does not");
        pace.new_period(true, None);
        let whole = (1..=40).filter(|tick| pace.is_whole(ms(1_050 + tick * 50))).count();
        assert_eq!(whole, 10, "of forty ticks of 50 ms");
    }

    #[test]
    fn a_tick_that_comes_a_little_early_counts() {
        let mut pace = Pace::default();
        pace.new_period(false, None);
        assert!(pace.is_whole(ms(1_000)));
        pace.new_period(true, None);
        assert!(!pace.is_whole(ms(1_179)));
        assert!(pace.is_whole(ms(1_180)));
    }

    #[test]
    fn the_host_is_asked_for_another_period_only_when_it_changes() {
        let mut pace = Pace::default();
        let periods = [false, false, true, true, false].map(|is_exchanging| pace.new_period(is_exchanging, None));
        assert_eq!(periods, [Some(push::TICK), None, Some(client::TICK), None, Some(push::TICK)]);
    }

    #[test]
    fn waiting_requests_are_looked_at_when_an_endpoint_has_room_and_never_later_than_at_a_tick() {
        let mut pace = Pace::default();
        let looks = [Some(7_400), Some(7_900), Some(900_000), None];
        let periods = looks.map(|look| pace.new_period(false, look.map(Duration::from_micros)));
        assert_eq!(periods, [Some(Duration::from_millis(8)), None, Some(push::TICK), None]);
    }
}
