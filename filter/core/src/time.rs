//! Times of the monotonic clock, and of the day.
//!
//! Core has no clock: the shell reads both clocks and passes the times in. Decisions use [`Monotonic`]; [`UnixTime`] is for
//! people.

use core::ops::{Add, AddAssign, Sub};
use core::time::Duration;

use serde::{Deserialize, Serialize};

/// A time of the monotonic clock, which never goes back: the time since the clock's zero, which a process chooses.
///
/// - All workers of one Envoy share the zero. Times of different processes cannot be compared.
/// - [`ZERO`](Self::ZERO) is before every event.
/// - The length between two times is a [`Duration`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Monotonic(Duration);

impl Monotonic {
    /// Before every event.
    pub const ZERO: Self = Self(Duration::ZERO);

    /// The time `since_zero` after the clock's own zero.
    #[must_use]
    pub const fn new(since_zero: Duration) -> Self {
        Self(since_zero)
    }

    /// The time so many nanoseconds after the clock's zero, as the host's clock counts.
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(Duration::from_nanos(nanos))
    }

    /// The time so many milliseconds after the clock's zero, as messages between workers have it.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }

    /// The time so many seconds after the clock's zero.
    #[must_use]
    pub const fn from_secs(secs: u64) -> Self {
        Self(Duration::from_secs(secs))
    }

    /// Time since the clock's own zero.
    #[must_use]
    pub const fn since_zero(self) -> Duration {
        self.0
    }

    /// Nanoseconds since the clock's own zero; `u64::MAX` from 584 years on.
    #[must_use]
    pub fn as_nanos(self) -> u64 {
        u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX)
    }

    /// Milliseconds since the clock's own zero.
    #[must_use]
    pub fn as_millis(self) -> u64 {
        millis(self.0)
    }

    /// The time that has passed since `earlier`; zero if `earlier` is later.
    #[must_use]
    pub const fn saturating_sub(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// The time after `length` has passed; at most the largest time.
    #[must_use]
    pub const fn saturating_add(self, length: Duration) -> Self {
        Self(self.0.saturating_add(length))
    }
}

/// Saturates, as [`Monotonic::saturating_add`] does.
impl Add<Duration> for Monotonic {
    type Output = Self;

    fn add(self, length: Duration) -> Self {
        self.saturating_add(length)
    }
}

/// Saturates, as [`Monotonic::saturating_add`] does.
impl AddAssign<Duration> for Monotonic {
    fn add_assign(&mut self, length: Duration) {
        *self = self.saturating_add(length);
    }
}

/// Saturates, as [`Monotonic::saturating_sub`] does.
impl Sub for Monotonic {
    type Output = Duration;

    fn sub(self, earlier: Self) -> Duration {
        self.saturating_sub(earlier)
    }
}

/// Milliseconds since 1970-01-01T00:00:00Z, without leap seconds. A number in JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnixTime {
    millis: u64,
}

impl UnixTime {
    /// The time so many milliseconds after 1970 began.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Self { millis }
    }

    /// The time `since_1970` after 1970 began, in whole milliseconds.
    #[must_use]
    pub fn new(since_1970: Duration) -> Self {
        Self { millis: millis(since_1970) }
    }

    /// Milliseconds since 1970 began.
    #[must_use]
    pub const fn as_millis(self) -> u64 {
        self.millis
    }

    /// Whole seconds since 1970 began.
    #[must_use]
    pub const fn as_secs(self) -> u64 {
        self.millis.div_euclid(1_000)
    }
}

/// Both clocks, read at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Clocks {
    /// The monotonic clock.
    pub monotonic: Monotonic,
    /// The time of the day.
    pub unix: UnixTime,
}

impl Clocks {
    /// The time of the day at a time of the monotonic clock, if neither clock was set since. A time after these clocks counts
    /// as their time.
    #[must_use]
    pub fn unix_at(self, at: Monotonic) -> UnixTime {
        UnixTime { millis: self.unix.millis.saturating_sub(millis(self.monotonic.saturating_sub(at))) }
    }
}

fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_of_the_monotonic_clock_has_a_time_of_the_day() {
        let clocks = Clocks { monotonic: Monotonic::from_secs(100), unix: UnixTime::from_millis(1_700_000_000_000) };
        assert_eq!(clocks.unix_at(Monotonic::from_millis(98_500)), UnixTime::from_millis(1_699_999_998_500));
        assert_eq!(clocks.unix_at(Monotonic::from_secs(100)), clocks.unix);
        assert_eq!(clocks.unix_at(Monotonic::from_secs(101)), clocks.unix, "not yet");
        assert_eq!(Clocks { unix: UnixTime::default(), ..clocks }.unix_at(Monotonic::ZERO), UnixTime::default());
    }

    #[test]
    fn lengths_never_overflow() {
        let latest = Monotonic::new(Duration::MAX);
        assert_eq!(latest + Duration::from_secs(1), latest);
        assert_eq!(Monotonic::ZERO - latest, Duration::ZERO);
    }
}
