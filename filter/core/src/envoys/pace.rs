//! Pace of the host's ticks: the exchange wants more of them than the rest of the worker.

use core::time::Duration;

use crate::envoys::client;
use crate::time::Monotonic;
use crate::workers::push;

/// How much earlier than asked for a tick may come.
const SLACK: Duration = Duration::from_millis(20);

/// When the host ticks, and when the whole of the worker's work was done last.
#[derive(Debug, Default)]
pub struct Pace {
    period: Duration,
    last_whole: Monotonic,
}

impl Pace {
    /// Whether all that a worker does at a tick is due, or the exchange alone. Call it once a tick; `is_exchanging` is
    /// [`ExchangeClient::is_busy`](client::ExchangeClient::is_busy).
    pub fn is_whole(&mut self, is_exchanging: bool, now: Monotonic) -> bool {
        let since = now.saturating_sub(self.last_whole).saturating_add(SLACK);
        let is_whole = !is_exchanging || since >= push::TICK;
        if is_whole {
            self.last_whole = now;
        }
        is_whole
    }

    /// The time between two ticks from now on; `None` where it has not changed.
    pub fn new_period(&mut self, is_exchanging: bool) -> Option<Duration> {
        let period = if is_exchanging { client::TICK } else { push::TICK };
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
        assert!(pace.is_whole(false, ms(1_000)) && pace.is_whole(false, ms(1_050)), "every tick, where it does not");
        let whole = (1..=40).filter(|tick| pace.is_whole(true, ms(1_050 + tick * 50))).count();
        assert_eq!(whole, 10, "of forty ticks of 50 ms");
    }

    #[test]
    fn a_tick_that_comes_a_little_early_counts() {
        let mut pace = Pace::default();
        assert!(pace.is_whole(false, ms(1_000)));
        assert!(!pace.is_whole(true, ms(1_179)));
        assert!(pace.is_whole(true, ms(1_180)));
    }

    #[test]
    fn the_host_is_asked_for_another_period_only_when_it_changes() {
        let mut pace = Pace::default();
        let periods = [false, false, true, true, false].map(|is_exchanging| pace.new_period(is_exchanging));
        assert_eq!(periods, [Some(push::TICK), None, Some(client::TICK), None, Some(push::TICK)]);
    }
}
