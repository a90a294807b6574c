//! Fitted cost of one pool: prefill seconds and bytes per token, fitted while the pool serves.
//!
//! Prefill seconds are `a + b·(n − p) + c·(n² − p²)`. The fit is a factor on each configured term, found by least squares
//! on relative errors with exponential forgetting (recursive least squares, Ljung 1999, chapter 11). A ridge draws the
//! factors towards 1, and bounds hold them. Huber's weights limit outliers, such as a prompt that waited behind work of
//! which this Envoy does not know.

use crate::config::{Cost, Pool};
use crate::endpoints::fitted_media::{CLASSES, FittedMedia, MediaTokens};
use crate::metrics::FITTED_GAUGES;

/// Factor on the weight of an observation at each further one: a window of about 200 observations.
const FORGETTING: f64 = 0.995;
/// Weight of the configured coefficients, in observations that one term alone explains.
const RIDGE: f64 = 0.05;
/// Relative error beyond which the pull of an observation grows no further.
const HUBER: f64 = 0.5;
/// Largest factor on a configured coefficient; the smallest is its inverse.
const MAX_FACTOR: f64 = 10.0;
/// Largest factor on the configured bytes per token; the smallest is its inverse. Text of one language and tokenizer
/// varies by less.
const MAX_TEXT_FACTOR: f64 = 4.0;
/// Weight of the configured bytes per token, in tokens.
const TEXT_RIDGE: f64 = 20_000.0;
/// Most bytes of one prompt that count in the fit.
const TEXT_BYTES: f64 = 16.0 * TEXT_RIDGE;

/// Prefill cost and bytes per token of one pool, fitted to the legs so far.
#[derive(Clone, Debug)]
pub struct FittedCost {
    configured: Cost,
    cost: Cost,
    factors: [f64; 3],
    /// Upper triangle of the normal equations: aa, ab, ac, bb, bc, cc.
    normal: [f64; 6],
    target: [f64; 3],
    configured_bytes_per_token: f64,
    text_bytes: f64,
    text_tokens: f64,
    media: FittedMedia,
    observations: u64,
}

/// A prefill leg that ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SeenPrefill {
    /// Tokens of the prompt.
    pub tokens: f64,
    /// Tokens of the prompt that the endpoint had cached; more than `tokens` counts as `tokens`.
    pub cached_tokens: f64,
    /// Seconds that the leg would have taken at an endpoint of weight 1.
    pub seconds: f64,
}

impl FittedCost {
    /// The configured figures of a pool, before any observation.
    #[must_use]
    pub fn new(pool: &Pool) -> Self {
        Self {
            configured: pool.cost,
            cost: pool.cost,
            factors: [1.0; 3],
            normal: [0.0; 6],
            target: [0.0; 3],
            configured_bytes_per_token: pool.bytes_per_token,
            text_bytes: 0.0,
            text_tokens: 0.0,
            media: FittedMedia::default(),
            observations: 0,
        }
    }

    /// Coefficients of the prefill cost in seconds, each 0.1 to 10 times the configured one.
    #[must_use]
    pub fn cost(&self) -> Cost {
        self.cost
    }

    /// Bytes of a prompt's JSON per token, 0.25 to 4 times the configured ones.
    #[must_use]
    pub fn bytes_per_token(&self) -> f64 {
        let configured = self.configured_bytes_per_token;
        let ratio = (self.text_bytes + configured * TEXT_RIDGE) / (self.text_tokens + TEXT_RIDGE);
        ratio.clamp(configured / MAX_TEXT_FACTOR, configured * MAX_TEXT_FACTOR)
    }

    /// Factors on the configured tokens of each class of media.
    #[must_use]
    pub fn media_factors(&self) -> [f64; CLASSES] {
        self.media.factors()
    }

    /// Number of prefill legs that were observed.
    #[must_use]
    pub fn observations(&self) -> u64 {
        self.observations
    }

