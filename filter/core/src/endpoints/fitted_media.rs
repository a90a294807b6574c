//! Tokens of media in the prompts of one pool, fitted to what engines report.
//!
//! Each class of media has a configured estimate, and a factor on it that follows the `usage` of prefill answers. Models
//! differ by more than a factor of 4 in the tokens of an image.

use crate::body::media::{Media, MediaKind};
use crate::config::MediaCost;

/// Number of classes: images of a known size, other images, sounds, videos, documents.
pub const CLASSES: usize = 5;
/// Most tokens of one image of a known size: engines scale larger images down (Qwen2.5-VL at 12.8 million pixels).
const MAX_IMAGE_TOKENS: f64 = 16_384.0;
/// Factor on the weight of an observation at each further one of its class.
const FORGETTING: f64 = 0.98;
/// Weight of the configured estimates, in tokens.
const RIDGE_TOKENS: f64 = 2_000.0;
/// Largest factor; the smallest is its inverse.
const MAX_FACTOR: f64 = 16.0;
/// Relative error beyond which the pull of an observation grows no further.
const HUBER: f64 = 0.5;
/// Least part of media in a prompt for an observation. In other prompts the error of the text's estimate is too large.
const LEAST_SHARE: f64 = 0.25;

/// Tokens of a prompt's media by class, as configured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MediaTokens([f64; CLASSES]);

impl MediaTokens {
    /// Tokens of these media; all 0 for none.
    #[must_use]
    pub fn of(cost: &MediaCost, media: &[Media]) -> Self {
        let mut sums = [0.0; CLASSES];
        for one in media {
            let (class, tokens) = tokens(cost, one);
            if let Some(sum) = sums.get_mut(class) {
                *sum += tokens;
            }
        }
        Self(sums)
    }

    /// Sum of the tokens of each class times its factor.
    #[must_use]
    pub fn total(&self, factors: &[f64; CLASSES]) -> f64 {
        self.0.iter().zip(factors).map(|(tokens, factor)| tokens * factor).sum()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|tokens| *tokens <= 0.0)
    }
}

/// Class of one of the media, and its tokens as configured.
#[must_use]
pub fn tokens(cost: &MediaCost, media: &Media) -> (usize, f64) {
    match (media.kind, media.pixels) {
        (MediaKind::Image, Some(pixels)) => (0, (pixels as f64 / cost.pixels_per_token).clamp(1.0, MAX_IMAGE_TOKENS)),
        (MediaKind::Image, None) => (1, cost.image_tokens),
        (MediaKind::Audio, _) => (2, cost.audio_tokens),
        (MediaKind::Video, _) => (3, cost.video_tokens),
        (MediaKind::File, _) => (4, cost.file_tokens),
    }
}

/// Factors on the tokens of each class, fitted to the answers so far.
#[derive(Clone, Debug, Default)]
pub struct FittedMedia {
    seen: [f64; CLASSES],
    estimated: [f64; CLASSES],
}

impl FittedMedia {
    /// The factors, each 1/16 to 16.
    #[must_use]
    pub fn factors(&self) -> [f64; CLASSES] {
        let mut factors = [1.0; CLASSES];
        for ((factor, seen), estimated) in factors.iter_mut().zip(self.seen).zip(self.estimated) {
            *factor = ((seen + RIDGE_TOKENS) / (estimated + RIDGE_TOKENS)).clamp(1.0 / MAX_FACTOR, MAX_FACTOR);
        }
        factors
    }

    /// Observes a prompt with media of one class, which has `tokens` of them beside `text_tokens` of text. A prompt with
    /// media of several classes, or with few of them, changes nothing.
    pub fn saw(&mut self, media: &MediaTokens, text_tokens: f64, tokens: f64) {
        let mut classes = media.0.iter().enumerate().filter(|(_, estimate)| **estimate > 0.0);
        let (Some((class, estimate)), None) = (classes.next(), classes.next()) else { return };
        let Some(factor) = self.factors().get(class).copied() else { return };
        let (rest, expected) = (tokens - text_tokens, estimate * factor);
        if !(rest > 0.0 && rest.is_finite() && expected >= LEAST_SHARE * (text_tokens + expected)) {
            return;
        }
        let weight = (HUBER / (rest / expected - 1.0).abs()).min(1.0) * (RIDGE_TOKENS / estimate).min(1.0);
        if let (Some(seen), Some(estimated)) = (self.seen.get_mut(class), self.estimated.get_mut(class)) {
            *seen = FORGETTING * *seen + weight * rest;
            *estimated = FORGETTING * *estimated + weight * estimate;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::json::Span;
    use crate::config::Config;

    fn media(kind: MediaKind, pixels: Option<u64>) -> Media {
        Media { kind, payload: Span::default(), pixels }
    }

    fn cost() -> MediaCost {
        Config::parse(b"{}").unwrap().pool("default").media
    }

    #[test]
    fn an_image_counts_by_its_size_and_other_media_by_their_kind() {
        let of = |media: Media| MediaTokens::of(&cost(), &[media]).total(&[1.0; CLASSES]);
        assert_eq!(of(media(MediaKind::Image, Some(784 * 500))), 500.0);
        assert_eq!(of(media(MediaKind::Image, Some(1))), 1.0);
        assert_eq!(of(media(MediaKind::Image, Some(u64::MAX))), MAX_IMAGE_TOKENS);
        assert_eq!(of(media(MediaKind::Image, None)), cost().image_tokens);
        assert_eq!(of(media(MediaKind::Audio, Some(9))), cost().audio_tokens);
        assert!(MediaTokens::of(&cost(), &[]).is_empty());
    }

    #[test]
    fn factors_follow_what_engines_report_within_bounds_and_by_class() {
        let mut fit = FittedMedia::default();
        let images = MediaTokens::of(&cost(), &[media(MediaKind::Image, Some(784_000)); 2]);
        for _ in 0..200 {
            fit.saw(&images, 100.0, 100.0 + 500.0);
        }
        let factors = fit.factors();
        assert!((factors[0] - 0.25).abs() < 0.05, "{factors:?}");
        assert_eq!(factors[1..], [1.0; 4]);
        for (text, tokens) in
            [(100.0, 1e12), (100.0, f64::NAN), (1e9, 1e9 + 1.0), (100.0, 50.0), (100.0, f64::INFINITY)]
        {
            fit.saw(&images, text, tokens);
        }
        assert!((fit.factors()[0] - 0.25).abs() < 0.1, "{:?}", fit.factors());
        let several = [media(MediaKind::Audio, None), media(MediaKind::Video, None)];
        fit.saw(&MediaTokens::of(&cost(), &several), 10.0, 1e6);
        assert_eq!(fit.factors()[2..], [1.0; 3]);
        let sound = MediaTokens::of(&cost(), &several[..1]);
        for _ in 0..10_000 {
            fit.saw(&sound, 10.0, 1e9);
        }
        assert!(fit.factors().iter().all(|factor| (1.0 / 16.0..=16.0).contains(factor)));
    }
}
