//! How long things take.

use std::time::Duration;

use crate::config::Config;

/// Cost model of one server, scaled by its speed factor.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    scale: f64,
    a: f64,
    b: f64,
    c: f64,
    tpot: f64,
    tpot_batch: f64,
    transfer: f64,
    transfer_token: f64,
}

impl Timing {
    /// Seconds from the configuration's milli-, micro- and nanoseconds.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self {
            scale: config.speed,
            a: config.a_ms * 1e-3,
            b: config.b_us * 1e-6,
            c: config.c_ns * 1e-9,
            tpot: config.tpot_ms * 1e-3,
            tpot_batch: config.tpot_batch_us * 1e-6,
            transfer: config.transfer_ms * 1e-3,
            transfer_token: config.transfer_us * 1e-6,
        }
    }

    /// `a + b·(n − p) + c·(n² − p²)` for `n` prompt tokens with `p` cached.
    #[must_use]
    pub fn prefill(&self, tokens: u64, cached: u64) -> Duration {
        let (n, p) = (tokens as f64, cached.min(tokens) as f64);
        self.scaled(self.a + self.b * (n - p) + self.c * (n * n - p * p))
    }

    /// One output token while `batch` requests decode, this one included.
    #[must_use]
    pub fn token(&self, batch: usize) -> Duration {
        self.scaled(self.tpot + self.tpot_batch * batch.saturating_sub(1) as f64)
    }

    /// Moving the KV of so many tokens between servers.
    #[must_use]
    pub fn transfer(&self, tokens: u64) -> Duration {
        self.scaled(self.transfer + self.transfer_token * tokens as f64)
    }

    fn scaled(&self, seconds: f64) -> Duration {
        Duration::try_from_secs_f64(seconds * self.scale).unwrap_or_default()
    }
}

/// Sleeps, but not at all for nothing: a timer costs a wake-up even at zero.
pub(crate) async fn pause(duration: Duration) {
    if !duration.is_zero() {
        tokio::time::sleep(duration).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefill_follows_the_formula() {
        let timing = Timing::new(&Config { speed: 1.0, ..Config::default() });
        // 15 ms + 25 µs · 8192 + 5.24e-10 s · 8192²
        assert_eq!(timing.prefill(8_192, 0).as_millis(), 15 + 204 + 35);
        assert_eq!(timing.prefill(8_192, 8_192).as_millis(), 15);
        assert!(timing.prefill(8_192, 4_096) > timing.prefill(4_096, 0));
        assert_eq!(timing.token(1).as_micros(), 8_000);
        assert_eq!(timing.token(11).as_micros(), 9_000);
        assert_eq!(timing.transfer(1_000).as_micros(), 4_500);
    }

    #[test]
    fn speed_scales_and_zero_takes_no_time() {
        let timing = |speed| Timing::new(&Config { speed, ..Config::default() });
        assert_eq!(timing(0.5).prefill(0, 0).as_micros(), 7_500);
        assert_eq!(timing(0.0).prefill(1 << 20, 0), Duration::ZERO);
        assert_eq!(timing(0.0).token(1_000), Duration::ZERO);
    }
}
