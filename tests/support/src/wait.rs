//! Waiting for what has to come true.

use std::time::{Duration, Instant};

/// How long anything may take: far above what it takes, below what a person waits for.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(3);

/// Waits until `look` finds something.
///
/// # Panics
/// When [`PATIENCE`] is over, saying `what` was waited for.
pub async fn until<T>(what: impl std::fmt::Display, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(PAUSE).await;
    }
}
