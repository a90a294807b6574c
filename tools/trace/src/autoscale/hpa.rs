//! The HorizontalPodAutoscaler's algorithm, with the behaviour that the manifests in `gateway-manifests/autoscaling` set.
//!
//! Source: <https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/#algorithm-details>, and of
//! kube-controller-manager `pkg/controller/podautoscaler` for what the page leaves open.

use std::collections::VecDeque;
use std::time::Duration;

/// Share by which a metric may differ from its target without a change: kube-controller-manager's default.
const TOLERANCE: f64 = 0.1;

/// A policy of a behaviour: the most servers that may come or go within a period.
#[derive(Clone, Copy, Debug)]
pub enum Policy {
    /// A number of servers.
    Pods(usize),
    /// Percent of the servers at the begin of the period.
    Percent(usize),
}

/// What the manifests set.
#[derive(Clone, Copy, Debug)]
pub struct Behaviour {
    /// Fewest and most servers.
    pub servers: (usize, usize),
    /// Time between two looks.
    pub sync: Duration,
    /// Period of the policies.
    pub period: Duration,
    /// Policies upwards; the one that allows most counts.
    pub up: [Policy; 2],
    /// Policy downwards.
    pub down: Policy,
    /// Time for which the metric must have allowed fewer servers.
    pub stabilization: Duration,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            servers: (1, 16),
            sync: Duration::from_secs(15),
            period: Duration::from_secs(60),
            up: [Policy::Percent(100), Policy::Pods(2)],
            down: Policy::Pods(1),
            stabilization: Duration::from_secs(300),
        }
    }
}

/// The autoscaler of one role.
#[derive(Debug)]
pub struct Hpa {
    behaviour: Behaviour,
    recommended: VecDeque<(Duration, usize)>,
    /// Changes: servers added (above 0) or removed.
    changes: VecDeque<(Duration, isize)>,
}

impl Hpa {
    /// Without a past.
    #[must_use]
    pub fn new(behaviour: Behaviour) -> Self {
        Self { behaviour, recommended: VecDeque::new(), changes: VecDeque::new() }
    }

    /// Servers that there should be. `metrics` has for each metric the target of one server and the sum over the role, both
    /// of type AverageValue; without any, nothing changes.
    pub fn look(&mut self, now: Duration, current: usize, metrics: &[(f64, f64)]) -> usize {
        let desired = |(target, sum): &(f64, f64)| {
            let ratio = sum / (target * current as f64);
            if (ratio - 1.0).abs() <= TOLERANCE { current } else { (sum / target).ceil() as usize }
        };
        let Some(desired) = metrics.iter().map(desired).max() else { return current };
        let Behaviour { servers: (least, most), period, up, down, stabilization, .. } = self.behaviour;
        self.recommended.retain(|(at, _)| now - *at < stabilization);
        self.recommended.push_back((now, desired));
        self.changes.retain(|(at, _)| now - *at < period);
        // Upwards there is no stabilization: the recommendation of now counts.
        let stable = self.recommended.iter().map(|(_, servers)| *servers).max().unwrap_or(desired);
        let changed = |sign: isize| -> isize {
            self.changes.iter().map(|(_, change)| *change).filter(|change| change.signum() == sign).sum()
        };
        let next = if desired > current {
            let begin = current.saturating_add_signed(-changed(1));
            let limit = |policy: Policy| match policy {
                Policy::Pods(pods) => begin + pods,
                Policy::Percent(percent) => (begin * (100 + percent)).div_ceil(100),
            };
            desired.min(up.into_iter().map(limit).max().unwrap_or(desired)).max(current)
        } else if stable < current {
            let begin = current.saturating_add_signed(-changed(-1));
            let limit = match down {
                Policy::Pods(pods) => begin.saturating_sub(pods),
                Policy::Percent(percent) => begin * 100usize.saturating_sub(percent) / 100,
            };
            stable.max(limit).min(current)
        } else {
            current
        };
        let next = next.clamp(least, most);
        if next != current {
            self.changes.push_back((now, next as isize - current as isize));
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_metric_that_needs_most_counts_and_a_tenth_more_or_less_changes_nothing() {
        let mut hpa = Hpa::new(Behaviour::default());
        assert_eq!(hpa.look(at(0), 4, &[(1.0, 4.39), (0.5, 1.81)]), 4);
        assert_eq!(hpa.look(at(15), 4, &[(1.0, 4.0), (0.5, 2.3)]), 5);
        assert_eq!(hpa.look(at(30), 5, &[]), 5, "without a metric nothing changes");
    }

    #[test]
    fn in_a_period_servers_double_or_two_are_added() {
        let mut hpa = Hpa::new(Behaviour::default());
        assert_eq!(hpa.look(at(0), 1, &[(1.0, 9.0)]), 3);
        assert_eq!(hpa.look(at(15), 3, &[(1.0, 9.0)]), 3, "the period began with one");
        assert_eq!(hpa.look(at(60), 3, &[(1.0, 9.0)]), 6);
        assert_eq!(hpa.look(at(120), 6, &[(1.0, 9.0)]), 9);
    }

    #[test]
    fn one_server_a_minute_goes_after_five_minutes() {
        let mut hpa = Hpa::new(Behaviour::default());
        assert_eq!(hpa.look(at(0), 5, &[(1.0, 5.0)]), 5);
        for seconds in (15..300).step_by(15) {
            assert_eq!(hpa.look(at(seconds), 5, &[(1.0, 1.0)]), 5, "{seconds}");
        }
        assert_eq!(hpa.look(at(300), 5, &[(1.0, 1.0)]), 4);
        assert_eq!(hpa.look(at(345), 4, &[(1.0, 1.0)]), 4);
        assert_eq!(hpa.look(at(360), 4, &[(1.0, 1.0)]), 3);
    }
}
