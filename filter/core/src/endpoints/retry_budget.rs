//! Retry budget: retries cannot multiply the load of a pool that fails.

/// What retries a worker may still make, so that they cannot multiply the load of a pool that is failing: a share of
/// its legs, and some to begin with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetryBudget {
    retries: f64,
}

/// Retries that each first try earns (linkerd's and Envoy's usual share).
const RETRIES_PER_TRY: f64 = 0.2;
/// Retries that a worker has at the start: a quiet gateway retries at once.
const FIRST_RETRIES: f64 = 10.0;
/// Most that are saved up.
const MOST_RETRIES: f64 = 100.0;

impl Default for RetryBudget {
    fn default() -> Self {
        Self { retries: FIRST_RETRIES }
    }
}

impl RetryBudget {
    /// A first try was made.
    pub fn earn(&mut self) {
        self.retries = (self.retries + RETRIES_PER_TRY).min(MOST_RETRIES);
    }

    /// Whether another retry may be made; it counts as made.
    pub fn spend(&mut self) -> bool {
        let is_left = self.retries >= 1.0;
        if is_left {
            self.retries -= 1.0;
        }
        is_left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_a_share_of_the_tries() {
        let mut budget = RetryBudget::default();
        assert_eq!((0..100).filter(|_| budget.spend()).count(), 10);
        let mut retries = 0;
        for _ in 0..1_000 {
            budget.earn();
            retries += u32::from(budget.spend());
        }
        assert!((195..=200).contains(&retries), "{retries}");
        (0..10_000).for_each(|_| budget.earn());
        assert_eq!((0..1_000).filter(|_| budget.spend()).count(), 100);
    }
}