    /// Observes a prefill leg. Numbers that are not finite or not above 0 change nothing.
    pub fn saw_prefill(&mut self, seen: SeenPrefill) {
        let SeenPrefill { tokens: n, cached_tokens, seconds } = seen;
        let p = cached_tokens.clamp(0.0, n.max(0.0));
        let terms = [self.configured.a, self.configured.b * (n - p), self.configured.c * (n * n - p * p)];
        let [fa, fb, fc] = self.factors;
        let [ta, tb, tc] = terms;
        let expected = fa * ta + fb * tb + fc * tc;
        let ratio = seconds / expected;
        if !(expected > 1e-6 && ratio.is_finite() && ratio > 0.0) {
            return;
        }
        let weight = (HUBER / (ratio - 1.0).abs()).min(1.0);
        let [a, b, c] = [ta / expected, tb / expected, tc / expected];
        for (sum, product) in self.normal.iter_mut().zip([a * a, a * b, a * c, b * b, b * c, c * c]) {
            *sum = FORGETTING * *sum + weight * product;
        }
        for (sum, term) in self.target.iter_mut().zip([a, b, c]) {
            *sum = FORGETTING * *sum + weight * term * ratio;
        }
        self.observations = self.observations.saturating_add(1);
        self.solve();
    }

    /// Observes a prompt of text with so many bytes and tokens. Numbers that are not finite or not above 0 change nothing.
    /// Huber's weights limit outliers, and no prompt counts for more than the configured bytes per token.
    pub fn saw_text(&mut self, bytes: f64, tokens: f64) {
        let ratio = bytes / tokens / self.bytes_per_token();
        if !(bytes > 0.0 && tokens > 0.0 && ratio.is_finite() && ratio > 0.0) {
            return;
        }
        // Twice as many bytes and half as many bytes are equally wrong.
        let error = ratio.max(1.0 / ratio) - 1.0;
        let weight = (HUBER / error).min(1.0) * (TEXT_RIDGE / tokens).min(1.0) * (TEXT_BYTES / bytes).min(1.0);
        self.text_bytes = FORGETTING * self.text_bytes + weight * bytes;
        self.text_tokens = FORGETTING * self.text_tokens + weight * tokens;
    }

    /// Observes a prompt with media, which has so many bytes of text and so many tokens of text and media together.
    pub fn saw_media(&mut self, media: &MediaTokens, bytes: f64, tokens: f64) {
        let text_tokens = bytes / self.bytes_per_token();
        self.media.saw(media, text_tokens, tokens);
    }

    /// Cramer's rule on the three normal equations.
    fn solve(&mut self) {
        let [aa, ab, ac, bb, bc, cc] = self.normal;
        let (aa, bb, cc) = (aa + RIDGE, bb + RIDGE, cc + RIDGE);
        let [ta, tb, tc] = self.target.map(|sum| sum + RIDGE);
        let (ca, cb, cx) = (bb * cc - bc * bc, ac * bc - ab * cc, ab * bc - ac * bb);
        let determinant = aa * ca + ab * cb + ac * cx;
        let solved = [
            ca * ta + cb * tb + cx * tc,
            cb * ta + (aa * cc - ac * ac) * tb + (ab * ac - aa * bc) * tc,
            cx * ta + (ab * ac - aa * bc) * tb + (aa * bb - ab * ab) * tc,
        ]
        .map(|cofactors| cofactors / determinant);
        if solved.iter().all(|factor| factor.is_finite()) {
            self.factors = solved.map(|factor| factor.clamp(1.0 / MAX_FACTOR, MAX_FACTOR));
            let [a, b, c] = self.factors;
            let Cost { a: a0, b: b0, c: c0 } = self.configured;
            self.cost = Cost { a: a0 * a, b: b0 * b, c: c0 * c };
        }
    }

