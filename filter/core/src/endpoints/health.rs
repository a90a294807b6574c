//! Health of one endpoint: the pause after a failure, and the probe after the pause.

use core::time::Duration;

use crate::endpoints::outliers::ErrorClass;
use crate::time::Monotonic;

/// Why an endpoint is ejected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cause {
    /// The endpoint could not be reached, or reset the connection.
    #[default]
    Unreachable,
    /// Envoy's cluster lacks the endpoint: another one answered in its place.
    Absent,
    /// The KV caches of the endpoint cannot be fetched: decode endpoints answer 5xx to its prompts and serve whole requests.
    Handover,
    /// The endpoint answers errors that its peers do not answer.
    Outlier(ErrorClass),
}

impl Cause {
    /// Text for an operator: the rest of a sentence that begins with the endpoint's address.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Unreachable => "does not answer",
            Self::Absent => "is not in Envoy's cluster",
            Self::Handover => "computes prompts at which decode servers fail: KV caches cannot be fetched from it",
            Self::Outlier(ErrorClass::Server) => "answers 5xx where others of its pool do not",
            Self::Outlier(ErrorClass::Overload) => "answers 429 or 503 where others of its pool do not",
            Self::Outlier(ErrorClass::Refusal) => "answers 4xx where others of its pool do not",
        }
    }

    /// Its number in an event.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Unreachable => 0,
            Self::Absent => ABSENT,
            Self::Handover => HANDOVER,
            Self::Outlier(kind) => kind.code(),
        }
    }

    /// The cause with that number. An unknown number, which a newer filter wrote, is [`Unreachable`](Self::Unreachable).
    pub(crate) const fn of_code(code: u8) -> Self {
        match ErrorClass::of_code(code) {
            Some(kind) => Self::Outlier(kind),
            None if code == ABSENT => Self::Absent,
            None if code == HANDOVER => Self::Handover,
            None => Self::Unreachable,
        }
    }
}

/// Number of [`Cause::Absent`] in an event, behind those of errors.
const ABSENT: u8 = 4;
/// Number of [`Cause::Handover`].
const HANDOVER: u8 = 5;

/// Health of one endpoint. Without any failure it is healthy.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Health {
    failures: u32,
    /// Time of the first failure after the endpoint's last answer.
    since: Monotonic,
    /// Cause of the latest failure.
    cause: Cause,
    out_until: Monotonic,
    probing: bool,
}

/// First pause after a failure; each further one doubles it up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// First and longest pause of [`Cause::Handover`]. They are long because each probe costs a client its answer, and because
/// only a new process or a new configuration helps.
const HANDOVER_PAUSES: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));
/// Longest pause. An endpoint that works again gets requests after this time and one probe at the latest.
const MAX_PAUSE: Duration = Duration::from_secs(5);

impl Health {
    /// Whether the endpoint may get a request: it is healthy, or its pause is over and no probe is under way.
    #[must_use]
    pub fn is_usable(&self, now: Monotonic) -> bool {
        self.failures == 0 || (now >= self.out_until && !self.probing)
    }

    /// Whether the endpoint gets no request even while its whole pool is ejected, unless a probe is due. That is true
    /// - for an endpoint that Envoy's cluster lacks, because another endpoint of any role would answer,
    /// - for an endpoint whose KV caches cannot be fetched, because decode endpoints serve the requests whole.
    #[must_use]
    pub fn is_excluded(&self, now: Monotonic) -> bool {
        matches!(self.cause, Cause::Absent | Cause::Handover) && !self.is_usable(now)
    }

    /// Notes that a request goes to the endpoint. For an ejected endpoint that request is the probe, and the endpoint gets no
    /// other one before it ends.
    pub fn sent(&mut self, now: Monotonic) {
        if self.failures > 0 {
            self.probing = true;
            // A probe whose client left has no end. It counts as over after the longest pause.
            self.out_until = now;
        }
    }

    /// Ejects the endpoint for a pause.
    pub fn failed(&mut self, cause: Cause, now: Monotonic) {
        if self.failures == 0 {
            self.since = now;
        }
        self.cause = cause;
        let (first, longest) = if cause == Cause::Handover { HANDOVER_PAUSES } else { (FIRST_PAUSE, MAX_PAUSE) };
        let pause = first.saturating_mul(1_u32.checked_shl(self.failures.min(8)).unwrap_or(1)).min(longest);
        self.failures = self.failures.saturating_add(1);
        self.out_until = now.saturating_add(pause);
        self.probing = false;
    }

    /// Notes an answer: the endpoint is healthy, its failures are forgotten and its probe has ended.
    pub fn answered(&mut self) {
        *self = Self::default();
    }

    /// Ends a probe that has lasted as long as the longest pause.
    pub fn prune(&mut self, now: Monotonic) {
        if self.probing && now.saturating_sub(self.out_until) > MAX_PAUSE {
            self.probing = false;
        }
    }

    /// Whether a probe is under way: the one request that an ejected endpoint gets when its pause is over.
    #[must_use]
    pub fn is_probing(&self) -> bool {
        self.probing
    }

    /// Why the endpoint is ejected, and since when; `None` where it is not.
    #[must_use]
    pub fn ejection(&self) -> Option<(Cause, Monotonic)> {
        self.is_failing().then_some((self.cause, self.since))
    }

    /// Whether the endpoint is ejected.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.failures > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Monotonic {
        Monotonic::from_millis(ms)
    }

    #[test]
    fn a_failing_endpoint_pauses_is_probed_once_and_returns() {
        let mut health = Health::default();
        assert!(health.is_usable(ms(0)));
        health.failed(Cause::Unreachable, ms(0));
        assert!(!health.is_usable(ms(499)));
        assert!(health.is_usable(ms(500)));
        health.sent(ms(500));
        assert!(!health.is_usable(ms(501)), "one probe at a time");
        health.failed(Cause::Outlier(ErrorClass::Server), ms(510));
        assert_eq!(health.ejection(), Some((Cause::Outlier(ErrorClass::Server), ms(0))));
        assert!(!health.is_usable(ms(1_509)));
        assert!(health.is_usable(ms(1_510)));
        health.sent(ms(1_510));
        health.answered();
        assert_eq!(health, Health::default());
    }

    #[test]
    fn an_absent_endpoint_is_one_until_its_probe() {
        let mut health = Health::default();
        health.failed(Cause::Unreachable, ms(0));
        assert!(!health.is_excluded(ms(1)));
        health.failed(Cause::Absent, ms(0));
        assert!(health.is_excluded(ms(999)) && !health.is_excluded(ms(1_000)));
        health.sent(ms(1_000));
        assert!(health.is_excluded(ms(1_001)));
        health.answered();
        assert!(!health.is_excluded(ms(1_002)));
    }

    #[test]
    fn a_probe_without_an_end_does_not_lock_an_endpoint_out() {
        let mut health = Health::default();
        health.failed(Cause::Unreachable, ms(0));
        health.sent(ms(600));
        health.prune(ms(700));
        assert!(!health.is_usable(ms(700)));
        health.prune(ms(6_000));
        assert!(health.is_usable(ms(6_000)));
    }

    #[test]
    fn pauses_grow_to_a_bound() {
        let mut health = Health::default();
        for _ in 0..100 {
            health.failed(Cause::Unreachable, ms(0));
        }
        assert!(health.is_usable(ms(0) + MAX_PAUSE));
    }
}
