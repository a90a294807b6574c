//! The retry budget, which keeps retries from multiplying the load of a failing pool.

/// Number of prefill legs that one worker may still run again: 10 at the start, and one for every five first tries.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetryBudget {
    retries: f64,
}

/// Retries that each first try earns: the default share of linkerd and Envoy.
const RETRIES_PER_TRY: f64 = 0.2;
/// Retries that a worker has at the start, so that an Envoy with few requests can retry.
const FIRST_RETRIES: f64 = 10.0;
/// Most retries that a worker saves.
const MOST_RETRIES: f64 = 100.0;

impl Default for RetryBudget {
    fn default() -> Self {
        Self { retries: FIRST_RETRIES }
    }
}

impl RetryBudget {
    /// Adds the fifth of a retry for a request's first try, up to the bound.
    pub fn earn(&mut self) {
        self.retries = (self.retries + RETRIES_PER_TRY).min(MOST_RETRIES);
    }

    /// Takes one retry from the budget; `false` where there is none.
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