    /// The figures as gauges: name without labels, and value in the unit that the name says.
    #[must_use]
    pub fn gauges(&self) -> [(&'static str, u64); 4] {
        let Cost { a, b, c } = self.cost;
        [
            (FITTED_GAUGES[0], (a * 1e6) as u64),
            (FITTED_GAUGES[1], (b * 1e9) as u64),
            (FITTED_GAUGES[2], (c * 1e15) as u64),
            (FITTED_GAUGES[3], (self.bytes_per_token() * 1e3) as u64),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use proptest::prelude::*;

    fn fit() -> FittedCost {
        FittedCost::new(Config::parse(b"").unwrap().pool("default"))
    }

    /// Lengths as in traces: short and long, cached and not.
    fn lengths(i: u64) -> (f64, f64) {
        let n = 200.0 * 1.4_f64.powi((i % 17) as i32);
        (n, n * [0.0, 0.3, 0.9][(i % 3) as usize])
    }

    fn error(fit: &FittedCost, truth: Cost) -> f64 {
        let of = |(n, p)| (fit.cost().seconds(n, p) / truth.seconds(n, p) - 1.0).abs();
        (0..51).map(lengths).map(of).fold(0.0, f64::max)
    }

    fn seen(tokens: f64, cached_tokens: f64, seconds: f64) -> SeenPrefill {
        SeenPrefill { tokens, cached_tokens, seconds }
    }

    #[test]
    fn a_pool_that_is_slower_than_configured_is_learnt() {
        let mut fit = fit();
        let truth = Cost { a: 0.030, b: 60e-6, c: 1.5e-9 };
        assert!(error(&fit, truth) > 0.5);
        for (n, p) in (0..300).map(lengths) {
            fit.saw_prefill(seen(n, p, truth.seconds(n, p)));
        }
        assert!(error(&fit, truth) < 0.05, "{:?}", fit.cost());
    }

    #[test]
    fn a_change_is_followed() {
        let mut fit = fit();
        for factor in [1.0, 4.0, 0.25] {
            let Cost { a, b, c } = fit.configured;
            let truth = Cost { a: a * factor, b: b * factor, c: c * factor };
            for (n, p) in (0..1_500).map(lengths) {
                fit.saw_prefill(seen(n, p, truth.seconds(n, p)));
            }
            assert!(error(&fit, truth) < 0.1, "{factor}: {:?}", fit.cost());
        }
    }

    #[test]
    fn outliers_move_little() {
        let mut fit = fit();
        let truth = fit.configured;
        for i in 0..500 {
            let (n, p) = lengths(i);
            let waited = if i % 10 == 0 { 30.0 } else { 0.0 };
            fit.saw_prefill(seen(n, p, truth.seconds(n, p) + waited));
        }
        assert!(error(&fit, truth) < 0.35, "{} {:?}", error(&fit, truth), fit.cost());
    }

    #[test]
    fn bytes_per_token_follow_what_answers_say_within_bounds() {
        let mut fit = fit();
        for _ in 0..50 {
            fit.saw_text(30_000.0, 10_000.0);
        }
        assert!((fit.bytes_per_token() - 3.0).abs() < 0.1, "{}", fit.bytes_per_token());
        for (bytes, tokens) in [(2_000.0, 1_000.0), (12_000.0, 1_000.0), (90_000.0, 1_000.0)] {
            for _ in 0..3_000 {
                fit.saw_text(bytes, tokens);
            }
            let expected = (bytes / tokens).clamp(1.0, 16.0);
            assert!((fit.bytes_per_token() / expected - 1.0).abs() < 0.1, "{expected} {}", fit.bytes_per_token());
        }
    }

    #[test]
    fn a_few_prompts_that_are_no_text_move_the_bytes_per_token_little() {
        let mut fit = fit();
        for i in 0..400 {
            fit.saw_text(8_000.0, 2_000.0);
            if i % 20 == 0 {
                fit.saw_text(4e6, 1_500.0);
                fit.saw_text(1e9, 1.0);
                fit.saw_text(10.0, 1e6);
            }
        }
        assert!((fit.bytes_per_token() - 4.0).abs() < 0.4, "{}", fit.bytes_per_token());
    }

    proptest! {
        #[test]
        fn no_observation_leads_out_of_the_bounds(seen in prop::collection::vec((any::<f64>(), any::<f64>(), any::<f64>()), 0..50)) {
            let mut fit = fit();
            for (n, p, seconds) in seen {
                // Lengths come from counts, which are neither negative nor endless; seconds from a clock.
                fit.saw_prefill(self::seen(n.abs().min(1e9), p.abs().min(1e9), seconds));
                fit.saw_text(n, p);
            }
            let (cost, configured) = (fit.cost(), fit.configured);
            for (now, before) in [(cost.a, configured.a), (cost.b, configured.b), (cost.c, configured.c)] {
                prop_assert!((0.0999..10.001).contains(&(now / before)));
            }
            prop_assert!((0.9..16.1).contains(&fit.bytes_per_token()));
        }
    }
}
